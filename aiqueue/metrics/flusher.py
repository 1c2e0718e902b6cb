"""Adds what a worker has counted to the counters of the server, every few seconds, and each count once.

A flush is one atomic batch. Its first message counts the flushes of this run of the worker, on a subject that nobody
else writes to, and has the Nats-Msg-Id of the flush. A flush whose answer is lost is sent again as it was: the stream
refuses it if it has the first message (docs/decisions/history.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from .. import headers, subjects
from ..connection import Connection, store_together
from ..errors import AccessDenied, AIQueueError, NotFound, ServerError, Unavailable
from ..topology import Topology
from . import metric_subjects
from .mending import BROKEN, mend_counters
from .metric_subjects import OTHER, WORKERS, Level, MetricKey
from .retention import drop_old_minutes
from .sums import Counts

log = logging.getLogger(__name__)

EVERY_S = 5.0  # what a killed worker loses at most
TENANTS_EVERY_S = 60.0  # the same for the counters of tenants
TENANTS_MAX = 1_000  # of one worker and hour; all further ones are counted together
BATCH_MAX = 900  # counters of one flush
SEALED_MAX = 16  # flushes that wait for their turn; meanwhile what is counted waits for a later one
CHECK_AFTER_S = 240.0  # a flush in doubt for so long is looked up: well within the stream's duplicate_window
REFUSED_MAX = 12  # tries of a flush that the server refuses
PAUSE_S = 30.0  # until the next try where there is no stream, or no permission
TRIM_EVERY_S = 3_600.0  # of one worker, a half more or less: old counters of minutes are removed
STOP_S = 3.0  # for the last flush of a worker that ends

Taken = Mapping[tuple[str, str, str], Counts]  # by family, tenant and kind


@dataclass(slots=True)
class _Flush:
    """Counters to be added together. `sent_at`: when the first try was that may have stored them, in monotonic seconds
    and by the wall clock.
    """

    increments: list[tuple[str, int]]
    id: str = field(default_factory=subjects.new_id)
    sent_at: tuple[float, float] | None = None
    refused: int = 0  # how often the server has refused them

    @property
    def is_old(self) -> bool:
        if self.sent_at is None:
            return False
        monotonic, wall = self.sent_at
        return max(time.monotonic() - monotonic, time.time() - wall) > CHECK_AFTER_S


class Flusher:
    """Flushes what one worker counts. `take` returns what was counted since the last call, and counts anew."""

    def __init__(
        self, connection: Connection, topology: Topology, families: Collection[str], take: Callable[[], Taken]
    ) -> None:
        self._connection = connection
        self._stream = topology.metrics_stream.name
        self._families = tuple(families)
        self._take = take
        self._kinds: dict[tuple[str, str], Counts] = {}
        self._tenants: dict[tuple[str, str], Counts] = {}
        self._known: set[tuple[str, str]] = set()  # tenants that have counters in this hour
        self._hour = 0
        self._tenants_at = 0.0
        self._reported: dict[Level, int] = {}  # in which minute and hour this worker has reported
        self._sealed: deque[_Flush] = deque()
        self._run, self._stored = subjects.new_id(), 0
        self._paused_until = 0.0
        self._logged: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to flush, in a task."""
        self._tenants_at = time.monotonic() + TENANTS_EVERY_S * random.random()  # noqa: S311
        self._task = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """Flush what is left, within STOP_S. Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.flush(last=True)

    async def _go_on(self) -> None:
        await asyncio.sleep(EVERY_S * random.random())  # noqa: S311  (workers that start together flush apart)
        trim_at = time.monotonic() + TRIM_EVERY_S * random.random()  # noqa: S311
        while True:
            await self.flush()
            if time.monotonic() >= trim_at and self._connection.connected:
                trim_at = time.monotonic() + TRIM_EVERY_S * (0.5 + random.random())  # noqa: S311
                await self._trim()
            await asyncio.sleep(EVERY_S)

    async def _trim(self) -> None:
        """Have the server drop old counters of minutes. Another worker does it if this one cannot."""
        self._connection.optional += 1
        try:
            await drop_old_minutes(self._connection, self._stream)
        except AIQueueError as error:
            log.debug("old metrics stay: %s", error)
        except Exception:
            log.exception("removing old metrics failed")
        finally:
            self._connection.optional -= 1

    async def flush(self, *, last: bool = False) -> None:
        """Add what was counted to the server's counters. What cannot be added now waits. Never raises.

        Without the stream, or without the permission, what was counted is dropped, and the log says so once.
        """
        try:
            self._collect()
            if time.monotonic() < self._paused_until:
                self._drop()
                return
            if not self._connection.connected:
                return
            if len(self._sealed) < SEALED_MAX:
                self._seal(last=last)
            await self._send_all()
        except (NotFound, AccessDenied) as error:
            self._paused_until = time.monotonic() + PAUSE_S
            self._drop()
            self._log_once(type(error).__name__, error)
        except Unavailable as error:
            log.debug("metrics are flushed later: %s", error)
        except AIQueueError as error:
            self._note_refusal()
            self._log_once(str(error), error)
        except Exception:
            log.exception("flushing metrics failed")

    def _log_once(self, key: str, problem: Exception) -> None:
        if key not in self._logged and len(self._logged) < 10:
            self._logged.add(key)
            log.warning("this worker's jobs are not counted in the history: %s", problem)

    def _note_refusal(self) -> None:
        """Try a refused flush again, as too many batches may be under way, but not for ever."""
        if self._sealed:
            self._sealed[0].refused += 1
            if self._sealed[0].refused >= REFUSED_MAX:
                self._drop_flush()

    def _drop(self) -> None:
        self._kinds, self._tenants = {}, {}
        self._reported.clear()
        while self._sealed:
            self._drop_flush()

    def _drop_flush(self) -> None:
        if self._sealed.popleft().sent_at is not None:  # it may be stored, and so be counted in this run's flushes
            self._run, self._stored = subjects.new_id(), 0

    # -- from what was counted to a flush

    def _collect(self) -> None:
        for (family, tenant, kind), counts in self._take().items():
            if (family, kind) not in self._kinds:
                self._kinds[family, kind] = Counts()
            self._kinds[family, kind].add(counts)
            if (family, tenant) not in self._known:
                if len(self._known) < TENANTS_MAX and subjects.TOKEN.fullmatch(tenant):
                    self._known.add((family, tenant))
                else:
                    tenant = OTHER  # noqa: PLW2901
            if (family, tenant) not in self._tenants:
                self._tenants[family, tenant] = Counts()
            self._tenants[family, tenant].add(counts, buckets=False)

    def _seal(self, *, last: bool) -> None:
        """Make flushes of what was counted. It counts for the time in the middle of the last EVERY_S."""
        now = self._connection.clock.now() - EVERY_S / 2
        minute, hour = int(now // 60 * 60), int(now // 3600 * 3600)
        increments: list[tuple[str, int]] = []
        kinds, self._kinds = self._kinds, {}
        levels: dict[Level, int] = {"minute": minute, "hour": hour, "total": 0}
        for (family, kind), counts in kinds.items():
            found = counts.increments()
            for level, at in levels.items():
                names = (metric_subjects.metric(MetricKey(level, at, family, kind, what)) for what in found)
                increments += zip(names, found.values(), strict=True)
        increments += self._report({"minute": minute, "hour": hour, "tenant": hour})
        if last or time.monotonic() >= self._tenants_at or self._hour != hour:
            increments += self._take_tenants(self._hour or hour)
            self._tenants_at = time.monotonic() + TENANTS_EVERY_S
            if self._hour != hour:
                self._hour, self._known = hour, set()
        for at in range(0, len(increments), BATCH_MAX):
            self._sealed.append(_Flush(increments[at : at + BATCH_MAX]))

    def _report(self, levels: Mapping[Level, int]) -> list[tuple[str, int]]:
        """Count this worker, once in each minute and hour: else nobody would know a time without jobs from a gap."""
        found: list[tuple[str, int]] = []
        for level, at in levels.items():
            if self._reported.get(level) != at:
                self._reported[level] = at
                keys = (MetricKey(level, at, family, WORKERS, "reported") for family in self._families)
                found += ((metric_subjects.metric(key), 1) for key in keys)
        return found

    def _take_tenants(self, hour: int) -> list[tuple[str, int]]:
        tenants, self._tenants = self._tenants, {}
        return [
            (metric_subjects.metric(MetricKey("tenant", hour, family, tenant, what)), value)
            for (family, tenant), counts in tenants.items()
            for what, value in counts.increments(buckets=False).items()
        ]

    # -- to the server

    async def _send_all(self) -> None:
        while self._sealed:
            flush = self._sealed[0]
            if flush.is_old and (missing := await self._is_still_missing()) is not True:
                if missing is None:
                    self._drop_flush()
                    continue
                self._stored += 1
            else:
                await self._send_mended(flush)
                self._stored += 1
            self._sealed.popleft()

    async def _send_mended(self, flush: _Flush) -> None:
        """As `_send`, also where a crash of the server has broken some of the counters."""
        try:
            await self._send(flush)
        except ServerError as error:
            if error.err_code != BROKEN:
                raise
            await self._mend(flush)
            await self._send(flush)

    async def _mend(self, flush: _Flush) -> None:
        """Mend the counters of a flush. The increments that they had not taken become a flush of their own."""
        connection, taken = self._connection, list[tuple[str, int]]()
        connection.optional += 1
        try:
            async for increment in mend_counters(connection, self._stream, [each for each, _ in flush.increments]):
                taken.append(increment)
        finally:
            connection.optional -= 1
            if taken:
                self._sealed.append(_Flush(taken))
                log.info("mended %d counters of the history that a crash of the server had broken", len(taken))

    async def _send(self, flush: _Flush) -> None:
        """Store a flush; it is stored when this returns."""
        began = time.monotonic(), time.time()
        first = metric_subjects.flush(self._run), {headers.INCREMENT: "1", headers.MSG_ID: flush.id}
        counters = [(subject, {headers.INCREMENT: str(value)}) for subject, value in flush.increments]
        connection = self._connection
        connection.optional += 1  # a worker without the permission works all the same
        try:
            await store_together(connection, self._stream, [first, *counters])
        except Unavailable as error:
            if error.maybe_stored:
                flush.sent_at = flush.sent_at or began
            raise
        except BaseException:  # cancelled while it waits for the answer
            flush.sent_at = flush.sent_at or began
            raise
        finally:
            connection.optional -= 1

    async def _is_still_missing(self) -> bool | None:
        """Return whether the flush in doubt is not stored: so says the counter of this run's flushes. None: the worker
        may not read it, and gives this flush up.
        """
        self._connection.optional += 1
        try:
            stored = await self._connection.last(self._stream, metric_subjects.flush(self._run))
        except AccessDenied as error:
            if "lookup" not in self._logged:
                self._logged.add("lookup")
                log.warning("a flush of counts without an answer is given up, as nobody may look it up: %s", error)
            return None
        finally:
            self._connection.optional -= 1
        return stored is None or int(json.loads(stored.data)["val"]) <= self._stored
