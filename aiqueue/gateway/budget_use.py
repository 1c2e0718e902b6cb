"""The use of a tenant's budget of one month, as it is stored. Pure: no server, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

CALLS_MAX = 5_000  # reserved and possibly billed ones: some 250 KB
CALL_S_MAX = 26 * 3600  # longer than any call or batch: both take a day at most


class ChargedCall(NamedTuple):
    """A call that is not settled. `at`: when it was reserved, in whole seconds since the epoch.

    `held`: it was possibly billed, and nobody knows what it has cost.
    """

    amount: int
    at: int
    held: bool


@dataclass(slots=True)
class BudgetUse:
    """What a tenant has spent in a month, and the calls that are not settled, by hashed call id. In micro-dollars.

    `reserved` and `held` are the sums over `calls`. `limit`: the budget that the last writer knew.
    """

    spent: int = 0
    limit: int = 0
    calls: dict[str, ChargedCall] = field(default_factory=dict)
    reserved: int = 0
    held: int = 0

    @property
    def charged(self) -> int:
        """What counts against the budget."""
        return self.spent + self.reserved + self.held

    def copy(self) -> BudgetUse:
        return BudgetUse(self.spent, self.limit, dict(self.calls), self.reserved, self.held)

    def reserve(
        self, call: str, amount: int, at: float, limit: int, pool: str = ""
    ) -> Literal["reserved", "known", "spent", "full"]:
        """Reserve for a call, if the budget admits it. "known": the call is here already, with its former amount.

        `pool`: a call that has reserved for others, such as a batch: as far as it has, the amount is taken from it.
        """
        if call in self.calls:
            return "known"
        aside = self.calls.get(pool)
        taken = 0 if aside is None or aside.held else min(aside.amount, amount)
        if self.charged - taken + amount > limit:
            self.hold_old(at)
            return "spent"
        if len(self.calls) >= CALLS_MAX and not self._forget_held():
            return "full"
        if aside is not None and taken:
            self.calls[pool] = aside._replace(amount=aside.amount - taken)
            self.reserved -= taken
        self.calls[call] = ChargedCall(amount, int(at), held=False)
        self.reserved += amount
        self.limit = limit
        return "reserved"

    def settle(self, call: str, cost: int) -> bool:
        """Charge what a call has cost, in place of its reservation. False: the call is not here (any more)."""
        if not self.release(call):
            return False
        self.spent += cost
        return True

    def release(self, call: str) -> bool:
        """Drop a call that costs nothing. False: it is not here (any more)."""
        known = self.calls.pop(call, None)
        if known is None:
            return False
        if known.held:
            self.held -= known.amount
        else:
            self.reserved -= known.amount
        return True

    def hold(self, call: str) -> bool:
        """Charge the reservation of a possibly billed call until `settle` or `release`. False: nothing changes."""
        known = self.calls.get(call)
        if known is None or known.held:
            return False
        self.calls[call] = known._replace(held=True)
        self.reserved -= known.amount
        self.held += known.amount
        return True

    def hold_old(self, now: float) -> None:
        """Hold reservations that are older than any call: nobody is left who settles them. `now`: since the epoch."""
        for call in [call for call, each in self.calls.items() if now - each.at > CALL_S_MAX]:
            self.hold(call)

    def _forget_held(self) -> bool:
        """Count the oldest possibly billed call as spent for ever. False: there is none."""
        held = [(each.at, call) for call, each in self.calls.items() if each.held]
        return bool(held) and self.settle(min(held)[1], self.calls[min(held)[1]].amount)

    def plain(self) -> dict[str, Any]:
        """Return the use as it is stored, in JSON."""
        calls = {call: [each.amount, each.at, int(each.held)] for call, each in self.calls.items()}
        return {"spent": self.spent, "limit": self.limit, "calls": calls}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Self:
        """Read what is stored. Raises ValueError, TypeError, KeyError, AttributeError for anything else."""
        use = cls(_amount(plain["spent"]), _amount(plain["limit"]))
        for call, (amount, at, held) in plain["calls"].items():
            use.calls[call] = known = ChargedCall(_amount(amount), _amount(at), held=bool(held))
            if known.held:
                use.held += known.amount
            else:
                use.reserved += known.amount
        return use


def _amount(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} is no amount")
    return value
