"""The pid of a child that has ended may be another process's: nothing is sent to it."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Mapping

import pytest

import aiqueue
from aiqueue.errors import JobFailed
from aiqueue.processes import descendants

from ..support import eventually, processes
from ..suspects import Act, act_sync
from . import starters
from .starters import STARTED_KINDS, Start
from .test_started import LEFT_SESSION

pytestmark = pytest.mark.families("agent.tasks")
ONCE = aiqueue.Backoff(attempts=1)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sessions that were killed, in this order."""
    killed: list[int] = []
    kill_session = descendants.kill_session

    def kill_and_note(leader: int, known: Mapping[int, int] | None = None) -> None:
        killed.append(leader)
        kill_session(leader, known)

    monkeypatch.setattr(descendants, "kill_session", kill_and_note)
    return killed


async def tell(client: aiqueue.Client) -> int:
    """Run a job, and return the pid of its child."""
    found = await (await client.enqueue(Act(do="tell"), tenant="acme")).result(25)
    return int(found["pid"])


@pytest.mark.parametrize("do", ["spin", "exit"])
async def test_a_child_that_was_stopped_or_died_in_a_job_is_killed_once(
    client: aiqueue.Client, killed: list[int], do: str
) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True, timeout=2, retry=ONCE)(act_sync)
    async with worker.running(client):
        first = await tell(client)
        with pytest.raises(JobFailed):
            await (await client.enqueue(Act(do=do), tenant="acme")).result(25)
        assert killed == [first]
        second = await tell(client)
        assert killed == [first]
    assert killed == [first, second]


async def test_a_child_that_died_between_two_jobs_is_not_killed_later(
    client: aiqueue.Client, killed: list[int]
) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True)(act_sync)
    async with worker.running(client) as session:
        first = await tell(client)
        (slot,) = session.runner.processes._slots  # type: ignore[union-attr]
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: slot.child is None and killed == [first])  # at its end, when the pid is still its own
        second = await tell(client)
        assert killed == [first]
    assert killed == [first, second]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows what has left the process group")
async def test_what_a_child_that_died_between_two_jobs_has_started_ends_with_it(client: aiqueue.Client) -> None:
    name = str(secrets.randbelow(10**12) + 10**12)
    worker = aiqueue.Worker(processes=1)
    worker.handle(Start, process=True)(starters.start_sync)
    try:
        async with worker.running(client):
            pid = await (await client.enqueue(Start(name=name, then="return"), tenant="acme")).result(25)
            await eventually(lambda: len(processes(name)) == len(STARTED_KINDS))
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: len(processes(name)) == LEFT_SESSION)
    finally:
        for left in processes(name):
            os.kill(left, signal.SIGKILL)
