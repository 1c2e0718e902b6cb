"""Outputs of the demos."""

from __future__ import annotations

from typing import Any, TypedDict

from ...gateway import BudgetStats
from ...inspect import FamilyStats
from .jobs import DeadLetterJson
from .products import UsageTotalJson


class MeasuredJson(TypedDict):
    """What jobs of the demo did."""

    enqueued: int
    """How many jobs were stored."""
    succeeded: int
    """How many jobs succeeded."""
    dead: int
    """How many jobs are dead letters."""
    retries: int
    """How many attempts were tried again."""
    replays: int
    """How many dead letters were replayed."""
    wait_ms: float | None
    """Median of the wait in milliseconds; null: none was measured."""
    run_ms: float | None
    """Median of the run in milliseconds; null: none was measured."""
    run_s: float
    """Seconds that the jobs ran, together."""
    span_s: float
    """Seconds from the first job's storing to the last one's end."""
    per_s: float | None
    """Jobs a second in this time; null: it is too short."""


class DemoRowJson(MeasuredJson):
    """What the jobs of a tenant and family did."""

    tenant: str
    family: str


class DemoJson(TypedDict):
    """The report of the demo."""

    ok: bool
    """Whether all jobs succeeded, and no dead letter is left."""
    documents: int
    """How many files were processed."""
    jobs: list[DemoRowJson]
    """One for each tenant and family."""
    total: MeasuredJson
    """The same of all jobs."""
    missing: list[str]
    """A line for each job that is not known to have succeeded."""
    dead_letters: list[DeadLetterJson]
    """Dead letters that there were."""
    dead_letters_left: int
    """How many dead letters were left after their replay."""
    findings: list[dict[str, Any]]
    """What the analyses of each tenant's documents found."""
    families: list[FamilyStats]
    """The families when all was done."""
    fed_per_s: float | None
    """Files a second that were enqueued; null: not measured."""
    paced: bool
    """Whether the files were enqueued slowly, to be watched."""
    seconds: float
    """Seconds that the demo took."""
    kept: str | None
    """With --keep: directory of the server's data; null: they are deleted."""


class GatewayDemoJson(TypedDict):
    """The report of the gateway's demo."""

    ok: bool
    """Whether all was answered and the bill adds up."""
    requests: int
    """How many requests were made."""
    answered: int
    """How many of them were answered."""
    calls: int
    """Calls that the provider took."""
    refused: int
    """Calls that the provider refused, as it was told to."""
    unrecorded: int
    """Calls that stand in no record."""
    wrong: int
    """Calls whose record says another cost than the provider."""
    possibly_billed: int
    """Calls whose end is not known, so that the provider may bill them."""
    billed_micros: int
    """What the provider bills, in micro-dollars."""
    recorded_micros: int
    """Cost of the calls whose end is known, in micro-dollars."""
    lost_micros: int
    """What the provider bills for calls whose end is not known, in micro-dollars."""
    held_micros: int
    """What is held for these, in micro-dollars."""
    budget_spent_micros: int
    """What the budgets say is spent, in micro-dollars."""
    budget_held_micros: int
    """What the budgets say is held, in micro-dollars."""
    totals: list[UsageTotalJson]
    """Usage by tenant, day and model."""
    budgets: list[BudgetStats]
    """Budgets of the tenants."""
    seconds: float
    """Seconds that the demo took."""
    kept: str | None
    """With --keep: directory of the server's data; null: they are deleted."""
