"""Items of one `enqueue_many` that wait because their lane is full."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from ..errors import AIQueueError, QueueFull
from .pending import PendingItem
from .refusals import FULL_CAP_S, FULL_FIRST_S

BATCH_MAX = 64
ANSWER_S = 0.05  # a full lane is not tried again with less time than this left for the server's answer


class _FullLane:
    """A lane that refused an item because a limit is reached, and the items that wait for it.

    It is tried again with backoff: first with one item, and after each success with a larger batch.
    """

    def __init__(self, refusal: QueueFull) -> None:
        self.refusal = refusal
        self.waiting: list[tuple[int, PendingItem]] = []  # a heap: earlier items go first
        self.wait_s = FULL_FIRST_S
        self.batch = 1
        self.timer: asyncio.Handle | None = None


class FullLanes:
    """The full lanes of one `enqueue_many`: `lanes`. `send` sends an item within so many seconds, `settle` ends one."""

    def __init__(self, send: Callable[[PendingItem, float], None], settle: Callable[[PendingItem], None]) -> None:
        self._send = send
        self._settle = settle
        self.lanes: dict[str, _FullLane] = {}  # by subject

    def hold(self, pending: PendingItem) -> bool:
        """Queue an item behind others that wait for its lane. Returns False if none do."""
        lane = self.lanes.get(pending.subject)
        if lane is None or not lane.waiting:
            return False
        heapq.heappush(lane.waiting, (pending.number, pending))
        return True

    def refused(self, pending: PendingItem) -> None:
        """Add a refused item to those that wait for its lane, and schedule the next try."""
        assert isinstance(pending.outcome, QueueFull)
        lane = self.lanes.get(pending.subject)
        if lane is None:
            lane = self.lanes[pending.subject] = _FullLane(pending.outcome)
        lane.refusal = pending.outcome
        heapq.heappush(lane.waiting, (pending.number, pending))
        lane.batch = 1
        self._schedule(pending.subject, lane)

    def accepted(self, subject: str) -> None:
        """A lane took an item. If it was full: send a larger batch at once, or forget the lane if no items wait."""
        lane = self.lanes.get(subject)
        if lane is None:
            return
        if lane.timer is not None:
            lane.timer.cancel()
        if not lane.waiting:
            del self.lanes[subject]
            return
        lane.wait_s, lane.batch = FULL_FIRST_S, min(lane.batch * 2, BATCH_MAX)
        lane.timer = asyncio.get_running_loop().call_soon(self._retry, subject, lane)

    def close(self) -> None:
        """Forget all lanes and what waits for them."""
        for lane in self.lanes.values():
            if lane.timer is not None:
                lane.timer.cancel()
        self.lanes.clear()

    def _schedule(self, subject: str, lane: _FullLane) -> None:
        """Try a full lane again after its backoff, or earlier when the time of its first item is over."""
        if lane.timer is None:
            loop = asyncio.get_running_loop()
            when = min(loop.time() + lane.wait_s, lane.waiting[0][1].deadline)
            lane.timer = loop.call_at(when, self._retry, subject, lane)
            lane.wait_s = min(lane.wait_s * 2, FULL_CAP_S)

    def _retry(self, subject: str, lane: _FullLane) -> None:
        """Send the next batch of items that wait for a full lane. Items whose time is over fail with QueueFull."""
        lane.timer = None
        now = asyncio.get_running_loop().time() + 0.001
        sent = 0
        while lane.waiting and (sent < lane.batch or lane.waiting[0][1].deadline <= now):
            pending = lane.waiting[0][1]
            if now < pending.deadline < now + ANSWER_S:
                break
            heapq.heappop(lane.waiting)
            if pending.deadline <= now:
                pending.outcome = pending.outcome or lane.refusal
                self._settle(pending)
                continue
            pending.outcome = None
            sent += 1
            try:
                self._send(pending, pending.deadline - now)
            except AIQueueError as error:
                pending.outcome = error
                self._settle(pending)
        if lane.waiting:
            self._schedule(subject, lane)
