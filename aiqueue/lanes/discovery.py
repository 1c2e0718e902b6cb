"""Which lanes there are: told by producers' hints at once, found by a poll within a second, let go when idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from functools import partial
from typing import Any

from .. import subjects
from ..connection import Connection, Received, Subscription, timestamp
from ..errors import AIQueueError, ConfigMismatch, NotFound, Unavailable
from ..subjects import Lane
from ..topology import Family
from .puller import LanePull, Puller

log = logging.getLogger("aiqueue.lanes")

POLL_S = 1.0
IDLE_S = 60.0  # a lane without a job for this long is let go; its consumer goes by inactive_threshold
CREATE_AT_ONCE_MAX = 16
FEW = 128  # with more lanes than this, one in memory that was found with a backlog is let go once that is done
BACKLOG_MIN = 8  # jobs; for fewer it does not pay to make a consumer and to remove it
SETTLED_S = 0.1  # after the last job was delivered, its ack should be there
LEAVE_AT_ONCE_MAX = 64
PAUSED_S = 2.0  # how long a consumer is held still for, to be removed unused
PAUSE_EXACT_S = 2e-6  # how exactly its end comes back
LEAVE_API_S = 1.0  # for each answer meanwhile
REPORTED_MAX = 1_000
REMAKE_AFTER_S = 0.25  # docs/decisions/lane-made-anew.md: at once would meet the server's clean-up
SUBJECTS_PAGE = 100_000  # the server's own page of STREAM.INFO subjects


class Lanes:
    """The lanes of some families, handed to a puller while they live.

    `tenants` None is all that are found. `changed` is called when there may be something to pull.
    """

    def __init__(
        self,
        connection: Connection,
        puller: Puller,
        families: Collection[Family],
        *,
        tenants: Collection[str] | None,
        changed: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._puller = puller
        self._families = {family.name: family for family in families}
        self._tenants = None if tenants is None else frozenset(subjects.token("tenant", each) for each in tenants)
        self._changed = changed
        self._open: dict[Lane, LanePull] = {}
        self._opening: set[Lane] = set()
        self._hinted: set[Lane] = set()  # of those that are being opened
        self._creating = asyncio.Semaphore(CREATE_AT_ONCE_MAX)
        self._settling: set[LanePull] = set()  # drained, to be let go
        self._leaving: dict[Lane, bool] = {}  # and whether jobs were heard of meanwhile
        self._removing = asyncio.Semaphore(LEAVE_AT_ONCE_MAX)
        self._leaves: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hints: list[Subscription] = []
        self._poller: asyncio.Task[None] | None = None
        self._looks: dict[str, asyncio.Task[None]] = {}
        self.polled = 0.0  # when a look was last answered, monotonic seconds
        self._reported: set[str] = set()
        self._stopped = False

    async def start(self) -> None:
        """Listen for hints, look for lanes once, and go on looking. Raises NotFound where a stream is missing."""
        for family in self._families.values():
            self._hints.append(await self._connection.subscribe(f"{subjects.HINTS}.{family.name}.*.*", self._on_hint))
            await self._look(family)
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Find no more. Safe twice and unstarted."""
        self._stopped = True
        if self._leaves:
            await asyncio.wait(self._leaves, timeout=PAUSED_S)  # those that have paused a consumer end it
        left = [task for task in (self._poller, *self._tasks, *self._leaves) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._poller = None
        for subscription in self._hints:
            await subscription.close()
        self._hints.clear()

    def gone(self, pull: LanePull) -> None:
        """The server no longer has the lane's consumer (idle too long, deleted, forgotten by a restart)."""
        self._drop(pull)
        again = partial(self._want, pull.key, jobs=1)  # there may be jobs in it
        asyncio.get_running_loop().call_later(REMAKE_AFTER_S, again)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for family in self._families.values():
                former = self._looks.get(family.name)
                if former is None or former.done():  # one that nobody answers must not keep the others waiting
                    task = self._looks[family.name] = asyncio.create_task(self._look_again(family))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            self._retire_idle()
            self._puller.tend()
            self._changed()

    async def _look_again(self, family: Family) -> None:
        try:
            await self._look(family)
        except AIQueueError as error:
            log.debug("looking for lanes of %s: %s", family.name, error)
        except Exception:
            log.exception("looking for lanes of %s", family.name)  # and again in a second
        self._changed()

    async def _look(self, family: Family) -> None:
        """Find the lanes that hold jobs."""
        if family.lanes == "shared":
            for priority in family.priorities:
                self._want(Lane(family.name, "*", priority), jobs=1)
            self.polled = time.monotonic()
            return
        request = {"subjects_filter": f"ai.{family.name}.>", "offset": 0}
        while True:
            try:
                info = await self._connection.api(f"STREAM.INFO.{family.stream}", request)
            except NotFound:
                raise NotFound(f"there is no stream {family.stream}: has `aiqueue apply` been run?") from None
            self.polled = time.monotonic()
            found = info["state"].get("subjects") or {}
            for subject, jobs in found.items():
                lane = subjects.parse_lane(subject)
                if lane is not None and lane not in self._leaving:  # if it is true, in a second again
                    self._want(lane, jobs=jobs)
            if len(found) < SUBJECTS_PAGE:
                return
            request["offset"] = int(str(request["offset"])) + len(found)

    def _on_hint(self, message: Received) -> None:
        parts = message.subject.split(".")
        lane = Lane(f"{parts[2]}.{parts[3]}", parts[4], parts[5])
        if lane in self._opening:
            self._hinted.add(lane)
        elif lane in self._open:
            self._open[lane].passing = False  # its producer counts on us, and hints again only after a while
        self._want(lane, jobs=1)

    def _want(self, lane: Lane, *, jobs: int) -> None:
        family = self._families.get(lane.family)
        if self._stopped or family is None or lane.priority not in family.priorities:
            return
        if family.lanes == "shared":
            lane = Lane(lane.family, "*", lane.priority)
        elif self._tenants is not None and lane.tenant not in self._tenants:
            return
        pull = self._open.get(lane)
        if pull is not None:
            pull.held = time.monotonic()
            self._puller.told(pull, jobs)
            self._changed()
            return
        if lane in self._leaving:
            self._leaving[lane] = True
            return
        if lane in self._opening:
            return
        self._opening.add(lane)
        task = asyncio.create_task(self._create(family, lane, jobs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _create(self, family: Family, lane: Lane, jobs: int) -> None:
        """Make sure of the lane's consumer (creating one that exists as declared is harmless) and pull on it."""
        try:
            config = family.lane_config(lane.tenant, lane.priority)
            name = config["durable_name"]
            async with self._creating:
                made = await self._made(family, lane, config)
        except ConfigMismatch as error:
            self._report_mismatch(lane, error, served=False)
        except Unavailable as error:
            log.debug("lane %s: %s", lane, error)  # the poll comes again
            if "no such file" in str(error):
                await self._clear(family, name)
        except AIQueueError as error:
            self._report(lane, str(error), served=False)
        else:
            self._serve(family, lane, name, jobs, created=timestamp(made["created"]))
        finally:
            self._opening.discard(lane)
            self._hinted.discard(lane)

    async def _made(self, family: Family, lane: Lane, config: dict[str, Any]) -> dict[str, Any]:
        """The server's word on the lane's consumer. One of another declaration will do: its limits differ, its jobs are
        the same. It is asked for once more: the answer to the first creation of one that was there already tells the
        server's restart as its time (docs/decisions/journal-runs.md).
        """
        name = f"{family.stream}.{config['durable_name']}"
        request = {"stream_name": family.stream, "config": config, "action": "create"}
        drifted = None
        try:
            await self._connection.api(f"CONSUMER.CREATE.{name}.{config['filter_subject']}", request)
        except ConfigMismatch as error:
            if "already exists" not in str(error):
                raise
            drifted = error
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{name}")
        except NotFound as error:
            raise Unavailable(str(error)) from None  # let go by another worker in this moment
        if drifted is not None and not info.get("paused"):  # else it is on its way out
            self._report_mismatch(lane, drifted, served=True)
        return info

    async def _clear(self, family: Family, consumer: str) -> None:
        """Remove a consumer that the server holds in memory but whose files went with its predecessor's: left alone,
        every later attempt to make it fails too.
        """
        with contextlib.suppress(AIQueueError):
            await self._connection.api(f"CONSUMER.DELETE.{family.stream}.{consumer}")

    def _serve(self, family: Family, lane: Lane, consumer: str, jobs: int, *, created: float) -> None:
        pull = LanePull(
            lane, family.stream, consumer, family.ack_wait_s, pending=jobs,
            rank=family.priorities.index(lane.priority), weight=family.weight(lane.tenant), created=created,
            passing=self._passing(family, lane, jobs),
        )  # fmt: skip
        self._open[lane] = pull
        self._puller.add(pull)
        self._changed()

    def _passing(self, family: Family, lane: Lane, jobs: int) -> bool:
        own = family.lanes == "tenant" and family.lane_storage == "memory" and not family.claim
        # of a job that was delivered once, and given up at that, the consumer says nothing
        return own and family.max_deliver != 1 and jobs >= BACKLOG_MIN and lane not in self._hinted

    def _report_mismatch(self, lane: Lane, error: ConfigMismatch, *, served: bool) -> None:
        self._report(lane, f"{error}; `aiqueue plan` shows the difference, `aiqueue apply` mends it", served=served)

    def _report(self, lane: Lane, problem: str, *, served: bool) -> None:
        if len(self._reported) >= REPORTED_MAX:
            self._reported.clear()
        if str(lane) not in self._reported:  # once, not every second
            self._reported.add(str(lane))
            log.error("lane %s %s: %s", lane, "has drifted" if served else "cannot be served", problem)

    def _retire_idle(self) -> None:
        now = time.monotonic()
        for pull in list(self._open.values()):
            if pull.retiring and pull.idle:
                self._drop(pull)
            elif pull.key.tenant != "*" and now - pull.active > IDLE_S and not pull.waiting and not pull.pending:
                pull.retiring = True

    def drained(self, pull: LanePull) -> bool:
        """A passing lane has no more jobs. True: there are many lanes, each of which costs every ack of the stream, and
        it is to go (docs/decisions/passing-lanes.md).
        """
        if pull in self._settling:
            return True
        if self._stopped or len(self._open) <= FEW:
            return False
        self._settle(pull)
        return True

    def _settle(self, pull: LanePull) -> None:
        self._settling.add(pull)
        asyncio.get_running_loop().call_later(SETTLED_S, self._let_go, pull)

    def _let_go(self, pull: LanePull) -> None:
        if not self._stopped:
            task = asyncio.create_task(self._leave(pull))
            self._leaves.add(task)
            task.add_done_callback(self._leaves.discard)

    async def _leave(self, pull: LanePull) -> None:
        """Remove the lane's consumer, or serve the lane on if that is of use to anybody."""
        async with self._removing:
            self._settling.discard(pull)
            if self._stopped or self._open.get(pull.key) is not pull:
                return
            if not (pull.passing and pull.idle and pull.pending <= 0):  # there are jobs again, or a hint has come
                self._puller.keep(pull)
                self._changed()
                return
            self._drop(pull)
            self._leaving[pull.key] = False
            try:
                removed = await self._removed(f"{pull.stream}.{pull.consumer}")
            except NotFound:
                removed = True
            except AIQueueError as error:
                log.debug("letting go of lane %s: %s", pull.key, error)
                removed = False
            finally:
                wanted = self._leaving.pop(pull.key)
        if not removed and not self._stopped:
            pull.pending, pull.passing = 1, False  # as far as is known
            self._open[pull.key] = pull
            self._puller.add(pull)
            self._changed()
        elif wanted:
            self._want(pull.key, jobs=1)

    async def _removed(self, name: str) -> bool:
        """Remove a consumer that nobody waits at and of which nothing is in flight or to be had; one that another
        worker has paused is left to that one. It is paused first: a job that it delivered after this was asked would
        be delivered again. False: it is of use.
        """

        async def ask(word: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
            return await self._connection.api(f"CONSUMER.{word}.{name}", request, timeout=LEAVE_API_S)

        before = await ask("INFO")
        if before.get("paused"):
            return True
        if not _unused(before):
            return False
        until = timestamp(before["ts"]) + PAUSED_S + secrets.randbelow(100_000) / 1e6  # nobody else's
        asked = time.monotonic()
        await ask("PAUSE", {"pause_until": datetime.fromtimestamp(until, UTC).isoformat(timespec="microseconds")})
        after = await ask("INFO")
        told = after["config"].get("pause_until")
        if told is None or abs(timestamp(told) - until) > PAUSE_EXACT_S:
            return True  # it is another one's pause now
        holds = after.get("paused") and time.monotonic() - asked < PAUSED_S / 2 and self._connection.connected
        if holds and _unused(after) and after["created"] == before["created"]:
            await ask("DELETE")
            return True
        await ask("PAUSE", {})
        return False

    def _drop(self, pull: LanePull) -> None:
        if self._open.get(pull.key) is pull:
            del self._open[pull.key]
            self._puller.remove(pull)


def _unused(info: dict[str, Any]) -> bool:
    """Nothing of it is in flight, to be had or at its last delivery, and no pull waits."""
    return not any(info[each] for each in ("num_ack_pending", "num_pending", "num_redelivered", "num_waiting"))
