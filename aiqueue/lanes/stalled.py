"""The watch for stalled lanes: lanes that hold jobs while the worker has free slots, and nothing arrives.

A pull can get lost without any sign: its server was stopped and came back with an older state, a subscription was
dropped on the way, a client lost its state. The puller's own counters prove nothing then, so the server is asked. The
poll (`discovery`) shows which lanes hold jobs; the lane's consumer shows whether it could deliver any.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ..connection import Connection
from ..errors import AIQueueError, NotFound
from .delivery import LanePull
from .puller import Puller

log = logging.getLogger(__name__)

CHECK_EVERY_S = 0.5
QUIET_S = 2.0  # without a delivery while slots are free: after it, the lane's consumer is checked twice
REPORT_VALID_S = 2.5  # how long a report that a lane holds jobs counts
CLEARED_S = 5.0  # a lane that could deliver nothing is not checked again for so long
CHECKED_MAX = 8  # lanes that are checked at a time
UNANSWERED_S = 20.0  # without an answer to the poll while connected: the connection is replaced
STEP_MAX_S = 6.0  # of the time between two checks that counts: of more, this process was suspended or blocked
RECONNECT_FIRST_S, RECONNECT_MAX_S = 30.0, 600.0  # between new connections
RENEWALS_MAX = 3  # where the server does not answer: then this process is perhaps at fault, and is stalled
RECOVERED_S = 60.0  # without a stalled lane: the next repair starts with a new inbox again


class StalledLaneWatch:
    """Finds stalled lanes once a second, and repairs: at first by new pulls on a new inbox, then by a new connection.

    `free` returns the number of free slots. `polled` returns when the poll was last answered, monotonic seconds.
    `stalled_since` is when a lane was first found stalled, monotonic seconds; None while no lane is. Time in which the
    worker could not hear the server does not count: `unanswered` says whether the poll is unanswered on a connection
    that stands. Such a worker is not stalled.
    """

    def __init__(
        self, connection: Connection, puller: Puller, *, free: Callable[[], int], polled: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._puller = puller
        self._free = free
        self._polled = polled
        self._task: asyncio.Task[None] | None = None
        self._free_since: float | None = None
        self._suspects: set[LanePull] = set()  # looked stalled at the last check
        self._cleared: dict[LanePull, float] = {}  # when the lane was checked and not stalled, monotonic seconds
        self._repairs = 0  # since all was well for RECOVERED_S
        self._repaired_at = 0.0
        self._caps_read = 0
        self._checked_at = 0.0  # monotonic seconds
        self._heard_at = 0.0  # when the poll was last answered, as of the last check
        self._unheard_s = 0.0  # how long this process has run since then
        self.stalled_since: float | None = None
        self.unanswered = False

    def start(self) -> None:
        """Start the watch."""
        self._checked_at = time.monotonic()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop the watch. Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        while True:
            self._checked_at = time.monotonic()  # a check may take long itself
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                await self._check()
                await self._read_cap()
            except AIQueueError as error:
                log.debug("checking for stalled lanes: %s", error)
            except Exception:
                log.exception("checking for stalled lanes failed; the next check is in %g s", CHECK_EVERY_S)

    async def _check(self) -> None:
        """Check quiet lanes, and repair if one looks stalled in two checks in a row, or if the poll gets no answers."""
        now = time.monotonic()
        if not self._can_hear(now):
            self._free_since = None
            self._suspects.clear()
            if self.unanswered:
                if not self.waits_for_server:
                    self.stalled_since = self.stalled_since or now
                self._repair(f"the server has not answered the poll for {self._unheard_s:.0f} s", reconnect=True)
            return
        if self._free() <= 0:
            self._free_since = None
        elif self._free_since is None:
            self._free_since = now
        found: dict[LanePull, str] = {}
        if self._free_since is not None and now - self._free_since >= QUIET_S:
            for lane in self._quiet_lanes(now):
                if symptom := await self._find_symptom(lane):
                    found[lane] = symptom
                else:
                    self._cleared[lane] = now
        # after one check only, a pull may just be on its way; after a delivery, the lane is not stalled
        stalled = [lane for lane in found if lane in self._suspects and now - lane.last_delivery_at >= QUIET_S]
        self._suspects = set(found)
        if stalled:
            lane, more = stalled[0], f" (and {len(stalled) - 1} more)" if len(stalled) > 1 else ""
            quiet_s = now - lane.last_delivery_at
            self.stalled_since = self.stalled_since or now
            self._repair(
                f"lane {lane.key}{more} is stalled: it {found[lane]}, and delivers nothing for {quiet_s:.0f} s"
            )
        elif self.stalled_since is not None and not found and now - self._repaired_at > QUIET_S:
            self.stalled_since = None
        if self._repairs and now - self._repaired_at > RECOVERED_S and self.stalled_since is None:
            self._repairs = 0

    def _can_hear(self, now: float) -> bool:
        """Whether the server is heard, and this process was not suspended since the last check."""
        elapsed, heard_at, connected = now - self._checked_at, self._polled(), self._connection.connected
        self._checked_at = now
        if connected and heard_at == self._heard_at:
            self._unheard_s += min(elapsed, STEP_MAX_S)
        else:
            self._unheard_s, self._heard_at = 0.0, heard_at
        self.unanswered = connected and self._unheard_s > UNANSWERED_S
        if connected and not self.unanswered and elapsed <= STEP_MAX_S:
            return True
        if self.stalled_since is not None and not (self.unanswered and not self.waits_for_server):
            self.stalled_since += elapsed
        return False

    @property
    def waits_for_server(self) -> bool:
        """Whether the server does not answer, and new connections have not been tried in vain: else this process may be
        at fault, and is to be replaced.
        """
        return self.unanswered and self._repairs <= RENEWALS_MAX

    async def _read_cap(self) -> None:
        """Read the max_ack_pending of one lane that is full, another one each time: it may have been changed."""
        full = [lane for lane in self._puller.lanes if lane.is_full]
        if full and self._connection.connected:
            self._caps_read += 1
            lane = full[self._caps_read % len(full)]
            info = await self._connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
            lane.set_cap(info["config"].get("max_ack_pending", 0))
            if lane.room > 0:
                self._puller.note_room(lane)

    def _quiet_lanes(self, now: float) -> list[LanePull]:
        """Return up to CHECKED_MAX lanes with reported jobs and no delivery for QUIET_S, suspects first."""
        lanes = [
            lane
            for lane in self._puller.lanes
            if now - lane.jobs_reported_at < REPORT_VALID_S
            and now - lane.last_delivery_at >= QUIET_S
            and not lane.is_held_back
        ]
        known = set(self._puller.lanes)
        self._cleared = {lane: at for lane, at in self._cleared.items() if lane in known and now - at < CLEARED_S}
        unchecked = [lane for lane in lanes if lane not in self._cleared]
        return sorted(unchecked, key=lambda lane: lane not in self._suspects)[:CHECKED_MAX]

    async def _find_symptom(self, lane: LanePull) -> str:
        """Return what the server's consumer shows that contradicts a quiet lane; empty if nothing does."""
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
        except NotFound:
            return "has no consumer"  # the puller got no message about it
        if _may_not_deliver(info):
            return ""
        if pending := info.get("num_pending", 0):
            return f"holds {pending:,} jobs"
        lost = not info.get("num_waiting", 0) and (lane.standing_request or lane.grants)
        return "has lost its pull" if lost else ""

    def _repair(self, problem: str, *, reconnect: bool = False) -> None:
        """Open new pulls, with growing pauses between repairs: first on a new inbox, later on a new connection.

        `reconnect`: replace the connection at once, because a new inbox on it would not help.
        """
        now = time.monotonic()
        pause_s = QUIET_S
        if self._repairs >= 2:
            pause_s = min(RECONNECT_MAX_S, RECONNECT_FIRST_S * 2.0 ** (self._repairs - 2))
        if self._repairs and now - self._repaired_at < pause_s:
            return
        self._repairs, self._repaired_at = self._repairs + 1, now
        if self._repairs == 1 and not reconnect:
            log.warning("%s; pulling again, with a new reply subject", problem)
            self._puller.restart_pulls()
        else:
            log.warning("%s; pulling again, on a new connection", problem)
            self._connection.renew()


def _may_not_deliver(info: dict[str, Any]) -> bool:
    """Whether a consumer may deliver nothing now: it is paused, or max_ack_pending is reached."""
    full = info.get("num_ack_pending", 0) >= info["config"].get("max_ack_pending", 1_000) > 0
    return bool(info.get("paused")) or full
