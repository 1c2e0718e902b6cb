"""NATSClient over faults: its process is killed, its server is restarted."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.bus import Msg, decode
from aiqueue.cli.app import app
from aiqueue.errors import ReplyTimeout, ResultTimeout, Unavailable
from aiqueue.topology import provision

from .. import forks
from ..support import Account, NatsProcess, eventually, wait_until, whole_lines

TASKS = 2_000
CONCURRENCY = 20
SHORT_LEASES = """
[family]
name = "test.tasks"
default_kind = "task"
key = "n"
[stream]
name = "TEST_TASKS"
[consumer]
ack_wait = "5s"
"""

SUBSCRIBER = f"""
import asyncio, os, signal
from aiqueue import NATSClient
from aiqueue.bus import decode

LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def task_handler(msg):
    n = decode(msg)["n"]
    os.write(LOG, f"start {{n}} {{os.getpid()}}\\n".encode())
    await asyncio.sleep(0.01)
    os.write(LOG, f"end {{n}} {{os.getpid()}}\\n".encode())


async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with NATSClient() as nats_client:
        await nats_client.subscribe(
            subject="ai.test.tasks.*", callback=task_handler, queue="agent.workers", concurrency={CONCURRENCY}
        )
        os.write(LOG, f"ready - {{os.getpid()}}\\n".encode())
        await stop.wait()


asyncio.run(main())
"""


class Subscriber:
    """A process with one subscription, and what its callback wrote."""

    def __init__(self, directory: Path, account: Account) -> None:
        self._directory = directory
        self._log = directory / "jobs.log"
        self._log.touch()
        (directory / "subscriber.py").write_text(textwrap.dedent(SUBSCRIBER))
        self._environment = os.environ | {
            "JOB_LOG": str(self._log), "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user,
            "AIQUEUE_PASSWORD": account.password, "AIQUEUE_STREAMS": str(directory / "streams"),
        }  # fmt: skip
        self.process: forks.Program | None = None
        self.killed: list[int] = []

    def start(self) -> None:
        with (self._directory / "subscriber.err").open("ab") as errors:
            self.process = forks.start("subscriber.py", cwd=self._directory, env=self._environment, stderr=errors)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.killed.append(self.process.pid)
        self.process = None

    def lines(self, event: str) -> list[tuple[str, int]]:
        split = (line.split() for line in whole_lines(self._log))
        return [(n, int(pid)) for logged, n, pid in split if logged == event]

    def wait_for_ended(self, count: int) -> None:
        end = time.monotonic() + 60
        while len({n for n, _ in self.lines("end")}) < count:
            assert time.monotonic() < end, (self._directory / "subscriber.err").read_text()[-3_000:]
            time.sleep(0.02)

    def stop(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        wait_until(lambda: process.pid in {pid for _, pid in self.lines("ready")})
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=40)


@pytest.fixture
def subscriber(streams: Path, account: Account) -> Iterator[Subscriber]:
    (streams / "test_tasks.toml").write_text(SHORT_LEASES)
    subscriber = Subscriber(streams.parent, account)
    yield subscriber
    if subscriber.process is not None:
        subscriber.kill()


async def test_a_subscriber_killed_twice_loses_no_task_and_repeats_only_those_in_flight(
    subscriber: Subscriber, account: Account, streams: Path
) -> None:
    options: Any = {"user": account.user, "password": account.password, "streams": streams}
    async with aiqueue.NATSClient(account.url, **options) as bus:
        await provision.apply(bus.client.connection, bus.client.topology)
        publishes = (bus.publish(f"ai.test.tasks.t{n % 3}", json.dumps({"n": n})) for n in range(TASKS))
        await asyncio.gather(*publishes)
        subscriber.start()
        for progress in (500, 1_200):
            await asyncio.to_thread(subscriber.wait_for_ended, progress)
            subscriber.kill()
            subscriber.start()
        await asyncio.to_thread(subscriber.wait_for_ended, TASKS)
        assert await asyncio.to_thread(subscriber.stop) == 0
        info = await bus.client.connection.api("STREAM.INFO.TEST_TASKS")
        assert info["state"]["messages"] == 0
        assert [letter async for letter in bus.client.dead.find()] == []
    runs: dict[str, list[int]] = collections.defaultdict(list)
    for n, pid in subscriber.lines("start"):
        runs[n].append(pid)
    repeated = [pids for pids in runs.values() if len(pids) > 1]
    assert all(pid in subscriber.killed for pids in repeated for pid in pids[:-1])
    assert len(repeated) <= 2 * CONCURRENCY * 2  # a kill meets 20 running callbacks, and acks not yet sent


async def test_publishers_subscribers_and_requesters_go_on_over_a_restart_of_the_server(
    own_server: Callable[..., NatsProcess],
) -> None:
    """No acknowledged message is lost, and every call ends in a result or a documented error."""
    server = own_server()
    options: Any = {"user": server.user, "password": server.password}
    handled: collections.Counter[str] = collections.Counter()
    mails: list[str] = []
    stored: list[str] = []
    sent: list[str] = []
    answered: list[bool] = []
    stop = asyncio.Event()

    async def task_handler(msg: Msg) -> None:
        assert msg.job is not None
        handled[msg.job.id] += 1

    async def message_handler(msg: Msg) -> None:
        mails.append(decode(msg)["id"])

    async with aiqueue.NATSClient(server.url, **options) as bus, aiqueue.NATSClient(server.url, **options) as other:
        await provision.apply(bus.client.connection, bus.client.topology)
        await other.subscribe("ai.agent.tasks.acme", queue="agent.workers", callback=task_handler)
        await other.subscribe("ai.agent.message.acme", queue="agent.reader", callback=message_handler)
        await other.subscribe("ai.gateway.responses.acme", callback=lambda msg: {"said": decode(msg)["n"]})
        await other.subscribe("plain.echo", callback=lambda msg: None)

        async def publish() -> None:
            while not stop.is_set():
                published = await bus.publish("ai.agent.tasks.acme", b"{}", timeout=30)
                assert published is not None
                stored.append(published.id)

        async def send() -> None:
            while not stop.is_set():
                number = str(len(sent))
                headers = {"target_agent_id": "reader", "Aiq-Job-Id": f"m-{number}"}
                await bus.publish("ai.agent.message.acme", json.dumps({"id": number}), headers=headers, timeout=30)
                sent.append(number)

        async def ask() -> None:
            while not stop.is_set():
                n = len(answered)
                try:
                    answer = await bus.request(
                        "ai.gateway.responses.acme", json.dumps({"n": n, "request_id": f"r-{n}"}), timeout=20
                    )
                    answered.append(decode(answer) == {"said": n})
                except (ResultTimeout, Unavailable):
                    answered.append(True)

        async def ask_plainly() -> None:
            while not stop.is_set():
                with pytest.raises((ReplyTimeout, Unavailable)):
                    await bus.request("plain.echo", b"", timeout=0.2)

        calls = [asyncio.create_task(each()) for each in (publish, publish, send, ask, ask_plainly)]
        await eventually(lambda: min(len(stored), len(mails), len(answered)) > 5)
        await asyncio.to_thread(server.kill)
        await eventually(lambda: not bus.connected)
        server.start()
        counts = len(stored), len(sent), len(answered)
        await eventually(
            lambda: all(
                now > then + 5 for now, then in zip((len(stored), len(sent), len(answered)), counts, strict=True)
            ),
            within=60,
        )
        stop.set()
        await asyncio.gather(*calls)
        assert all(answered)
        await eventually(lambda: set(stored) <= set(handled) and set(sent) <= set(mails), within=60)


async def test_a_dead_letter_of_a_callback_is_replayed_from_the_command_line(
    shared: Account, bus: aiqueue.NATSClient, tenant: str
) -> None:
    failing, done = True, asyncio.Event()

    async def task_handler(msg: Msg) -> None:
        if failing:
            raise ValueError("no")
        done.set()

    await bus.subscribe(
        f"ai.agent.tasks.{tenant}", queue="q", callback=task_handler, retry=aiqueue.Backoff(attempts=2, first="10ms")
    )
    published = await bus.publish(f"ai.agent.tasks.{tenant}", b"{}")
    assert published is not None
    env = {"AIQUEUE_URL": shared.url, "AIQUEUE_USER": shared.user, "AIQUEUE_PASSWORD": shared.password}

    def dead(*words: str) -> str:
        result = CliRunner().invoke(app, ["dead", *words], env=env)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def letters() -> list[Any]:
        return json.loads(await asyncio.to_thread(dead, "ls", "--tenant", tenant, "--json")) or []

    await eventually(letters)
    (letter,) = await letters()
    assert (letter["job_id"], letter["reason"]) == (published.id, "attempts")
    failing = False
    await asyncio.to_thread(dead, "replay", str(letter["seq"]))
    await asyncio.wait_for(done.wait(), 20)
