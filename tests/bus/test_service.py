"""The program of "Run as a service" in docs/guides/integration-guide.md, as a real process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.bus import create_envelope, encode
from aiqueue.topology import provision

from .. import forks
from ..support import ROOT, Account, NatsProcess

JOBS = 500  # five times as many as run at once
STREAM = "STREAM.INFO.AI_AGENT_TASKS"


def program() -> str:
    section = (ROOT / "docs/guides/integration-guide.md").read_text().partition("## Run as a service")[2]
    found = re.search(r"^```python fragment\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


class Service:
    """The program, in a directory of its own."""

    def __init__(self, directory: Path, account: Account | NatsProcess) -> None:
        self._directory = directory
        self._environment = os.environ | {
            "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        self.process: forks.Program | None = None

    def start(self, code: str) -> None:
        (self._directory / "subscriber.py").write_text(code)
        self.process = forks.start(
            "subscriber.py", cwd=self._directory, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def wait_until_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def end(self, by: signal.Signals | None = None) -> tuple[int, str]:
        """Return the exit code, and what it has said on stderr."""
        assert self.process is not None
        if by is not None:
            self.process.send_signal(by)
        try:
            _, errors = self.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors


@pytest.fixture
def service(tmp_path: Path, shared: Account) -> Iterator[Service]:
    service = Service(tmp_path, shared)
    yield service
    service.kill()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
async def test_the_program_that_gets_a_signal_amid_jobs_exits_with_0_and_loses_and_repeats_none(
    service: Service, bus: aiqueue.NATSClient, tenant: str, by: signal.Signals
) -> None:
    ended = asyncio.Queue[Any]()  # the first results
    await bus.subscribe(f"aiq.live.ai.agent.results.{tenant}.*", callback=ended.put_nowait)
    slow = program().replace("    return {", "    await asyncio.sleep(0.5)\n    return {")
    assert slow != program()
    service.start(slow)
    await asyncio.to_thread(service.wait_until_ready)
    subject = f"ai.agent.tasks.{tenant}"
    body = encode(create_envelope("agent_task", {"text": "hello"}))
    ids = [each.id for each in await asyncio.gather(*(bus.publish(subject, body) for _ in range(JOBS))) if each]
    await asyncio.wait_for(ended.get(), 20)
    code, errors = await asyncio.to_thread(service.end, by)
    assert (code, errors) == (0, "")
    attempts: list[int] = []

    async def rest(msg: Any) -> dict[str, str]:
        attempts.append(msg.job.attempt)
        return {"said": "by the next"}

    await bus.subscribe(subject, queue="agent.workers", callback=rest)
    results = [await (await bus.client.job(each, family="agent.tasks", tenant=tenant)).result(20) for each in ids]
    said = [each["said"] for each in results]
    assert (said.count("HELLO"), said.count("by the next")) == (JOBS - len(attempts), len(attempts))
    assert 0 < len(attempts) < JOBS
    assert set(attempts) == {1}


async def test_the_program_exits_with_1_and_says_why_where_no_server_answers(service: Service, tmp_path: Path) -> None:
    code = program().replace("NATSClient(", 'NATSClient("nats://127.0.0.1:1", connect_timeout="100ms", ')
    assert code != program()
    service.start(code)
    code_of_exit, errors = await asyncio.to_thread(service.end)
    assert code_of_exit == 1
    assert errors.strip().splitlines()[-1].startswith("aiqueue.errors.Unavailable: ")


async def test_the_program_exits_with_0_although_its_server_is_gone(
    own_server: Callable[..., NatsProcess], tmp_path: Path
) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
    service = Service(tmp_path, server)
    service.start(program())
    try:
        await asyncio.to_thread(service.wait_until_ready)
        await asyncio.to_thread(server.kill)
        code, errors = await asyncio.to_thread(service.end, signal.SIGTERM)
    finally:
        service.kill()
    assert code == 0, errors
    assert "Traceback" not in errors
