"""Silent lanes: they hold jobs, slots are free, and nothing comes. The worker is made to pull again.

A pull may get lost without a word: its server was stopped and went on as the leader of the past, an interest was
dropped on the way, a client lost its place. What the puller believes is then no evidence. So the server is asked: the
poll (`lanes`) says which lanes hold jobs, and the lane's consumer whether any of them could be had.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ..connection import Connection
from ..errors import AIQueueError, NotFound
from .puller import LanePull, Puller

log = logging.getLogger("aiqueue.silence")

LOOK_S = 1.0
SILENT_S = 2.0  # without a delivery, for as long with free slots: then the lane's consumer is asked, twice
HELD_S = 2.5  # how long the poll's word that a lane holds jobs is good
CLEARED_S = 5.0  # a lane that had nothing to give is not asked again for so long
ASKED_MAX = 8  # lanes that are asked about in one look
UNANSWERED_S = 20.0  # a link that stands, and the poll has had no answer
AGAIN_FIRST_S, AGAIN_MAX_S = 30.0, 600.0  # between new connections
MENDED_S = 60.0  # without a silent lane: then it all begins anew


class StalledLaneWatch:
    """Looks for silent lanes once a second, and mends: fresh pulls on a new inbox first, then a new connection.

    `free`: how many slots are free. `polled`: when the poll last had an answer, monotonic seconds.
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
        self._suspects: set[LanePull] = set()  # found silent at the last look
        self._cleared: dict[LanePull, float] = {}
        self._tries = 0
        self._tried_at = 0.0
        self.since: float | None = None  # when silence was first found, monotonic seconds; None: all is heard

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except AIQueueError as error:
                log.debug("looking for silent lanes: %s", error)
            except Exception:
                log.exception("looking for silent lanes")  # and again in a second

    async def _look(self) -> None:
        now = time.monotonic()
        if not self._connection.connected:
            self._free_since = None
            return
        if now - self._polled() > UNANSWERED_S:
            self._mend(f"no answer to the poll for {now - self._polled():.0f} s", inbox_too=True)
            return
        if self._free() <= 0:
            self._free_since = None
        elif self._free_since is None:
            self._free_since = now
        found: dict[LanePull, str] = {}
        if self._free_since is not None and now - self._free_since >= SILENT_S:
            for lane in self._quiet_ones(now):
                if what := await self._wrong(lane):
                    found[lane] = what
                else:
                    self._cleared[lane] = now
        # heard of meanwhile: no more silent. Seen once only: a pull may just be on its way.
        sure = [lane for lane in found if lane in self._suspects and now - lane.active >= SILENT_S]
        self._suspects = set(found)
        if sure:
            lane, more = sure[0], f" (and {len(sure) - 1} more)" if len(sure) > 1 else ""
            self._mend(f"lane {lane.key}{more} {found[lane]} and is silent for {now - lane.active:.0f} s")
        elif self.since is not None and not found and now - self._tried_at > SILENT_S:
            self.since = None
        if self._tries and now - self._tried_at > MENDED_S and self.since is None:
            self._tries = 0

    def _quiet_ones(self, now: float) -> list[LanePull]:
        """Lanes that hold jobs, by the poll, and have brought none for a while; those in doubt first."""
        lanes = [lane for lane in self._puller.lanes if now - lane.held < HELD_S and now - lane.active >= SILENT_S]
        known = set(self._puller.lanes)
        self._cleared = {lane: at for lane, at in self._cleared.items() if lane in known and now - at < CLEARED_S}
        asked = [lane for lane in lanes if lane not in self._cleared]
        return sorted(asked, key=lambda lane: lane not in self._suspects)[:ASKED_MAX]

    async def _wrong(self, lane: LanePull) -> str:
        """What the server says that does not go with this silence; empty: nothing."""
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
        except NotFound:
            return "has no consumer"  # and nobody told us
        if _held_back(info):
            return ""
        if pending := info.get("num_pending", 0):
            return f"holds {pending:,} jobs"
        lost = not info.get("num_waiting", 0) and (lane.standing or lane.grants)
        return "has lost its pull" if lost else ""

    def _mend(self, problem: str, *, inbox_too: bool = False) -> None:
        """`inbox_too`: answers stay away as well, so that another inbox would not do."""
        now = time.monotonic()
        self.since = self.since or now
        pause_s = SILENT_S if self._tries < 2 else min(AGAIN_MAX_S, AGAIN_FIRST_S * 2.0 ** (self._tries - 2))
        if self._tries and now - self._tried_at < pause_s:
            return
        self._tries, self._tried_at = self._tries + 1, now
        if self._tries == 1 and not inbox_too:
            log.warning("%s: pulling again, on a new inbox", problem)
            self._puller.anew()
        else:
            log.warning("%s: pulling again, on a new connection", problem)
            self._connection.renew()


def _held_back(info: dict[str, Any]) -> bool:
    """Whether the consumer may give nothing now: paused, or as much in flight as it may have."""
    full = info.get("num_ack_pending", 0) >= info["config"].get("max_ack_pending", 1_000) > 0
    return bool(info.get("paused")) or full
