"""Permissions: each call and each role, with one of its rights missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.client import Client
from aiqueue.errors import AccessDenied, ResultTimeout
from aiqueue.gateway import (
    ApiKeys,
    Batches,
    Budget,
    Budgets,
    GatewayWorker,
    UsageLedger,
    UsageRecord,
    UsageStore,
    month_of,
)
from aiqueue.gateway.key_budgets import KnownApiKeys
from aiqueue.gateway.standin import Behaviour, StandIn
from aiqueue.inspect import MetricsExporter, WorkerStats
from aiqueue.metrics import History
from aiqueue.rag import Rag, RagWorker
from aiqueue.starlette import describe
from aiqueue.worker import Responder

from .. import keyed
from ..gateway.batches.lines import chat_line, create, reported
from ..gateway.running import KEY, KEY_VARIABLE, write_config
from ..limits.provider import FAMILY
from ..support import ROOT, Eventually, NatsProcess, create_streams

OwnServer = Callable[..., NatsProcess]


class Task(aiqueue.Message, kind="task"):
    text: str = ""


class Hang(aiqueue.Message, kind="hang"):
    pass


def users(publish: list[str] | None = None, subscribe: list[str] | None = None) -> str:
    """The config of two users: `all`, who may everything, and `less`, who may not do this."""
    denied = json.dumps({"publish": {"deny": publish or []}, "subscribe": {"deny": subscribe or []}})
    return (
        "authorization { users: [ { user: all, password: p }, "
        f"{{ user: less, password: p, permissions: {denied} }} ] }}"
    )


@contextlib.asynccontextmanager
async def two(server: NatsProcess) -> AsyncIterator[tuple[Client, Client]]:
    """A client who may everything, and one who may less."""
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
        async with aiqueue.connect(url=server.url, user="less", password="p") as less:
            yield every, less


async def result(less: Client, job: str) -> None:
    handle = await less.enqueue(Task(), tenant="acme")
    await handle.result(timeout=20)


async def stream(less: Client, job: str) -> None:
    handle = await less.enqueue(Task(), tenant="acme")
    async for _ in handle.stream(timeout=20):
        pass


async def status(less: Client, job: str) -> None:
    await (await less.job(job)).status()


async def shown(less: Client, job: str) -> None:
    """The state of a parked job, and of others from the lane to the end, as a web service shows it."""
    assert (await describe(await less.job(job)))["state"] == "parked"
    for text, end in (("", "done"), ("bad", "failed")):
        handle = await less.enqueue(Hang() if end == "done" else Task(text=text), tenant="acme")
        states = set()
        async with asyncio.timeout(20):
            while (state := (await handle.status()).state) != end:
                assert (await describe(await less.job(handle.id)))["state"] in ("queued", "in_flight", end)
                states.add(state)
        assert states <= {"queued", "in_flight"}


async def dead_letters(less: Client, job: str) -> None:
    """List, show, replay and purge them."""
    await less.enqueue(Task(text="bad"), tenant="acme")
    for act in (less.dead.replay, less.dead.purge):
        async with asyncio.timeout(20):
            while not (found := [each async for each in less.dead.find()]):
                await asyncio.sleep(0.02)
        letter = await less.dead.get(found[-1].seq)
        assert await less.dead.body(letter)
        assert await act(letter)


async def cancel(less: Client, job: str) -> None:
    await less.cancel(job)


async def pauses(less: Client, job: str) -> None:
    for tenant in ("acme", None):
        await less.pause("rag.ingest", tenant=tenant, duration="1h")
        assert await less.pauses()
        assert await less.resume("rag.ingest", tenant=tenant)


async def documents(less: Client, job: str) -> None:
    document = await less.documents.put(b"x" * 1000, tenant="acme")
    await less.documents.open(document).read()


async def enqueue(less: Client, job: str) -> None:
    await less.enqueue(Task(), tenant="acme")


async def rerun(less: Client, job: str) -> None:
    for word in ("rerun", "rerun_failed", "replace", "replace"):
        handle = await less.enqueue(Task(), tenant="acme", unique=word, on_duplicate=word, delay="1h")  # type: ignore[arg-type]
        await handle.reschedule(delay="2h")
    for word in ("rerun", "rerun_failed"):
        await less.enqueue(Task(), tenant="acme", unique=f"{word}-now", on_duplicate=word)  # type: ignore[arg-type]


async def delayed(less: Client, job: str) -> None:
    for _ in range(2):
        await less.enqueue(Task(), tenant="acme", unique="one", delay=60)


@pytest.mark.parametrize(
    ("call", "verb", "subject"),
    [
        (enqueue, "publish", "ai.agent.tasks.acme"),
        (delayed, "publish", "ai.parked.at.>"),
        (delayed, "publish", "$JS.API.STREAM.MSG.GET.AI_PARKED"),
        (result, "publish", "$JS.API.STREAM.MSG.GET.AI_AGENT_TASKS"),
        (result, "publish", "$JS.API.STREAM.MSG.GET.AI_RESULTS"),
        (result, "subscribe", "aiq.live.>"),
        (result, "subscribe", "$JS.ACK.>"),
        (stream, "publish", "$JS.API.DIRECT.GET.AI_RESULTS"),
        (stream, "subscribe", "aiq.live.>"),
        (status, "publish", "$JS.API.DIRECT.GET.AI_RESULTS"),
        (status, "publish", "$JS.API.DIRECT.GET.AI_AGENT_TASKS"),
        (cancel, "publish", "$JS.API.DIRECT.GET.AI_RESULTS"),
        (pauses, "publish", "$KV.AI_PRESENCE.pause.>"),
        (pauses, "publish", "$JS.API.STREAM.MSG.GET.KV_AI_PRESENCE"),
        (pauses, "publish", "$JS.API.DIRECT.GET.KV_AI_PRESENCE"),
        (documents, "publish", "$O.AI_DOCUMENTS.C.>"),
        (documents, "publish", "$JS.API.STREAM.MSG.GET.OBJ_AI_DOCUMENTS"),
        (documents, "publish", "$JS.API.DIRECT.GET.OBJ_AI_DOCUMENTS"),
    ],
)
async def test_a_call_without_one_right_is_denied_at_once_by_its_subject(
    own_server: OwnServer, call: Callable[[Client, str], Awaitable[None]], verb: str, subject: str
) -> None:
    async with two(own_server(users(**{verb: [subject]}))) as (every, less):
        job = await every.enqueue(Task(), tenant="acme")
        started_at = time.monotonic()
        with pytest.raises(AccessDenied) as caught:
            await call(less, job.id)
        assert time.monotonic() - started_at < 10
        assert f"this user may not {verb} to {subject.removesuffix('.>')}" in str(caught.value)


async def run_worker(less: Client, ran: list[str]) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        ran.append(job.id)

    async with worker.running(less):
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("verb", "subject"),
    [
        ("publish", "$JS.API.STREAM.INFO.AI_AGENT_TASKS"),
        ("publish", "$JS.API.CONSUMER.CREATE.>"),
        ("publish", "$JS.API.CONSUMER.MSG.NEXT.>"),
        ("publish", "$JS.ACK.>"),
        ("publish", "ai.agent.results.>"),
        ("subscribe", "aiq.hint.>"),
        ("subscribe", "aiq.back.>"),
        ("subscribe", "aiq.cancel.>"),
    ],
)
async def test_a_worker_without_one_right_ends_and_names_its_subject(
    own_server: OwnServer, verb: str, subject: str
) -> None:
    async with two(own_server(users(**{verb: [subject]}))) as (every, less):
        await every.enqueue(Task(), tenant="acme")
        started_at = time.monotonic()
        ran: list[str] = []
        with pytest.raises(AccessDenied) as caught:
            async with asyncio.timeout(20):
                await run_worker(less, ran)
        assert time.monotonic() - started_at < 15
        assert f"this user may not {verb} to {subject.removesuffix('.>')}" in str(caught.value)


async def test_a_worker_that_may_not_hear_of_pauses_heeds_them_all_the_same(
    own_server: OwnServer, eventually: Eventually
) -> None:
    async with two(own_server(users(subscribe=["aiq.pause"]))) as (every, less):
        ran: list[str] = []
        running = asyncio.create_task(run_worker(less, ran))
        await every.enqueue(Task(), tenant="acme")
        await eventually(lambda: ran)
        await every.pause("agent.tasks")
        await asyncio.sleep(1.2)
        await every.enqueue(Task(), tenant="acme")
        await asyncio.sleep(0.5)
        assert len(ran) == 1
        await every.resume("agent.tasks")
        await eventually(lambda: len(ran) == 2)
        running.cancel()
        await asyncio.wait([running])


async def test_a_worker_that_may_not_read_pauses_works_and_says_that_it_does_not_heed_them(
    own_server: OwnServer, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(own_server(users(publish=["$JS.API.DIRECT.GET.KV_AI_PRESENCE"]))) as (every, less):
        await every.pause("agent.tasks")
        ran: list[str] = []
        running = asyncio.create_task(run_worker(less, ran))
        await every.enqueue(Task(), tenant="acme")
        await eventually(lambda: ran)
        assert "this worker does not heed pauses: permission denied" in caplog.text
        running.cancel()
        await asyncio.wait([running])


async def test_a_worker_whose_right_is_taken_away_ends(own_server: OwnServer, eventually: Eventually) -> None:
    server = own_server(users())
    async with two(server) as (every, less):
        ran: list[str] = []
        running = asyncio.create_task(run_worker(less, ran))
        await every.enqueue(Task(), tenant="acme")
        await eventually(lambda: ran)
        server.extra = users(publish=["$JS.ACK.>"])
        server.reload()

        async def until_it_ends() -> bool:
            await every.enqueue(Task(), tenant="acme")
            return running.done()

        await eventually(until_it_ends)
        with pytest.raises(AccessDenied, match=r"may not publish to \$JS\.ACK\."):
            await running


@pytest.mark.parametrize("denied", ["ai.agent.tasks.other", "ai.agent.results.other.>"])
async def test_what_a_handler_may_not_do_does_not_end_its_worker(own_server: OwnServer, denied: str) -> None:
    async with two(own_server(users(publish=[denied]))) as (every, less):
        worker = aiqueue.Worker(tenants=["acme"])

        @worker.handle(Task)
        async def task(job: aiqueue.Job[Task]) -> str:
            try:
                await (await less.enqueue(Task(), tenant="other")).cancel()
            except AccessDenied:
                return "denied"
            return "allowed"

        async with worker.running(less):
            assert await (await every.enqueue(Task(), tenant="acme")).result(timeout=20) == "denied"
            assert await (await every.enqueue(Task(), tenant="acme")).result(timeout=20) == "denied"


async def test_a_responder_without_its_subscription_does_not_start(own_server: OwnServer) -> None:
    server = own_server(users(subscribe=["ai.>"]))
    async with two(server) as (_, less):
        with pytest.raises(AccessDenied, match="this user may not subscribe to ai"):
            async with Responder(families=["rag.queries"]).running(less):
                pass


async def test_a_right_that_comes_back_is_used_again(own_server: OwnServer, eventually: Eventually) -> None:
    server = own_server(users(subscribe=["aiq.live.>"]))
    async with two(server) as (every, less):
        job = await every.enqueue(Task(), tenant="acme")
        with pytest.raises(AccessDenied):
            await (await less.job(job.id)).result(timeout=20)
        server.extra = users()
        server.reload()

        async def still_waits() -> bool:
            try:
                await (await less.job(job.id)).result(timeout=0.2)
            except ResultTimeout:
                return True
            except AccessDenied:
                return False
            return False

        await eventually(still_waits)


async def workers(less: Client, job_id: str) -> None:
    assert [each.families for each in await listed(less)] == [("agent.tasks",)]


async def listed(less: Client) -> list[WorkerStats]:
    async with asyncio.timeout(20):
        while not (found := await less.workers()):
            await asyncio.sleep(0.02)
    return found


async def explain(less: Client, job_id: str) -> None:
    """Of a parked job, of one that waits, and of one that a worker holds and answers for."""
    found = await less.explain(job_id)
    assert (found.reason, found.unknown) == ("delay", ())
    await listed(less)
    handle = await less.enqueue(Hang(), tenant="acme")
    async with asyncio.timeout(20):
        while (found := await less.explain(handle.id)).reason != "running":
            assert found.unknown == ()
    assert found.unknown == ()


async def lists(client: Client, _: str) -> None:
    assert (await client.jobs.page()).jobs
    assert [each async for each in client.jobs.list(state=["in_flight", "retrying", "parked", "failed"])]


async def acts(client: Client, _: str) -> None:
    for act in ("run_now", "move", "replay", "cancel"):
        plan = await client.jobs.plan(act, tenant="acme", to="high" if act == "move" else "")  # type: ignore[arg-type]
        outcome = await client.jobs.act(plan, by="anna")
        assert (outcome.failed, outcome.unaudited) == ([], "")


async def audit(client: Client, _: str) -> None:
    async with client.audit.act("pause", {"tenant": "acme"}, by="anna") as line:
        pass
    assert line.problem == ""
    (found,) = [each async for each in client.audit.find(newer="1h")]
    assert (found.nats_user, found.os_user) == ("less", "anna")


async def metrics(client: Client, job_id: str) -> None:
    for tenants in (False, True):
        found = await MetricsExporter(client.connection, client.topology, tenants=tenants).scrape()
        assert found.failed == {}
        assert 'aiqueue_jobs_parked{family="agent.tasks"' in found.text


async def history(client: Client, job_id: str) -> None:
    found = History(client.connection, client.topology, "minute", since_s=600)
    await found.update()


# the permissions that docs/operations/permissions.md lists


def user(name: str, publish: list[str], subscribe: list[str]) -> str:
    """A user of a server's configuration that has only these permissions."""
    permissions = json.dumps({"publish": publish, "subscribe": subscribe})
    return f"{{ user: {name}, password: p, permissions: {permissions} }}"


def documented(*rows: str) -> tuple[list[str], list[str]]:
    """What the rows of the table that start so allow to publish, and to subscribe to."""
    publish: list[str] = []
    subscribe = ["_INBOX.>"]
    lines = (ROOT / "docs/operations/permissions.md").read_text().splitlines()
    for row in rows:
        (line,) = (each for each in lines if each.startswith(f"| {row}") and "| `" in each)
        _, _, may_publish, may_subscribe, _ = line.split("|")
        publish += re.findall(
            r"`([^`]+)`", may_publish.replace("<family>.<tenant>", "agent.tasks.acme").replace("<tenant>", "acme")
        )
        subscribe += re.findall(r"`([^`]+)`", may_subscribe)
    return publish, subscribe


ROWS = [
    "a plain publisher of one tenant", "a producer with aiqueue", "if the user delays jobs",
    "if the user puts or reads documents", "if the user waits for results", "if the user cancels jobs",
    "if the user reruns", "if the user pauses", "if the user lists workers", "if the user asks [why jobs wait]",
    "if the user lists jobs", "if the user acts on", "if the user's acts are to be", "if the user reads the audit",
    "if the user reads the [history]", "if the user serves [metrics]",
    "if the user shows the state", "if the user lists and shows [dead letters]", "if the user replays or purges",
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (enqueue, ROWS[:2]), (delayed, ROWS[:3]), (documents, [*ROWS[:2], ROWS[3]]), (result, [*ROWS[:2], ROWS[4]]),
        (stream, [*ROWS[:2], ROWS[4]]), (cancel, [*ROWS[:2], ROWS[5]]), (rerun, [*ROWS[:2], ROWS[6]]),
        (pauses, [ROWS[7]]), (workers, [ROWS[8]]), (explain, [*ROWS[:2], ROWS[9]]),
        (lists, [ROWS[10]]), (acts, ROWS[10:13]), (audit, ROWS[12:14]), (history, [ROWS[14]]), (metrics, [ROWS[15]]),
        (shown, [*ROWS[:2], ROWS[16]]), (dead_letters, [ROWS[0], *ROWS[17:]]),
    ],
)  # fmt: skip
async def test_the_documented_permissions_suffice(
    own_server: OwnServer,
    call: Callable[[Client, str], Awaitable[None]],
    rows: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a worker that has no others either."""

    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('less', *documented(*rows))}, {user('worker', *documented('a worker'))} ] }}"
    )
    async with two(server) as (every, less):
        job = await every.enqueue(Task(), tenant="acme", delay=60)
        async with aiqueue.connect(url=server.url, user="worker", password="p") as client:
            worker = aiqueue.Worker()

            @worker.handle(Task)
            async def task(job: aiqueue.Job[Task]) -> str:
                await job.progress(0.5)
                if job.message.text == "bad":
                    raise aiqueue.Reject("bad")
                if job.attempt == 1:
                    raise aiqueue.Retry(after=0.05)
                return "done"

            @worker.handle(Hang)
            async def hang(job: aiqueue.Job[Hang]) -> None:
                await asyncio.sleep(0.5)

            async with worker.running(client):
                await call(less, job.id)
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_with_the_permissions_of_a_former_version_a_worker_runs_requests_and_pauses_are_listed(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without those for limits, which gateway.requests did not have."""
    publish, subscribe = documented("a worker")
    lists = [each for each in documented("if the user pauses and resumes")[0] if "LIMITS" not in each]
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('less', lists, ['_INBOX.>'])}, {user('worker', publish, subscribe)} ] }}"
    )

    class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
        model: str

    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def answer(job: aiqueue.Job[Ask]) -> str:
        return job.message.model

    async with two(server) as (every, less):
        async with aiqueue.connect(url=server.url, user="worker", password="p") as serving, worker.running(serving):
            handle = await every.enqueue(Ask(model="m"), tenant="acme", unique="r-1")
            assert await handle.result(timeout=20) == "m"
        await every.pause("rag.ingest", duration="1h")
        assert [each.family for each in await less.pauses()] == ["rag.ingest"]
    assert "pauses of limited keys are not listed: permission denied" in caplog.text


async def test_the_documented_permissions_of_limits_suffice(
    own_server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an operator who sets, pauses and lists, and of a worker that heeds it and pauses its key itself."""

    (tmp_path / "llm.toml").write_text(FAMILY)
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('operator', *documented(ROWS[7], 'if the user sets [limits]', 'if the user lists limits'))}, "
        f"{user('worker', *documented('a worker', 'if the worker serves a family with a `limit_key`'))} ] }}"
    )

    def connect(name: str) -> Client:
        return aiqueue.connect(url=server.url, user=name, password="p", streams=tmp_path)

    class Call(aiqueue.Message, kind="llm.call", family="llm.calls"):
        model: str

    worker = aiqueue.Worker()

    @worker.handle(Call)
    async def call(job: aiqueue.Job[Call]) -> int:
        if job.attempt == 1:
            raise aiqueue.Retry("429", after=0.5, pause="key")
        return job.attempt

    async with connect("all") as every:
        await create_streams(every)
        async with connect("operator") as operator, connect("worker") as serving, worker.running(serving):
            await operator.set_limit("llm.calls", "m", requests=100)
            handle = await every.enqueue(Call(model="m"), tenant="acme")
            assert await handle.result(timeout=20) == 2
            (found,) = await operator.limits()
            assert found.uses[0].requests >= 2
            assert await operator.unset_limit("llm.calls", "m")
            assert await operator.pause("llm.calls", key="m", tenant="acme")
            assert await operator.pauses()
            assert await operator.resume("llm.calls", key="m", tenant="acme")
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_the_documented_permissions_of_usage_suffice(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an operator who lists usage, and of a worker that records calls and reserves from budgets."""
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('operator', *documented('if the user lists [usage]', ROWS[12]))}, "
        f"{user('worker', *documented('a worker'))} ] }}"
    )
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
    async with aiqueue.connect(url=server.url, user="worker", password="p") as serving:
        store = UsageStore(serving.connection, serving.topology)
        budgets, at = Budgets(store, UsageLedger(store), [Budget("acme", 10)]), await store.now()
        assert await budgets.reserve("acme", "c", 10)
        told = {"call_id": "c", "job_id": "j", "request_id": "r", "model": "m", "provider": "p", "cost_micros": 7}
        await UsageLedger(store).record(UsageRecord(tenant="acme", started_at=at, outcome="ok", **told))
        assert await budgets.settle("acme", "c", 7)
    command = [sys.executable, "-m", "aiqueue", "gateway", "usage", "--json", "--rebuild"]
    environment = os.environ | {"AIQUEUE_URL": server.url, "AIQUEUE_USER": "operator", "AIQUEUE_PASSWORD": "p"}
    done = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=30)
    shown = json.loads(done.stdout)
    assert [each["sums"]["cost_micros"] for each in shown["totals"]] == [7]
    assert [each["spent_micros"] for each in shown["budgets"]] == [7]
    assert "denied" not in caplog.text + done.stderr
    assert "Violation" not in caplog.text + done.stderr


async def test_the_documented_permissions_of_api_keys_suffice(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    """Of an operator who adds, lists and revokes them, of a front that accepts them, and of a worker."""
    rows = {
        "operator": "if the user adds, lists or revokes [API keys]", "front": "if the user accepts API keys",
        "worker": "a worker",
    }  # fmt: skip
    users_of = ", ".join(user(name, *documented(row)) for name, row in rows.items())
    server = own_server(f"authorization {{ users: [ {{ user: all, password: p }}, {users_of} ] }}")
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
    async with (
        aiqueue.connect(url=server.url, user="operator", password="p") as operator,
        aiqueue.connect(url=server.url, user="front", password="p") as front,
        aiqueue.connect(url=server.url, user="worker", password="p") as serving,
        ApiKeys(front) as keys,
    ):
        own = ApiKeys(operator)
        key, token = await own.add("acme", requests_per_minute=2, budget_micros=10)
        await eventually(lambda: keys.find(token) is not None)
        (await keys.admit(key)).settle()
        assert await KnownApiKeys(serving).key_of("acme", {"Gateway-Api-Key": key.id}) == key
        store = UsageStore(serving.connection, serving.topology)
        await Budgets(store, UsageLedger(store)).reserve("acme", "c", 10, of_key=key.budget)
        listed = UsageStore(operator.connection, operator.topology)
        month = month_of(await listed.now())
        (found,) = await Budgets(listed, UsageLedger(listed)).stats(month, keys=True)
        assert (found.key, found.reserved_micros) == (key.id, 10)
        assert await own.list() == [key]
        await own.revoke(key.id)
        await eventually(lambda: keys.find(token) is None)
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_the_documented_permissions_of_batches_suffice(
    own_server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
) -> None:  # fmt: skip
    """Of whoever creates, reads and cancels them, and of a gateway worker that runs them."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    maker = user("maker", *documented("if the user uploads files and creates, reads or cancels [batches]"))
    rows = "a worker", "if the worker serves a family with a `limit_key`", "if the worker runs [batches]"
    worker = user("worker", *documented(*rows))
    server = own_server(f"authorization {{ users: [ {{ user: all, password: p }}, {maker}, {worker} ] }}")
    async with (
        StandIn() as standin,
        aiqueue.connect(url=server.url, user="all", password="p") as every,
        aiqueue.connect(url=server.url, user="maker", password="p") as making,
        aiqueue.connect(url=server.url, user="worker", password="p") as serving,
    ):
        await create_streams(every)
        config = write_config(tmp_path, standin.url)
        batch = await create(making, [chat_line(1), chat_line(2, model="none")])
        batches = Batches(making)
        async with GatewayWorker(config).running(serving):
            batch = await batches.wait(batch.id, tenant="acme")
            assert (batch.completed, batch.failed) == (1, 1)
            assert len(await reported(making, batch)) == 2
            standin.behaviour = Behaviour(first_token_s=0.5)
            second = await create(making, map(chat_line, range(300)))
            await batches.cancel(second.id, tenant="acme")
            second = await batches.wait(second.id, tenant="acme")
            assert second.status == "cancelled"
            third = await create(making, map(chat_line, range(300)))
            called = len(standin.calls)
            await eventually(lambda: len(standin.calls) > called)
            await every.cancel(third.id, family="gateway.batches", tenant="acme")  # its worker sees to the rest
            assert (await batches.wait(third.id, tenant="acme")).status == "cancelled"
        fourth = await create(making, [chat_line(1)])
        await every.cancel(fourth.id, family="gateway.batches", tenant="acme")
        monkeypatch.setattr("aiqueue.gateway.batches.client.LOOK_AFTER_S", 0)
        async with GatewayWorker(config).running(serving):  # and here who asks
            assert (await batches.wait(fourth.id, tenant="acme")).status == "cancelled"
        await batches.delete_file(batch.input_file_id, tenant="acme")
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text


async def test_the_documented_permissions_of_retrieval_suffice(
    own_server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker that ingests and answers, and cancels an answer in words that nobody gives; and of who asks it."""
    monkeypatch.setattr("aiqueue.rag.answering.LOOK_EVERY_S", 0.1)
    rows = (
        "a plain publisher",
        "a producer with aiqueue",
        "if the user waits for results",
        "if the user asks for the status of",
    )
    publish, subscribe = documented(*rows)
    publish += [each.replace("agent.tasks", "rag.queries") for each in publish]
    publish = [each.replace("agent.tasks", "rag.ingest").replace("<tenant>", "acme") for each in publish]
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('asker', publish, subscribe)}, "
        f"{user('worker', *documented('a worker', 'if the worker serves [documents]'))} ] }}"
    )
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
    (tmp_path / "rag.toml").write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n')
    async with (
        aiqueue.connect(url=server.url, user="worker", password="p") as serving,
        RagWorker(tmp_path / "rag.toml").running(serving),
        aiqueue.connect(url=server.url, user="asker", password="p") as asking,
    ):
        rag = Rag(asking)
        assert (await (await rag.ingest("d", tenant="acme", content="some words")).result(20))["state"] == "completed"
        assert (await rag.status("d", tenant="acme")).state == "completed"
        asked = await (await rag.ask("words", tenant="acme", answer=True, model="small")).result(20)
        assert len(asked["passages"]) == 1
        assert "no gateway worker is running" in asked["answer_problem"]
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text
    assert "not cancelled" not in caplog.text


@pytest.mark.parametrize("verb", ["set_limit", "limits", "pause"])
async def test_a_missing_permission_of_limits_is_named(own_server: OwnServer, tmp_path: Path, verb: str) -> None:
    (tmp_path / "llm.toml").write_text(FAMILY)
    denied = {
        "set_limit": "$KV.AI_LIMITS.rule.>",
        "limits": "$JS.API.DIRECT.GET.KV_AI_LIMITS",
        "pause": "$KV.AI_LIMITS.pause.>",
    }[verb]
    server = own_server(users([denied]))
    async with aiqueue.connect(url=server.url, user="all", password="p", streams=tmp_path) as every:
        await create_streams(every)
    async with aiqueue.connect(url=server.url, user="less", password="p", streams=tmp_path) as less:
        calls = {
            "set_limit": lambda: less.set_limit("llm.calls", "m", requests=1),
            "limits": less.limits,
            "pause": lambda: less.pause("llm.calls", key="m"),
        }
        with pytest.raises(AccessDenied, match=re.escape(denied.removesuffix(".>"))) as caught:
            await calls[verb]()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("may_look", [True, False])
async def test_the_documented_permissions_suffice_for_the_lanes_of_limited_keys(
    own_server: OwnServer, tmp_path: Path, may_look: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A producer of one tenant that lacks those to look stores its jobs in the ordinary lane, where they run too."""
    rows = [*ROWS[:2], ROWS[4], *(["if the user's jobs of [limited keys]"] if may_look else [])]
    publish, subscribe = documented(*rows)
    publish = [each.replace("agent.tasks", keyed.FAMILY) for each in publish]
    worker_may = documented("a worker", "if the worker serves a family")

    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('less', publish, subscribe)}, {user('worker', *worker_may)} ] }}"
    )
    (tmp_path / "test_calls.toml").write_text(keyed.FILE)
    rule = f'[[limit]]\nfamily = "{keyed.FAMILY}"\nrequests = 1000\n'
    (tmp_path / "limits.toml").write_text(rule)
    worker = aiqueue.Worker()

    @worker.handle(keyed.Call)
    async def call(job: aiqueue.Job[keyed.Call]) -> int:
        return job.message.n

    options: dict[str, Any] = {"url": server.url, "password": "p", "streams": tmp_path}
    async with (
        aiqueue.connect(user="all", **options) as every,
        aiqueue.connect(user="less", **options) as less,
        aiqueue.connect(user="worker", **options) as client,
    ):
        await create_streams(every)
        async with worker.running(client):
            token = await less.key_lanes.find_token(less.topology.family(keyed.FAMILY), "acme", "m")
            assert bool(token) == may_look
            handle = await less.enqueue(keyed.Call(model="m", n=3), tenant="acme")
            assert bool(handle.lane.key) == may_look
            assert await handle.result(timeout=20) == 3
    assert ("Violation" in caplog.text or "denied" in caplog.text) == (not may_look)


async def test_an_act_that_may_not_be_audited_is_done_and_one_line_says_what_to_grant(own_server: OwnServer) -> None:
    server = own_server(users(["ai.audit.>", "$SYS.REQ.USER.INFO"]))
    async with aiqueue.connect(url=server.url, user="all", password="p") as every:
        await create_streams(every)
    environment = os.environ | {"AIQUEUE_URL": server.url, "AIQUEUE_USER": "less", "AIQUEUE_PASSWORD": "p"}
    command = [sys.executable, "-m", "aiqueue", "pause", "agent.tasks"]
    done = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stderr == (
        "this is not in the audit: permission denied: this user may not publish to ai.audit.pause; "
        "see docs/operations/permissions.md\n"
    )


async def test_the_four_users_of_the_page_about_production_suffice(
    own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a pipeline that applies, a worker, a web service, and operators."""
    page = (ROOT / "docs/operations/production.md").read_text()
    (config,) = re.findall(r"```text\n(authorization .*?)```", page, re.DOTALL)
    server = own_server(re.sub(r"\$\w+_PASSWORD", "p", config))

    async def run(user: str, *words: str) -> None:
        environment = os.environ | {"AIQUEUE_URL": server.url, "AIQUEUE_USER": user, "AIQUEUE_PASSWORD": "p"}
        command = [sys.executable, "-m", "aiqueue", *words]
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout

    await run("apply", "apply")
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        if job.message.text == "bad":
            raise aiqueue.Reject("bad")
        return job.message.text

    async with (
        aiqueue.connect(url=server.url, user="worker", password="p") as serving,
        aiqueue.connect(url=server.url, user="service", password="p") as service,
    ):
        handle = await service.enqueue(Task(text="x"), tenant="acme")
        assert (await describe(handle))["state"] == "queued"
        async with worker.running(serving):
            assert await handle.result(timeout=20) == "x"
            bad = await service.enqueue(Task(text="bad"), tenant="acme")
            with pytest.raises(aiqueue.JobFailed):
                await bad.result(timeout=20)
            await run("operator", "explain", bad.id)
        assert (await describe(handle))["state"] == "done"
    acts = ("pause agent.tasks --tenant acme", "pause", "resume agent.tasks --tenant acme", "limits ls")
    cancel = "jobs cancel --family agent.tasks --tenant acme --yes"
    looks = ("doctor", "jobs ls", f"inspect {bad.id}", "dead ls", "workers", "history")
    for words in (*looks, f"dead replay --job {bad.id}", *acts, cancel, "audit"):
        await run("operator", *words.split())
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text
