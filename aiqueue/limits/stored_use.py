"""The stored use of one value of a key: what was reserved when, who has calls in flight, and whose turn it is. Pure.

Time is cut into slots, 60 in a window. A reservation is charged to the slot in which it is made. It counts until a
whole window has passed since its call can have started at the latest: then no window holds that call and a new one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

VERSION = 1
SLOTS = 60  # in a window
GRACE = 0.05  # how much of that a tenant keeps that did not wait for a moment
LAG_MAX = 0.3  # how far a tenant may be behind the others and still catch up, in shares of a window
TTL_MARGIN_S = 60


class Timing(NamedTuple):
    """The times of a window. A call starts at most `guard_s` after its slot's end, as the provider sees it."""

    window_s: float
    slot_s: float
    guard_s: float

    @classmethod
    def of(cls, window_s: float) -> Self:
        slot_s = window_s / SLOTS
        return cls(window_s, slot_s, min(1.0, max(0.1, slot_s)))

    def slot(self, now: float) -> int:
        """Return the present slot, named by its end in milliseconds since the epoch."""
        return math.ceil((math.floor(now / self.slot_s) + 1) * self.slot_s * 1000)

    def start_by(self, slot: int) -> float:
        """Return until when a process may start a call of this slot. The rest of the guard is the way to the provider,
        and what clocks differ by.
        """
        return slot / 1000 + self.guard_s / 2

    def counts_until(self, slot: int) -> float:
        return slot / 1000 + self.guard_s + self.window_s


class Flight(NamedTuple):
    """The calls that a process may have in flight, until the lease ends. `wants_until`: it waits for more."""

    held: int
    until: float
    wants_until: float = 0.0


class Ticket(NamedTuple):
    """The next reservation of a process that waits for room. `tag`: its turn, the lowest is next."""

    process: str
    tenant: str
    requests: float
    cost: float
    tag: float
    until: float


@dataclass(slots=True)
class StoredUse:
    """The use of one value of a key, over all tenants or of one tenant.

    `slots`: requests and cost by slot. `times`: by tenant, how much of the limit it was granted, divided by its weight
    (virtual time); `clock`: the latest of these times. Times and tickets are used over all tenants only.
    """

    key: str
    slots: dict[int, tuple[float, float]] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0
    tickets: list[Ticket] = field(default_factory=list)

    def encode(self) -> bytes:
        base = min(self.slots, default=0)
        plain: dict[str, Any] = {"v": VERSION, "key": self.key, "base": base}
        plain["slots"] = [[slot - base, _short(r), _short(c)] for slot, (r, c) in sorted(self.slots.items())]
        if self.flights:
            plain["flights"] = {
                name: [each[0], round(each[1], 3), round(each[2], 3)] for name, each in self.flights.items()
            }
        if self.times:
            plain["clock"] = round(self.clock, 9)
            plain["times"] = {tenant: round(each, 9) for tenant, each in self.times.items()}
        if self.tickets:
            plain["tickets"] = [[*each[:4], round(each.tag, 9), round(each.until, 3)] for each in self.tickets]
        return json.dumps(plain, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a stored document. Raises ValueError, in one line, for anything that this version cannot read."""
        try:
            plain = json.loads(data)
            if plain["v"] != VERSION:
                raise ValueError(f"it has version {plain['v']!r}, and this aiqueue reads version {VERSION}")
            base = plain["base"]
            return cls(
                plain["key"],
                {base + slot: (requests, cost) for slot, requests, cost in plain["slots"]},
                {name: Flight(*each) for name, each in plain.get("flights", {}).items()},
                dict(plain.get("times", {})),
                plain.get("clock", 0.0),
                [Ticket(*each) for each in plain.get("tickets", [])],
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no document of limits ({type(error).__name__}: {error})") from None

    def copy(self) -> StoredUse:
        return StoredUse(
            self.key, dict(self.slots), dict(self.flights), dict(self.times), self.clock, list(self.tickets)
        )

    def prune(self, now: float, timing: Timing) -> None:
        """Drop what does not count any more."""
        self.slots = {slot: use for slot, use in self.slots.items() if timing.counts_until(slot) > now}
        self.flights = {name: each for name, each in self.flights.items() if max(each.until, each.wants_until) > now}
        self.tickets = [each for each in self.tickets if each.until > now]
        self.times = {tenant: each for tenant, each in self.times.items() if each > self.clock - LAG_MAX}

    def charge(self, slot: int, requests: float, cost: float) -> None:
        """Add to a slot; negative numbers take from it, but never more than it has."""
        before = self.slots.get(slot, (0, 0))
        self.slots[slot] = max(0, before[0] + requests), max(0, before[1] + cost)

    def used(self, now: float, timing: Timing) -> tuple[float, float]:
        """Return the requests and the cost that count."""
        counting = [use for slot, use in self.slots.items() if timing.counts_until(slot) > now]
        return sum(each[0] for each in counting), sum(each[1] for each in counting)

    def room_at(self, requests: float, cost: float, timing: Timing) -> float:
        """Return when so many requests and so much cost will not count any more; infinity if never."""
        at = 0.0
        for slot in sorted(self.slots):
            if requests <= 0 and cost <= 0:
                return at
            requests, cost = requests - self.slots[slot][0], cost - self.slots[slot][1]
            at = timing.counts_until(slot)
        return at if requests <= 0 and cost <= 0 else math.inf

    def in_flight(self, now: float) -> int:
        """Return how many calls are in flight, over all processes."""
        return sum(each.held for each in self.flights.values() if each.until > now)

    def ttl_s(self, now: float, timing: Timing) -> int:
        """Return for how long the document must be kept if it is not written again."""
        leases = [max(each.until, each.wants_until) - now for each in self.flights.values()]
        return math.ceil(max([timing.window_s + 2 * timing.guard_s + timing.slot_s, *leases])) + TTL_MARGIN_S


def _short(value: float) -> float:
    return int(value) if value == int(value) else round(value, 9)
