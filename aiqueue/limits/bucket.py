"""One document as one process knows it: what the process has reserved ahead, what it owes, and its next write. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .rules import Rule
from .stored_use import Flight, StoredUse, Timing

AHEAD_S = 0.25  # for how long a process reserves ahead where nothing binds
AHEAD_SHARE = 0.1  # and at most which share of what is left
FLUSH_S = 0.25  # how long corrections gather before they are written
SLOT_SHARE = 0.025  # of the limit: what one slot takes where more waits, so that bursts do not repeat in each window
SLOT_LEFT_SHARE = 0.4  # of what is left: what a slot takes at most if that is more
LEASE_S = 10.0  # how long the calls of a process that has died count as in flight
WANTS_S = 1.0  # how long a process that has died counts as waiting
RATE_S = 0.5  # over what time the rate of requests is measured


class Purse(NamedTuple):
    """What is reserved in a slot and not spent."""

    slot: int
    requests: float
    cost: float


@dataclass(slots=True)
class RequestRate:
    """How many requests come in a second, and what one costs on average."""

    rate: float = 0.0
    mean: float = 0.0
    at: float = 0.0

    def note(self, now: float, requests: int, cost: float) -> None:
        self.rate = self.now(now) + requests / RATE_S
        cost /= requests or 1
        self.mean = cost if self.mean == 0.0 else self.mean + 0.05 * (cost - self.mean)
        self.at = now

    def now(self, now: float) -> float:
        return self.rate * math.exp(min(0.0, self.at - now) / RATE_S)


class Bucket:
    """One document as this process knows it.

    `seq`: the sequence of the stored document, 0 if there is none. `running`: calls in flight in this process.
    `is_writing`: a write is under way, and the outcome is not known yet.
    """

    def __init__(self, process: str, key: str, subject: str = "") -> None:
        self.process = process
        self.subject = subject
        self.seq = 0
        self.document = StoredUse(key)
        self.is_loaded = False
        self.is_writing = False
        self.rule: Rule | None = None
        self.timing = Timing.of(60.0)
        self.purse: Purse | None = None
        self.owed: dict[int, tuple[float, float]] = {}  # by slot: what is given back, as negative numbers
        self.extra = (0.0, 0.0)  # used above reservations
        self.running = 0
        self.flush_at = math.inf
        self.pace = RequestRate()

    def use_rule(self, rule: Rule | None) -> bool:
        """Follow this rule from now on. Return whether it is another one than before."""
        if rule == self.rule:
            return False
        self.give_back_purse()
        self.rule = rule
        if rule is not None:
            self.timing = Timing.of(rule.window_s)
        return True

    def see(self, seq: int, document: StoredUse) -> None:
        """Take what is stored now."""
        self.seq, self.document, self.is_loaded = seq, document, True

    def held(self, now: float) -> int:
        """Return how many calls this process may have in flight, as it is stored."""
        mine = self.document.flights.get(self.process)
        return mine.held if mine is not None and mine.until > now else 0

    def lacks_places(self, now: float) -> bool:
        """Return whether more calls run than are stored, because a rule is new, or the lease has ended."""
        return self.rule is not None and self.rule.in_flight is not None and self.running > self.held(now)

    def others(self) -> list[Flight]:
        """Return the entries of other processes with calls in flight."""
        return [each for name, each in self.document.flights.items() if name != self.process]

    def allowed_in_flight(self, now: float) -> float:
        """Return how many calls this process may have in flight: those that no other process has or waits for.

        A process that waits is owed an equal share, and gets it as soon as calls of the others end.
        """
        limit = None if self.rule is None else self.rule.in_flight
        if limit is None:
            return math.inf
        others = [each for each in self.others() if max(each.until, each.wants_until) > now]
        held = sum(each.held for each in others if each.until > now)
        waiting = [each for each in others if each.wants_until > now]
        share = max(1, limit // (len(others) + 1))
        owed = sum(max(0, share - each.held) for each in waiting)
        return max(min(share, limit - held) if waiting else 0, limit - held - owed)

    # -- spending what is reserved

    def can_spend(self, now: float, requests: float, cost: float) -> bool:
        """Return whether the purse and the free places in flight suffice, without a write."""
        if self.rule is None:
            return True
        if self.rule.in_flight is not None and self.running >= min(self.held(now), self.allowed_in_flight(now)):
            return False
        if (self.rule.requests is None or not requests) and (self.rule.cost is None or not cost):
            return True
        purse = self.purse
        return (
            purse is not None
            and now <= self.timing.start_by(purse.slot)
            and (self.rule.requests is None or purse.requests >= requests)
            and (self.rule.cost is None or purse.cost >= cost)
        )

    def spend(self, now: float, requests: float, cost: float) -> int:
        """Take a reservation out of the purse. Return its slot."""
        self.running += 1
        if self.purse is None:
            return self.timing.slot(now)
        slot, had_requests, had_cost = self.purse
        self.purse = Purse(slot, max(0, had_requests - requests), max(0, had_cost - cost))
        return slot

    # -- corrections

    def give_back(self, now: float, slot: int, requests: float, cost: float) -> None:
        """Give back what was reserved in a slot and not used."""
        if requests or cost:
            before = self.owed.get(slot, (0, 0))
            self.owed[slot] = before[0] - requests, before[1] - cost
            self.flush_at = min(self.flush_at, now + FLUSH_S)

    def take_extra(self, now: float, requests: float, cost: float) -> None:
        """Charge what was used above a reservation: to later slots, whatever they hold."""
        self.extra = self.extra[0] + requests, self.extra[1] + cost
        self.flush_at = min(self.flush_at, now + FLUSH_S)

    def end_call(self, now: float) -> None:
        self.running -= 1
        if self.rule is not None and self.rule.in_flight is not None:
            self.flush_at = min(self.flush_at, now + FLUSH_S)

    def give_back_purse(self) -> None:
        """Give back what is reserved and not spent."""
        if self.purse is not None:
            slot, requests, cost = self.purse
            before = self.owed.get(slot, (0, 0))
            self.owed[slot] = before[0] - requests, before[1] - cost
            self.flush_at, self.purse = 0.0, None

    def close(self) -> None:
        """Give back what is not spent, and reserve nothing ahead any more."""
        self.give_back_purse()
        self.pace = RequestRate()

    # -- writes

    def begin(self, draft: Draft) -> None:
        """The draft is about to be written: what it holds cannot be spent meanwhile."""
        self.is_writing, self.purse = True, None

    def stored(self, draft: Draft, seq: int) -> None:
        """The draft was stored."""
        self.is_writing = False
        if seq > self.seq:
            self.see(seq, draft.document)
        self.purse = draft.purse_after
        for slot, (requests, cost) in draft.corrections.items():
            left = self.owed[slot][0] - requests, self.owed[slot][1] - cost
            if abs(left[0]) + abs(left[1]) < 1e-9:
                del self.owed[slot]
            else:
                self.owed[slot] = left
        self.extra = self.extra[0] - draft.extra[0], self.extra[1] - draft.extra[1]
        self.flush_at = draft.now + FLUSH_S if self.owed or max(self.extra) > 1e-9 else math.inf

    def rejected(self, draft: Draft) -> None:
        """Another write came first: nothing has changed, except for what this process knows of the document."""
        self.is_writing, self.purse = False, draft.purse_before

    def lost(self, draft: Draft) -> None:
        """Nobody knows whether the draft was stored. Of each correction that would be right in one case only, the one
        is kept that never lets the limit be exceeded.
        """
        self.is_writing = False
        for slot in draft.corrections:
            self.owed.pop(slot, None)


class Draft:
    """The next document, while it is decided what to reserve. `now`: by the server's clock.

    `lead_s`: how long the write will take. What is reserved is charged to the slot in which the credits arrive: where
    writes take longer than a slot, they would come too late to be used.
    """

    def __init__(self, bucket: Bucket, now: float, lead_s: float = 0.0) -> None:
        assert bucket.rule is not None
        self.bucket, self.rule, self.timing, self.now = bucket, bucket.rule, bucket.timing, now
        self.seq = bucket.seq  # of the document that this one replaces; others may be heard of before it is written
        self.document = bucket.document.copy()
        self.document.prune(now, self.timing)
        self.slot = self.timing.slot(now + lead_s)
        self.corrections = dict(bucket.owed)
        for slot, (requests, cost) in self.corrections.items():
            if slot in self.document.slots:
                self.document.charge(slot, requests, cost)
        self.extra = bucket.extra
        self.document.charge(self.slot, *self.extra)
        self.purse_before = bucket.purse
        self.purse_after: Purse | None = None
        self._pool = self._empty_purse()
        self.spent = (0.0, 0.0)
        self.taken = 0  # places in flight
        self.is_blocked = False  # something waits for room in this document
        self.wants_place = False  # and it is a place in flight
        self.is_touched = False  # to be written in any case
        self._used = self.document.used(now, self.timing)
        self._in_slot = self.document.slots[self.slot]
        self._allowed = bucket.allowed_in_flight(now)

    def _empty_purse(self) -> tuple[float, float]:
        """Move the purse out of its slot, so that the slot of now can take it, and the sum stays the same."""
        purse = self.purse_before
        if purse is None or purse.slot not in self.document.slots:
            return 0.0, 0.0
        self.document.charge(purse.slot, -purse.requests, -purse.cost)
        return purse.requests, purse.cost

    # -- room

    def has_room(
        self, requests: float, cost: float, ahead: tuple[float, float] = (0, 0), *, evenly: bool = False
    ) -> bool:
        """Return whether a reservation fits, beside `ahead` of others whose turn is sooner. Else the draft is blocked.

        `evenly`: several tenants share the bucket, so a slot takes only its part.
        """
        if self.rule.in_flight is not None and self.bucket.running + self.taken + 1 > self._allowed:
            self.is_blocked = self.wants_place = True
            return False
        spent = self.spent[0] + requests, self.spent[1] + cost
        for at, limit in enumerate((self.rule.requests, self.rule.cost)):
            if limit is None or spent[at] <= self._pool[at]:
                continue
            left = limit - self._used[at] - spent[at]
            if left - ahead[at] < -1e-9 or (
                evenly and not self._fits_slot(at, (requests, cost)[at], limit, left, ahead)
            ):
                self.is_blocked = True
                return False
        return True

    def _fits_slot(self, at: int, more: float, limit: float, left: float, ahead: tuple[float, float]) -> bool:
        """Return whether the slot of now takes a reservation, beside those whose turn is sooner. An empty slot takes
        any one. After a burst, much room comes at once: a part of what is left spreads it over some windows, and leaves
        little of it idle meanwhile.
        """
        taken = self._in_slot[at] + self.spent[at] + ahead[at]
        is_empty = self._in_slot[0] + self.spent[0] + ahead[0] == 0
        return is_empty or taken + more <= max(SLOT_SHARE * limit, SLOT_LEFT_SHARE * left)

    def take(self, requests: float, cost: float) -> None:
        """Reserve."""
        self.spent = self.spent[0] + requests, self.spent[1] + cost
        self.taken += 1

    def room_at(self, requests: float, cost: float) -> float:
        """Return when to look again for room that a blocked reservation needs."""
        limits = self.rule.requests or math.inf, self.rule.cost or math.inf
        wanted = self.spent[0] + requests, self.spent[1] + cost
        needed = [self._used[at] + max(wanted[at], self._pool[at]) - limits[at] for at in (0, 1)]
        at = self.document.room_at(needed[0], needed[1], self.timing)
        return max(at, self.slot / 1000 if at == 0.0 else 0.0)

    # -- places in flight

    def _finish_flight(self) -> None:
        """Set this process's entry: the calls in flight, and a few ahead if nobody else waits."""
        limit, before = self.rule.in_flight, self.document.flights.pop(self.bucket.process, Flight(0, 0.0))
        if limit is None:
            return
        held, needed = self.bucket.held(self.now), self.bucket.running + self.taken
        others = self.bucket.others()
        is_wanted = any(each.wants_until > self.now for each in others)
        is_due = self.now >= self.bucket.flush_at or is_wanted
        target: float = needed
        if not is_wanted and not self.is_blocked:
            left = limit - needed - sum(each.held for each in others if each.until > self.now)
            target += max(0, int(min(self.bucket.pace.now(self.now) * AHEAD_S, left * AHEAD_SHARE)))
            target = target if is_due else max(target, min(held, self._allowed))
        wants_until = self.now + WANTS_S if self.wants_place else 0.0
        if target or self.wants_place:
            self.document.flights[self.bucket.process] = Flight(int(target), self.now + LEASE_S, wants_until)
        wants_more = self.wants_place and before.wants_until < self.now + WANTS_S / 2
        wants_less = not self.wants_place and before.wants_until > self.now
        renews = target > 0 and before.until < self.now + LEASE_S / 2
        if needed > held or (target < held and is_due) or wants_more or wants_less or renews:
            self.is_touched = True

    # -- the end

    def finish(self) -> bool:
        """Complete the document. Return whether it must be written."""
        purse, now = self.purse_before, self.now
        is_stale = purse is not None and now > self.timing.start_by(purse.slot)
        is_short = any(
            limit is not None and spent > pool
            for limit, spent, pool in zip((self.rule.requests, self.rule.cost), self.spent, self._pool, strict=True)
        )
        self._finish_flight()
        if is_short or is_stale or now >= self.bucket.flush_at:
            self.is_touched = True
        ahead = self._ahead()
        kept = tuple(spent + more for spent, more in zip(self.spent, ahead, strict=True))
        self.document.charge(self.slot, *kept)
        if kept != (0, 0):
            self.purse_after = Purse(self.slot, *kept)
        self.document.slots = {slot: use for slot, use in self.document.slots.items() if max(use) > 1e-9}
        return self.is_touched

    def _ahead(self) -> tuple[float, float]:
        """Return what to reserve ahead: for AHEAD_S at the present rate, and little of what is left."""
        if self.is_blocked or (self.rule.requests is None and self.rule.cost is None):
            return 0, 0
        if any(each.process != self.bucket.process for each in self.document.tickets):
            return 0, 0
        pace = self.bucket.pace
        count: float = pace.now(self.now) * AHEAD_S
        for at, (limit, each) in enumerate(((self.rule.requests, 1.0), (self.rule.cost, pace.mean))):
            if limit is not None and each > 0:
                count = min(count, (limit - self._used[at] - self.spent[at]) * AHEAD_SHARE / each)
        whole = max(0, int(count))
        return whole, whole * pace.mean * 1.2
