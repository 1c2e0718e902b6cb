"""The rotation of a worker's lanes: where many hold jobs, some are pulled on, and the others stand in line (`line`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

from ..subjects import Lane
from . import line
from .ack_window import UNCONFIRMED_MAX
from .delivery import LanePull
from .line import LaneInLine, Line
from .puller import STEP_MAX, Puller

log = logging.getLogger(__name__)

STEP_S = 0.01
LEAVING_S = 0.4  # between two tries to remove a consumer: kept for longer than it takes the server to see an ack
RATE_OVER_S = 0.5  # how far back the rate of jobs is measured
START_S = 0.5  # lanes that came up to so long after the rotation began belong to its first round


class Rotation:
    """Ends the turns of lanes, and lets lanes in line have theirs. Nothing runs while no lane stands in line.

    - `opening`: lanes that have a place and are not pulled on yet, with their ranks.
    - `settling`: lanes whose consumers are about to be removed. `removing`: those that it is done to, which cannot have
      a place at the moment.
    - `enter` gets each lane whose turn begins, `leave` each whose turn has ended, whether removing its consumer pays,
      and its debt.
    """

    def __init__(
        self,
        puller: Puller,
        *,
        opening: Mapping[Lane, int],
        settling: Collection[LanePull],
        removing: Collection[Lane],
        enter: Callable[[LaneInLine], None],
        leave: Callable[[LanePull, bool, float], None],
    ) -> None:
        self._puller = puller
        self._opening = opening
        self._settling = settling
        self._removing = removing
        self._enter = enter
        self._leave = leave
        self.line = Line()
        self._task: asyncio.Task[None] | None = None
        self._step_scheduled = False
        self._rate, self._started_at = _Rate(), 0.0

    @property
    def is_full(self) -> bool:
        """Whether another lane with jobs has to stand in line."""
        busy, opening = self._puller.busy, len(self._opening)
        if self.line or len(busy) + opening < line.FEW_LANES:
            return bool(self.line)
        return sum(lane.may_wait for lane in busy) + opening >= line.FEW_LANES

    def add(self, waiting: LaneInLine, *, first: bool = False) -> None:
        """Let a lane stand in line, at its end or its front."""
        self.line.add(waiting, first=first)
        self.start()
        if waiting.is_new and not self._step_scheduled:
            self._step_scheduled = True
            asyncio.get_running_loop().call_soon(self._step_now)

    def start(self) -> None:
        """Rotate from now on, if that is not going on already, until no lane stands in line."""
        if self._task is None and self.is_full:
            self._rate, self._started_at = _Rate(), time.monotonic()
            self._task = asyncio.create_task(self._rotate())

    async def stop(self) -> None:
        """Stop. Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _rotate(self) -> None:
        while self.is_full:
            await asyncio.sleep(STEP_S)
            self._step_now()
        self._puller.acks.unconfirmed_max, self._puller.step_per_weight = UNCONFIRMED_MAX, 0.0
        self._task = None

    def _step_now(self) -> None:
        self._step_scheduled = False
        try:
            self._step(time.monotonic())
        except Exception:
            log.exception("taking turns among lanes failed; the next try is in %g s", STEP_S)

    def _step(self, now: float) -> None:
        """End the turns that are over, then give the free places to lanes in line."""
        placed = [lane for lane in self._puller.busy if lane.may_wait]
        rate = self._rate.measure(self._puller.asked, now)
        wanting = len(placed) + len(self._opening) + len(self.line)
        weights = self.line.weights + sum(lane.weight for lane in placed)
        counted = len(placed) + len(self.line)
        length = line.turn_length(wanting, weights / counted if counted else 1.0, rate)
        if len(placed) > line.LIVE_MAX or self.line:
            for lane in reversed(line.choose_leaving(placed, self.line, length, now)):  # the last is the first in line
                pays = line.removal_pays(lane.turn_jobs * lane.weight, wanting)
                self._leave(lane, pays, line.debt(lane.turn_jobs, lane.owed, length))
        acks = self._puller.acks
        acks.unconfirmed_max, self._puller.step_per_weight = UNCONFIRMED_MAX, 0.0
        if self.line:
            self._puller.step_per_weight = min(STEP_MAX, line.STEP_OF_TURN * length)
            wait = self.line.longest_wait(now)
            acks.unconfirmed_max = line.unconfirmed_max(
                wanting, wait, self.line.jobs / max(rate, 1.0), is_first_round=now - wait <= self._started_at + START_S
            )
            ranks = [*(lane.rank for lane in placed if not lane.in_line), *self._opening.values()]
            for waiting in self.line.take(ranks, now, leaving=self._count_leaving(), skip=self._removing):
                self._enter(waiting)

    def _count_leaving(self) -> int:
        """Return how many consumers are about to go. Not those that jobs have kept for long."""
        return len(self._removing) + sum(each.settle_s <= LEAVING_S for each in self._settling)


class _Rate:
    """How many jobs a second are asked for, over the last RATE_OVER_S or so."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._at = self._asked_before = 0.0
        self._rate = 0.0

    def measure(self, asked: int, now: float) -> float:
        """Return the rate. `asked`: the jobs so far."""
        if self._since is None:
            self._since, self._at, self._asked_before = now, now, asked
            return 0.0
        span = now - self._at
        if span <= 0:
            return self._rate
        part = min(1.0, span / min(RATE_OVER_S, max(span, now - self._since)))
        self._rate += part * ((asked - self._asked_before) / span - self._rate)
        self._at, self._asked_before = now, asked
        return self._rate
