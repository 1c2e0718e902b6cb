"""Who works: the records of workers as operators see them, and which worker holds a job."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers, subjects
from aiqueue.cli.app import app
from aiqueue.cli.workers import describe_worker
from aiqueue.errors import BadInput, NotFound, UnknownFamily
from aiqueue.inspect import Holder, WorkerStats, ask_holder, parse_workers, worker_stats
from aiqueue.lanes import WorkerRecords

from ..support import Account, eventually
from ..worker.test_kill import WorkerPool
from . import blocking


class Hold(aiqueue.Message, kind="hold"):
    n: int = 0


def holder(entered: asyncio.Event, left: asyncio.Event, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**options)

    @worker.handle(Hold, timeout="1m")
    async def hold(job: aiqueue.Job[Hold]) -> None:
        entered.set()
        await left.wait()

    return worker


async def find(client: aiqueue.Client, name: str) -> WorkerStats | None:
    return next((each for each in await client.workers() if each.name == name), None)


async def ask(client: aiqueue.Client, handle: aiqueue.Handle[Any], **options: Any) -> Holder | None:
    return await ask_holder(client.connection, handle.family, handle.tenant, handle.id, **options)


@pytest.fixture
def cli(account: Account, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("aiqueue.worker.announcer.EVERY_S", 0.2)
    monkeypatch.setenv("AIQUEUE_URL", account.url)
    monkeypatch.setenv("AIQUEUE_USER", account.user)
    monkeypatch.setenv("AIQUEUE_PASSWORD", account.password)

    async def run(*arguments: str, columns: str = "") -> str:
        monkeypatch.setenv("COLUMNS", columns)
        done = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


async def test_a_worker_is_listed_with_its_slots_kinds_tenants_memory_version_and_oldest_job(
    client: aiqueue.Client, cli: Any
) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with holder(entered, left, name="one", tenants=["acme"], concurrency=2).running(client):
        handle = await client.enqueue(Hold(), tenant="acme")
        await entered.wait()

        async def runs_it() -> bool:
            found = await find(client, "one")
            return found is not None and found.oldest is not None

        await eventually(runs_it)
        (one,) = await client.workers(family="agent.tasks", tenant="acme")
        assert (one.name, one.state, one.slots, one.running) == ("one", "running", 2, 1)
        assert (one.families, one.kinds, one.tenants) == (("agent.tasks",), {"agent.tasks": ("hold",)}, ("acme",))
        assert (one.pid, one.version, one.answers, one.heeds_pauses) == (os.getpid(), aiqueue.__version__, True, True)
        assert one.rss_bytes is not None
        assert one.rss_bytes > 1_000_000
        assert one.oldest is not None
        assert (one.oldest.job_id, one.oldest.kind, one.oldest.tenant) == (handle.id, "hold", "acme")
        assert abs(one.heard_at - time.time()) < 10
        assert time.time() - 60 < one.started_at <= time.time()
        assert one.serves_lane("agent.tasks", "acme")
        assert not one.serves_lane("agent.tasks", "globex")
        assert await client.workers(tenant="globex") == await client.workers(family="rag.ingest") == []
        pause = await client.pause("agent.tasks", tenant="acme", by="anna")
        await client.pause("agent.tasks", tenant="globex", by="bert")
        (one,) = await client.workers()
        assert one.pauses == (pause,)
        (plain,) = json.loads(await cli("workers", "--json"))
        assert (plain["name"], plain["oldest"]["job_id"], plain["pauses"][0]["by"]) == ("one", handle.id, "anna")
        for columns in ("", "80", "160"):
            shown = await cli("workers", columns=columns)
            assert "one " in shown
            assert "1/2" in shown
            assert "by anna" in shown
            assert all(len(line) <= int(columns or 10_000) for line in shown.splitlines()[:3])
        shown = await cli("workers", "one", columns="80")
        for part in ("worker one: running", "1 of 2 in use", "agent.tasks: hold", "acme", handle.id, "by anna"):
            assert part in shown
        assert json.loads(await cli("workers", "one", "--json"))["name"] == "one"
        left.set()
    assert await client.workers() == []
    assert "no worker is running" in await cli("workers")


async def test_a_family_without_workers_and_an_unknown_one_are_refused_and_a_missing_stream_is_named(
    client: aiqueue.Client,
) -> None:
    with pytest.raises(BadInput, match="aiqueue inbox ls"):
        await client.workers(family="agent.message")
    with pytest.raises(UnknownFamily):
        await client.workers(family="no.such")
    await client.connection.api("STREAM.DELETE.KV_AI_PRESENCE")
    with pytest.raises(NotFound, match="there is no stream KV_AI_PRESENCE: run `aiqueue apply` first"):
        await client.workers()


async def test_a_worker_that_drains_is_listed_as_draining_and_serves_nobody_until_its_jobs_have_ended(
    client: aiqueue.Client,
) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    run = holder(entered, left, name="one").running(client)
    await run.__aenter__()
    await client.enqueue(Hold(), tenant="acme")
    await entered.wait()
    leaving = asyncio.create_task(run.__aexit__(None, None, None))

    async def drains() -> None:
        found = await find(client, "one")
        assert found is not None
        assert (found.state, found.kinds, found.families) == ("draining", {}, ("agent.tasks",))

    await eventually(drains)
    assert not leaving.done()
    left.set()
    await leaving
    assert await client.workers() == []


async def test_records_of_former_versions_and_of_other_programs_are_read(client: aiqueue.Client) -> None:
    """The first is as version 0.1.0 wrote it before workers were listed."""
    former = {
        "state": "ok", "time": 1.0, "pid": 7, "worker": "former", "slots": 4, "running": 1, "waiting": 0, "done": 9,
        "last_delivery": None, "connected": True, "stalled_s": 0.0, "lanes": 2, "tenants": None,
        "jobs": [{"family": "agent.tasks", "tenant": "acme", "priority": "normal", "seq": 3, "job_id": "a", "kind": "k",
                  "delivered_s": 2.5}],
        "heeds_pauses": True, "key_lanes": True, "host": "h", "started": 5.0, "kinds": {"agent.tasks": ["k"]},
        "rss_bytes": 1,
    }  # fmt: skip
    await WorkerRecords(client.connection, client.topology).write("former", former)
    (found,) = await client.workers()
    assert (found.name, found.families, found.version, found.answers) == ("former", ("agent.tasks",), "", False)
    assert found.oldest is not None
    assert found.oldest.age_s == 2.5
    wrong: list[Any] = [
        None,
        True,
        -1,
        10**400,
        float("nan"),
        float("inf"),
        "x" * 10_000,
        [],
        [None, 1],
        {},
        {"a": [1]},
    ]
    fields = ("family", "tenant", "priority", "seq", "job_id", "kind", "delivered_s")
    for value in wrong:
        (found,) = parse_workers([(json.dumps(dict.fromkeys(former, value)).encode(), 100.0)], 100.0)
        assert len(found.name) <= 300
        assert found.state == "running"
        job = {**dict.fromkeys(fields, "a"), "seq": 3, "delivered_s": value}
        jobs = {"jobs": [dict.fromkeys(fields, value), job]}
        (found,) = parse_workers([(json.dumps(jobs).encode(), 100.0)], 100.0)
        assert all(0 <= each.age_s < 2**62 for each in found.jobs)  # infinite: `aiqueue workers` ended with an error
    assert parse_workers([(b"{}", 80.0)], 100.0)[0].state == "silent"
    assert parse_workers([(wrong, 1.0) for wrong in (b"", b"[]", b"7", b"null", b"{", b"\xff")], 1.0) == []


def test_a_field_that_is_wrong_leaves_the_others_as_they_are() -> None:
    job = {"family": "agent.tasks", "tenant": "acme", "priority": "normal", "seq": 3, "job_id": "a", "kind": "k"}
    record = {
        "worker": "one", "state": "draining", "host": "h" * 400, "pid": 7, "slots": True, "running": 2.5, "lanes": -1,
        "kinds": {"agent.tasks": ["a", 7, "b" * 400], "rag.ingest": "k"}, "tenants": ["acme", None], "started": 5,
        "jobs": [{**job, "delivered_s": 1.5}, 7, {**job, "seq": "3", "delivered_s": 2}], "answers": 1,
        "key_lanes": True, "in_line": {"agent.tasks": 4, "rag.ingest": "x"}, "rss_bytes": 0,
    }  # fmt: skip
    (found,) = parse_workers([(json.dumps(record).encode(), 100.0)], 100.0)
    assert (found.name, found.state, found.pid, found.started_at) == ("one", "draining", 7, 5.0)
    assert (found.host, found.slots, found.running, found.lanes) == ("h" * 300, 0, 2, 0)
    assert found.kinds == {"agent.tasks": ("a", "", "b" * 300), "rag.ingest": ()}
    assert (found.families, found.tenants) == (("agent.tasks", "rag.ingest"), ("acme", ""))
    assert [(each.seq, each.age_s, each.kind) for each in found.jobs] == [(0, 2.0, "k"), (3, 1.5, "k")]
    assert (found.answers, found.heeds_limits, found.rss_bytes) == (False, True, None)
    assert found.in_line == {"agent.tasks": 4, "rag.ingest": 0}


async def test_a_worker_that_writes_its_record_while_all_are_read_is_listed_once(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.lanes.worker_records.READ_AT_ONCE", 2)
    records, read = WorkerRecords(client.connection, client.topology), client.connection.read
    for number in range(5):
        await records.write(f"w{number}", {"worker": f"w{number}", "slots": 1})

    async def read_and_write(stream: str, subject: str, **options: Any) -> Any:
        has_written = ".pause." in subject
        async for stored in read(stream, subject, **options):
            yield stored
            if not has_written:
                await records.write("w0", {"worker": "w0", "slots": 2})
                has_written = True

    monkeypatch.setattr(client.connection, "read", read_and_write)
    listed = await client.workers()
    assert [(each.name, each.slots) for each in listed] == [("w0", 2), *((f"w{n}", 1) for n in range(1, 5))]


async def test_nothing_in_a_record_reaches_a_terminal_raw(client: aiqueue.Client, cli: Any) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\u2066\r\n\x9b31m" + "w" * 400
    record = {
        "worker": evil, "state": "stalled", "blocked_at": evil, "host": evil, "version": evil, "slots": 1, "running": 1,
        "families": [evil], "kinds": {evil: [evil]}, "tenants": [evil],
        "jobs": [{"job_id": evil, "kind": evil, "family": evil, "delivered_s": 5}],
    }  # fmt: skip
    records = WorkerRecords(client.connection, client.topology)
    await records.write("evil", record)
    await records.write("worse", {**record, "state": evil})
    for columns in ("", "80", "200"):
        shown = await cli("workers", columns=columns)
        assert not set(shown) & set("\x1b\x07\x9b\r\u202e\u2066")
        if columns:
            assert max(map(len, shown.splitlines())) <= int(columns)
    assert not set(await cli("workers", "--json")) & set("\x1b\x07\x9b\r\u202e\u2066")
    for form in ([], ["--json"]):
        shown = await cli("workers", evil[: worker_stats.TEXT_MAX], *form)
        assert not set(shown) & set("\x1b\x07\x9b\r\u202e\u2066")
        assert "stalled" in shown


def test_a_worker_that_is_late_is_marked_before_it_is_silent_and_a_blocked_one_is_named_with_its_job() -> None:
    job = {"job_id": "j1", "kind": "sleep", "family": "agent.tasks", "delivered_s": 8.0}
    blocked = {"worker": "w", "state": "stalled", "blocked_at": "app.py:3", "stalled_s": 8.0, "jobs": [job]}
    for record, heard_s, said in (
        ({"worker": "w"}, 6, ""),
        ({"worker": "w"}, 8, "not heard of for 8s: its event loop may be blocked, or it was killed"),
        (blocked, 1, "its event loop is blocked for 8s, at app.py:3; its oldest job is sleep j1"),
    ):
        (found,) = worker_stats.parse_workers([(json.dumps(record).encode(), 1_000.0)], 1_000.0 + heard_s)
        assert found.state == ("stalled" if record is blocked else "running")
        assert describe_worker(found) == said


async def test_one_worker_that_is_not_there_is_one_line(client: aiqueue.Client, cli: Any) -> None:
    done = await asyncio.to_thread(CliRunner().invoke, app, ["workers", "gone\x1b[2J"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no worker 'gone\\x1b[2J' is running")


async def test_a_thousand_records_are_listed_whole(client: aiqueue.Client) -> None:
    job = {
        "family": "agent.tasks", "tenant": "acme", "priority": "normal", "seq": 3, "job_id": "0" * 26, "kind": "k",
        "delivered_s": 1.5,
    }  # fmt: skip
    body = {
        "state": "ok", "slots": 100, "running": 5, "tenants": None, "kinds": {"agent.tasks": ["one", "two", "three"]},
        "families": ["agent.tasks"], "version": "0.1.0", "host": "host-1.example", "jobs": [job] * 2,
    }  # fmt: skip
    store = client.connection.store
    for at in range(0, 1_000, 100):
        await asyncio.gather(*(
            store(
                f"$KV.AI_PRESENCE.worker.w{n}", json.dumps({**body, "worker": f"w{n}"}).encode(),
                {headers.MSG_ID: subjects.new_id(), headers.TTL: "60s"},
            )
            for n in range(at, at + 100)
        ))  # fmt: skip
    listed = await client.workers()
    assert {each.name for each in listed} == {f"w{n}" for n in range(1_000)}
    assert {(each.state, each.slots, each.running, len(each.jobs)) for each in listed} == {("running", 100, 5, 2)}


async def test_only_the_holder_of_a_job_answers_and_says_how_it_holds_it(client: aiqueue.Client) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    async with (
        holder(asyncio.Event(), left, name="other", tenants=["globex"]).running(client),
        holder(entered, left, name="one", tenants=["acme"], concurrency=1).running(client),
    ):
        handle = await client.enqueue(Hold(), tenant="acme")
        await entered.wait()
        found = await ask(client, handle)
        assert found is not None
        assert (found.worker, found.pid, found.state, found.attempt) == ("one", os.getpid(), "running", 1)
        assert (found.runs_in, found.timeout_s, found.deliveries, found.suspect) == ("loop", 60.0, 1, False)
        assert found.since is not None
        assert found.started_at is not None
        assert time.time() - 20 < found.since <= found.started_at + 0.1 < time.time() + 0.1
        behind = await client.enqueue(Hold(), tenant="acme")
        assert await ask(client, behind, within_s=0.1) is None
        named = await ask(client, behind, worker="other")
        assert named is not None
        assert (named.worker, named.state) == ("other", "absent")
        assert await ask(client, behind, worker="nobody", within_s=0.1) is None
        for wrong in (b"", b"[]", b"{}", b'{"tenant": 1, "job_id": []}', b"\xff"):
            await client.connection.publish("aiq.holds.agent.tasks", wrong, reply=client.connection.new_inbox())
        assert await ask(client, handle) is not None
        left.set()
    assert await ask(client, handle) is None


async def test_the_holder_says_whether_a_job_runs_in_a_thread_or_waits_for_a_slot(client: aiqueue.Client) -> None:
    worker, let_go = aiqueue.Worker(name="one", concurrency=1, processes=1), asyncio.Event()

    @worker.handle(Hold)
    def in_thread(job: aiqueue.Job[Hold]) -> None:
        while not let_go.is_set():
            time.sleep(0.01)

    async with worker.running(client) as session:
        handle = await client.enqueue(Hold(), tenant="acme")

        async def in_a_thread() -> bool:
            found = await ask(client, handle)
            return found is not None and found.runs_in == "thread"

        await eventually(in_a_thread)
        behind = await client.enqueue(Hold(n=1), tenant="acme")
        session.puller.refill(1, 0)  # asked for, and then there is no slot for it
        await eventually(lambda: session.vitals()["waiting"])
        found = await ask(client, behind)
        assert found is not None
        assert (found.state, found.started_at, found.attempt) == ("waiting", None, None)
        let_go.set()


@pytest.fixture
def pool(tmp_path: Path, account: Account) -> Iterator[WorkerPool]:
    pool = WorkerPool(tmp_path, account, blocking.APP)
    yield pool
    for process in pool.alive:
        process.kill()
        process.wait()


async def test_a_worker_whose_event_loop_is_blocked_is_listed_as_stalled_and_runs_again(
    pool: WorkerPool, account: Account
) -> None:
    async with blocking.client_of(pool, account) as client:
        await blocking.start(client, pool)
        await client.enqueue(blocking.Sleep(n=3), tenant="acme")

        async def stalled() -> bool:
            found = await find(client, "one")
            return found is not None and found.state == "stalled"

        await eventually(stalled)
        begun = time.monotonic()
        while time.monotonic() - begun < 1.4:  # longer than a record lives
            found = await find(client, "one")
            assert found is not None
            assert found.state == "stalled"
            assert "app.py" in found.blocked_at
            assert [each.kind for each in found.jobs] == ["sleep"]
            await asyncio.sleep(0.1)
        assert found.stalled_s > 1

        async def runs() -> bool:
            found = await find(client, "one")
            return found is not None and (found.state, found.blocked_at) == ("running", "")

        await eventually(runs)


async def test_a_worker_that_is_killed_is_gone_when_its_record_has_expired(pool: WorkerPool, account: Account) -> None:
    async with blocking.client_of(pool, account) as client:
        process = await blocking.start(client, pool)
        await asyncio.to_thread(pool.kill, process)
        await eventually(lambda: _is_gone(client), within=4)


async def _is_gone(client: aiqueue.Client) -> bool:
    return await client.workers() == []
