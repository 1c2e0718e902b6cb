"""The credits of a tenant and key that no job has yet: one pool, which the lanes of all priorities share."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..errors import AboveLimit, AIQueueError
from ..limits import Credit, CreditBatch, Limiter

log = logging.getLogger(__name__)

ASKED_MAX = 50  # credits of one pool that are asked for and not granted yet
COSTLY_ASKED_MAX = 4  # the same where calls have costs, which are known only when a job is here
UNPRICED_MAX = 4  # calls for which credits are had before anybody knows what one costs
FRESH_S = 0.05  # a credit whose call would have to start sooner than this is given back
KEPT_S = 1.0  # a credit for which no job comes is given back after this time: others may wait for it
FAILED_S = 1.0  # after an error, a pool asks no more for so long
BOUND_S = 2.0  # after a limit held credits back, each is asked for by itself for so long
SMOOTHING = 0.1  # weight of the newest cost in the mean


class PooledLane(Protocol):
    """What a pool needs of a lane; `delivery.LanePull`."""

    pending: int

    @property
    def granted(self) -> int: ...


class KeyPool:
    """The credits of a tenant and key that no job has yet. `lanes`: its lanes, one a priority."""

    def __init__(self, limiter: Limiter, family: str, tenant: str, key: str, changed: Callable[[], None]) -> None:
        self._limiter = limiter
        self.family, self.tenant, self.key = family, tenant, key
        self._changed = changed
        self.lanes: list[PooledLane] = []
        self._credits: deque[tuple[Credit | CreditBatch, float]] = deque()  # and until when each is kept
        self._calls = 0  # for which they suffice
        self._asks: dict[object, Callable[[], None]] = {}  # what stops each
        self._mean_cost = 0.0
        self.is_priced = False  # a job has said what it costs, if anything
        self._head_cost: float | None = None  # of a job that went back to its lane for want of a credit
        self._failed_at = -FAILED_S
        self._bound_at = -BOUND_S

    @property
    def free(self) -> int:
        """Credits that no open grant of a lane will use."""
        return max(0, self._calls - sum(each.granted for each in self.lanes))

    @property
    def is_exhausted(self) -> bool:
        """Whether a credit is waited for, so that no lane of the pool is pulled on."""
        return bool(self._asks) or time.monotonic() - self._failed_at < FAILED_S

    @property
    def cost(self) -> float:
        """What the next job costs, as far as that is known."""
        return self._mean_cost if self._head_cost is None else self._head_cost

    def want(self, jobs: int) -> int:
        """Have credits for `jobs` that are not asked for yet, as far as the limit allows. Return how many are here."""
        self.trim()
        if self._asks and self._limiter.is_short(self.family, self.key):
            if not self._binds():
                self._stop_asking()  # for many calls in one credit, as there seemed to be room
            self._bound_at = time.monotonic()
        need = jobs - self.free - len(self._asks)
        if need > 0 and time.monotonic() - self._failed_at >= FAILED_S:
            try:
                self._get(need)
            except AboveLimit:  # the job itself will tell that
                self._mean_cost, self._head_cost = 0.0, None
            except AIQueueError as error:
                self._fail(error)
        for each in list(self._asks)[: max(0, -need)]:
            self._asks.pop(each)()
        return self.free

    def _get(self, need: int) -> None:
        """Take what is to be had at once, and ask for the rest: for many calls in one credit where nothing binds."""
        limiter, name, cost = self._limiter, (self.family, self.key, self.tenant), self.cost
        if not self.is_priced:
            need = min(need, UNPRICED_MAX - self._calls)
        most = 1 if self._binds() else limiter.batch_size(*name, need, cost)
        calls = min(need, most)
        while need > 0 and not self._asks:
            credit = limiter.try_acquire(*name, requests=calls, cost=calls * cost)
            if credit is not None:
                need -= self._add(credit)
            elif calls > 1:
                calls //= 4
            else:
                break
            calls = max(1, min(calls, need))
        asks = 1 if most > 1 else COSTLY_ASKED_MAX if cost else ASKED_MAX
        calls = min(need, most)
        while need > 0 and len(self._asks) < asks:
            ask = object()
            stop = limiter.ask(
                *name, lambda outcome, ask=ask: self._on_outcome(ask, outcome), requests=calls, cost=calls * cost  # type: ignore[misc]
            )  # fmt: skip
            if stop is None:  # paused, without a rule
                return
            self._asks[ask] = stop
            need -= calls

    def _binds(self) -> bool:
        """Whether a limit has held credits back lately."""
        return time.monotonic() - self._bound_at < BOUND_S

    def _add(self, credit: Credit) -> int:
        """Add a credit. Return for how many calls it suffices."""
        kept_until = min(credit.start_by - FRESH_S, self._limiter.clock() + KEPT_S)
        self._credits.append((CreditBatch(credit) if credit.requests > 1 else credit, kept_until))
        self._calls += credit.requests
        return credit.requests

    def _on_outcome(self, ask: object, outcome: Credit | Exception) -> None:
        self._asks.pop(ask, None)
        if isinstance(outcome, Credit):
            self._add(outcome)
        elif isinstance(outcome, AboveLimit):
            self._mean_cost, self._head_cost = 0.0, None
        else:
            self._fail(outcome)
        self._changed()

    def _fail(self, error: Exception) -> None:
        self._failed_at = time.monotonic()
        log.warning("no job of key %r of %s %s is started: %s", self.key, self.family, self.tenant, error)

    def spend(self) -> Credit | CreditBatch | None:
        """Take a credit out, for a job that has arrived. None: there is none."""
        self._head_cost = None
        if not self._credits:
            return None
        self._calls -= 1
        credit = self._credits[0][0]
        if type(credit) is CreditBatch:
            credit.take()
            if credit.left:
                return credit
        self._credits.popleft()
        return credit

    def note_cost(self, cost: float) -> None:
        """A job of this cost is about to start."""
        self.is_priced = True
        self._mean_cost += SMOOTHING * (cost - self._mean_cost) if self._mean_cost else cost

    def note_return(self, cost: float) -> None:
        """A job of this cost goes back to its lane without having had a credit: the next one is asked for it."""
        self._head_cost = cost
        self._stop_asking()

    def trim(self) -> None:
        """Give credits back that are too old, or of former rules."""
        if self._credits:
            now = self._limiter.clock()
            while self._credits and (self._credits[0][1] < now or not self._credits[0][0].is_current):
                self._drop()

    def _drop(self) -> None:
        credit, _ = self._credits.popleft()
        self._calls -= credit.left if isinstance(credit, CreditBatch) else 1
        credit.release()

    def _stop_asking(self) -> None:
        asks, self._asks = list(self._asks.values()), {}
        for stop in asks:
            stop()

    def close(self) -> None:
        """Give back all credits."""
        self._stop_asking()
        while self._credits:
            self._drop()
