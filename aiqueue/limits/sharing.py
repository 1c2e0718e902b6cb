"""Whose turn it is among the reservations that wait for one value of a key, and what is written for them. Pure.

A reservation needs room over all tenants and, if its tenant has a limit of its own, there too: in two documents, each
written by itself. What one write has reserved is kept if the other one fails.

Turns are by virtual time: each grant advances its tenant by the share of the limit that it uses, divided by the
tenant's weight, and the tenant that is furthest behind is next. The times are stored, for all processes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

from ..errors import AboveLimit
from .bucket import Bucket, Draft
from .credit import BatchCall, Credit
from .stored_use import GRACE, LAG_MAX, Ticket

PICKS_MAX = 64  # reservations that one write is for
YIELD_SHARE = 0.025  # of the limit: how far a tenant may be ahead of one that waits in another process
YIELD_S = 0.25  # and how long that is waited for: its process may have died
LOOK_S = 0.5  # how often a reservation that waits looks again, whatever was heard
TICKET_S, TICKET_SLOTS = 3.0, 3  # how long a ticket is valid, whichever is shorter
TAGS_MAX = 1_000
PURSE_IDLE_S = 2.0  # how long what is reserved ahead is kept while nobody asks


class Waiter:
    """A reservation that waits. `done` is called once, with the credit or an error."""

    def __init__(
        self, tenant: str, requests: int, cost: float, weight: float, done: Callable[[Credit | Exception], None]
    ) -> None:
        self.tenant, self.requests, self.cost, self.weight = tenant, requests, cost, weight
        self.done = done
        self.is_cancelled = False


class Sharing:
    """The reservations of one process for one value of a key. Times are the server's, in seconds since the epoch."""

    def __init__(
        self,
        process: str,
        key: str,
        clock: Callable[[], float],
        *,
        changed: Callable[[], None] = lambda: None,
        report: Callable[[Credit | BatchCall, float], None] = lambda *_: None,
    ) -> None:
        """`changed` is called when it may be time to plan again, `report` with each credit that used more than it had
        reserved, and by how much.
        """
        self.process, self.key, self.clock, self.changed, self.report = process, key, clock, changed, report
        self.wide = Bucket(process, key)
        self.narrow: dict[str, Bucket] = {}
        self.queues: dict[str, deque[Waiter]] = {}
        self.paused_until: Callable[[str], float] = lambda _tenant: 0.0
        self.rules_version = 0  # what is granted and has not begun is valid for one
        self._tags: dict[str, float] = {}  # by tenant, where this process knows more than the document
        self._clock = 0.0  # the latest tag that was granted
        self._yielded: dict[Ticket, float] = {}  # since when it has been waited for the process of a ticket
        self._picked: list[Waiter] = []  # for whom the writes under way reserve
        self.wake_at = math.inf
        self.lead_s = 0.0  # how long a write takes
        self.is_short = False  # a limit held somebody back when it was last planned

    @property
    def buckets(self) -> list[Bucket]:
        return [self.wide, *self.narrow.values()]

    @property
    def waiting(self) -> int:
        return sum(len(each) for each in self.queues.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is owed."""
        return not self.queues and all(
            each.purse is None
            and not each.owed
            and not each.running
            and not each.is_writing
            and max(each.extra) <= 1e-9
            for each in self.buckets
        )

    def check_all(self) -> None:
        """After a change of rules: what waits for more than the new limit itself fails with AboveLimit."""
        for waiter in [each for queue in self.queues.values() for each in queue]:
            try:
                self.check(waiter.tenant, waiter.requests, waiter.cost)
            except AboveLimit as error:
                self.cancel(waiter)
                waiter.done(error)

    def narrow_bucket(self, tenant: str) -> Bucket:
        return self.narrow.setdefault(tenant, Bucket(self.process, self.key))

    def _limited(self, tenant: str) -> list[Bucket]:
        """Return the buckets with a rule that a reservation of a tenant is charged to."""
        found = [self.wide, self.narrow[tenant]] if tenant in self.narrow else [self.wide]
        return [each for each in found if each.rule is not None]

    # -- reservations

    def check(self, tenant: str, requests: int, cost: float) -> None:
        """Raise AboveLimit for a reservation that would wait for ever."""
        for bucket in self._limited(tenant):
            rule = bucket.rule
            assert rule is not None
            for what, value, limit in (("requests", requests, rule.requests), ("cost", cost, rule.cost)):
                if limit is not None and value > limit:
                    raise AboveLimit(what, value, limit, f"{rule.id}: {rule.describe()}", self.key)

    def try_acquire(self, now: float, waiter: Waiter) -> Credit | None:
        """Return a credit if nobody waits and what is reserved ahead suffices. Raises AboveLimit."""
        self.note(now, waiter)
        if self.queues or not self._can_spend(now, waiter):
            return None
        return self._grant(now, waiter, self._start_tag(waiter.tenant))

    def note(self, now: float, waiter: Waiter) -> None:
        """Count a reservation that somebody asks for: what is reserved ahead goes by the rate. Raises AboveLimit."""
        self.check(waiter.tenant, waiter.requests, waiter.cost)
        for bucket in self._limited(waiter.tenant):
            bucket.pace.note(now, waiter.requests, waiter.cost)

    def add(self, waiter: Waiter, *, first: bool = False) -> None:
        """Put a reservation into its tenant's queue, at its end or before all others."""
        queue = self.queues.get(waiter.tenant)
        if queue is None:
            self._tags[waiter.tenant] = self._start_tag(waiter.tenant)
            queue = self.queues[waiter.tenant] = deque()
        if first:
            queue.appendleft(waiter)
        else:
            queue.append(waiter)

    def cancel(self, waiter: Waiter) -> None:
        waiter.is_cancelled = True
        self._remove(waiter)

    def _remove(self, waiter: Waiter) -> None:
        queue = self.queues.get(waiter.tenant)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self.queues[waiter.tenant]

    def _can_spend(self, now: float, waiter: Waiter) -> bool:
        if self.paused_until(waiter.tenant) > now:
            return False
        return all(
            not each.is_writing and each.can_spend(now, waiter.requests, waiter.cost)
            for each in self._limited(waiter.tenant)
        )

    def _grant(self, now: float, waiter: Waiter, tag: float | None = None) -> Credit:
        """Grant. `tag`: the tenant's virtual time before; None: the stored one has advanced for this grant already."""
        if tag is not None:
            self._clock = max(self._clock, tag)
            if len(self._tags) >= TAGS_MAX:
                self._tags = {each: at for each, at in self._tags.items() if at > self._clock or each in self.queues}
            self._tags[waiter.tenant] = tag + self._step(waiter)
        charged = [(each, each.spend(now, waiter.requests, waiter.cost)) for each in self._limited(waiter.tenant)]
        return Credit(self, waiter.tenant, waiter.requests, waiter.cost, charged)

    def serve(self, now: float) -> None:
        """Grant what the purses suffice for: first to those for whom it was reserved, in that order, then in turns.

        A call that its purse does not suffice for lets none pass.
        """
        picked, self._picked = self._picked, []
        for waiter in picked:
            if not waiter.is_cancelled and self._can_spend(now, waiter):
                self._remove(waiter)
                waiter.done(self._grant(now, waiter))
        active = set(self.queues)
        while active:
            tenant = min(active, key=lambda each: (self._tag(each), each))
            queue = self.queues.get(tenant)
            if queue is None or self.paused_until(tenant) > now:
                active.discard(tenant)
                continue
            waiter = queue[0]
            if not self._can_spend(now, waiter):
                if self.wide in self._limited(tenant) and not self.wide.can_spend(now, waiter.requests, waiter.cost):
                    return
                active.discard(tenant)
                continue
            self._remove(waiter)
            waiter.done(self._grant(now, waiter, self._tag(tenant)))

    def shortage(self, now: float, requests: int, cost: float) -> tuple[str, float] | None:
        """Return what is short for one more call over all tenants, "requests" or "cost", and for how long."""
        if self.wide.rule is None or not self.wide.is_loaded:
            return None
        draft = Draft(self.wide, now)
        if draft.has_room(requests, cost):
            return None
        limit = self.wide.rule.requests
        is_of_requests = limit is not None and draft.document.used(now, draft.timing)[0] + requests > limit
        return "requests" if is_of_requests else "cost", max(0.0, draft.room_at(requests, cost) - now)

    # -- turns

    def _tag(self, tenant: str) -> float:
        """Return a waiting tenant's virtual time: the later one of what is stored and what this process knows."""
        document = self.wide.document
        return max(self._tags.get(tenant, 0.0), document.times.get(tenant, document.clock - LAG_MAX))

    def _start_tag(self, tenant: str) -> float:
        """Return the virtual time of a tenant that begins to wait: it has gained next to nothing while it did not."""
        document = self.wide.document
        clock = max(document.clock, self._clock) - GRACE
        return max(self._tags.get(tenant, 0.0), document.times.get(tenant, 0.0), clock)

    def _step(self, waiter: Waiter) -> float:
        """Return by how much a grant advances its tenant's virtual time."""
        rule = self.wide.rule
        if rule is None:
            return 0.0
        shares = [waiter.requests / rule.requests] if rule.requests else []
        shares += [waiter.cost / rule.cost] if rule.cost else []
        if not shares and rule.in_flight:
            shares = [1 / rule.in_flight]
        return max(shares, default=0.0) / waiter.weight

    def rank(self, now: float) -> int:
        """Return how many other processes wait whose turn is sooner than that of this process's first reservation."""
        first = min((self._tag(each) for each in self.queues), default=0.0)
        others = [each for each in self.wide.document.tickets if each.process != self.process and each.until > now]
        return sum(each.tag < first for each in others)

    # -- writes

    def plan(self, now: float) -> list[Draft]:
        """Grant what can be granted now, and return what is to be written; `wake_at` says when to plan again.

        For each draft call `begin` of its bucket, and `stored`, `rejected` or `lost` when the outcome is known.
        """
        self.wake_at = math.inf
        self.serve(now)
        for bucket in self.buckets:
            if bucket.purse is not None and not bucket.is_writing and now >= bucket.pace.at + PURSE_IDLE_S:
                bucket.give_back_purse()  # others may wait for it
        drafts = {id(each): Draft(each, now, self.lead_s) for each in self.buckets if self._needs_draft(each, now)}
        served, blocked = self._pick(now, drafts)
        wide = drafts.get(id(self.wide))
        if wide is not None:
            self._set_ticket(wide, blocked)
            if wide.finish() and served:
                self._advance(wide, served)
        self.is_short = any(each.is_blocked for each in drafts.values())
        to_write = [each for each in drafts.values() if (each.is_touched if each is wide else each.finish())]
        self._set_wake(now, drafts)
        self._picked = [waiter for waiter, _ in served] if to_write else []
        return to_write

    def _needs_draft(self, bucket: Bucket, now: float) -> bool:
        if bucket.rule is None or bucket.is_writing:
            return False
        if now >= bucket.flush_at or (bucket.purse is not None and now > bucket.timing.start_by(bucket.purse.slot)):
            return True
        tenants = self.queues if bucket is self.wide else [each for each, one in self.narrow.items() if one is bucket]
        if any(each in self.queues for each in tenants):
            return True
        return self.process in bucket.document.flights or bucket.lacks_places(now)

    def _pick(self, now: float, drafts: Mapping[int, Draft]) -> tuple[list[tuple[Waiter, float]], Ticket | None]:
        """Reserve for the waiters in turns, as far as there is room. Return them with their tags, and the ticket of
        the one that waits for room over all tenants.
        """
        wide = drafts.get(id(self.wide))
        tags = {each: self._tag(each) for each in self.queues if self.paused_until(each) <= now}
        places = dict.fromkeys(tags, 0)
        served: list[tuple[Waiter, float]] = []
        evenly = wide is not None and len({*wide.document.times, *tags, *(t.tenant for t in wide.document.tickets)}) > 1
        while tags and len(served) < PICKS_MAX:
            tenant = min(tags, key=lambda each: (tags[each], each))
            if places[tenant] >= len(self.queues[tenant]) or any(each.is_writing for each in self._limited(tenant)):
                del tags[tenant]
                continue
            waiter = self.queues[tenant][places[tenant]]
            narrow = drafts.get(id(self.narrow.get(tenant)))
            if narrow is not None and not narrow.has_room(waiter.requests, waiter.cost):
                self.wake_at = min(self.wake_at, narrow.room_at(waiter.requests, waiter.cost))
                del tags[tenant]
                continue
            if wide is not None and not self._has_room(wide, waiter, tags[tenant], evenly):
                until = now + min(TICKET_S, TICKET_SLOTS * wide.timing.slot_s)
                return served, Ticket(self.process, tenant, waiter.requests, waiter.cost, tags[tenant], until)
            for draft in (wide, narrow):
                if draft is not None:
                    draft.take(waiter.requests, waiter.cost)
            served.append((waiter, tags[tenant]))
            tags[tenant] += self._step(waiter)
            places[tenant] += 1
        return served, None

    def _has_room(self, wide: Draft, waiter: Waiter, tag: float, evenly: bool) -> bool:
        """Return whether there is room over all tenants now, beside what other processes wait for whose turn is sooner.
        Those of the same tenant have the same turn.

        A tenant that is far ahead of such a one waits until that process has had its turn: where much room comes at
        once, the first process to write would take all of it for its own tenants.
        """
        behind = {
            each: max(each.tag, wide.document.times.get(each.tenant, 0.0))
            for each in wide.document.tickets
            if each.process != self.process and each.tenant != waiter.tenant
        }
        ahead = [each for each, at in behind.items() if at < tag]
        needed = sum(each.requests for each in ahead), sum(each.cost for each in ahead)
        if not wide.has_room(waiter.requests, waiter.cost, needed, evenly=evenly):
            self.wake_at = min(self.wake_at, wide.room_at(waiter.requests, waiter.cost))
            return False
        far = [each for each, at in behind.items() if at < tag - YIELD_SHARE]
        self._yielded = {each: self._yielded.get(each, wide.now) for each in far}
        until = max((at + YIELD_S + self.lead_s for at in self._yielded.values()), default=0.0)
        if until <= wide.now:
            return True
        wide.is_blocked = True
        self.wake_at = min(self.wake_at, until)
        return False

    def _set_ticket(self, wide: Draft, ticket: Ticket | None) -> None:
        """Leave a ticket for the reservation that waits, unless its tenant has one; remove one that is done with."""
        others = [each for each in wide.document.tickets if each.process != self.process]
        mine = next((each for each in wide.document.tickets if each.process == self.process), None)
        if ticket is not None and (wide.wants_place or any(each.tenant == ticket.tenant for each in others)):
            ticket = None
        if ticket is None:
            wide.is_touched |= mine is not None
        else:
            half = (ticket.until - wide.now) / 2
            is_same = mine is not None and mine[1:4] == ticket[1:4] and mine.until - wide.now > half
            if is_same and mine is not None:
                ticket = mine
            wide.is_touched |= not is_same
            self.wake_at = min(self.wake_at, ticket.until - half + 0.001)
        wide.document.tickets = [*others, ticket] if ticket is not None else others

    def _advance(self, wide: Draft, served: list[tuple[Waiter, float]]) -> None:
        """Store how far the tenants have come."""
        document = wide.document
        for waiter, tag in served:
            before = max(tag, document.times.get(waiter.tenant, 0.0))
            document.times[waiter.tenant] = before + self._step(waiter)
            document.clock = max(document.clock, tag)

    def _set_wake(self, now: float, drafts: Mapping[int, Draft]) -> None:
        """Set when to plan again if nothing is heard before."""
        if self.queues:
            paused = [self.paused_until(each) for each in self.queues]
            self.wake_at = min([self.wake_at, now + LOOK_S, *(each for each in paused if each > now)])
        for bucket in self.buckets:
            if bucket.rule is None:
                continue
            self.wake_at = min(self.wake_at, bucket.flush_at)
            if bucket.purse is not None:
                until = min(bucket.timing.start_by(bucket.purse.slot), bucket.pace.at + PURSE_IDLE_S)
                self.wake_at = min(self.wake_at, until + 0.001)
            if bucket.held(now) or bucket.lacks_places(now):
                self.wake_at = min(self.wake_at, now + LOOK_S * 4)
