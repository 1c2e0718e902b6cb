"""What a handler in a child process has started ends with the attempt that was stopped, and with the child."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

import aiqueue
from aiqueue.attempt import cancellation
from aiqueue.errors import JobFailed
from aiqueue.processes.pool import ChildProcess
from aiqueue.processes.recipe import Recipe

from ..support import check_cancelled_start, eventually, processes
from . import starters
from .starters import STARTED_KINDS, Start

ONCE = aiqueue.Backoff(attempts=1)
LEFT_SESSION = 1  # of STARTED_KINDS: the process that has left the child's session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows what has left the process group")


@pytest.fixture
def name() -> Any:
    """A number that no other process has in its command line. What is left with it is killed."""
    name = str(secrets.randbelow(10**12) + 10**12)
    yield name
    for pid in processes(name):
        os.kill(pid, signal.SIGKILL)


async def started(name: str) -> None:
    await eventually(lambda: len(processes(name)) == len(STARTED_KINDS))


async def gone(name: str) -> None:
    await eventually(lambda: not processes(name))


async def test_a_child_whose_start_is_cancelled_has_ended_when_the_start_has(monkeypatch: pytest.MonkeyPatch) -> None:
    await check_cancelled_start(monkeypatch, ChildProcess, lambda: ChildProcess.start(Recipe({}, {})))


@pytest.mark.parametrize("handler", [starters.start_sync, starters.start_async])
async def test_what_a_handler_has_started_ends_with_a_timeout(
    client: aiqueue.Client, name: str, handler: Callable[[Any], Any]
) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Start, process=True, timeout=3, retry=ONCE)(handler)
    async with worker.running(client):
        handle = await client.enqueue(Start(name=name), tenant="acme")
        await started(name)
        with pytest.raises(JobFailed, match="timed out"):
            await handle.result(25)
        await gone(name)


@pytest.mark.parametrize("handler", [starters.start_sync, starters.start_async])
async def test_what_a_handler_has_started_ends_with_a_cancelled_attempt(
    client: aiqueue.Client, name: str, handler: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancellation, "GRACE_S", 0.3)
    worker = aiqueue.Worker(processes=1)
    worker.handle(Start, process=True)(handler)
    async with worker.running(client) as session:
        handle = await client.enqueue(Start(name=name), tenant="acme")
        await started(name)
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
        await gone(name)


@pytest.mark.parametrize("handler", [starters.start_sync, starters.start_async])
async def test_what_a_handler_has_started_ends_with_a_drain(
    client: aiqueue.Client, name: str, handler: Callable[[Any], Any]
) -> None:
    worker = aiqueue.Worker(processes=1, drain_timeout=0.1)
    worker.handle(Start, process=True)(handler)
    async with worker.running(client):
        await client.enqueue(Start(name=name), tenant="acme")
        await started(name)
    await gone(name)


async def test_what_a_handler_left_behind_ends_with_its_worker(client: aiqueue.Client, name: str) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Start, process=True)(starters.start_sync)
    async with worker.running(client):
        await (await client.enqueue(Start(name=name, then="return"), tenant="acme")).result(25)
        await started(name)
    await gone(name)


async def test_what_a_handler_has_started_in_the_childs_session_ends_with_a_child_that_dies(
    client: aiqueue.Client, name: str
) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Start, process=True, retry=ONCE)(starters.start_sync)
    async with worker.running(client):
        handle = await client.enqueue(Start(name=name, then="die"), tenant="acme")
        with pytest.raises(JobFailed, match="worker process died: signal 6"):
            await handle.result(25)
        await eventually(lambda: len(processes(name)) == LEFT_SESSION)


async def test_what_the_lifespan_has_started_outlives_a_cancelled_attempt_and_ends_with_its_worker(
    client: aiqueue.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARTED", f"{name} {os.getpid()}")
    worker = aiqueue.Worker(processes=1, lifespan=starters.lifespan)
    worker.handle(Start, process=True)(starters.start_async)
    async with worker.running(client) as session:
        before = await (await client.enqueue(Start(name=name, then="return"), tenant="acme")).result(25)
        assert before["state"] in processes(name)
        handle = await client.enqueue(Start(name=name), tenant="acme")
        await eventually(lambda: session.running == 1)
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
        after = await (await client.enqueue(Start(name=name, then="return"), tenant="acme")).result(25)
        assert after["state"] in processes(name)
    await gone(name)
