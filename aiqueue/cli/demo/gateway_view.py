"""What `aiqueue gateway demo` shows: the progress of its requests, and a bill that is compared with the provider's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from ...gateway import BudgetStats, ModelConfig, UsageRecord, UsageTotal, format_usd
from .view import Screen, plain_table

if TYPE_CHECKING:
    from ...gateway import standin

Place = tuple[str, str]  # tenant and model


class CallBoard:
    """The progress of requests by tenant and model; a `Board`. `calls`: the provider's log, as it grows."""

    def __init__(self, calls: Sequence[standin.LoggedCall]) -> None:
        self._calls = calls
        self._expected: Counter[Place] = Counter()
        self._answers: Counter[Place] = Counter()
        self._failed: Counter[Place] = Counter()
        self.stated = 0  # calls that the answers say may have been billed besides

    @staticmethod
    def total(counts: Mapping[Place, int]) -> int:
        return sum(counts.values())

    def expect(self, tenant: str, model: str) -> None:
        """Count a request that is enqueued."""
        self._expected[tenant, model] += 1

    def answer(self, tenant: str, model: str, answer: dict[str, Any]) -> None:
        """Count its answer."""
        self._answers[tenant, model] += 1
        self.stated += answer["aiqueue"].get("possibly_billed", 0)

    def fail(self, tenant: str, model: str) -> None:
        """Count a request that is not answered."""
        self._failed[tenant, model] += 1

    @property
    def requests(self) -> int:
        return self._expected.total()

    @property
    def answered(self) -> int:
        return self._answers.total()

    @property
    def running(self) -> int:
        return sum(each.outcome == "running" for each in self._calls)

    @property
    def is_done(self) -> bool:
        return self._answers.total() + self._failed.total() == self._expected.total()

    def describe(self) -> str:
        """See `Board`."""
        return f"{self.answered} of {self.requests} requests answered, {len(self._calls)} calls of the provider"

    def draw(self) -> RenderableType:
        """See `Board`."""
        table = plain_table("")
        for name in ("tenant", "model"):
            table.add_column(name, no_wrap=True)
        for name in ("requests", "waiting", "called", "answered"):
            table.add_column(name, justify="right", min_width=8)
        running = Counter(
            (each.user.partition("-")[0], each.model) for each in self._calls if each.outcome == "running"
        )
        for place, count in self._expected.items():
            done = self._answers[place] + self._failed[place]
            called = min(running[place], count - done)
            table.add_row(*place, *_cells(count, count - done - called, called, self._answers[place]))
        refused = sum(each.outcome == "refused" for each in self._calls)
        caption = f"the provider's log: {len(self._calls)} calls, {refused} refused"
        return Padding(Group(table, Text(caption, style="dim")), (1, 0, 0, 1))


def _cells(*counts: int) -> list[Text]:
    styles = ("", "yellow", "cyan", "green")
    return [Text(f"{count:,}", style=style if count else "dim") for count, style in zip(counts, styles, strict=True)]


@dataclass(frozen=True)
class DemoBill:
    """What the provider bills by its own log, and what the ledger and the budgets say. Amounts are micro-dollars.

    - `calls`: of the provider, without the `refused` ones. `unrecorded`: of them, those that stand in no record.
    - `recorded_micros`: the cost of the calls whose end is known. `lost_micros`: what the provider bills for those that
      are reported as possibly billed, for which `held_micros` are held.
    """

    requests: int
    answered: int
    calls: int
    refused: int
    unrecorded: int
    wrong: int
    possibly_billed: int
    billed_micros: int
    recorded_micros: int
    lost_micros: int
    held_micros: int
    budget_spent_micros: int
    budget_held_micros: int

    @classmethod
    def of(
        cls, board: CallBoard, calls: Sequence[standin.LoggedCall], records: Sequence[UsageRecord],
        budgets: Sequence[BudgetStats], models: Mapping[str, ModelConfig],
    ) -> Self:  # fmt: skip
        """Compare them. A call has its record's id as its Idempotency-Key."""
        costs: dict[str, int] = {}
        for call in calls:
            price = models[call.model].price
            if call.outcome != "refused" and price is not None:
                costs[call.idempotency_key] = price.cost_micros(call.prompt_tokens, call.completion_tokens)
        known = {each.call_id: each.cost_micros or 0 for each in records if each.outcome == "ok"}
        held = {each.call_id: each.reserved_micros for each in records if each.outcome == "possibly_billed"}
        return cls(
            requests=board.requests, answered=board.answered, calls=len(costs),
            refused=sum(each.outcome == "refused" for each in calls),
            unrecorded=len(costs.keys() - known.keys() - held.keys()),
            wrong=sum(costs.get(each) != cost for each, cost in known.items()),
            possibly_billed=len(held), billed_micros=sum(costs.values()), recorded_micros=sum(known.values()),
            lost_micros=sum(costs.get(each, 0) for each in held), held_micros=sum(held.values()),
            budget_spent_micros=sum(each.spent_micros for each in budgets),
            budget_held_micros=sum(each.held_micros for each in budgets),
        )  # fmt: skip

    @property
    def is_right(self) -> bool:
        """Whether all is answered, recorded and charged as the provider bills it."""
        adds_up = self.billed_micros == self.recorded_micros + self.lost_micros and not self.unrecorded + self.wrong
        is_charged = (self.budget_spent_micros, self.budget_held_micros) == (self.recorded_micros, self.held_micros)
        return self.answered == self.requests and adds_up and is_charged

    def describe(self) -> list[tuple[str, str]]:
        """Return the final lines and their styles."""
        bill, known, lost, held = map(
            format_usd, (self.billed_micros, self.recorded_micros, self.lost_micros, self.held_micros)
        )
        served = (
            f"{self.requests} requests, {self.answered} answers. The provider's log: {self.calls} calls served, "
            f"{self.refused} refused."
        )
        paid = (
            f"The provider bills {bill} = {known} for answers + {lost} for {self.possibly_billed} calls under "
            f"way at the kill, which are reported as possibly billed, and {held} is held for them. "
            + ("The bill adds up." if self.is_right else "The bill is wrong!")
        )
        lines = [(served, "bold"), (paid, "bold green" if self.is_right else "bold red")]
        if not self.is_right:
            lines.append((f"These are the figures: {self}", "red"))
        return lines


def show(screen: Screen, totals: Sequence[UsageTotal], budgets: Sequence[BudgetStats]) -> None:
    """Print what `aiqueue gateway usage` shows."""
    usage = plain_table("aiqueue gateway usage")
    for name in ("tenant", "model"):
        usage.add_column(name, no_wrap=True)
    for name in ("calls", "prompt", "completion", "cost", "held"):
        usage.add_column(name, justify="right")
    for each in totals:
        sums = each.sums
        counts = (f"{count:,}" for count in (sums.calls, sums.prompt_tokens, sums.completion_tokens))
        held = format_usd(sums.held_micros) if sums.possibly_billed else ""
        usage.add_row(each.tenant, each.model, *counts, format_usd(sums.cost_micros), held)
    left = plain_table("Budgets")
    left.add_column("tenant", no_wrap=True)
    for name in ("month", "left", "spent", "held"):
        left.add_column(name, justify="right")
    for stats in budgets:
        amounts = (stats.limit_micros, stats.limit_micros - stats.charged_micros, stats.spent_micros, stats.held_micros)
        left.add_row(stats.tenant, *map(format_usd, amounts))
    screen.show(usage, left)
