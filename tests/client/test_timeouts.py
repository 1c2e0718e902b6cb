"""The error of an awaited job that has not ended in time says why: quickly, once a lane, and only with the rights."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.client import timeouts
from aiqueue.errors import ResultTimeout, details
from aiqueue.subjects import Lane

from ..connection.test_permissions import documented, two, user
from ..inspect.explaining import Hold, announce, holder, make_why
from ..support import Account, Eventually, NatsProcess


async def timeout_of(handle: aiqueue.Handle[Any], seconds: float = 0.2) -> ResultTimeout:
    with pytest.raises(ResultTimeout) as caught:
        await handle.result(seconds)
    return caught.value


async def test_a_timeout_says_why_the_job_waits_and_what_to_do(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    started_at = time.monotonic()
    error = await timeout_of(handle)
    assert time.monotonic() - started_at < 0.5 + 0.2
    assert str(error) == (
        f"timed out after 0.2 s waiting for the result of job {handle.id}: "
        "no worker of agent.tasks is running: run one that handles agent.tasks: `aiqueue work MODULE:WORKER`"
    )
    assert (error.reason, error.retryable) == ("no_worker", True)
    assert "no worker is alive" in error.evidence
    assert details(error)["reason"] == "no_worker"
    with pytest.raises(ResultTimeout) as caught:
        async for _ in (await client.enqueue(Hold(), tenant="globex")).stream(timeout=0.1):
            pass
    assert caught.value.reason == "no_worker"


@pytest.mark.parametrize(("options", "reason"), [({"delay": "1h"}, "delay"), ({}, "running")])
async def test_a_delayed_job_and_a_running_one(client: aiqueue.Client, options: dict[str, Any], reason: str) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with holder(entered, left).running(client):
        handle = await client.enqueue(Hold(), tenant="acme", **options)
        if not options:
            await entered.wait()
        assert (await timeout_of(handle)).reason == reason
        left.set()


async def test_a_delayed_job_and_one_in_its_lane_of_a_paused_family(client: aiqueue.Client) -> None:
    await client.pause("agent.tasks", by="anna")
    error = await timeout_of(await client.enqueue(Hold(), tenant="acme", delay="1h"))
    assert error.reason == "delay"
    assert "it is paused, so first `aiqueue resume agent.tasks`; then `aiqueue reschedule " in str(error)
    assert (await timeout_of(await client.enqueue(Hold(), tenant="acme"))).reason == "paused"


async def test_the_first_timeout_of_a_program_has_a_reason_however_long_its_imports_take(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reader = timeouts.TimeoutReasons._reader

    def slow(reasons: timeouts.TimeoutReasons) -> Any:
        time.sleep(2 * timeouts.EXPLAIN_S)  # as an import on a busy machine
        return make_reader(reasons)

    monkeypatch.setattr(timeouts.TimeoutReasons, "_reader", slow)
    assert (await timeout_of(await client.enqueue(Hold(), tenant="acme", delay="1h"))).reason == "delay"


async def test_a_job_that_waits_in_another_lane_or_once_more_is_not_said_to_be_gone(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    moved = await client.enqueue(Hold(), tenant="acme", priority="low")
    await client.jobs.act(await client.jobs.plan("move", to="high"))
    assert (await timeout_of(moved)).reason == "no_worker"
    failing = aiqueue.Worker(tenants=["globex"])

    @failing.handle(Hold, retry=aiqueue.Backoff(attempts=2, first=3600, cap=3600, jitter=0))
    async def hold(job: aiqueue.Job[Hold]) -> None:
        raise ValueError("try later")

    async with failing.running(client):
        retried = await client.enqueue(Hold(), tenant="globex")

        async def waits_for_its_next_attempt() -> None:
            assert (await retried.status()).state == "retrying"

        await eventually(waits_for_its_next_attempt)
    elsewhere = aiqueue.Worker(tenants=["nobody"])
    elsewhere.handle(Hold)(hold)
    async with elsewhere.running(client):  # it forwards parked jobs of all tenants
        await retried.run_now()

        async def is_in_its_lane() -> None:
            assert (await retried.status()).state == "queued"

        await eventually(is_in_its_lane)
        error = await timeout_of(retried)
    assert "not stored" not in str(error)


async def test_many_waiters_of_a_lane_ask_once(client: aiqueue.Client, account: Account) -> None:
    await announce(client)
    handles = [
        each async for each in client.enqueue_many([Hold(n=n) for n in range(100)], tenant="acme")
        if isinstance(each, aiqueue.Handle)
    ]  # fmt: skip
    asked: list[str] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as other:
        await other.connection.subscribe("$JS.API.>", lambda message: asked.append(message.subject))
        await other.connection.flush()
        errors = await asyncio.gather(*(timeout_of(each, 0.5) for each in handles))
        await other.connection.flush()
    assert {each.reason for each in errors} == {"turn"}
    assert sum("CONSUMER.LIST.AI_AGENT_TASKS" in each for each in asked) == 1
    assert sum("DIRECT.GET.KV_AI_PRESENCE" in each for each in asked) <= 3  # records, pauses
    assert sum("CONSUMER.INFO" in each for each in asked) <= 2


async def test_waiters_of_many_lanes_read_the_workers_and_the_pauses_once(
    client: aiqueue.Client, account: Account
) -> None:
    """Each lane read all of them by itself, and a thousand lanes kept them a thousand times."""
    await announce(client)
    handles = [await client.enqueue(Hold(), tenant=f"tenant-{n}") for n in range(20)]
    asked: list[str] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as other:

        def on_request(message: Any) -> None:
            if "DIRECT.GET.KV_AI_PRESENCE" in message.subject and b".worker.*" in message.data:
                asked.append(message.subject)

        await other.connection.subscribe("$JS.API.>", on_request)
        await other.connection.flush()
        errors = await asyncio.gather(*(timeout_of(each, 0.5) for each in handles))
        await other.connection.flush()
    assert {each.reason for each in errors} <= {"turn", ""}
    assert len(asked) == 1


async def test_of_many_lanes_at_once_some_are_asked_and_the_others_wait_for_nothing(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand, none was answered in time, and the errors came seconds late."""
    asked: list[str] = []

    async def slow(_: Any, family: Any, lane: Lane, *__: Any) -> None:
        asked.append(lane.tenant)
        await asyncio.sleep(10)

    monkeypatch.setattr("aiqueue.inspect.lane_evidence.LaneReader.read", slow)
    handles = [await client.enqueue(Hold(), tenant=f"tenant-{n}") for n in range(3 * timeouts.LANES_AT_ONCE)]
    errors = await asyncio.gather(*(timeout_of(each) for each in handles))
    assert {each.reason for each in errors} == {""}
    assert 0 < len(asked) <= timeouts.LANES_AT_ONCE


async def test_an_error_whose_reason_cannot_be_known_in_time_names_the_command_that_tells(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: Any) -> None:
        await asyncio.sleep(10)

    monkeypatch.setattr("aiqueue.inspect.lane_evidence.LaneReader.read", slow)
    handle = await client.enqueue(Hold(), tenant="acme")
    started_at = time.monotonic()
    error = await timeout_of(handle)
    assert time.monotonic() - started_at < 0.2 + timeouts.EXPLAIN_S + 0.1
    text = f"timed out after 0.2 s waiting for the result of job {handle.id}: `aiqueue explain {handle.id}` says why"
    assert (str(error), error.reason) == (text, "")


async def test_without_the_rights_the_reason_is_left_out_and_nothing_is_logged(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ("a plain publisher of one tenant", "a producer with aiqueue", "if the user waits for results")
    server: NatsProcess = own_server(
        f"authorization {{ users: [ {{ user: all, password: p }}, {user('less', *documented(*rows))} ] }}"
    )
    async with two(server) as (_, less):
        for _ in range(2):
            error = await timeout_of(await less.enqueue(Hold(), tenant="acme"))
            assert error.reason == ""
            assert str(error).endswith(f"of job {str(error).split()[-1]}")
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_enqueue_wait_says_why(client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    make_why(account, monkeypatch)
    arguments = ["enqueue", "hold", "{}", "--tenant", "acme", "--wait", "--timeout", "0.2"]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert done.exit_code == 1
    assert "no worker of agent.tasks is running: run one" in done.stderr
    done = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--json"])
    assert json.loads(done.stdout)["waits_for"] == "no_worker"
