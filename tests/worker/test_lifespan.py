"""A worker's lifespan may take the client, in the worker's process and in its children."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput

from ..support import Account, create_streams
from .heading import Seen, trace
from .living import Ask, State, open_state, use_client

pytestmark = pytest.mark.families("agent.tasks")


def worker_with(lifespan: Any, *, process: bool) -> aiqueue.Worker[Any]:
    worker = aiqueue.Worker(lifespan=lifespan, processes=1)
    worker.handle(Ask, process=process, retry=aiqueue.Backoff(attempts=1))(use_client)

    @worker.handle(Seen)
    async def seen(job: aiqueue.Job[Seen, State]) -> list[Any]:
        return [job.message.n, job.headers.get("X-Kind"), job.state.pid]

    return worker


@pytest.mark.parametrize("process", [False, True], ids=["worker", "child process"])
async def test_a_lifespan_that_needs_an_argument_gets_the_client_and_a_child_process_one_of_its_own(
    account: Account, process: bool
) -> None:
    url, user, password = account.url, account.user, account.password
    async with aiqueue.connect(url, user=user, password=password, headers=trace) as client:
        await create_streams(client)
        async with worker_with(open_state, process=process).running(client):
            result, is_here, pid = await (await client.enqueue(Ask(n=5), tenant="acme")).result(25)
    assert result == [5, "seen", os.getpid()]
    assert is_here
    assert (pid != os.getpid()) == process


async def test_a_lifespan_whose_argument_has_a_default_is_called_without(client: aiqueue.Client) -> None:
    @asynccontextmanager
    async def lifespan(name: str = "own") -> AsyncIterator[str]:
        yield name

    worker = aiqueue.Worker(lifespan=lifespan)

    @worker.handle(Seen)
    async def seen(job: aiqueue.Job[Seen, str]) -> str:
        return job.state

    async with worker.running(client):
        assert await (await client.enqueue(Seen(), tenant="acme")).result(25) == "own"


async def test_one_that_a_child_process_cannot_find_is_refused_when_the_worker_starts(client: aiqueue.Client) -> None:
    @asynccontextmanager
    async def closure(client: aiqueue.Client) -> AsyncIterator[State]:
        yield State(client, 0)

    with pytest.raises(BadInput, match=r"the lifespan tests\.worker\.test_lifespan\..*closure is not found under"):
        async with worker_with(closure, process=True).running(client):
            pass


@pytest.mark.parametrize("wrong", ["app:lifespan", lambda client, more: None], ids=["a text", "two arguments"])
def test_what_is_no_lifespan_is_refused_in_one_line(wrong: Any) -> None:
    with pytest.raises(BadInput, match=r"^lifespan .*must (be a function|take no argument, or one, the client)"):
        aiqueue.Worker(lifespan=wrong)
