"""Times on the wire follow the server's clock, also where the local clock is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers, subjects
from aiqueue.connection import ServerClock
from aiqueue.connection.clock import FRESH_S, KEEP_S, RETRY_S, SYNCHRONISED_S
from aiqueue.errors import JobFailed, Unavailable

from ..support import Account, NatsProcess, create_streams, eventually

pytestmark = pytest.mark.families("agent.tasks")
HOUR_S = 3_600
INSTALLED = sorted(map(str, Path("/usr/lib").glob("*/faketime/libfaketime.so.1")))  # Debian's package libfaketime
LIBFAKETIME = os.environ.get("LIBFAKETIME") or next(iter(INSTALLED), "")

needs_faketime = pytest.mark.skipif(not LIBFAKETIME, reason="libfaketime is not installed (or name it in LIBFAKETIME)")
skews = pytest.mark.parametrize("skew_s", [-HOUR_S, HOUR_S], ids=["an hour behind", "an hour ahead"])


class Task(aiqueue.Message, kind="task"):
    do: str = ""


# The arithmetic


class World:
    """A local clock that is `skew_s` wrong, a monotonic clock, and a server; they advance together."""

    def __init__(self, skew_s: float) -> None:
        self.server = 1_800_000_000.0
        self.skew_s = skew_s
        self.asked = 0
        self.clock = ServerClock(self.ask, wall=lambda: self.server + self.skew_s, monotonic=lambda: self.server - 1e9)

    def answer(self, there_s: float, back_s: float) -> None:
        """Have the server answer a request that takes so long on its way there, and back."""
        sent_at = self.server - 1e9
        self.server += there_s
        text = datetime.fromtimestamp(self.server, UTC).isoformat().replace("+00:00", "Z")
        self.server += back_s
        self.clock.note_reply(sent_at, {"ts": text})

    @property
    def error_s(self) -> float:
        return abs(self.clock.now() - self.server)

    async def ask(self, subject: str, *, timeout: float) -> None:
        self.asked += 1
        raise Unavailable(subject)


waits = st.floats(0, 5)
wrongs = st.floats(-1e6, 1e6)


@given(wrongs, st.lists(st.tuples(waits, waits), min_size=1, max_size=20))
def test_the_servers_time_is_known_to_half_of_the_shortest_round_trip(
    skew_s: float, trips: list[tuple[float, float]]
) -> None:
    world = World(skew_s)
    shortest_s = float("inf")
    for there_s, back_s in trips:
        world.answer(there_s, back_s)
        if world.server - 1_800_000_000 <= KEEP_S:
            shortest_s = min(shortest_s, there_s + back_s)
            # what is within the error of a synchronised clock is not corrected
            assert world.error_s <= shortest_s + SYNCHRONISED_S + 1e-4


@given(wrongs, wrongs)
def test_a_step_of_the_local_clock_changes_nothing_once_it_is_measured(skew_s: float, step_s: float) -> None:
    world = World(skew_s)
    world.answer(0.001, 0.001)
    world.skew_s += step_s
    assert world.error_s <= SYNCHRONISED_S + 0.01


@given(wrongs)
def test_a_server_with_another_clock_is_believed_after_a_reconnect_and_when_it_contradicts(step_s: float) -> None:
    world = World(0.0)
    world.answer(0.0, 0.0)
    world.clock.expire()
    world.server += step_s
    world.clock._monotonic = lambda: world.server - 1e9 - step_s
    sent_at = world.server - 1e9 - step_s
    text = datetime.fromtimestamp(world.server, UTC).isoformat().replace("+00:00", "Z")
    world.clock.note_reply(sent_at - 2, {"ts": text})
    assert world.error_s <= 1 + SYNCHRONISED_S + 0.01


@given(st.floats(-SYNCHRONISED_S / 2, SYNCHRONISED_S / 2))
def test_a_synchronised_local_clock_is_used_as_it_is(skew_s: float) -> None:
    world = World(skew_s)
    world.answer(0.002, 0.001)
    assert world.clock.now() == world.server + world.skew_s
    assert world.clock.offset_ms == 0


@pytest.mark.parametrize("reply", [{}, {"ts": None}, {"ts": "soon"}, {"ts": 5}, {"ts": ""}])
def test_an_answer_without_a_time_measures_nothing(reply: dict[str, Any]) -> None:
    world = World(100)
    world.clock.note_reply(0.0, reply)
    assert world.clock.now() == world.server + 100


async def test_a_clock_that_cannot_be_measured_is_asked_for_once_in_a_while() -> None:
    world = World(0)
    for _ in range(3):
        await asyncio.gather(*(world.clock.ensure("S") for _ in range(10)))
    assert world.asked == 1
    world.server += RETRY_S
    await world.clock.ensure("S")
    assert world.asked == 2
    world.answer(0, 0)
    world.server += FRESH_S - 1
    await world.clock.ensure("S")
    assert world.asked == 2


@pytest.mark.parametrize("step_s", [-HOUR_S, HOUR_S])
async def test_a_time_that_is_over_has_the_server_asked_and_the_server_decides(step_s: float) -> None:
    """A worker that was paused is behind a message of now. One of before a server's clock was set back says nothing."""
    world, behind_s = World(0.0), max(0.0, step_s)

    async def ask(subject: str, *, timeout: float) -> None:
        world.asked += 1
        await asyncio.sleep(0)
        text = datetime.fromtimestamp(world.server + behind_s, UTC).isoformat().replace("+00:00", "Z")
        world.clock.note_reply(world.server - 1e9, {"ts": text})

    world.clock._ask = ask
    await world.clock.ensure("S")
    world.clock._ahead_s -= behind_s
    world.server += 1.0
    arrived_at = world.server - 1e9
    world.server += 0.5
    await asyncio.gather(*(world.clock.catch_up("S", arrived_at, world.server + HOUR_S - 1) for _ in range(9)))
    assert abs(world.clock.now() - world.server - behind_s) < 0.01
    assert world.asked == 2, "all that have come together ask once"


async def test_a_time_that_is_over_is_believed_where_the_server_cannot_be_asked() -> None:
    world = World(-HOUR_S)
    for _ in range(3):
        await world.clock.catch_up("S", world.server - 1e9, world.server - 0.01)
        assert world.error_s < 0.1
    assert world.asked == 1
    await world.clock.catch_up("S", world.server - 1e9, world.server - 60)
    assert world.error_s < 0.1, "a time of a while ago says nothing"


def test_new_ids_hold_the_corrected_time() -> None:
    def stamp(job_id: str) -> int:
        bits = 0
        for digit in job_id[:10]:
            bits = bits << 5 | "0123456789abcdefghijklmnopqrstuv".index(digit)
        return bits >> 2

    for offset_ms in (-HOUR_S * 1000, 0, HOUR_S * 1000):
        assert abs(stamp(subjects.new_id(offset_ms)) - time.time() * 1000 - offset_ms) < 1_000


# On a server


async def test_enqueueing_asks_for_the_time_once_and_not_for_each_job(account: Account, client: aiqueue.Client) -> None:
    asked: list[str] = []
    subscription = await client.connection.subscribe("$JS.API.STREAM.INFO.>", lambda each: asked.append(each.subject))
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as other:
        for _ in range(20):
            await other.enqueue(Task(), tenant="acme")
        assert asked == []
        await asyncio.gather(*(other.enqueue(Task(), tenant="acme", delay=60) for _ in range(10)))
        for _ in range(10):
            await other.enqueue(Task(), tenant="acme", deadline=60)
        [each async for each in other.enqueue_many(Task() for _ in range(100)) if False]
        await client.connection.flush()
        assert asked == ["$JS.API.STREAM.INFO.AI_PARKED"]
    await subscription.close()


PRODUCER = """
    import asyncio, json, sys, time
    import aiqueue
    from tests.connection.test_clock import Task

    async def main(url, user, password):
        async with aiqueue.connect(url, user=user, password=password) as client:
            before = time.time()
            await client.enqueue(Task(do="delayed"), tenant="acme", delay=3)
            [each async for each in client.enqueue_many([Task(do="delayed, of many")], tenant="acme", delay=3)]
            await client.enqueue(Task(do="urgent"), tenant="acme", deadline=60)
            missed = await client.enqueue(Task(do="missed"), tenant="acme", deadline=0.5, delay=2)
            print(json.dumps({"from": before, "to": time.time(), "missed": missed.id}))

    asyncio.run(main(*sys.argv[1:]))
    """

WORKER = """
    import asyncio, sys, time
    import aiqueue
    from tests.connection.test_clock import Task

    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job):
        if job.message.do == "retry" and job.attempt == 1:
            raise aiqueue.Retry("later", after=6)
        return [job.attempt, time.time()]

    async def main(url, user, password):
        async with aiqueue.connect(url, user=user, password=password) as client:
            async with worker.running(client):
                await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main(*sys.argv[1:]))
    """


@contextlib.contextmanager
def skewed(script: str, account: Account, skew_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process whose clock is wrong."""
    environment = {
        **os.environ, "LD_PRELOAD": LIBFAKETIME, "FAKETIME": f"{skew_s:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), account.url, account.user, account.password],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@needs_faketime
@skews
async def test_jobs_of_a_producer_with_a_wrong_clock_start_after_their_delay_and_before_their_deadline(
    account: Account, client: aiqueue.Client, skew_s: int
) -> None:
    started: dict[str, float] = {}
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        started[job.message.do] = time.time()

    with skewed(PRODUCER, account, skew_s) as process:
        output, _ = await asyncio.to_thread(process.communicate)
    said = json.loads(output)
    assert abs(said["to"] - time.time() - skew_s) < 60, "the clock of the process was not wrong"
    async with worker.running(client):
        await eventually(lambda: {"delayed", "delayed, of many", "urgent"} <= started.keys())
        with pytest.raises(JobFailed, match="deadline"):
            await (await client.job(said["missed"], tenant="acme")).result(25)
    for do in ("delayed", "delayed, of many"):
        assert said["from"] - skew_s + 2.9 < started[do] < said["to"] - skew_s + 10, do
    assert "missed" not in started


@needs_faketime
@skews
async def test_a_worker_with_a_wrong_clock_keeps_backoffs_and_deadlines(
    account: Account, client: aiqueue.Client, skew_s: int
) -> None:
    urgent = await client.enqueue(Task(), tenant="acme", deadline=60)
    missed = await client.enqueue(Task(), tenant="acme", deadline=0.05)
    retried = await client.enqueue(Task(do="retry"), tenant="acme")
    await asyncio.sleep(0.1)  # until the deadline has passed
    with skewed(WORKER, account, skew_s):
        attempt, at = await urgent.result(25)
        assert attempt == 1
        assert abs(at - time.time() - skew_s) < 60, "the clock of the worker was not wrong"
        with pytest.raises(JobFailed, match="deadline"):
            await missed.result(25)
        attempt, retried_at = await retried.result(25)
        assert attempt == 2
    assert 5 < retried_at - at < 20  # 6 s after the first attempt, which ran beside the other job


async def test_the_deadline_on_the_wire_is_by_the_servers_clock(client: aiqueue.Client) -> None:
    clock = client.connection.clock
    await clock.ensure("AI_PARKED")
    clock._wall = lambda: time.time() - HOUR_S  # as with a wrong local clock
    await client.enqueue(Task(), tenant="acme", deadline=60)
    stored = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.acme.normal")
    assert stored is not None
    assert abs(headers.number(stored.headers[headers.DEADLINE]) / 1000 - stored.time - 60) < 1


async def test_a_user_who_may_not_ask_for_the_time_keeps_the_local_clock_and_nothing_is_logged(
    own_server: Callable[..., NatsProcess], caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server(
        "authorization { users: [ {user: root, password: r}, {user: u, password: p, permissions: "
        '{ publish: { deny: ["$JS.API.STREAM.INFO.>"] } }} ] }'
    )
    async with aiqueue.connect(server.url, user="root", password="r") as root:
        await create_streams(root)
    async with aiqueue.connect(server.url, user="u", password="p") as client:
        before = time.time()
        handle = await client.enqueue(Task(), tenant="acme", delay=60, deadline=90)
        assert handle.due is not None
        assert 59 < handle.due - before < 70
        assert client.connection.clock._measured_at is None
    assert "refused" not in caplog.text
