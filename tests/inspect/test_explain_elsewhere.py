"""Reasons that lie in limits, schedules, streams and processes: made true on a real server, and named by `explain`."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shlex
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers, subjects
from aiqueue.cli.app import app
from aiqueue.errors import JobState, NotFound, Unavailable
from aiqueue.inspect import Holder, JobStats, ask_holder, lane_scan, parse_workers
from aiqueue.inspect.explanation import REMEDIES, JobEvidence, LaneEvidence
from aiqueue.inspect.reasons import decide
from aiqueue.lanes import ActivePauses
from aiqueue.schedules import tick_job_id
from aiqueue.subjects import Lane
from aiqueue.topology import Topology, provision

from .. import keyed
from ..connection.test_permissions import documented, two, user, users
from ..support import ROOT, Account, Cluster, NatsProcess, eventually
from ..worker import test_stranded
from ..worker.test_kill import WorkerPool
from . import blocking
from .explaining import FAMILY, Hold, Why, announce, holder, make_why, take, why

__all__ = ["why"]


async def has(why: Why, job: aiqueue.Handle[Any] | str, reason: str, *options: str) -> None:
    found = await why(job, *options)
    assert found["reason"] == reason, found


async def test_the_limit_of_its_key_is_reached(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = make_why(account, monkeypatch, streams=str(tmp_path / "streams"))
    worker = aiqueue.Worker(name="one")

    @worker.handle(keyed.Call)
    async def call(job: aiqueue.Job[keyed.Call]) -> None:
        pass

    async with keyed.connect(account, tmp_path) as client:
        await client.set_limit(keyed.FAMILY, "m", requests=1, window="1h")
        async with worker.running(client):
            await (await client.enqueue(keyed.Call(model="m"), tenant="acme")).result(20)
            handle = await client.enqueue(keyed.Call(model="m"), tenant="acme")
            await eventually(lambda: has(why, handle, "limit"))
            found = await why(handle)
            assert "1 request in 1h" in found["text"]
            assert any("requests 1 of 1" in each for each in found["evidence"])
            assert f"`aiqueue limits set {keyed.FAMILY} m --requests 2 --for 1h`" in found["remedy"]
            assert 3_000 < found["until"] - time.time() < 4_000
            assert any(each.startswith("there is room for another request in ") for each in found["evidence"])
            await client.pause(keyed.FAMILY, key="m", by="anna")
            found = await why(handle)
            assert (found["reason"], "--key m" in found["remedy"]) == ("paused", True)


async def test_of_a_limit_of_cost_explain_says_when_it_frees_and_a_command_that_raises_it(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = make_why(account, monkeypatch, streams=str(tmp_path / "streams"))
    worker = aiqueue.Worker(name="one")

    @worker.handle(keyed.Call, cost=lambda call: 10 * call.n)
    async def call(job: aiqueue.Job[keyed.Call]) -> None:
        pass

    async with keyed.connect(account, tmp_path) as client:
        await client.set_limit(keyed.FAMILY, "m*", requests=50, cost=100, window="1d", tenant="*")
        async with worker.running(client):
            await (await client.enqueue(keyed.Call(model="m1", n=10), tenant="acme")).result(20)
            handle = await client.enqueue(keyed.Call(model="m1", n=5), tenant="acme")
            await eventually(lambda: has(why, handle, "limit"))
            found = await why(handle)
            assert found["until"] is None
            assert any("only its worker knows" in each and "1d" in each for each in found["evidence"]), found
            (command,) = re.findall("`aiqueue (.+?)`", found["remedy"])
            assert command == f"limits set {keyed.FAMILY} 'm*' --each-tenant --cost 200 --for 1h"
            done = await asyncio.to_thread(CliRunner().invoke, app, shlex.split(command))
            assert (done.exit_code, "50 requests and cost 200 in 1d" in done.stdout) == (0, True), done.output
            await handle.result(20)


async def test_the_server_has_given_it_up(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_strands.toml").write_text(textwrap.dedent(test_stranded.FILE))
    why = make_why(account, monkeypatch, streams=str(tmp_path))
    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": tmp_path}
    async with aiqueue.connect(account.url, **options) as client:
        await provision.apply(client.connection, client.topology)
        await test_stranded.strand(client, 1)

        async def given_up() -> None:
            await test_stranded.pull(client)  # the server says so when it is asked for jobs
            found = await why("job-0")
            assert (found["reason"], "2 times" in found["text"]) == ("stranded", True)

        await eventually(given_up)


async def test_another_job_of_its_id_is_under_way(client: aiqueue.Client, why: Why) -> None:
    class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
        prompt: str

    handle = await client.enqueue(Request(prompt="a"), tenant="acme", unique="r-1")
    started = {headers.MSG_ID: subjects.new_id(), headers.EVENT: "started", headers.RUN: "999", headers.ATTEMPT: "1"}
    await client.connection.store("ai.gateway.responses.acme.r-1", b"\xa0", started)
    family = client.topology.family("gateway.requests")
    config = family.lane_config("acme", "normal")
    name = f"{family.stream}.{config['durable_name']}"
    await client.connection.api(
        f"CONSUMER.CREATE.{name}.{config['filter_subject']}", {"stream_name": family.stream, "config": config}
    )
    await take(client, name)
    found = await why(handle)
    assert (found["reason"], "run 999" in found["text"]) == ("claimed", True)


async def test_there_was_no_space_for_its_dead_letter(client: aiqueue.Client, why: Why) -> None:
    handle = await client.enqueue(Hold(), tenant="acme")
    stored = await client.connection.get("AI_AGENT_TASKS", 1)
    assert stored is not None
    (await client.connection.delete("AI_AGENT_TASKS", 1))
    await client.parking.park(
        handle.lane, handle.id, client.connection.clock.now() + 600, {**stored.headers, headers.REASON: "attempts"},
        stored.data, dedup_key="d1",
    )  # fmt: skip
    found = await why(handle)
    assert (found["reason"], "(attempts)" in found["text"]) == ("dead_letters_full", True)


async def test_it_has_ended_without_an_outcome_or_is_not_among_the_jobs_that_were_read(
    client: aiqueue.Client, why: Why, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {headers.MSG_ID: subjects.new_id(), headers.EVENT: "started", headers.RUN: "77", headers.ATTEMPT: "1"}
    await client.connection.store("ai.agent.results.acme.gone", b"\xa0", entry)
    await has(why, "gone", "ended")
    monkeypatch.setattr(lane_scan, "SCAN_JOBS_MAX", 5)
    async for _ in client.enqueue_many([Hold(n=n) for n in range(20)], tenant="acme"):
        pass
    await has(why, "gone", "unknown")


async def test_it_is_the_job_of_a_schedule(client: aiqueue.Client, why: Why) -> None:
    await client.schedules.add("daily", aiqueue.Every("1d"), Hold(), tenant="acme")
    stats = await client.schedules.get("daily", tenant="acme")
    assert stats.document.next_ms is not None
    job_id = tick_job_id("daily", stats.document.next_ms)
    found = await why(job_id)
    assert (found["reason"], found["remedy"]) == (
        "schedule_not_due", "`aiqueue schedule run daily --tenant acme` enqueues a job now",
    )  # fmt: skip
    assert found["until"] == stats.document.next_ms / 1000
    past = tick_job_id("daily", stats.document.next_ms - 2 * 86_400_000)
    await has(why, past, "schedule_skipped")
    await client.schedules.pause("daily", tenant="acme")
    await has(why, job_id, "schedule_paused")
    with pytest.raises(NotFound):
        await client.explain(tick_job_id("weekly", stats.document.next_ms))


async def test_no_worker_has_taken_its_tick(client: aiqueue.Client, why: Why) -> None:
    await client.schedules.add("soon", aiqueue.Every("1s"), Hold(), tenant="acme")
    stats = await client.schedules.get("soon", tenant="acme")
    assert stats.document.next_ms is not None
    job_id = tick_job_id("soon", stats.document.next_ms)
    await eventually(lambda: has(why, job_id, "schedule_late"))


async def test_what_this_user_may_not_read_is_named_as_not_known(own_server: Any) -> None:
    rows = ("a plain publisher of one tenant", "a producer with aiqueue", "if the user waits for results")
    publish, subscribe = documented(*rows)
    publish = [each for each in publish if each != "$JS.API.DIRECT.GET.>"]
    read = ("AI_RESULTS", "AI_AGENT_TASKS", "AI_PARKED", "AI_DEAD", "AI_CHECKPOINTS")
    publish += [*(f"$JS.API.DIRECT.GET.{each}" for each in read), "$JS.API.CONSUMER.INFO.>"]
    server: NatsProcess = own_server(
        f"authorization {{ users: [ {{ user: all, password: p }}, {user('less', publish, subscribe)} ] }}"
    )
    async with two(server) as (every, less):
        handle = await every.enqueue(Hold(), tenant="acme")
        found = await less.explain(handle.id, family=FAMILY, tenant="acme")
        assert found.reason == "unserved"
        assert any(each.startswith("who works: permission denied") for each in found.unknown)


@pytest.mark.parametrize("verb", ["subscribe", "publish"])
async def test_a_worker_without_the_right_to_say_what_it_holds_runs_jobs_and_its_record_says_so(
    own_server: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("aiqueue.worker.announcer.EVERY_S", 0.1)
    subject = {"subscribe": "aiq.holds.>", "publish": "_INBOX.>"}[verb]
    entered, left = asyncio.Event(), asyncio.Event()
    async with two(own_server(users(**{verb: [subject]}))) as (every, less), holder(entered, left).running(less):
        handle = await every.enqueue(Hold(), tenant="acme")
        await entered.wait()
        assert await ask_holder(every.connection, FAMILY, "acme", handle.id, within_s=0.1) is None

        async def is_known() -> None:
            found = await every.explain(handle.id)
            assert (found.reason, "as its record says" in found.text) == ("running", True)

        await eventually(is_known)
        left.set()


async def test_the_stream_has_no_leader(own_cluster: Cluster) -> None:
    own_cluster.start()
    owner = own_cluster.account
    async with aiqueue.connect(
        own_cluster.url, user=owner.user, password=owner.password, profile="cluster", families=[FAMILY]
    ) as client:
        await eventually(lambda: provision.apply(client.connection, client.topology))
        handle = await client.enqueue(Hold(), tenant="acme")
        for node in own_cluster.alive[1:]:
            node.kill()
        await eventually(lambda: client.connection.connected)

        async def silent() -> bool:
            try:
                found = await client.explain(handle.id, family=FAMILY, tenant="acme")
            except Unavailable:
                return False
            return found.reason == "no_answer" and "AI_AGENT_TASKS" in found.text

        await eventually(silent, within=60)


@pytest.fixture
def pool(tmp_path: Path, account: Account) -> Iterator[WorkerPool]:
    pool = WorkerPool(tmp_path, account, blocking.APP.replace("TTL_S = 1.0", "TTL_S = 2.0"))
    yield pool
    for process in pool.alive:
        process.kill()
        process.wait()


async def test_the_job_of_a_worker_that_hangs_and_is_then_killed_is_explained_all_the_while(
    pool: WorkerPool, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = make_why(account, monkeypatch, streams=str(pool.directory / "streams"))
    async with blocking.client_of(pool, account) as client:
        process = await blocking.start(client, pool)
        handle = await client.enqueue(blocking.Sleep(n=60), tenant="acme")
        await eventually(lambda: has(why, handle, "worker_stalled"))
        found = await why(handle)
        assert "app.py" in found["evidence"][0]
        await asyncio.to_thread(pool.kill, process)
        seen: list[str] = []

        async def is_gone() -> bool:
            seen.append((await why(handle, once=True))["reason"])
            return seen[-1] == "no_worker"

        await eventually(is_gone)
        assert set(seen) <= {"worker_stalled", "worker_lost", "workers_lost", "no_worker"}


async def test_nothing_of_a_hostile_name_reaches_a_terminal_raw(client: aiqueue.Client, why: Why) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\u2066\u200f\r\ndo: rm\x9b31m"
    await announce(client, evil, kinds={FAMILY: [evil]}, state="stalled", blocked_at=evil, host=evil)
    await client.pause(FAMILY, tenant="globex", by=evil, reason=evil)
    for tenant in ("acme", "globex"):
        handle = await client.enqueue(Hold(), tenant=tenant)
        for arguments in (["explain", handle.id], ["inspect", handle.id], ["explain", handle.id, "--json"]):
            done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
            assert done.exit_code == 0
            assert not set(done.stdout) & set("\x1b\x07\x9b\r\u202e\u2066\u200f")
        explained = await client.explain(handle.id)
        for sentence in (explained.text, explained.remedy, *explained.evidence):
            assert "\n" not in sentence  # a name must not look like a line of its own


def test_each_reason_is_on_the_page_of_why_jobs_wait() -> None:
    rows = [
        each.split("|")[1]
        for each in (ROOT / "docs/operations/explain.md").read_text().splitlines()
        if each.startswith("| `")
    ]
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(REMEDIES)


def test_each_reason_has_a_test() -> None:
    tests = "".join(each.read_text() for each in Path(__file__).parent.glob("*.py"))
    tests += (ROOT / "tests/client/test_timeouts.py").read_text()
    assert [each for each in REMEDIES if f'"{each}"' not in tests] == []


def test_a_reason_is_found_whatever_is_known() -> None:
    """Each part of the evidence may be missing. No server is needed to decide."""
    chance, family = random.Random(7), Topology.load().family(FAMILY)
    states = get_args(JobState)
    reasons = set()
    for _ in range(5_000):

        def maybe(*values: Any) -> Any:
            return chance.choice([None, *values])

        full = {"num_ack_pending": 5, "config": {"max_ack_pending": 5}}
        consumer = maybe({}, {"num_waiting": 1, "num_pending": 3}, full)
        record = {"worker": "w", "families": [FAMILY], "state": chance.choice(["ok", "draining", "stalled"])}
        workers = maybe((), tuple(parse_workers([(json.dumps(record).encode(), 1.0)], 1.0)))
        own = Lane(FAMILY, "acme", "normal")
        lane = maybe(LaneEvidence(family, own, consumer, workers, maybe(ActivePauses()), maybe({})))
        held_as: Any = chance.choice(["waiting", "starting", "running", "result"])
        held = Holder("w", "h", 1, held_as, maybe(1.0), seq=chance.choice([0, 7]))
        stats = JobStats("job", FAMILY, "acme", chance.choice(states), next_attempt_at=maybe(1.0, 1e12))
        names = ("delivered", "has_asked", "due", "is_retry", "stranded", "on_trial")
        flags = {name: chance.random() < 0.2 for name in names}
        found = decide(
            JobEvidence(
                stats, 100.0, lane=lane, seq=chance.choice([0, 7]), place=maybe(0, 1, 5), holder=maybe(held),
                deadline=maybe(1.0, 200.0), aside_since=maybe(5.0), error=chance.choice(["", "boom"]),
                has_forwarder=maybe(True, False), **flags,
            )
        )  # fmt: skip
        assert found.text
        assert found.remedy
        assert "{" not in found.remedy
        reasons.add(found.reason)
    assert len(reasons) > 20
