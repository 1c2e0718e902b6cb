"""A process that spends a tenant's budget, call by call, until SIGTERM: run and killed by test_budgets.

It is a child of this program, which forks another one when it was killed. What its predecessor had under way stands in
its notes, one line a step, as the journal of a job would tell it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path

import aiqueue.client
import aiqueue.connection
from aiqueue.gateway import Budget, Budgets, BudgetSpent, UsageLedger, UsageRecord, UsageStore

AMOUNT = 100


def note(file: Path, **told: object) -> None:
    """Append a line for good: a kill comes before it or after it."""
    with file.open("ab", buffering=0) as log:
        log.write(json.dumps(told).encode() + b"\n")


async def spend(generation: int) -> None:
    url, user, password, tenant, limit, log, number = sys.argv[1:]
    parent = os.getppid()
    notes = Path(f"{log}.{number}")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    note(Path(f"{log}.{number}.pids"), pid=os.getpid())  # it heeds SIGTERM from now on
    chance = random.Random(f"{number}/{generation}")
    async with aiqueue.client.connect(url, user=user, password=password) as client:
        store = UsageStore(client.connection, client.topology)
        ledger = UsageLedger(store)
        budgets = Budgets(store, ledger, [Budget(tenant, int(limit))])

        async def record(call: str, at: float, cost: int | None) -> None:
            told = {"job_id": call, "request_id": call, "tenant": tenant, "model": "m", "provider": "p"}
            outcome = "ok" if cost is not None else "possibly_billed"
            standing = await ledger.record(
                UsageRecord(
                    call_id=call, **told, started_at=at, outcome=outcome, cost_micros=cost, reserved_micros=AMOUNT
                )
            )
            if standing.outcome == "possibly_billed":
                await budgets.hold(tenant, call)
            else:
                await budgets.settle(tenant, call, standing.charged_micros)
            note(notes, call=call, step="done")

        steps = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        latest = {each["call"]: each for each in steps}
        for call, each in latest.items():
            if each["step"] == "done":
                continue
            found = await ledger.find(tenant, call)
            if each["step"] == "begun":
                await budgets.release(tenant, call)
                note(notes, call=call, step="done")
            else:
                await record(call, each["at"], found.cost_micros if found is not None else None)
        count = 0
        while not stop.is_set() and os.getppid() == parent:
            count += 1
            call = f"{number}-{generation}-{count}"
            note(notes, call=call, step="begun")
            try:
                reservation = await budgets.reserve(tenant, call, AMOUNT)
            except BudgetSpent:
                note(notes, call=call, step="done")
                await asyncio.sleep(0.01)
                continue
            assert reservation is not None
            note(notes, call=call, step="called", at=reservation.at)
            cost = chance.randint(0, AMOUNT)
            note(Path(log), call=call, cost=cost)  # the provider's own log
            await asyncio.sleep(0.002)
            await record(call, reservation.at, cost)
        await budgets.close()


if __name__ == "__main__":
    for generation in itertools.count():
        pid = os.fork()
        if not pid:
            asyncio.run(spend(generation))
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(abs(status))
