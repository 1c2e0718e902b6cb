"""Scenarios of money: what is paid while workers are killed, and what a budget admits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aiqueue import headers
from aiqueue.errors import AIQueueError
from aiqueue.gateway import Budgets, BudgetStats, Price, UsageLedger, month_of

from ..limiting.judge import most_open
from ..scenarios import Finding, told
from . import judge
from .bench import FAMILY, Asked, Ground, Setting, ground

PRICE = 1.0, 2.0
FALSE_MOST = 0.05
STREAMED = 4  # each fourth request is streamed
ADMITTED, AT_ONCE = 10, 50
TOKENS = 20


async def kills(asked: Asked) -> list[Finding]:
    """2,000 requests while a worker is killed every 2 s: all are answered, and every call is accounted for."""
    setting = Setting(budgets=['tenant = "a"\nmonth = 1_000'], price=PRICE, first_token_s=0.05, token_s=0.01)
    async with ground(asked, setting) as here:
        requests = [here.request(tokens=(5, 35), stream=n % STREAMED == 0) for n in range(asked.requests)]
        handles = await here.fill(requests)
        here.harm("worker-kill:2")
        begun = time.monotonic()
        with told(asked.say, "all answered"):
            answers = await here.answers(handles, 120 + asked.requests / 5)
        took_s = time.monotonic() - begun
        await here.calm()
        shift = time.time() - time.monotonic()
        at = [each.at + shift for each in here.faults]
        left = await here.left()
        budget = await settled(here, "a")
        calls, records = await here.calls(), await here.records()
        users = {str(each.request_id): str(each.user) for each in requests}
        whole = [each for each in answers if isinstance(each, dict)]
        stated = {each["aiqueue"]["request_id"]: each["aiqueue"].get("possibly_billed", 0) for each in whole}
        found = judge.accounts(calls, records, users, stated, at, Price.of(*PRICE))
        results = await _results(here)
        again = await here.answers(handles)
        known = [each for each in records if each.outcome != "possibly_billed"]
        held = [each for each in records if each.outcome == "possibly_billed"]
        for name in (
            "early",
            "unstated",
            "overstated",
            "unrecorded",
            "false",
            "invented",
            "wrong_tokens",
            "wrong_cost",
        ):
            if some := getattr(found, name):
                asked.say(f"  {name}: {', '.join(some[:10])}")
        if wrong := [str(each) for each in answers if not isinstance(each, dict)]:
            asked.say(f"  not answered: {'; '.join(wrong[:5])}")
        return [
            Finding("requests", len(requests)),
            Finding("seconds", took_s),
            Finding("kills", len(at), at_least=1),
            Finding("requests without an answer", len(requests) - len(whole), at_most=0),
            Finding("answers that are another one when read again", _differing(answers, again), at_most=0),
            Finding("requests with more results than one", sum(each > 1 for each in results.values()), at_most=0),
            Finding("requests without a call", len(found.uncalled), at_most=0),
            Finding("calls beyond the first of a request", found.extra),
            Finding("of them, not under way at a kill", len(found.early), at_most=0),
            Finding("of them, those that the answer does not state", len(found.unstated), at_most=0),
            Finding("stated, and were none, share", judge.share(found.overstated, found.stated), at_most=FALSE_MOST),
            Finding("calls that are in no record", len(found.unrecorded), at_most=0),
            Finding("records that say possibly billed", found.held),
            Finding("of them, never called, share", judge.share(found.false, found.held), at_most=FALSE_MOST),
            Finding("records of calls that were given up before they were made", found.given_up),
            Finding("records of calls that never were", len(found.invented), at_most=0),
            Finding("records with other tokens than the provider's", len(found.wrong_tokens), at_most=0),
            Finding("records with another cost", len(found.wrong_cost), at_most=0),
            Finding("reported ones without a reservation", sum(not e.reserved_micros for e in held), at_most=0),
            _same("budget: spent, micro-dollars", budget.spent_micros, sum(e.charged_micros for e in known)),
            _same("budget: held, micro-dollars", budget.held_micros, sum(e.reserved_micros for e in held)),
            Finding("budget: reserved still", budget.reserved_micros, at_most=0),
            Finding("jobs left", left, at_most=0),
            Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        ]


def _same(name: str, figure: int, wanted: int) -> Finding:
    return Finding(name, figure, at_least=wanted, at_most=wanted)


async def settled(here: Ground, tenant: str, within_s: float = 15.0) -> BudgetStats:
    """The tenant's budget, once nothing is reserved any more, or so many seconds are over."""
    budgets, end = Budgets(here.store, UsageLedger(here.store)), time.monotonic() + within_s
    while True:
        (found,) = await budgets.stats(month_of(time.time()), tenant)
        if not found.reserved_micros or time.monotonic() > end:
            return found
        await asyncio.sleep(0.2)


def _differing(answers: Sequence[Any], again: Sequence[Any]) -> int:
    return sum(isinstance(a, dict) and a != b for a, b in zip(answers, again, strict=True))


async def _results(here: Ground) -> Counter[str]:
    """Of each request, how many results its journal has."""
    topology, found = here.client.topology, Counter[str]()
    journal = topology.family(FAMILY).journal
    async for stored in here.client.connection.read(topology.journal_stream.name, f"{journal}.>"):
        found[stored.subject] += stored.headers.get(headers.EVENT) == "result"
    return found


async def budget(asked: Asked) -> list[Finding]:
    """50 concurrent requests against a budget that admits 10: 10 run, and not a cent more is spent."""
    most = ADMITTED * TOKENS * 2  # micro-dollars; a prompt costs nothing here, so that reservations are exact
    setting = Setting(
        budgets=[f'tenant = "a"\nmonth = {most / 1e6:f}'], price=(0.0, 2.0), slots=AT_ONCE, first_token_s=2.0
    )
    async with ground(asked, setting) as here:
        handles = await here.fill([here.request(tokens=TOKENS) for _ in range(AT_ONCE)])
        answers = await here.answers(handles)
        calls = [each for each in await here.calls() if each.outcome != "refused"]
        stats = await settled(here, "a")
        refused = [each for each in answers if isinstance(each, AIQueueError)]
        asked.say(f"  a refusal: {refused[0] if refused else 'none'}")
        spent = sum(each.completion_tokens * 2 for each in calls)
        return [
            Finding("requests answered", len(answers) - len(refused), at_least=ADMITTED, at_most=ADMITTED),
            Finding(
                "refused with the budget as the reason",
                sum("budget of" in str(each) for each in refused),
                at_least=AT_ONCE - ADMITTED,
            ),
            Finding("calls of the provider", len(calls), at_least=ADMITTED, at_most=ADMITTED),
            Finding("at once", most_open([each for each in await here.judged() if each.status == 200])),
            Finding("spent by the provider's count, micro-dollars", spent, at_most=most),
            _same("spent by the budget, micro-dollars", stats.spent_micros, spent),
            Finding("held or reserved still, micro-dollars", stats.held_micros + stats.reserved_micros, at_most=0),
        ]
