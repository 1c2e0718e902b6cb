"""One run of a worker on a client: its pulls, its slots, its leases, and its graceful end."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from .. import subjects
from ..attempt import Handlers
from ..client import Client
from ..documents import Collector
from ..enqueue import Parents
from ..lanes import Delivery, LaneDiscovery, LanePull, Puller, StalledLaneWatch, prefetch
from ..processes import Processes, Quarantine, Recipe, refuse_while_loading, reset_signals_at_fork
from ..requests import Claims
from ..schedules import Declared
from .announcer import Announcer
from .awaited_results import AwaitedResults
from .context import WorkerResources
from .counting import Counting
from .gate import Gate
from .gathering import ChildrenResources
from .holding import Holding
from .late_leases import LateLeases
from .lifespan import Lifespan
from .limiting import Limiting, make_key_gate, start_keys
from .pausing import Pausing
from .rehearsal import current_rehearsal
from .returns import Returns
from .rights import Rights, require_streams
from .runner import Runner
from .settlement import Settlement
from .stranded import StrandedSweeper
from .timed import TimedWork
from .traced_runner import runner_class
from .unknown_kinds import UnknownKinds
from .waiting import WaitingDeliveries
from .watchdog import Watchdog

log = logging.getLogger(__name__)

WAIT_HERE_MAX_S = 1.0  # a delivered job that finds no slot for this long goes to another worker
SMOOTHING = 0.1  # weight of the newest job in the mean handler time
LATE_END_S = 2.0  # what jobs get to end that a drain has cancelled
NEEDED = tuple(f"{each}." for each in (subjects.HINTS, subjects.BACK, subjects.CANCEL))  # subscriptions that it needs


@dataclass(frozen=True)
class WorkerOptions:
    """What a run of a worker needs to know of the worker; see `Worker`. `declared`: the worker itself."""

    name: str
    handlers: Handlers
    families: Collection[str]
    tenants: Collection[str] | None
    slots: int
    process_count: int
    lifespan: Lifespan | None
    drain_timeout_s: float
    declared: object
    suspect_after: int | None
    schedules: Declared
    child_lifespan: Lifespan | None = None


class Session:
    """One run of a worker on a client.

    A delivery is in one of two places: `_waiting` (no slot yet), or `_running` (by its location in the stream).
    `done` counts the deliveries that were run. `clean`: the drain had to cancel no running job.
    """

    def __init__(self, options: WorkerOptions, client: Client) -> None:
        self._options = options
        self._client = client
        self._slots = options.slots
        connection = client.connection
        self._families = {name: client.topology.family(name) for name in options.families}
        self._loop = asyncio.get_running_loop()
        self._base_context = contextvars.copy_context()  # every job gets a copy: a job starts inside another one's task
        self._pull_scheduled = False  # `_pull` runs in this turn of the event loop, or in the next one
        self._held_min = 0  # with fewer jobs here or requested, more are requested at once
        self.puller = Puller(
            connection, deliver=self._on_delivery, gone=self._on_consumer_gone, changed=self._schedule_pull,
            drained=lambda lane: self.discovery.on_drained(lane),  # noqa: PLW0108  (it is made below)
        )  # fmt: skip
        self.leases = LateLeases(connection, shortest_s=min(each.ack_wait_s for each in self._families.values()))
        self._keys = make_key_gate(
            client, self._families.values(), self._schedule_pull, lambda: self._pausing.look_again()  # noqa: PLW0108
        )  # fmt: skip
        self.discovery = LaneDiscovery(
            connection, self.puller, self._families.values(), tenants=options.tenants, changed=self._schedule_pull,
            keys=self._keys,
        )  # fmt: skip
        self.timed = TimedWork(client, options.schedules)
        polled = lambda: self.discovery.poll_answered_at  # noqa: E731
        self.stalled_watch = StalledLaneWatch(connection, self.puller, free=self._count_free_slots, polled=polled)
        self._collector = Collector(connection, client.topology)
        self._running: dict[tuple[object, ...], Delivery] = {}
        self._last_ended: asyncio.Future[None] | None = None  # a drain waits for it
        self._last_delivery_at: float | None = None  # monotonic seconds
        self._mean_handler_s: float | None = None
        self._slot_freed_at = 0.0  # when a slot last came free, monotonic seconds
        self._awaited_results, self._draining, self._stack = AwaitedResults(options.slots), False, AsyncExitStack()
        self._returns = Returns(self.leases)
        self._waiting = WaitingDeliveries(self._returns, self.leases)
        self._holding = Holding(
            connection, self._families, options.handlers, options.name, self._running, self._waiting
        )
        self.rights = Rights(
            connection, self._families.values(), client.topology.journal_stream.name, self._holding.writes_journal
        )
        kinds = {name: [kind for family, kind in options.handlers if family == name] for name in options.families}
        limited = [name for name, each in self._families.items() if each.limit_key]
        self._limits = client.limit_rules.describe_declared(limited) if limited else {}
        unknown_kinds = UnknownKinds(connection, client.parking)
        self._pausing = Pausing(
            connection, client.topology, self._families.values(), self.discovery, unknown_kinds,
            self._waiting.return_paused,
        )  # fmt: skip
        self._announcer = Announcer(
            connection, client.topology, options.name, kinds, self._describe, self._holding.describe_jobs,
            self._pausing.bring_forward,
        )  # fmt: skip
        self.runner: Runner | None = None
        self._sweeper: StrandedSweeper | None = None
        self.done, self.clean = 0, True

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    def vitals(self) -> dict[str, Any]:
        """Return the state of this run as plain data. Times are seconds since the epoch.

        `state`: ok, draining, disconnected (no server answers), or stalled for `stalled_s` seconds: lanes hold jobs,
        slots are free, and nothing arrives.
        """
        connected, since = self._client.connection.connected, self.stalled_watch.stalled_since
        now = time.monotonic()
        state = "stalled" if since else "ok"
        if self._draining or not connected or self.stalled_watch.waits_for_server:
            state = "draining" if self._draining else "disconnected"
        return {
            "state": state,
            "time": time.time(),
            "pid": os.getpid(),
            "worker": self._options.name,
            "slots": self._slots,
            "running": self.running,
            "waiting": len(self._waiting),
            "done": self.done,
            "last_delivery": self._last_delivery_at and time.time() - (now - self._last_delivery_at),
            "connected": connected,
            "stalled_s": now - since if since and state == "stalled" else 0.0,
            "lanes": sum(not lane.in_line for lane in self.puller.lanes),
        }

    def _describe(self) -> dict[str, Any]:
        """Return the part of the worker's record that changes, and what it serves."""
        self._awaited_results.look(self._running.values())
        tenants = None if self._options.tenants is None else list(self._options.tenants)
        heeds_limits = self._keys is None or self._keys.started
        heeds = {"heeds_pauses": self._pausing.watch.sees, "key_lanes": heeds_limits, "in_line": self.discovery.in_line}
        heeds |= {"limits": self._limits}
        return {**self.vitals(), "tenants": tenants, "answers": self._holding.answers, **heeds}

    async def start(self) -> None:
        """Start children, enter the lifespan, then start to pull jobs. On an error, stop what was started and raise."""
        client, options = self._client, self._options
        refuse_while_loading()
        reset_signals_at_fork()
        self.rights.start()
        try:
            await require_streams(client.connection, self._families.values())
            recipe = Recipe(
                self._families,
                {key: each for key, each in options.handlers.items() if key[0] in self._families},
                options.child_lifespan or options.lifespan,
                options.declared,
                client.make_headers,
            )
            pool = Processes(recipe, options.process_count, late=current_rehearsal() is not None)
            processes = await self._stack.enter_async_context(pool)
            quarantine = await self._stack.enter_async_context(
                Quarantine(client.connection, recipe, slots=options.slots, suspect_after=options.suspect_after)
            )
            state = await self._stack.enter_async_context(options.lifespan()) if options.lifespan else None
            parents = Parents(client.connection, client.topology)
            counting = await self._stack.enter_async_context(Counting(client, options.families, options.handlers))
            settlement = Settlement(
                client.connection, client.dead, client.parking, parents, worker=options.name, quarantine=quarantine,
                notes=counting.notes,
            )  # fmt: skip
            checkpoints = client.topology.checkpoints_stream.name
            resources = WorkerResources(
                client.journal, client.documents, self._families, checkpoints, ChildrenResources(client)
            )
            self.runner = runner_class(client)(
                Claims(client.journal, client.parking),
                resources,
                settlement,
                handlers=options.handlers,
                worker=options.name,
                state=state,
                processes=processes,
                quarantine=quarantine,
                watchdog=self._stack.enter_context(Watchdog(self._announcer.blocked.note)),
                ended=self._on_run_ended,
            )
            await self._stack.enter_async_context(self.runner.cancellations)
            self._returns.runner = self._pausing.runner = self.runner
            await self._holding.start(self.runner.cancellations, settlement.results.overflow.holds)
            self._collector.start()
            self.runner.limiting = await self._start_keys(self.runner.gate)
            await self._pausing.start()
            await self.puller.open()
            self.leases.start()
            await self.discovery.start()
            await client.connection.confirm_subscriptions(NEEDED)
            await self.timed.start(late=current_rehearsal() is not None)
            self.stalled_watch.start()
            self._sweeper = StrandedSweeper(
                client.connection, client.topology, client.journal, client.dead, parents, worker=options.name,
                identify=quarantine.identify, notes=counting.notes,
            )  # fmt: skip
            self._sweeper.start()
            self._announcer.start()
        except BaseException:
            await self._end_jobs_and_stop()  # jobs of the first families may run by now
            raise
        log.info("worker %s: %d slots, families %s", options.name, self._slots, ", ".join(self._families))

    async def drain(self) -> None:
        """Stop pulling, let running jobs end within the drain timeout, return the rest to the queue. Safe twice.

        A drain that is cancelled waits no longer, and stops everything all the same.
        """
        if self._draining:
            return
        self._draining = True
        self.puller.stop()
        try:
            if self.running:
                self._announcer.drain()
            else:
                await self._announcer.stop()
            await self.stalled_watch.stop()
            await self.discovery.stop()
            self._waiting.return_all()
            end = time.monotonic() + self._options.drain_timeout_s
            if self.running:
                log.info("draining: %d running jobs, up to %g s", self.running, self._options.drain_timeout_s)
                await self._wait_for_runs(self._options.drain_timeout_s)
            if self.runner is not None:
                await self.runner.drain(max(0.0, end - time.monotonic()))
        finally:
            await self._end_jobs_and_stop()

    async def _end_jobs_and_stop(self) -> None:
        """Return waiting jobs to the queue, interrupt running ones, then stop what `start` has started."""
        self._draining = True
        self.rights.stop()
        try:
            self._waiting.return_all()
            if self.running and self.runner is not None:
                self.clean = False
                log.warning("%d jobs did not end in time and return to the queue", self.running)
                for delivery in list(self._running.values()):
                    self.runner.interrupt(delivery)
                await self._wait_for_runs(LATE_END_S)
        finally:
            await self._stop()

    async def _wait_for_runs(self, timeout_s: float) -> None:
        """Wait until no job runs, and no result is under way, at most `timeout_s` seconds."""
        if self.running:
            self._last_ended = self._loop.create_future()
            await asyncio.wait([self._last_ended], timeout=timeout_s)

    async def _stop(self) -> None:
        """Stop everything that `start` may have started, in this order. Safe after a start that failed."""
        await self._announcer.stop()
        await self._holding.stop()
        await self.stalled_watch.stop()
        if self._sweeper is not None:
            await self._sweeper.stop()
        await self._pausing.stop()
        await self.discovery.stop()
        await self.timed.stop()
        await self.puller.close()
        await self._returns.wait()
        if self._keys is not None:
            await self._keys.stop()
        await self.leases.stop()
        await self._collector.stop()
        if self.runner is not None:
            self.runner.close()
        await self._stack.aclose()

    # -- pulls

    def _count_free_slots(self) -> int:
        return self._slots - self.running - len(self._waiting)

    def _schedule_pull(self) -> None:
        """Have `_pull` run after everything else in this turn of the event loop."""
        if not self._pull_scheduled:
            self._pull_scheduled = True
            self._loop.call_soon(self._pull)

    def _pull(self) -> None:
        """Request as many jobs as the free slots can take, and return those that wait here for too long."""
        self._pull_scheduled = False
        if self._draining:
            return
        try:
            extra = prefetch(self._slots, self._estimate_handler_s())
            self.puller.refill(self._count_free_slots(), extra)
            held = len(self._waiting) + self.puller.granted
            self._held_min = extra // 2 if held >= extra // 2 else 0  # 0: the lanes have no more jobs now
            self._return_overdue()
        except Exception:
            log.exception("pulling")  # the next change, a second away at most, tries again

    # -- deliveries

    def _on_delivery(self, delivery: Delivery) -> None:
        """Start a delivered job, or keep it until a slot is free."""
        self._last_delivery_at = delivery.arrived_at
        if delivery.location in self._running and self._adopt_redelivery(delivery):
            return
        lane = delivery.lane
        if is_over := lane.turn is not None and lane.turn.is_full:  # a standing pull has brought it
            self.puller.note_return(lane)
        if self._draining or lane.paused or is_over:
            self._returns.spawn(delivery)
            return
        if lane.pool is not None:
            delivery.credit = lane.pool.spend()
        self.leases.hold_lease(delivery.reply, lane.ack_wait_s, delivery.arrived_at)
        if self._waiting or len(self._running) >= self._slots:
            self._waiting.add(delivery)
        else:
            self._start_run(delivery)
        if not self._pull_scheduled:
            self._schedule_pull()

    def _adopt_redelivery(self, delivery: Delivery) -> bool:
        """Give the run at this location the lease of a redelivery. False: the delivery is of another job.

        1. The job still runs here, and its lease ran out meanwhile: the run goes on with the new lease.
        2. The stream was recreated (deleted, or in memory and restarted) and counts from 1 again: the run is obsolete.
           It must send no reply, because the server would take the reply for the new job at this location.
        """
        ours = self._running[delivery.location]
        self.leases.drop_lease(ours.reply)
        if ours.stored_at != delivery.stored_at:
            del self._running[delivery.location]
            ours.make_obsolete()
            self._running[ours.location] = ours
            return False
        ours.renew(delivery.message)
        self.leases.hold_lease(ours.reply, delivery.lane.ack_wait_s, delivery.arrived_at)
        return True

    def _start_waiting(self) -> None:
        """Give free slots to the waiting jobs, in the order in which they arrived.

        Fairness was decided when they were requested, and few wait here at a time (`prefetch`).
        """
        while self._waiting and not self._draining and len(self._running) < self._slots:
            delivery = self._waiting.take()
            if delivery.location in self._running and self._adopt_redelivery(delivery):
                delivery.give_back_credit()
            else:
                self._start_run(delivery)

    def _start_run(self, delivery: Delivery) -> None:
        """Start a task that runs the delivery, whose job does not run here."""
        assert self.runner is not None
        self._running[delivery.location] = delivery
        delivery.lane.begin_run()
        # not asyncio.create_task: asking for the running loop is a system call (getpid) in Python 3.11
        delivery.task = self._loop.create_task(self.runner.run_delivery(delivery), context=self._base_context.copy())

    def _on_run_ended(self, delivery: Delivery, started_at: float) -> None:
        """Free the slot of a run that started at `started_at`, monotonic seconds, and start the next job."""
        self._slot_freed_at = time.monotonic()
        took_s = self._slot_freed_at - started_at
        mean_s = self._mean_handler_s
        self._mean_handler_s = took_s if mean_s is None else mean_s + SMOOTHING * (took_s - mean_s)
        self.leases.drop_lease(delivery.reply)
        del self._running[delivery.location]
        delivery.lane.end_run()
        if delivery.lane.is_full:
            self.puller.note_room(delivery.lane)
        delivery.task = None  # its context holds the job, and the job the delivery
        self.done += 1
        if self._last_ended is not None and not self._running and not self._last_ended.done():
            self._last_ended.set_result(None)
        if self._waiting:
            self._start_waiting()
        if len(self._waiting) + self.puller.granted < self._held_min:
            self._pull()  # at once: scheduled behind all jobs that start now, it would leave slots empty meanwhile
        elif not self._pull_scheduled:
            self._schedule_pull()

    def _on_consumer_gone(self, lane: LanePull) -> None:
        self._waiting.drop_lane(lane)
        self.discovery.on_consumer_gone(lane)

    # -- limited keys

    async def _start_keys(self, gate: Gate) -> Limiting | None:
        """Let what heeds the limits start, if a family has any. Raises NotFound, Unavailable, AccessDenied."""
        keys = self._keys
        if keys is None or not await start_keys(keys, self._families.values()):
            return None
        self._pausing.also_paused = keys.is_paused
        return Limiting(keys.limiter, gate, self._options.name, self._slots, keys.find_token, self.puller.note_return)

    # -- back to the queue

    def _return_overdue(self) -> None:
        """Return jobs that have waited here for WAIT_HERE_MAX_S: another worker may be idle.

        Nothing is returned while handlers take less than a quarter of that.
        """
        handler_s = self._estimate_handler_s()
        if handler_s is not None and handler_s < WAIT_HERE_MAX_S / 4:
            return
        self._waiting.return_before(time.monotonic() - WAIT_HERE_MAX_S)

    def _estimate_handler_s(self) -> float | None:
        """Return the mean handler time, or the time since a slot last came free if that is longer. None: unknown.

        The second counts while all slots are taken: they may be in long jobs, after many short ones.
        """
        if self._mean_handler_s is None or self.running < self._slots:
            return self._mean_handler_s
        return max(self._mean_handler_s, time.monotonic() - self._slot_freed_at)
