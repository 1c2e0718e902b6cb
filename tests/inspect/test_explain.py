"""Each reason for which a job waits, made true on a real server, and named by `explain`, in text and in JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers, subjects
from aiqueue.cli.app import app
from aiqueue.enqueue import Forwarder
from aiqueue.errors import NotFound, QueueFull
from aiqueue.gateway.budget_use import BudgetUse
from aiqueue.gateway.budgets import Budget, BudgetSpent
from aiqueue.inspect import lane_scan, worker_stats
from aiqueue.worker import overflow, unknown_kinds

from ..enqueue.test_full import DISK, opened
from ..support import Account, NatsProcess, eventually
from .explaining import FAMILY, STREAM, Hold, Other, Why, announce, holder, make_consumer, make_why, take, why

__all__ = ["why"]


async def held(client: aiqueue.Client, entered: asyncio.Event) -> aiqueue.Handle[Any]:
    handle = await client.enqueue(Hold(), tenant="acme")
    await entered.wait()
    return handle


async def test_no_worker(client: aiqueue.Client, why: Why) -> None:
    await client.enqueue(Hold(), tenant="acme")
    handle = await client.enqueue(Hold(), tenant="acme")
    found = await why(handle)
    assert (found["reason"], found["state"], found["family"], found["tenant"]) == (
        "no_worker", "queued", FAMILY, "acme",
    )  # fmt: skip
    assert found["text"] == "no worker of agent.tasks is running"
    assert "1 job of its lane is before it" in found["evidence"]
    assert found["unknown"] == []
    await announce(client, families=["rag.ingest"], kinds={"rag.ingest": ["x"]})
    found = await why(handle)
    assert found["reason"] == "no_worker"
    assert "1 worker of other families: none serves it" in found["evidence"]


async def test_no_worker_takes_the_tenant(client: aiqueue.Client, why: Why) -> None:
    await announce(client, tenants=["globex", "initech"])
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert found["reason"] == "no_worker_for_tenant"
    assert "1 worker serves globex, initech" in found["evidence"][0]


async def test_its_workers_drain(client: aiqueue.Client, why: Why) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    run = holder(entered, left).running(client)
    await run.__aenter__()
    running = await held(client, entered)
    leaving = asyncio.create_task(run.__aexit__(None, None, None))

    async def drains() -> bool:
        return [each.state for each in await client.workers()] == ["draining"]

    await eventually(drains)
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert (found["reason"], "one" in found["text"]) == ("workers_draining", True)
    assert (await why(running))["reason"] == "running"
    left.set()
    await leaving


@pytest.mark.parametrize(
    ("fields", "reason", "shown"),
    [
        ({"state": "stalled", "stalled_s": 5.0, "blocked_at": "app.py:7 in f"}, "workers_stalled", "app.py:7 in f"),
        ({"state": "disconnected"}, "workers_disconnected", "lane"),
        ({"kinds": {FAMILY: ["other", "more"]}}, "unknown_kind", "more, other"),
        ({"running": 10, "waiting": 0}, "slots_busy", "10 of 10 slots in use"),
        ({}, "turn", "it is found within a second"),
        ({"in_line": {FAMILY: 40}}, "turn", "40 lanes of its family in line, at ghost"),
    ],
)
async def test_what_its_workers_are_at(
    client: aiqueue.Client, why: Why, fields: dict[str, Any], reason: str, shown: str
) -> None:
    await announce(client, **fields)
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert found["reason"] == reason
    assert any(shown in each for each in found["evidence"])


async def test_its_workers_were_not_heard_of_for_long(
    client: aiqueue.Client, why: Why, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.inspect.worker_stats.SILENT_S", -1.0)
    await announce(client)
    assert (await why(await client.enqueue(Hold(), tenant="acme")))["reason"] == "workers_lost"


async def test_all_slots_are_busy_and_then_a_higher_priority_goes_first(client: aiqueue.Client, why: Why) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with holder(entered, left).running(client):
        running = await held(client, entered)

        async def is_known() -> bool:
            return [each.running for each in await client.workers()] == [1]

        await eventually(is_known)
        waiting = await client.enqueue(Hold(), tenant="acme")
        found = await why(waiting)
        assert (found["reason"], found["state"]) == ("slots_busy", "queued")
        assert any(running.id in each for each in found["evidence"])
        await client.enqueue(Hold(), tenant="globex", priority="high")
        found = await why(waiting)
        assert found["reason"] == "priority"
        assert "an estimate" in found["text"]
        left.set()


async def test_its_turn_comes_after_the_jobs_before_it_and_those_of_other_lanes(
    client: aiqueue.Client, why: Why
) -> None:
    await announce(client)
    for tenant in ("acme", "acme", "globex"):
        await client.enqueue(Hold(), tenant=tenant)
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert (found["reason"], "2 jobs of its lane are before it" in found["text"]) == ("turn", True)
    assert any("1 job of its priority in 1 other lane" in each for each in found["evidence"])


async def test_its_lane_has_as_many_jobs_in_flight_as_it_may(client: aiqueue.Client, why: Why) -> None:
    await announce(client)
    await client.enqueue(Hold(), tenant="acme")
    await take(client, await make_consumer(client, max_ack_pending=1))
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert (found["reason"], "1 of at most 1 jobs" in found["text"]) == ("lane_limit", True)


@pytest.mark.parametrize("scope", [{}, {"tenant": "acme"}, {"kind": "hold"}])
async def test_it_is_paused(client: aiqueue.Client, why: Why, scope: dict[str, str]) -> None:
    await client.pause(FAMILY, **scope, by="anna", reason="too slow", duration="10m")  # type: ignore[arg-type]
    found = await why(await client.enqueue(Hold(), tenant="acme"))
    assert found["reason"] == "paused"
    assert "by anna: too slow" in found["text"]
    assert abs(found["until"] - time.time() - 600) < 30
    options = "".join(f" --{name} {value}" for name, value in scope.items())
    assert found["remedy"] == f"`aiqueue resume {FAMILY}{options}` when it may go on"


async def test_somebody_has_paused_its_consumer(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    name = await make_consumer(client)
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 600))
    await client.connection.api(f"CONSUMER.PAUSE.{name}", {"pause_until": until})
    found = await why(handle)
    assert (found["reason"], found["remedy"]) == ("lane_paused", f"`nats consumer resume {STREAM} acme-normal`")


async def test_its_kind_is_parked_aside_because_nobody_knows_it_or_it_is_paused(
    client: aiqueue.Client, why: Why, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unknown_kinds, "HOP_FIRST_S", 300.0)
    monkeypatch.setattr(unknown_kinds, "HOP_MAX_S", 300.0)
    handle = await client.enqueue(Other(), tenant="acme")
    async with holder(asyncio.Event(), asyncio.Event()).running(client):

        async def aside() -> bool:
            return (await handle.status()).state != "queued" and (await handle.status()).state != "in_flight"

        await eventually(aside)
        found = await why(handle)
        assert found["reason"] == "unknown_kind"
        assert "no worker that is alive knows its kind, other" in found["text"]
        assert found["evidence"][0].startswith("parked aside 1 time, first ")
        await announce(client, kinds={FAMILY: ["other"]})
        found = await why(handle)
        assert (found["reason"], "ghost knows the kind" in found["evidence"]) == ("unknown_kind_hop", True)
        await client.pause(FAMILY, kind="other", by="anna")
        assert (await why(handle))["reason"] == "paused"


async def test_it_waits_for_its_delay_and_is_due_without_a_worker(client: aiqueue.Client, why: Why) -> None:
    found = await why(await client.enqueue(Hold(), tenant="acme", delay="1h"))
    assert (found["reason"], found["state"]) == ("delay", "parked")
    assert abs(found["until"] - time.time() - 3_600) < 30
    job = found["job_id"]
    assert found["remedy"] == f"`aiqueue reschedule {job} --now` starts it now"
    await client.pause(FAMILY, kind="hold", by="anna")
    found = await why(await client.job(job))
    first = f"it is paused, so first `aiqueue resume {FAMILY} --kind hold`; then "
    assert found["remedy"] == f"{first}`aiqueue reschedule {job} --now` starts it now"
    await client.resume(FAMILY, kind="hold")
    handle = await client.enqueue(Hold(), tenant="acme", delay=0.05)

    async def is_due() -> bool:
        return "due" in (await handle.status()).note

    await eventually(is_due)
    assert (await why(handle))["reason"] == "due_no_forwarder"


async def test_it_waits_for_its_next_attempt_for_room_in_a_budget_and_for_a_short_retry(
    client: aiqueue.Client, why: Why
) -> None:
    spent = BudgetSpent(Budget("acme", 5_000_000), "acme", "2026-11", 100_000, BudgetUse(spent=5_000_000))
    errors = {0: aiqueue.Retry("the provider is down", after=600), 1: aiqueue.Retry(str(spent), after=600),
              2: aiqueue.Retry("again", after=3)}  # fmt: skip
    worker = aiqueue.Worker(name="one")

    @worker.handle(Hold, retry=aiqueue.Backoff(attempts=5))
    async def hold(job: aiqueue.Job[Hold]) -> None:
        raise errors[job.message.n]

    async with worker.running(client):
        retry, budget, soon = [await client.enqueue(Hold(n=n), tenant="acme") for n in range(3)]

        async def failed() -> bool:
            return all([(await each.status()).state == "retrying" for each in (retry, budget, soon)])

        await eventually(failed)
        assert (await why(soon))["reason"] == "retry_soon"
        found = await why(retry)
        assert (found["reason"], "the provider is down" in found["evidence"][0]) == ("retry", True)
        found = await why(budget)
        assert found["reason"] == "budget"
        assert "tenant acme has a budget of $5" in found["evidence"][0]
        assert found["remedy"].endswith(f"`aiqueue reschedule {budget.id} --now`")


async def test_it_waits_for_its_children(client: aiqueue.Client, why: Why) -> None:
    worker = aiqueue.Worker(name="one")

    @worker.handle(Hold)
    async def hold(job: aiqueue.Job[Hold]) -> None:
        child = await job.enqueue(Other(), name="first", delay="1h")
        await job.gather([child])

    async with worker.running(client):
        handle = await client.enqueue(Hold(), tenant="acme")

        async def waits() -> bool:
            return (await handle.status()).state == "waiting"

        await eventually(waits)
        found = await why(handle)
        assert (found["reason"], found["text"]) == ("children", "it waits for its children: 1 of 1 have not ended")
        assert "first (" in found["evidence"][0]
        child = found["remedy"].split("`")[1].removeprefix("aiqueue explain ")
        assert (await why(child))["reason"] == "delay"


async def test_its_lane_is_full(client: aiqueue.Client, why: Why) -> None:
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs_per_subject": 1})
    await client.enqueue(Hold(), tenant="acme")
    handle = await client.enqueue(Hold(), tenant="acme", delay=0.05)
    forwarder = Forwarder(client.connection, client.topology)
    await forwarder.start()

    async def was_refused() -> bool:
        return "its lane is full" in (await handle.status()).note

    await eventually(was_refused)
    assert (await why(handle))["reason"] == "lane_full"
    await forwarder.stop()


async def test_it_runs_or_waits_in_a_worker(client: aiqueue.Client, why: Why) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with holder(entered, left).running(client) as session:
        running = await held(client, entered)
        found = await why(running)
        assert (found["reason"], found["state"]) == ("running", "in_flight")
        assert "attempt 1 for " in found["text"]
        assert "by worker one on " in found["text"]
        assert "in its event loop" in found["text"]
        waiting = await client.enqueue(Hold(n=1), tenant="acme")
        session.puller.refill(1, 0)
        await eventually(lambda: session.vitals()["waiting"])
        assert (await why(waiting))["reason"] == "waits_in_worker"
        left.set()


async def test_it_was_delivered_and_nobody_holds_it(
    client: aiqueue.Client, why: Why, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    delivered = await take(client, await make_consumer(client))
    await announce(client)
    found = await why(handle)
    assert (found["reason"], "no worker says that it holds it" in found["evidence"][0]) == ("lease", True)
    seq = int(delivered.reply.split(".")[5])
    job = {"family": FAMILY, "seq": seq, "tenant": "acme", "delivered_s": 1.0}
    await announce(client, jobs=[job])
    found = await why(handle)
    assert (found["reason"], "ghost" in found["text"]) == ("worker_lost", True)
    assert "or is too busy to answer" in found["text"]  # its record is fresh: nobody can know
    await announce(client, "hangs", state="stalled", stalled_s=30.0, blocked_at="app.py:9 in f")
    await announce(client)
    found = await why(handle)
    assert (found["reason"], "hangs: the event loop is blocked" in str(found["evidence"])) == ("lease", True)
    await announce(client, jobs=[job], state="stalled", stalled_s=30.0, blocked_at="app.py:9 in f")
    found = await why(handle)
    assert (found["reason"], found["evidence"][0]) == ("worker_stalled", "at app.py:9 in f")
    await announce(client, jobs=[job], answers=False)
    assert (await why(handle))["reason"] == "running"
    monkeypatch.setattr(worker_stats, "SILENT_S", -1.0)  # killed, and of a former version: it runs nothing any more
    assert (await why(handle))["reason"] == "worker_lost"


async def test_it_was_given_back_and_all_slots_are_busy(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    consumer = await make_consumer(client)
    delivered = await take(client, consumer)
    await client.connection.publish(delivered.reply, b"-NAK")
    await announce(client, running=10)
    found = await why(handle)
    assert (found["reason"], found["state"]) == ("slots_busy", "in_flight")
    assert found["evidence"][0].startswith("no worker holds it: it waits for a slot, or for the end of its lease")
    for fields in ({"answers": False}, {"state": "stalled", "blocked_at": "app.py:9 in f"}):
        await announce(client, "may-hold-it", running=10, **fields)
        assert (await why(handle))["reason"] == "lease"


async def test_its_retry_is_due_and_all_slots_are_busy(client: aiqueue.Client, why: Why) -> None:
    entered, left, has_failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    worker = holder(entered, left)

    @worker.handle(Other, retry=aiqueue.Backoff(attempts=2, first="4s", jitter=0))
    async def other(job: aiqueue.Job[Other]) -> None:
        has_failed.set()
        raise OSError("no answer")

    async with worker.running(client):
        failed = await client.enqueue(Other(), tenant="acme")
        await has_failed.wait()
        await held(client, entered)
        await eventually(lambda: _has_reason(why, failed, "slots_busy"))
        assert "attempt 1 has failed: OSError: no answer" in (await why(failed))["evidence"]
        left.set()


async def test_it_ends_while_the_workers_are_asked_who_holds_it(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    delivered = await take(client, await make_consumer(client))

    async def ask_holder(*_: Any, **__: Any) -> None:
        await client.connection.request(delivered.reply, b"+ACK", timeout_s=5)

    monkeypatch.setattr("aiqueue.inspect.explaining.ask_holder", ask_holder)
    assert (await client.explain(handle.id)).reason == "ended"  # and no job that waits for the end of a lease


async def test_it_is_tried_apart_because_workers_were_lost_with_it(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    consumer = await make_consumer(client)
    for _ in range(2):  # two workers get it, and are lost
        delivered = await take(client, consumer)
        await client.connection.publish(delivered.reply, b"-NAK")
    entered, left = asyncio.Event(), asyncio.Event()
    async with holder(entered, left, drain_timeout="0s").running(client):
        await eventually(lambda: _has_reason(why, handle, "quarantine"))
        left.set()


async def _has_reason(why: Why, handle: aiqueue.Handle[Any], reason: str) -> None:
    assert (await why(handle))["reason"] == reason


async def test_another_job_of_its_id_is_under_way(client: aiqueue.Client, why: Why) -> None:
    class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
        prompt: str

    entered, left = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker(name="one", concurrency=4)

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> str:
        entered.set()
        await left.wait()
        return "done"

    async with worker.running(client):
        await client.enqueue(Request(prompt="a"), tenant="acme", unique="r-1")
        await entered.wait()
        fields = {"request_id": "r-1", headers.MSG_ID: subjects.new_id()}
        body = json.dumps({"prompt": "a"}).encode()
        ack = await client.connection.store("ai.gateway.requests.acme", body, fields)
        stored = await client.connection.get("AI_GATEWAY_REQUESTS", ack.seq)
        assert stored is not None
        found = await why("r-1")
        assert found["reason"] == "running"  # the id is that of the one that runs
        left.set()


async def test_its_deadline_has_passed(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme", deadline=0.01)
    await eventually(lambda: _has_reason(why, handle, "deadline"))


async def test_it_is_in_a_lane_that_its_family_does_not_declare(client: aiqueue.Client, why: Why) -> None:
    fields = {headers.MSG_ID: subjects.new_id(), headers.JOB_ID: "odd-1", headers.KIND: "hold"}
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    more = {**config, "subjects": [*config["subjects"], "ai.agent.tasks.*.urgent"]}
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", more)
    await client.connection.store("ai.agent.tasks.acme.urgent", b"{}", fields)
    found = await why("odd-1")
    assert (found["reason"], "does not declare" in found["text"]) == ("undeclared_lane", True)


async def test_it_is_over(client: aiqueue.Client, why: Why) -> None:
    worker = aiqueue.Worker(name="one")

    @worker.handle(Hold)
    async def hold(job: aiqueue.Job[Hold]) -> int:
        if job.message.n:
            raise aiqueue.Reject("not wanted")
        return 7

    async with worker.running(client):
        done, failed = await client.enqueue(Hold(), tenant="acme"), await client.enqueue(Hold(n=1), tenant="acme")
        assert await done.result(20) == 7
        with pytest.raises(aiqueue.JobFailed):
            await failed.result(20)
    cancelled = await client.enqueue(Hold(), tenant="acme", delay="1h")
    await cancelled.cancel()
    assert [(await why(each))["reason"] for each in (done, failed, cancelled)] == ["done", "failed", "cancelled"]
    assert "not wanted" in (await why(failed))["text"]


async def test_its_result_waits_for_room_on_the_server(
    own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 2.0)
    entered, left = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker(name="one")

    @worker.handle(Hold)
    async def hold(job: aiqueue.Job[Hold]) -> str:
        entered.set()
        await left.wait()
        return "x" * 50_000

    server = own_server(DISK)
    why = make_why(Account(server.url, server.user, server.password), monkeypatch)
    async with opened(server, {}) as client, worker.running(client):
        handle = await held(client, entered)
        blob = {"name": "FILLER", "subjects": ["filler"], "storage": "file"}
        await client.connection.api("STREAM.CREATE.FILLER", blob)
        size = 500_000
        while size > 1_000:
            try:
                await client.connection.store("filler", b"f" * size, {headers.MSG_ID: subjects.new_id()})
            except QueueFull:
                size //= 2
        left.set()

        async def is_settled() -> None:
            assert (await why(handle, once=True))["reason"] == "starting"

        await eventually(is_settled)

        async def waits() -> None:
            found = await why(handle, "--tenant", "acme", once=True)
            assert (found["reason"], "worker one on " in found["text"]) == ("result_waits", True)

        await eventually(waits)
        await client.connection.api("STREAM.DELETE.FILLER")

        async def is_written() -> None:
            assert (await why(handle, "--tenant", "acme"))["reason"] == "done"

        await eventually(is_written)


async def test_a_key_that_is_behind_too_many_jobs_is_found_with_family_and_tenant_and_the_error_says_so(
    client: aiqueue.Client, why: Why, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_scan, "SCAN_JOBS_MAX", 10)
    async for _ in client.enqueue_many([Hold(n=n) for n in range(40)], tenant="acme"):
        pass
    mine = await client.enqueue(Hold(), tenant="acme", unique="mine")
    with pytest.raises(NotFound, match=r"only the first 10 stored jobs were searched.*name its family and tenant"):
        await client.explain("mine")
    found = await why("mine", "--family", FAMILY, "--tenant", "acme")
    assert found["evidence"][1] == "40 jobs of its lane are before it"
    assert (found["reason"], found["job_id"]) == ("no_worker", mine.id)


async def test_inspect_shows_why_a_job_waits(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    assert (await why(handle))["reason"] == "no_worker"
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["inspect", handle.id])
    assert "no worker of agent.tasks is running (no_worker)" in shown.stdout
    plain = await asyncio.to_thread(CliRunner().invoke, app, ["inspect", handle.id, "--json"])
    assert json.loads(plain.stdout)["explanation"]["reason"] == "no_worker"
