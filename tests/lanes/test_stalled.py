"""Stalled lanes are found and repaired."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

import aiqueue
from aiqueue.lanes.stalled import RENEWALS_MAX
from aiqueue.worker.session import Session

from ..support import Eventually

pytestmark = pytest.mark.families("agent.tasks")


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiqueue.lanes.stalled.CHECK_EVERY_S", 0.2)
    monkeypatch.setattr("aiqueue.lanes.stalled.QUIET_S", 0.6)


class NoSubscriptions(dict[int, Any]):
    """In place of a client's table of subscriptions: it takes no entry."""

    def __setitem__(self, key: int, value: Any) -> None:
        pass


def worker() -> aiqueue.Worker:
    made = aiqueue.Worker(concurrency=4)

    @made.handle(Ping)
    async def ping(job: aiqueue.Job[Ping]) -> int:
        return job.message.n

    return made


async def runs_a_job(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Ping(n=1), tenant="acme")
    assert await handle.result(25) == 1


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "aiqueue.lanes.stalled"]


async def drop_interest(session: Session) -> None:
    """As if the server had lost the subscription: the worker still relies on its inbox."""
    subscription = session.puller._subscription
    assert subscription is not None
    assert subscription._attached is not None
    await subscription._attached[1].unsubscribe()


async def test_a_worker_whose_inbox_the_server_forgot_pulls_again_on_a_new_one(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker().running(client) as session:
        await runs_a_job(client)
        await drop_interest(session)
        started_at = time.monotonic()
        await runs_a_job(client)
        assert time.monotonic() - started_at < 12  # without: when heartbeats have stayed away for 12.5 s
        await runs_a_job(client)
    (line,) = warnings_in(caplog)
    assert "lane agent.tasks" in line
    assert line.endswith("pulling again, with a new reply subject")


async def test_a_worker_that_stays_stalled_on_a_new_inbox_gets_a_new_connection(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    async with worker().running(client):
        await runs_a_job(client)
        link = client.connection._client
        assert link is not None
        link._callbacks = NoSubscriptions()
        await client.enqueue(Ping(n=2), tenant="acme")  # the stalled client gets it: it is redelivered after its lease
        await eventually(lambda: client.connection._client is not link and client.connection.connected)
        await runs_a_job(client)
    ways = [line.rpartition(", ")[2] for line in warnings_in(caplog)]
    assert ways == ["with a new reply subject", "on a new connection"]


async def test_a_worker_whose_polls_nobody_answers_gets_a_new_connection(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr("aiqueue.lanes.stalled.UNANSWERED_S", 2.0)
    async with worker().running(client) as session:
        await runs_a_job(client)
        link = client.connection._client
        assert link is not None
        link._reply_sid = -1
        await eventually(lambda: session.stalled_watch.unanswered)
        assert session.vitals()["stalled_s"] == 0.0
        await eventually(lambda: client.connection._client is not link and client.connection.connected)
        await runs_a_job(client)
    assert [line.rpartition(", ")[2] for line in warnings_in(caplog)] == ["on a new connection"]


async def test_a_worker_that_cannot_hear_the_server_is_disconnected_and_not_stalled(client: aiqueue.Client) -> None:
    async with worker().running(client) as session:
        watch, now = session.stalled_watch, time.monotonic()
        await watch.stop()
        watch.stalled_since, watch._checked_at, watch._polled = now - 50, now, lambda: now
        assert watch._can_hear(now + 0.5)
        assert [watch._can_hear(now + 5.0 * each) for each in range(1, 7)] == [True] * 4 + [False] * 2
        found = session.vitals()
        assert (found["state"], found["stalled_s"]) == ("disconnected", 0.0)
        assert watch.stalled_since == now - 40  # the last two steps do not count
        watch._polled = lambda: now + 30
        assert watch._can_hear(now + 30.5)
        assert session.vitals()["state"] == "stalled"


async def test_a_worker_that_new_connections_have_not_helped_is_stalled_and_is_replaced(client: aiqueue.Client) -> None:
    async with worker().running(client) as session:
        watch, now = session.stalled_watch, time.monotonic()
        await watch.stop()
        watch._polled, watch._heard_at = lambda: now, now
        watch._unheard_s, watch._checked_at, watch._repaired_at = 100.0, now, now
        states = []
        for watch._repairs in (RENEWALS_MAX, RENEWALS_MAX + 1):
            await watch._check()
            states.append(session.vitals()["state"])
        assert states == ["disconnected", "stalled"]


async def test_a_worker_whose_process_was_suspended_is_not_taken_for_stalled(client: aiqueue.Client) -> None:
    async with worker().running(client) as session:
        watch, now = session.stalled_watch, time.monotonic()
        await watch.stop()
        watch._checked_at, watch._polled = now, lambda: now
        assert watch._can_hear(now + 0.5)
        assert not watch._can_hear(now + 90)  # what was read before is old
        assert watch._can_hear(now + 90.5)
        assert session.vitals()["state"] == "ok"


async def test_lanes_that_deliver_nothing_for_a_reason_are_not_stalled(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    caplog.set_level(logging.DEBUG, "aiqueue.lanes.stalled")
    release = asyncio.Event()
    busy = aiqueue.Worker(concurrency=4)

    @busy.handle(Ping)
    async def ping(job: aiqueue.Job[Ping]) -> None:
        await release.wait()

    async with busy.running(client) as session:
        handle = await client.enqueue(Ping(), tenant="acme")  # in flight for long
        await eventually(lambda: session.running == 1)
        until = "2999-01-01T00:00:00Z"
        await eventually(lambda: len(list(session.puller.lanes)) == 1)
        config = client.topology.family("agent.tasks").lane_config("globex", "normal")
        where = "AI_AGENT_TASKS.globex-normal"
        request = {"stream_name": "AI_AGENT_TASKS", "config": config, "action": "create"}
        await client.connection.api(f"CONSUMER.CREATE.{where}.{config['filter_subject']}", request)
        await client.connection.api(f"CONSUMER.PAUSE.{where}", {"pause_until": until})
        await client.enqueue(Ping(), tenant="globex")
        await eventually(lambda: len(session.stalled_watch._cleared) == 2)
        await asyncio.sleep(0.5)  # a second look at both would be under way
        assert session.stalled_watch.stalled_since is None
        release.set()
        assert await handle.result(25) is None
    assert not warnings_in(caplog)
