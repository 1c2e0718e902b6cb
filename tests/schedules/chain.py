"""What the tests of the chain share: schedules that are stored, and the jobs that are in the stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiqueue
from aiqueue import headers
from aiqueue.payload import encode_message
from aiqueue.schedules import Every, Recurrence, ScheduleDocument, Schedules, ScheduleSpec, Ticker

from ..support import Account

FAMILY = "agent.tasks"


class Task(aiqueue.Message, kind="task"):
    n: int = 0


BODY = encode_message(Task(n=1))


def hourly() -> Every:
    """Ticks an hour apart, of which none is near the time of the test."""
    return Every("1h", starting=round(time.time()) % 3_600 + 1_800.0)


def spec(schedule_id: str = "report", recurrence: Recurrence | None = None, **more: Any) -> ScheduleSpec:
    fields = {"tenant": "acme", "family": FAMILY, "kind": "task", "body": BODY, **more}
    return ScheduleSpec(id=schedule_id, recurrence=recurrence or Every("1h"), **fields)


def schedules_of(client: aiqueue.Client) -> Schedules:
    return Schedules(client.connection, client.topology, client.key_lanes)


@contextlib.asynccontextmanager
async def ticking(
    account: Account | None, client: aiqueue.Client | None = None, **options: Any
) -> AsyncIterator[Ticker]:
    """A ticker on a connection of its own, or on a client's."""
    async with contextlib.AsyncExitStack() as stack:
        if client is None:
            assert account is not None
            client = await stack.enter_async_context(
                aiqueue.connect(account.url, user=account.user, password=account.password)
            )
        ticker = Ticker(client.connection, client.topology, client.key_lanes, **options)
        await ticker.start()
        try:
            yield ticker
        finally:
            await ticker.stop()


async def jobs(client: aiqueue.Client, tenant: str = "acme", family: str = FAMILY) -> list[tuple[str, float]]:
    """The schedule and the tick of each job that is stored, in the order of the stream."""
    stream = client.topology.family(family).stream
    read = client.connection.read(stream, f"ai.{family}.{tenant}.>")
    return [(each.headers[headers.SCHEDULED_BY], float(each.headers[headers.SCHEDULED_FOR])) async for each in read]


async def make_late(client: aiqueue.Client, added: ScheduleDocument, late_s: float, **changes: Any) -> ScheduleDocument:
    """Have a schedule's next tick be the newest that is at least so late, as if no worker had been there since then."""
    schedules = schedules_of(client)
    await schedules.ticks.unpark(added)
    tick = added.recurrence.latest_before(time.time() - late_s, 1)[0]
    stored = await schedules.store.put(replace(added, next_ms=round(tick * 1000), **changes))
    await schedules.ticks.park(stored)
    return stored
