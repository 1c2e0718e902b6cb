"""The records of running workers, and what a new one does for the jobs that wait for it."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import AsyncExitStack
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers
from aiqueue.cli.app import app
from aiqueue.config import Settings
from aiqueue.inspect import Subject, describe_waiting, examine, read_waiting_kinds
from aiqueue.lanes import WorkerRecords
from aiqueue.topology import Topology
from aiqueue.worker import announcer, unknown_kinds
from aiqueue.worker.blocked_report import BlockedReport
from aiqueue.worker.unknown_kinds import UnknownKinds

from ..support import NatsProcess, create_streams, eventually

pytestmark = pytest.mark.families("agent.tasks")
STREAM = "KV_AI_PRESENCE"


class Known(aiqueue.Message, kind="known"):
    n: int = 0


class Other(aiqueue.Message, kind="other"):
    n: int = 0


def worker_of(model: type[aiqueue.Message], ran: list[int], **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=20, **options)

    @worker.handle(model)
    async def handler(job: aiqueue.Job[Any]) -> None:
        ran.append(job.message.n)

    return worker


async def records(client: aiqueue.Client) -> dict[str, Any]:
    return {record["worker"]: record for record in await WorkerRecords(client.connection, client.topology).read()}


async def write_record(client: aiqueue.Client, name: str, tenants: list[str] | None) -> None:
    """Announce a worker that knows the kind `other`, and takes no jobs here."""
    record = {"worker": name, "kinds": {"agent.tasks": ["other"]}, "tenants": tenants}
    await WorkerRecords(client.connection, client.topology).write(name, record)


async def parked_aside(client: aiqueue.Client) -> int:
    request = {"subjects_filter": "ai.parked.at.agent.tasks.*.*.*.aside"}
    info = await client.connection.api("STREAM.INFO.AI_PARKED", request)
    return sum((info["state"].get("subjects") or {}).values())


async def park_jobs_aside(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, jobs: int, *, in_lane: int = 0
) -> None:
    """Have a worker park jobs of the kind `other` aside for ten minutes, those in the lane and `jobs` new ones."""
    monkeypatch.setattr(unknown_kinds, "HOP_FIRST_S", 600.0)
    monkeypatch.setattr(unknown_kinds, "HOP_MAX_S", 600.0)
    async for _ in client.enqueue_many([Other(n=n) for n in range(jobs)], tenant="acme"):
        pass
    async with worker_of(Known, []).running(client):
        await eventually(lambda: _is(parked_aside(client), in_lane + jobs))


async def _is(found: Any, expected: int) -> bool:
    return bool(await found == expected)


async def test_a_record_says_what_a_worker_is_knows_and_runs_and_goes_when_it_drains(client: aiqueue.Client) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker(name="w.1 ", tenants=["acme"])

    @worker.handle(Known)
    async def handler(job: aiqueue.Job[Known]) -> None:
        entered.set()
        await left.wait()

    @worker.handle(Other)
    async def other(job: aiqueue.Job[Other]) -> None:
        pass

    assert announcer.EVERY_S == 5.0
    async with worker.running(client):
        handle = await client.enqueue(Known(), tenant="acme")
        await entered.wait()
        await eventually(lambda: _holds(client, "w.1 ", handle.id))
        record = (await records(client))["w.1 "]
        assert record["kinds"] == {"agent.tasks": ["known", "other"]}
        assert record["tenants"] == ["acme"]
        assert (record["state"], record["slots"], record["running"]) == ("ok", 100, 1)
        (job,) = record["jobs"]
        assert (job["family"], job["tenant"], job["priority"], job["kind"]) == (
            "agent.tasks", "acme", "normal", "known",
        )  # fmt: skip
        assert record["rss_bytes"] > 1_000_000
        stored = await client.connection.last(STREAM, "$KV.AI_PRESENCE.worker.w_1_")
        assert stored is not None
        assert stored.headers[headers.TTL] == "20s"
        left.set()
    assert await records(client) == {}


async def _holds(client: aiqueue.Client, name: str, job_id: str) -> bool:
    record = (await records(client)).get(name, {})
    return job_id in [job["job_id"] for job in record.get("jobs", [])]


async def test_a_worker_that_drains_leaves_the_record_of_another_of_its_name(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "EVERY_S", 600.0)
    first, second = worker_of(Known, [], name="same"), worker_of(Other, [], name="same")
    async with AsyncExitStack() as stack:
        async with first.running(client):
            await eventually(lambda: _knows(client, "known"))
            await stack.enter_async_context(second.running(client))
            await eventually(lambda: _knows(client, "other"))
        assert await _knows(client, "other")
    assert await records(client) == {}


async def _knows(client: aiqueue.Client, kind: str) -> bool:
    return (await records(client)).get("same", {}).get("kinds") == {"agent.tasks": [kind]}


async def test_a_worker_whose_kind_nobody_else_knows_gets_the_jobs_that_wait_for_it_at_once(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await park_jobs_aside(client, monkeypatch, 600)
    ran: list[int] = []
    async with worker_of(Other, ran).running(client):
        await eventually(lambda: len(ran) == 600)
    assert sorted(ran) == list(range(600))
    assert await parked_aside(client) == 0


async def test_a_further_worker_of_a_known_kind_shortens_no_hop(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "EVERY_S", 0.1)
    ran: list[int] = []
    written: set[float] = set()

    async def has_written_three_times() -> bool:
        """What a worker does for waiting jobs comes between its first write and its second one."""
        written.add((await records(client)).get("second", {"time": 0.0})["time"])
        return len(written - {0.0}) >= 3

    await park_jobs_aside(client, monkeypatch, 20)
    await write_record(client, "first", None)
    async with worker_of(Other, ran, name="second").running(client):
        await eventually(has_written_three_times)
        assert await parked_aside(client) == 20
    assert ran == []


async def test_two_workers_that_bring_the_same_jobs_forward_move_each_job_once(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await park_jobs_aside(client, monkeypatch, 300)
    each = [UnknownKinds(client.connection, client.parking) for _ in range(2)]
    moved = await asyncio.gather(*(one.bring_forward(["agent.tasks"], lambda *_: True) for one in each))
    assert sum(moved) == 300
    ran: list[int] = []
    async with worker_of(Other, ran).running(client):
        await eventually(lambda: len(ran) == 300)
    assert sorted(ran) == list(range(300))


async def test_doctor_and_inspect_say_how_many_jobs_wait_for_a_worker_that_knows_their_kind(
    account: Any, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await park_jobs_aside(client, monkeypatch, 12)
    family = client.topology.family("agent.tasks")
    (waiting,) = await read_waiting_kinds(client.connection, client.topology, [family])
    assert (waiting.kind, waiting.jobs, waiting.workers, waiting.partial) == ("other", 12, 0, False)
    text = "12 jobs wait for a worker that knows other: none is running"
    found = [each async for each in examine(Subject(client.connection, client.topology))]
    (finding,) = [each for each in found if each.code == "kind-unknown"]
    assert (finding.check, finding.level, finding.text) == ("agent.tasks", "warn", text)
    monkeypatch.setenv("AIQUEUE_URL", account.url)
    monkeypatch.setenv("AIQUEUE_USER", account.user)
    monkeypatch.setenv("AIQUEUE_PASSWORD", account.password)
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["inspect", "agent.tasks"])
    assert f"agent.tasks, all tenants: {text}" in shown.stdout
    await write_record(client, "first", ["globex"])
    (waiting,) = await read_waiting_kinds(client.connection, client.topology, [family])
    assert (waiting.jobs, waiting.workers, waiting.unserved) == (12, 0, 12)
    await write_record(client, "second", ["acme"])
    (waiting,) = await read_waiting_kinds(client.connection, client.topology, [family])
    assert (waiting.jobs, waiting.workers, waiting.unserved) == (12, 1, 0)
    assert describe_waiting(waiting) == "12 jobs wait for a worker that knows other: 1 is running"
    found = [each async for each in examine(Subject(client.connection, client.topology))]
    assert "kind-unknown" not in [each.code for each in found]


async def test_a_worker_keeps_its_record_while_it_brings_many_jobs_forward(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "EVERY_S", 0.05)
    started = asyncio.Event()

    async def bring_forward(*_: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    running = announcer.Announcer(
        client.connection, client.topology, "slow", {}, lambda: {"worker": "slow"}, list, bring_forward
    )
    running.start()
    try:
        await started.wait()
        request = {"subjects_filter": "$KV.AI_PRESENCE.worker.*"}
        before = (await client.connection.api(f"STREAM.INFO.{STREAM}", request))["state"]["last_seq"]

        async def was_renewed() -> bool:
            state = (await client.connection.api(f"STREAM.INFO.{STREAM}", request))["state"]
            return bool(state["last_seq"] >= before + 3)

        await eventually(was_renewed)
    finally:
        await running.stop()
    assert await records(client) == {}


async def test_a_worker_runs_without_the_permission_to_announce_itself(own_server: Any) -> None:
    denied = json.dumps({"publish": {"deny": ["$KV.>"]}})
    server: NatsProcess = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{{ user: less, password: p, permissions: {denied} }} ] }}"
    )
    ran: list[int] = []
    async with (
        aiqueue.connect(url=server.url, user="all", password="p") as every,
        aiqueue.connect(url=server.url, user="less", password="p") as less,
    ):
        await create_streams(every)
        async with worker_of(Known, ran).running(less):
            await every.enqueue(Known(n=7), tenant="acme")
            await eventually(lambda: ran == [7])


def test_a_process_without_a_thread_for_the_record_of_a_blocked_loop_keeps_its_watchdog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`note` is called in the watchdog's thread, which ended: a loop that hangs for ever was never ended then."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    report = BlockedReport(Settings, Topology.load(), "one", dict)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    report.note(60.0, "app.py:1 in f")
    report.note(0.0, "")
    report.note(61.0, "app.py:1 in f")


def test_the_time_for_which_a_loop_is_blocked_never_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog leaves out time in which its process was suspended: 35.8 s were followed by 23.2 s."""
    report = BlockedReport(Settings, Topology.load(), "one", dict)
    monkeypatch.setattr(threading.Thread, "start", lambda _thread: None)
    report.note(60.0, "app.py:1 in f")
    before = report._record()["stalled_s"]
    report.note(20.0, "app.py:1 in f")
    assert report._record()["stalled_s"] >= before >= 60.0
    report.note(0.0, "")
    report.note(7.0, "app.py:1 in f")
    assert report._record()["stalled_s"] < 8.0
