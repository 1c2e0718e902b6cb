"""Suspects, handlers in child processes, and the watchdog: with real children that really die."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue import codec, headers
from aiqueue.errors import BadInput, JobFailed
from aiqueue.journal import EMPTY_RECORD, TRIAL, Writer
from aiqueue.lanes import Delivery, LanePull
from aiqueue.processes import quarantine
from aiqueue.processes.recipe import Recipe
from aiqueue.subjects import Lane

from .. import support, suspects
from ..suspects import Act, act, act_sync
from ..worker.test_kill import WorkerPool

pytestmark = pytest.mark.families("agent.tasks")
FAST = aiqueue.Backoff(attempts=3, first=0.02, cap=0.05)

STREAM = """
    [family]
    name = "test.acts"
    default_kind = "act"
    [stream]
    name = "TEST_ACTS"
    [consumer]
    ack_wait = "1s"
    """

APP = """
    import asyncio, ctypes, os, time
    import aiqueue
    from aiqueue.worker import watchdog

    watchdog.TICK_S, watchdog.GRACE_S = 0.1, 0.3
    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Act(aiqueue.Message, kind="act", family="test.acts"):
        do: str
        n: int

    class Spin(aiqueue.Message, kind="spin", family="test.acts"):
        n: int

    worker = aiqueue.Worker(concurrency=20, drain_timeout="2s")

    @worker.handle(Act, timeout="1s")
    async def act(job):
        os.write(LOG, f"start {job.message.n} {os.getpid()}\\n".encode())
        match job.message.do:
            case "exit":
                await asyncio.sleep(0.05)
                os._exit(9)
            case "segv":
                await asyncio.sleep(0.05)
                ctypes.string_at(0)
            case "block":
                time.sleep(60)
            case "sleep":
                await asyncio.sleep(0.6)
            case _:
                await asyncio.sleep(0.02)
        os.write(LOG, f"end {job.message.n} {os.getpid()}\\n".encode())
        return [job.message.n, job.attempt]

    if "SPIN" in os.environ:
        @worker.handle(Spin, process=True)
        def spin(job):
            os.write(LOG, f"start {job.message.n} {os.getpid()}\\n".encode())
            while True:
                pass
    """


class Deed(aiqueue.Message, kind="act", family="test.acts"):
    do: str
    n: int


class Spin(aiqueue.Message, kind="spin", family="test.acts"):
    n: int


@pytest.fixture
def pool(tmp_path: Path, account: Any) -> Iterator[WorkerPool]:
    pool = WorkerPool(tmp_path, account, APP, STREAM)
    yield pool
    for process in pool.alive:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def client_of_pool(pool: WorkerPool, account: Any) -> AsyncIterator[aiqueue.Client]:
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await support.create_streams(client)
        yield client


async def dead(client: aiqueue.Client) -> list[Any]:
    return [letter async for letter in client.dead.find()]


@contextlib.asynccontextmanager
async def plain(account: Any) -> AsyncIterator[nats.NATS]:
    connection = await nats.connect(account.url, user=account.user, password=account.password)
    yield connection
    await connection.close()


async def lose(client: aiqueue.Client, account: Any, jobs: int = 1, times: int = 2) -> None:
    """Have the waiting jobs of acme delivered `times` times without an outcome, as by workers that died."""
    family = client.topology.family("agent.tasks")
    config = family.lane_config("acme", "normal")
    name = config["durable_name"]
    subject = f"CONSUMER.CREATE.{family.stream}.{name}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": family.stream, "config": config, "action": "create"})
    async with plain(account) as connection:
        pull = await connection.jetstream().pull_subscribe_bind(name, family.stream)
        for _ in range(times):
            taken: list[Any] = []
            while len(taken) < jobs:
                taken += await pull.fetch(jobs - len(taken), timeout=10)
            for message in taken:
                await message.nak()
        await connection.flush()


def worker_of(handler: Any = act, **given: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(lifespan=suspects.lifespan)
    worker.handle(Act, **{"retry": FAST, **given})(handler)
    return worker


# A job that kills its worker


@pytest.mark.parametrize(
    ("do", "how"), [("segv", "signal 11 (SIGSEGV)"), pytest.param("exit", "exit code 9", marks=pytest.mark.slow)]
)
async def test_a_job_that_kills_its_worker_is_convicted_and_the_innocent_are_done(
    pool: WorkerPool, account: Any, do: str, how: str
) -> None:
    body = f'{{"do": "{do}",   "n": -1}}'.encode()
    async with client_of_pool(pool, account) as client, plain(account) as publisher:
        handles = [await client.enqueue(Deed(do="good", n=n), tenant="acme") for n in range(100)]
        job_headers = {"Aiq-Kind": "act", "Aiq-Job-Id": "killer", "X-Own": "kept"}
        await publisher.jetstream().publish("ai.test.acts.acme", body, headers=job_headers)
        handles += [await client.enqueue(Deed(do="sleep", n=n), tenant="acme") for n in range(100, 115)]
        handles += [await client.enqueue(Deed(do="good", n=n), tenant="acme") for n in range(115, 200)]
        pool.start()
        pool.start()
        deaths = 0
        letters: list[Any] = []
        async with asyncio.timeout(45):
            while not letters:
                for process in [each for each in pool.alive if each.poll() is not None]:
                    deaths += 1
                    pool.alive.remove(process)
                    pool.start()
                letters = await dead(client)
                await asyncio.sleep(0.05)
            results = [await handle.result(30) for handle in handles]
        assert results == [[n, 1] for n in range(200)]
        assert pool.stop() == [0, 0]
        (letter,) = await dead(client)
        info = await client.connection.api("STREAM.INFO.TEST_ACTS")
    assert info["state"]["messages"] == 0
    assert deaths == 2
    assert (letter.job_id, letter.reason, letter.body, letter.headers["X-Own"]) == (
        "killer", "killed_worker", body, "kept",
    )  # fmt: skip
    assert how in letter.error


async def test_an_innocent_suspect_settles_as_anywhere_and_in_another_process(
    client: aiqueue.Client, account: Any
) -> None:
    handle = await client.enqueue(Act(do="tell"), tenant="acme", unique="k")
    await lose(client, account)
    async with worker_of().running(client):
        result = await handle.result(20)
        other = await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25)
    assert result["pid"] != os.getpid()
    assert other["pid"] == os.getpid()
    assert result["state"] == {"entered_in": result["pid"]}
    assert (result["attempt"], result["id"], result["tenant"]) == (1, "k", "acme")
    assert await dead(client) == []


@pytest.mark.parametrize("handler", [act, act_sync])
async def test_outcomes_in_quarantine_mean_the_same(client: aiqueue.Client, account: Any, handler: Any) -> None:
    acts = ("retry", "reject", "raise", "system exit", "odd", "types", "nonsense")
    handles = {do: await client.enqueue(Act(do=do), tenant="acme", unique=do.replace(" ", "-")) for do in acts}
    async with plain(account) as publisher:
        job_headers = {"Aiq-Kind": "act", "Aiq-Job-Id": "rubbish"}
        await publisher.jetstream().publish("ai.agent.tasks.acme", b"\xff\xff", headers=job_headers)
        await publisher.jetstream().publish(
            "ai.agent.tasks.acme", b"{}", headers={**job_headers, "Aiq-Job-Id": "misfit"}
        )
    await lose(client, account, jobs=9)
    async with worker_of(handler).running(client):
        assert (await handles["retry"].result(20))["attempt"] == 3
        assert (await handles["types"].result(20)) == {
            "when": "2026-01-02T00:00:00Z", "much": "1.50", "raw": b"\x00", "none": None,
        }  # fmt: skip
        await handles["nonsense"].result(20)
        await support.eventually(lambda: _dead_are(client, 6), within=40)
    letters = {letter.job_id: letter for letter in await dead(client)}
    assert {key: (letter.reason, letter.attempt) for key, letter in letters.items()} == {
        "reject": ("rejected", 1), "raise": ("attempts", 3), "system-exit": ("attempts", 3), "odd": ("result", 1),
        "rubbish": ("undecodable", 1), "misfit": ("invalid", 1),
    }  # fmt: skip
    assert letters["raise"].error == "ValueError: broken"
    assert "_act" in letters["raise"].history[0]["traceback"]
    assert "aiqueue/processes/child.py" not in letters["raise"].history[0]["traceback"]
    assert letters["rubbish"].body == b"\xff\xff"


async def _dead_are(client: aiqueue.Client, count: int) -> bool:
    return len(await dead(client)) == count


async def test_attempts_that_failed_make_no_suspect(client: aiqueue.Client) -> None:
    async with worker_of().running(client):
        handle = await client.enqueue(Act(do="retry"), tenant="acme")
        result = await handle.result(25)
    assert (result["attempt"], result["pid"]) == (3, os.getpid())


async def test_a_return_that_another_worker_announced_makes_no_suspect(client: aiqueue.Client, account: Any) -> None:
    recipe = Recipe(client.topology.families, {})
    lane = LanePull(Lane("agent.tasks", "acme", "normal"), "AI_AGENT_TASKS", "acme-normal", 30)
    message = SimpleNamespace(subject="ai.agent.tasks.acme.normal", block=None, headers={}, reply="")
    delivery = Delivery(lane, message, 7, 4, 0, 0)  # type: ignore[arg-type]
    async with (
        quarantine.Quarantine(client.connection, recipe, slots=4) as ours,
        quarantine.Quarantine(client.connection, recipe, slots=4) as theirs,
    ):
        assert ours.is_suspect(delivery)
        assert not ours.is_suspect(delivery, attempt=3)
        await theirs.note_return(delivery)
        assert theirs.is_suspect(delivery)  # one of three is accounted for
        await support.eventually(lambda: ours._returns)
        await ours.note_return(delivery)
        assert not ours.is_suspect(delivery)
        await support.eventually(lambda: not theirs.is_suspect(delivery))


async def test_a_plain_publishers_suspect_is_known_by_its_body_and_its_failures_still_count(
    client: aiqueue.Client, account: Any
) -> None:
    async with plain(account) as publisher:
        body = b'{"schema_version": "1.0", "message_type": "act", "data": {"do": "retry", "task_id": "t-1"}}'
        await publisher.jetstream().publish("ai.agent.tasks.acme", body)
    await lose(client, account, times=1)
    async with worker_of().running(client), asyncio.timeout(20):
        while (head := await client.journal.head("ai.agent.results.acme.t-1")) is None or head.event != "result":
            await asyncio.sleep(0.02)
    # deliveries: one lost, two failed attempts, and the third, which no more than one loss makes a suspect
    assert (head.data["attempt"], head.data["id"], head.data["pid"]) == (3, "t-1", os.getpid())


async def test_a_body_that_kills_its_reader_is_read_in_a_child_only(
    client: aiqueue.Client, account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"do": "tell", "task_id": "t-1"}'
    async with plain(account) as publisher:
        await publisher.jetstream().publish("ai.agent.tasks.acme", body)
        job_headers = {"Aiq-Kind": "act", "Aiq-Job-Id": "named"}
        await publisher.jetstream().publish("ai.agent.tasks.acme", body, headers=job_headers)
    await lose(client, account, jobs=2)
    # it reads the bodies whose headers do not name the job
    deadly = Recipe(client.topology.families, {}, suspects.deadly_to_read)
    reading = functools.partial(quarantine.Quarantine, reader_recipe=deadly)
    monkeypatch.setattr("aiqueue.worker.session.Quarantine", reading)
    async with worker_of().running(client):
        await support.eventually(lambda: _dead_are(client, 1), within=40)
        async with asyncio.timeout(20):
            while (head := await client.journal.head("ai.agent.results.acme.named")) is None or head.event != "result":
                await asyncio.sleep(0.02)
    (letter,) = await dead(client)
    assert (letter.reason, letter.kind, letter.body) == ("killed_worker", "agent.task", body)
    assert letter.job_id.startswith("s1-")
    assert "exit code 7" in letter.error


async def test_a_hang_in_quarantine_ends_at_its_timeout(client: aiqueue.Client, account: Any) -> None:
    handle = await client.enqueue(Act(do="block", value=60), tenant="acme")
    next_one = await client.enqueue(Act(do="tell"), tenant="acme")
    await lose(client, account, jobs=2)
    async with worker_of(timeout=1, retry=aiqueue.Backoff(attempts=1)).running(client):
        with pytest.raises(JobFailed, match="timed out after 1 s"):
            await handle.result(20)
        assert (await next_one.result(20))["pid"] != os.getpid()


async def test_progress_of_a_child_reaches_the_journal(client: aiqueue.Client, account: Any) -> None:
    handle = await client.enqueue(Act(do="progress"), tenant="acme")
    await lose(client, account)
    async with worker_of().running(client):
        await handle.result(20)
    subject = f"ai.agent.results.acme.{handle.id}"
    entries = [each async for each in client.connection.read(client.journal.stream, subject)]
    assert [each.headers[headers.EVENT] for each in entries] == ["started", "progress", "progress", "result"]
    assert codec.decode(entries[1].data) == {"fraction": 0.5, "note": "half"}


async def test_many_suspects_wait_without_taking_the_slots_of_others(client: aiqueue.Client, account: Any) -> None:
    """The first one is in its child until it is cancelled."""
    held = await client.enqueue(Act(do="wait", value=60), tenant="acme")
    slow = [await client.enqueue(Act(do="sleep", value=0.1), tenant="acme") for _ in range(9)]
    await lose(client, account, jobs=10)
    worker = worker_of()
    worker.concurrency = 4
    async with worker.running(client):
        await asyncio.sleep(0.5)
        others = [await client.enqueue(Act(do="tell"), tenant="globex") for _ in range(20)]
        for handle in others:
            await handle.result(25)
        assert await held.cancel()
        pids = {(await handle.result(40))["pid"] for handle in slow}
    assert len(pids) == 1  # a child that nothing happened to is kept
    assert os.getpid() not in pids


async def test_only_a_fresh_child_convicts(client: aiqueue.Client, account: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    os.environ["SUSPECTS_LOG"] = str(log)
    try:
        first = await client.enqueue(Act(do="tell"), tenant="acme", unique="a")
        killer = await client.enqueue(Act(do="exit"), tenant="acme", unique="b")
        last = await client.enqueue(Act(do="tell"), tenant="acme", unique="c")
        await lose(client, account, jobs=3)
        async with worker_of().running(client):
            await first.result(20)
            with pytest.raises(JobFailed, match="exit code 9"):
                await killer.result(20)
            await last.result(20)
    finally:
        del os.environ["SUSPECTS_LOG"]
    runs = [line.split() for line in support.whole_lines(log)]
    tried = [run[-1] for run in runs if run[0] == "exit"]
    assert len(set(tried)) == len(tried)
    assert len(tried) <= 2
    assert str(os.getpid()) not in tried


# A handler that no child can find


async def test_a_suspect_of_a_closure_is_tried_in_the_worker_and_convicted_after_three_trials(
    client: aiqueue.Client, account: Any
) -> None:
    ran: list[str] = []

    async def closure(job: aiqueue.Job[Act]) -> int:
        ran.append(job.id)
        await job.progress(0.5)
        return os.getpid()

    innocent = await client.enqueue(Act(do="tell"), tenant="acme", unique="innocent")
    killer = await client.enqueue(Act(do="tell"), tenant="acme", unique="killer")
    await lose(client, account, jobs=2)
    stored = await client.connection.get("AI_AGENT_TASKS", 2)
    assert stored is not None
    subject = "ai.agent.results.acme.killer"
    writer = Writer(client.journal, subject, run=2, enqueued_at=stored.time, attempt=1, record=EMPTY_RECORD)
    await writer.write(TRIAL, {"trials": quarantine.TRIALS_MAX})
    async with worker_of(closure).running(client):
        assert await innocent.result(20) == os.getpid()
        with pytest.raises(JobFailed) as failed:
            await killer.result(20)
    assert (failed.value.reason, ran) == ("killed_worker", ["innocent"])
    subject = "ai.agent.results.acme.innocent"
    entries = [each async for each in client.connection.read(client.journal.stream, subject)]
    assert [each.headers[headers.EVENT] for each in entries] == ["started", "trial", "result"]


# Handlers that run in processes


async def test_process_handlers_run_in_parallel_in_other_processes(
    client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUSPECTS_LOG", str(tmp_path / "log"))  # where each of both waits for the other
    worker = aiqueue.Worker(processes=2, lifespan=suspects.lifespan)
    worker.handle(Act, process=True)(act_sync)
    async with worker.running(client):
        both = [await client.enqueue(Act(do="meet"), tenant="acme") for _ in range(2)]
        first, second = [await handle.result(25) for handle in both]
        more = [await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25) for _ in range(5)]
    pids = {first["pid"], second["pid"]}
    assert len(pids | {os.getpid()}) == 3
    assert {each["pid"] for each in more} <= pids  # children are kept
    assert all(each["state"] == {"entered_in": each["pid"]} for each in more)
    assert [pid for pid in pids if support.processes(f" {pid}") and _alive(pid)] == []


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_a_child_that_dies_has_failed_the_attempt_and_is_replaced(client: aiqueue.Client) -> None:
    worker = worker_of(act_sync, process=True)
    async with worker.running(client):
        once = await client.enqueue(Act(do="die once"), tenant="acme")
        always = await client.enqueue(Act(do="exit"), tenant="acme")
        assert (await once.result(20))["attempt"] == 2
        with pytest.raises(JobFailed) as failed:
            await always.result(20)
        odd = await client.enqueue(Act(do="types"), tenant="acme")
        assert (await odd.result(20))["much"] == "1.50"
    assert (failed.value.reason, failed.value.attempt) == ("attempts", 3)
    assert failed.value.error == "worker process died: exit code 9"
    subject = f"ai.agent.results.acme.{once.id}"
    entries = [each async for each in client.connection.read(client.journal.stream, subject)]
    assert codec.decode(entries[0].data)["error"] == "worker process died: signal 9 (SIGKILL)"


async def test_a_timeout_kills_the_child_and_the_next_job_gets_another(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True, timeout=1, retry=aiqueue.Backoff(attempts=1))(act_sync)
    async with worker.running(client):
        before = await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25)
        with pytest.raises(JobFailed, match="timed out after 1 s"):
            await (await client.enqueue(Act(do="spin"), tenant="acme")).result(25)
        after = await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25)
        assert after["pid"] != before["pid"]
        assert not _alive(before["pid"])


async def test_a_drain_ends_children_that_still_run_and_returns_their_jobs_to_the_queue(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(processes=1, drain_timeout=0.2)
    worker.handle(Act, process=True)(act_sync)
    async with worker.running(client) as session:
        handle = await client.enqueue(Act(do="spin"), tenant="acme")
        await support.eventually(lambda: session.running == 1)
        (pid,) = await support.eventually(lambda: _children_of(os.getpid()))  # type: ignore[misc]
    assert not session.clean
    assert not _alive(pid)
    other = aiqueue.Worker()

    @other.handle(Act)
    async def other_act(job: aiqueue.Job[Act]) -> int:
        return job.attempt

    async with other.running(client):
        assert await handle.result(25) == 1


async def _children_of(pid: int) -> list[int]:
    listed = await asyncio.to_thread(support.processes, "from aiqueue.processes.child import main")
    return [child for child, command in listed.items() if command.endswith(f" {pid}")]


@pytest.mark.parametrize("what", ["closure", "lambda", "lifespan"])
async def test_a_process_handler_that_no_child_can_find_is_refused_at_the_start(
    client: aiqueue.Client, what: str
) -> None:
    @contextlib.asynccontextmanager
    async def local() -> AsyncIterator[None]:
        yield

    def closure(job: aiqueue.Job[Act]) -> None: ...

    worker = aiqueue.Worker(lifespan=local if what == "lifespan" else None)
    worker.handle(Act, process=True)({"closure": closure, "lambda": lambda job: None}.get(what, act_sync))
    with pytest.raises(BadInput, match=r"process=True: .* is not found under its name"):
        async with worker.running(client):
            pass


async def test_a_lifespan_that_fails_in_a_child_fails_the_start(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(lifespan=failing)
    worker.handle(Act, process=True)(act_sync)
    with pytest.raises(BadInput, match="RuntimeError: not in a child"):
        async with worker.running(client):
            pass
    with pytest.raises(BadInput, match="processes"):
        aiqueue.Worker(processes=0)


@contextlib.asynccontextmanager
async def failing() -> AsyncIterator[None]:
    raise RuntimeError("not in a child")
    yield


def test_the_slots_of_a_worker_with_process_handlers_only_are_its_processes() -> None:
    worker = aiqueue.Worker(concurrency=50, processes=3)
    worker.handle(Act, process=True)(act_sync)
    assert (worker.slots, worker.process_count) == (3, 3)
    worker.handle(Deed)(act_sync)  # type: ignore[arg-type]
    assert worker.slots == 50
    assert aiqueue.Worker(concurrency=1, processes=3).process_count == 1


SCRIPT = """
    import asyncio, os
    import aiqueue
    from aiqueue.topology import provision

    class Act(aiqueue.Message, kind="act"):
        do: str

    worker = aiqueue.Worker()
    worker.handle(Act, process=True)(lambda job: [job.message.do, os.getpid()])

    async def main():
        async with aiqueue.connect() as client:
            await provision.apply(client.connection, client.topology)
            async with worker.running(client):
                handle = await client.enqueue(Act(do="tell"), tenant="acme")
                do, pid = await handle.result(timeout=20)
                assert pid != os.getpid()
                print(do)
    GUARD
        asyncio.run(main())
    """


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_is_imported_by_its_children_and_told_when_it_lacks_its_guard(
    account: Any, tmp_path: Path, guarded: bool
) -> None:
    text = textwrap.dedent(SCRIPT).replace("GUARD", 'if __name__ == "__main__":' if guarded else "if True:")
    (tmp_path / "script.py").write_text(text)
    given = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, **given}, capture_output=True, text=True,
        timeout=40, check=False,
    )  # fmt: skip
    if guarded:
        assert (done.returncode, done.stdout) == (0, "tell\n"), done.stderr
    else:
        assert done.returncode != 0
        assert 'if __name__ == "__main__"' in done.stderr


# Whatever happens to the worker


async def test_children_end_with_a_worker_that_is_killed(
    pool: WorkerPool, account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool._environment["SPIN"] = "1"
    async with client_of_pool(pool, account) as client:
        process = pool.start()
        await client.enqueue(Spin(n=1), tenant="acme")
        await support.eventually(lambda: pool.lines("start"), within=40)
        children = await _children_of(process.pid)
        assert [pid for _, pid in pool.lines("start")] == children
        pool.kill(process)
        await support.eventually(lambda: not any(_alive(pid) for pid in children))


async def test_a_loop_that_stays_blocked_ends_its_process_and_logs_where(pool: WorkerPool, account: Any) -> None:
    async with client_of_pool(pool, account) as client:
        process = pool.start()
        await client.enqueue(Deed(do="block", n=1), tenant="acme")
        await support.eventually(lambda: process.poll() is not None, within=40)
    assert process.returncode == 70
    logged = (pool.directory / "worker.err").read_text()
    assert "the event loop has been blocked" in logged
    assert "app.py" in logged
    assert "time.sleep(60)" in logged


async def test_a_worker_that_was_stopped_and_continued_is_not_taken_for_blocked(pool: WorkerPool, account: Any) -> None:
    async with client_of_pool(pool, account) as client:
        process = pool.start()
        handle = await client.enqueue(Deed(do="sleep", n=1), tenant="acme")
        await support.eventually(lambda: pool.lines("start"), within=40)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert (await handle.result(20))[0] == 1
        assert process.poll() is None
        assert pool.stop() == [0]


async def test_without_process_handlers_no_child_is_started(client: aiqueue.Client) -> None:
    async with worker_of().running(client) as session:
        await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25)
        assert session.runner is not None
        assert session.runner.processes.pids == []
        assert await _children_of(os.getpid()) == []
