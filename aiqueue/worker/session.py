"""One run of a worker on a client: its pulls, its slots, its leases, and a graceful way to leave."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ..attempt import Handler
from ..client import Client
from ..documents import Collector
from ..enqueue import Forwarder
from ..lanes import Delivery, LanePull, Lanes, Leases, Puller, StalledLaneWatch, prefetch
from ..processes import Processes, Quarantine, Recipe, refuse_while_loading
from ..requests import Claims
from .context import WorkerResources
from .runner import Runner
from .settlement import Settlement
from .stranded import StrandedSweeper
from .watchdog import Watchdog

log = logging.getLogger("aiqueue.worker")

WAIT_HERE_MAX_S = 1.0  # a delivered job that finds no slot for this long goes to another worker
SMOOTHING = 0.1  # weight of the newest job in the mean handler time

_Place = tuple[str, int]
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


@dataclass(frozen=True)
class Terms:
    """What a worker says of its runs; see `Worker`. `declared`: the worker itself, which children find by name."""

    name: str
    handlers: Mapping[tuple[str, str], Handler]
    families: Collection[str]
    tenants: Collection[str] | None
    slots: int
    process_count: int
    lifespan: Lifespan | None
    drain_timeout_s: float
    declared: object


class Session:
    """One run of a worker on a client: its pulls, its slots, its leases."""

    def __init__(self, terms: Terms, client: Client) -> None:
        self._terms = terms
        self._client = client
        self._slots = terms.slots
        connection = client.connection
        self._families = {name: client.topology.family(name) for name in terms.families}
        self._loop = asyncio.get_running_loop()
        self._pulling = False  # a look at the pulls is on its way
        self._held_min = 0  # with fewer jobs here or asked for, more are asked for at once
        self._puller = Puller(
            connection, deliver=self._on_delivery, gone=self._on_gone, changed=self._changed, drained=self._on_drained
        )  # fmt: skip
        shortest_s = min(family.ack_wait_s for family in self._families.values())
        self._leases = Leases(connection, shortest_s=shortest_s)
        self._lanes = Lanes(
            connection, self._puller, self._families.values(), tenants=terms.tenants, changed=self._changed
        )
        self._forwarder = Forwarder(connection, client.topology)
        self._silence = StalledLaneWatch(connection, self._puller, free=self._free, polled=lambda: self._lanes.polled)
        self._collector = Collector(connection, client.topology)
        self._running: dict[_Place, Delivery] = {}
        self._void: set[Delivery] = set()  # those whose stream was made anew
        self._waiting: deque[Delivery] = deque()  # delivered, no slot yet
        self._heard: float | None = None  # when a job last came in, monotonic seconds
        self._handler_s: float | None = None
        self._freed = 0.0  # when a slot last came free, monotonic seconds
        self._returning: set[asyncio.Task[None]] = set()
        self._draining = False
        self._stack = AsyncExitStack()
        self._runner: Runner | None = None
        self._sweeper: StrandedSweeper | None = None
        self.done = 0  # deliveries carried to an end
        self.clean = True  # no running job had to be cancelled at the end of a drain

    @property
    def running(self) -> int:
        return len(self._running) + len(self._void)

    def vitals(self) -> dict[str, Any]:
        """How it is, as plain data. `state`: ok, draining, disconnected, or deaf (lanes hold jobs, slots are free, and
        nothing comes), for `deaf_s` seconds. Times are seconds since the epoch.
        """
        connected, since = self._client.connection.connected, self._silence.since
        now = time.monotonic()
        return {
            "state": "draining" if self._draining else "disconnected" if not connected else "deaf" if since else "ok",
            "time": time.time(),
            "pid": os.getpid(),
            "worker": self._terms.name,
            "slots": self._slots,
            "running": self.running,
            "waiting": len(self._waiting),
            "done": self.done,
            "last_delivery": self._heard and time.time() - (now - self._heard),
            "connected": connected,
            "deaf_s": now - since if since else 0.0,
            "lanes": len(list(self._puller.lanes)),
        }

    async def start(self) -> None:
        client, terms = self._client, self._terms
        refuse_while_loading()
        try:
            recipe = Recipe(
                self._families,
                {key: each for key, each in terms.handlers.items() if key[0] in self._families},
                terms.lifespan,
                terms.declared,
            )
            processes = await self._stack.enter_async_context(Processes(recipe, terms.process_count))
            quarantine = await self._stack.enter_async_context(Quarantine(client.connection, recipe, slots=terms.slots))
            state = await self._stack.enter_async_context(terms.lifespan()) if terms.lifespan else None
            settlement = Settlement(
                client.connection, client.dead, client.parking, families=self._families, worker=terms.name,
                quarantine=quarantine,
            )  # fmt: skip
            self._runner = Runner(
                Claims(client.journal, client.parking),
                WorkerResources(client.journal, client.documents, self._families),
                settlement,
                handlers=terms.handlers,
                worker=terms.name,
                state=state,
                processes=processes,
                quarantine=quarantine,
                watchdog=self._stack.enter_context(Watchdog()),
                ended=self._ended,
            )
            await self._stack.enter_async_context(self._runner.stops)
            self._collector.start()
            await self._puller.open()
            self._leases.start()
            await self._lanes.start()
            await self._forwarder.start()
            self._silence.start()
            self._sweeper = StrandedSweeper(
                client.connection,
                client.topology,
                client.journal,
                client.dead,
                worker=terms.name,
                look=quarantine.look,
            )
            self._sweeper.start()
        except BaseException:
            await self._stop()
            raise
        log.info("worker %s: %d slots, families %s", terms.name, self._slots, ", ".join(self._families))

    async def drain(self) -> None:
        """Stop pulling, finish what runs within the drain timeout, hand the rest to other workers. Safe twice."""
        if self._draining:
            return
        self._draining = True
        self._puller.stop()
        await self._silence.stop()
        await self._lanes.stop()
        while self._waiting:
            await self._return(self._take())
        end = time.monotonic() + self._terms.drain_timeout_s
        tasks = [each.task for each in (*self._running.values(), *self._void) if each.task is not None]
        if tasks:
            log.info("draining: %d running jobs, up to %g s", len(tasks), self._terms.drain_timeout_s)
            _, late = await asyncio.wait(tasks, timeout=self._terms.drain_timeout_s)
            self.clean = not late
            for task in late:
                task.cancel()
            if late:
                log.warning("%d jobs did not end in time and go to another worker", len(late))
                await asyncio.wait(late, timeout=2)
        if self._runner is not None:
            await self._runner.drain(max(0.0, end - time.monotonic()))
        await self._stop()

    async def _stop(self) -> None:
        self._draining = True
        await self._silence.stop()
        if self._sweeper is not None:
            await self._sweeper.stop()
        await self._lanes.stop()
        await self._forwarder.stop()
        await self._puller.close()
        await asyncio.gather(*self._returning, return_exceptions=True)
        await self._leases.stop()
        await self._collector.stop()
        if self._runner is not None:
            self._runner.close()
        await self._stack.aclose()

    # -- the engine

    def _free(self) -> int:
        return self._slots - self.running - len(self._waiting)

    def _changed(self) -> None:
        """Have a look at the pulls when all else of this turn of the event loop is done."""
        if not self._pulling:
            self._pulling = True
            self._loop.call_soon(self._pull)

    def _pull(self) -> None:
        """Keep the pulls at what the free slots can take."""
        self._pulling = False
        if self._draining:
            return
        try:
            extra = prefetch(self._slots, self._pace_s())
            self._puller.refill(self._free(), extra)
            held = len(self._waiting) + self._puller.granted
            self._held_min = extra // 2 if held >= extra // 2 else 0  # else there is no more to be had now
            self._return_overdue()
        except Exception:
            log.exception("pulling")  # the next change, a second away at most, tries again

    def _on_delivery(self, delivery: Delivery) -> None:
        self._heard = delivery.arrived
        if delivery.place in self._running and self._adopt(delivery):
            return
        if self._draining:
            self._spawn_return(delivery)
            return
        self._leases.hold(delivery.reply, delivery.lane.ack_wait_s)
        if self._waiting or self.running >= self._slots:
            delivery.lane.waiting += 1
            self._waiting.append(delivery)
        else:
            self._start(delivery)
        if not self._pulling:
            self._changed()

    def _adopt(self, delivery: Delivery) -> bool:
        """The redelivery of a job that still runs here (its lease ran out meanwhile): it is the one lease now.

        False: it is another job. A stream made anew (deleted, or in memory and restarted) counts from 1 again: the job
        of the former one must say nothing more, for its words would be taken for those of this new job.
        """
        ours = self._running[delivery.place]
        self._leases.let_go(ours.reply)
        if ours.stored_at != delivery.stored_at:
            ours.void = True
            del self._running[delivery.place]
            self._void.add(ours)
            return False
        ours.renew(delivery.message)
        self._leases.hold(ours.reply, delivery.lane.ack_wait_s)
        return True

    def _start_waiting(self) -> None:
        """Give free slots to the jobs that wait here, in the order that they came: whose turn it is was decided when
        they were asked for, and what waits here is soon done (`prefetch`).
        """
        while self._waiting and not self._draining and self.running < self._slots:
            self._start(self._take())

    def _take(self) -> Delivery:
        delivery = self._waiting.popleft()
        delivery.lane.waiting -= 1
        return delivery

    def _start(self, delivery: Delivery) -> None:
        if delivery.place in self._running and self._adopt(delivery):
            return
        assert self._runner is not None
        self._running[delivery.place] = delivery
        # not asyncio.create_task: asking for the running loop is a system call (getpid) in Python 3.11
        delivery.task = self._loop.create_task(self._runner.run(delivery))

    def _ended(self, delivery: Delivery, begun: float) -> None:
        self._freed = time.monotonic()
        took = self._freed - begun
        mean = self._handler_s
        self._handler_s = took if mean is None else mean + SMOOTHING * (took - mean)
        self._leases.let_go(delivery.reply)
        if delivery.void:
            self._void.discard(delivery)
        else:
            del self._running[delivery.place]
        self.done += 1
        if self._waiting:
            self._start_waiting()
        if len(self._waiting) + self._puller.granted < self._held_min:
            self._pull()  # at once: behind all jobs that are to begin now, the slots would run dry meanwhile
        elif not self._pulling:
            self._changed()

    def _on_gone(self, lane: LanePull) -> None:
        """The lane's consumer is no more, and with it these leases; the new one delivers the jobs again."""
        for delivery in [each for each in self._waiting if each.lane is lane]:
            self._waiting.remove(delivery)
            self._leases.let_go(delivery.reply)
        lane.waiting = 0
        self._lanes.gone(lane)

    def _on_drained(self, lane: LanePull) -> bool:
        return self._lanes.drained(lane)

    def _return_overdue(self) -> None:
        """Hand back jobs that wait here for a slot while another worker may be idle."""
        pace_s = self._pace_s()
        if pace_s is not None and pace_s < WAIT_HERE_MAX_S / 4:
            return
        oldest = time.monotonic() - WAIT_HERE_MAX_S
        while self._waiting and self._waiting[0].arrived < oldest:
            self._spawn_return(self._take())

    def _pace_s(self) -> float | None:
        """The mean handler time, or how long no slot has come free where that is longer: a worker whose slots are all
        in long jobs learns nothing from the short ones before them.
        """
        if self._handler_s is None or self.running < self._slots:
            return self._handler_s
        return max(self._handler_s, time.monotonic() - self._freed)

    async def _return(self, delivery: Delivery) -> None:
        assert self._runner is not None
        self._leases.let_go(delivery.reply)
        await self._runner.release(delivery)

    def _spawn_return(self, delivery: Delivery) -> None:
        task = asyncio.create_task(self._return(delivery))
        self._returning.add(task)
        task.add_done_callback(self._returned)

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._returning.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("handing a job back", exc_info=error)
