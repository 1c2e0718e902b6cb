"""A credit: what was reserved for one call, from the grant to the settlement of what the call used."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

from ..units import COST_MAX, real_number
from .bucket import Bucket


class Owner(Protocol):
    """Who grants credits; `sharing.Sharing`. `rules_version` is another one after each change of the rules."""

    @property
    def rules_version(self) -> int: ...
    def clock(self) -> float: ...
    def paused_until(self, tenant: str) -> float: ...
    def changed(self) -> None: ...
    def report(self, credit: Credit | BatchCall, above: float) -> None: ...


class Credit:
    """What was reserved for one call: `requests` and `cost`.

    1. `begin` just before the call. False: the call may not start any more, because it is late, paused, or the rules
       have changed; the reservation is given back.
    2. `settle` after the call, with what it used. Until then it is in flight.

    `release` gives back a reservation whose call did not start. Whoever drops a credit without any of these keeps its
    place in flight until the process ends.
    """

    __slots__ = ("_charged", "_is_begun", "_is_done", "_owner", "_version", "cost", "requests", "start_by", "tenant")

    def __init__(
        self, owner: Owner, tenant: str, requests: int, cost: float, charged: Sequence[tuple[Bucket, int]]
    ) -> None:
        """`charged`: the buckets, and the slots in them, that hold the reservation. None: the key is not limited."""
        self._owner = owner
        self._version = owner.rules_version
        self._charged = charged
        self._is_begun = self._is_done = False
        self.tenant, self.requests, self.cost = tenant, requests, cost
        self.start_by = min((bucket.timing.start_by(slot) for bucket, slot in charged), default=math.inf)

    @property
    def is_begun(self) -> bool:
        """Whether the call has started."""
        return self._is_begun

    @property
    def is_limited(self) -> bool:
        return bool(self._charged)

    @property
    def is_current(self) -> bool:
        """Whether it was granted by the rules as they are now."""
        return self._version == self._owner.rules_version

    @property
    def lapses_at(self) -> float:
        """Return when the call does not count as in flight any more, unless the lease is extended before: seconds since
        the epoch by the server's clock. Infinity: nothing limits calls in flight.

        A process that has lost its connection must end its calls by then, for others may take their places.
        """
        leases = []
        for bucket, _ in self._charged:
            mine = bucket.document.flights.get(bucket.process)
            if bucket.rule is not None and bucket.rule.in_flight is not None and mine is not None:
                leases.append(mine.until)
        return min(leases, default=math.inf)

    def begin(self) -> bool:
        """Return whether the call may start now: it is not late, paused or released, and the rules are the same."""
        if self._is_done:
            return False
        now = self._owner.clock()
        if not self._is_begun and (
            now > self.start_by or not self.is_current or self._owner.paused_until(self.tenant) > now
        ):
            self.release()
            return False
        self._is_begun = True
        return True

    def reduce(self, cost: float) -> None:
        """Give back at once what is reserved above `cost`: the call, which has not started, needs no more."""
        if self._is_done or cost >= self.cost:
            return
        unused, self.cost = self.cost - cost, cost
        now = self._owner.clock()
        for bucket, slot in self._charged:
            bucket.give_back(now, slot, 0, unused)
        if self._charged:
            self._owner.changed()

    def settle(self, cost: float | None = None) -> None:
        """The call has ended, and used so much (None: as reserved). What it did not use is given back. What it used
        above that is reported, and taken from later slots. Safe twice: the first one counts. Raises BadInput.
        """
        if cost is not None:
            real_number("cost", cost, 0, COST_MAX)
        if self._is_done:
            return
        unused = 0.0 if cost is None else self.cost - cost
        self._end(0, unused)
        if unused < 0:
            self._owner.report(self, -unused)

    def release(self) -> None:
        """Give back the reservation, if the call did not start; else as `settle`. Safe twice, and after `settle`."""
        if not self._is_done:
            self._end(*((0, 0.0) if self._is_begun else (self.requests, self.cost)))

    def start_in(self) -> float:
        """Return how long the call may still start, in seconds."""
        return self.start_by - self._owner.clock()

    def give_back(self, requests: int, cost: float) -> None:
        """Give back some requests, or cost, of a credit for several."""
        now = self._owner.clock()
        for bucket, slot in self._charged:
            bucket.give_back(now, slot, requests, cost)
        if self._charged:
            self._owner.changed()

    def take_extra(self, one: BatchCall, cost: float) -> None:
        """One of these calls has used so much above its reservation."""
        now = self._owner.clock()
        for bucket, _ in self._charged:
            bucket.take_extra(now, 0, cost)
        self._owner.report(one, cost)
        if self._charged:
            self._owner.changed()

    def split_one(self, cost: float) -> Credit:
        """Return a credit for one of these requests, with a part of the cost, in flight by itself."""
        for bucket, _ in self._charged:
            bucket.running += 1
        one = Credit(self._owner, self.tenant, 1, cost, self._charged)
        one._version = self._version
        return one

    def _end(self, requests: float, cost: float) -> None:
        self._is_done = True
        now = self._owner.clock()
        for bucket, slot in self._charged:
            bucket.end_call(now)
            if cost < 0:
                bucket.take_extra(now, 0, -cost)
            else:
                bucket.give_back(now, slot, requests, cost)
        if self._charged:
            self._owner.changed()


class CreditBatch:
    """A credit for several calls, of which nobody counts how many run at once. `left`: those not taken.

    Whoever takes a call does one of these with it, once: `begin` just before a call that costs nothing; `price` when
    its cost is known; `single`; or `give_back` if it does not start. After the call nothing is owed.
    """

    __slots__ = ("_cost_left", "_credit", "_end", "_unpriced", "left", "start_by")

    def __init__(self, credit: Credit) -> None:
        self._credit = credit
        self.left, self.start_by = credit.requests, credit.start_by
        self._unpriced = 0  # taken, and nobody has said what becomes of them
        self._cost_left = credit.cost
        self._end = time.monotonic() + credit.start_in()  # not the server's clock: this is asked before each job

    @property
    def is_current(self) -> bool:
        """As of a credit."""
        return self._credit.is_current

    @property
    def can_begin(self) -> bool:
        """Whether calls that were taken may start now."""
        return time.monotonic() <= self._end and self._credit.is_current

    def take(self) -> None:
        """Take one call out of the batch."""
        self.left -= 1
        self._unpriced += 1
        if not self.left:
            self._credit.settle()

    def price(self, cost: float) -> BatchCall | None:
        """Return a call that was taken, with its part of the cost. None: so much is not left; nothing has changed."""
        if cost > self._cost_left:
            return None
        self._cost_left -= cost
        self._note_priced()
        return BatchCall(self, self._credit, cost)

    def begin(self) -> bool:
        """Return whether a call that costs nothing may start now. If not, it is given back."""
        if not self.can_begin:
            self.give_back()
            return False
        self._note_priced()
        return True

    def give_back(self) -> None:
        """A call that was taken does not start."""
        self._note_priced()
        self._credit.give_back(1, 0.0)

    def single(self) -> Credit:
        """Return a credit of its own for a call that was taken."""
        self._note_priced()
        return self._credit.split_one(0.0)

    def release(self) -> None:
        """Give back what was not taken. No call that was taken begins any more."""
        left, self.left, self._end = self.left, 0, 0.0
        cost, self._cost_left = self._cost_left, 0.0
        if left:
            self._credit.settle()
        if left or cost:
            self._credit.give_back(left, cost)

    def _note_priced(self) -> None:
        self._unpriced -= 1
        if not self.left and not self._unpriced and self._cost_left:  # nobody will need it
            cost, self._cost_left = self._cost_left, 0.0
            self._credit.give_back(0, cost)


class BatchCall:
    """One call of a `CreditBatch`, with its part of the cost. Use it as a credit; `settle` may be called again."""

    __slots__ = ("_batch", "_credit", "_is_begun", "cost")

    def __init__(self, batch: CreditBatch, credit: Credit, cost: float) -> None:
        self._batch, self._credit, self.cost = batch, credit, cost
        self._is_begun = False

    @property
    def tenant(self) -> str:
        return self._credit.tenant

    def begin(self) -> bool:
        """Return whether the call may start now. If not, it is given back."""
        self._is_begun = self._batch.can_begin
        if not self._is_begun:
            self._credit.give_back(1, self.cost)
        return self._is_begun

    def settle(self, cost: float) -> None:
        """The call has used so much: the rest is given back at once, or what is above its part is reported."""
        if cost < self.cost:
            self._credit.give_back(0, self.cost - cost)
        elif cost > self.cost:
            self._credit.take_extra(self, cost - self.cost)
        self.cost = cost

    def single(self) -> Credit:
        """Return a credit of its own, instead of this one, for a call that has not begun."""
        return self._credit.split_one(self.cost)

    def release(self) -> None:
        """Give the call back if it has not begun."""
        if not self._is_begun:
            self._credit.give_back(1, self.cost)
