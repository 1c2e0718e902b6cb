"""A worker whose drain is cancelled, or whose start fails late, leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import NotFound
from aiqueue.lanes import LaneDiscovery
from aiqueue.topology import Family
from aiqueue.worker.session import Session

from ..support import Account, eventually


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


class Document(aiqueue.Message, kind="rag.document", family="rag.ingest"):
    content: str = ""


class Seen:
    """What a worker with one slot has gone through: its handler never returns."""

    def __init__(self, **options: Any) -> None:
        self.worker = aiqueue.Worker(concurrency=1, lifespan=self.lifespan, **options)
        self.worker.handle(Echo)(self.echo)
        self.events: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self.events.append("left")

    async def echo(self, job: aiqueue.Job[Echo]) -> None:
        self.events.append("entered")
        try:
            await asyncio.Event().wait()
        finally:
            self.events.append("stopped")


async def run_elsewhere(client: aiqueue.Client, handles: list[aiqueue.Handle]) -> list[int]:
    """Have another worker run the jobs, sooner than the leases of 30 s would let it. Returns their attempts."""
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> int:
        return job.attempt

    async with worker.running(client):
        return [await handle.result(25) for handle in handles]


async def test_a_drain_that_is_cancelled_stops_everything_and_returns_its_jobs(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.session.prefetch", lambda concurrency, handler_s: 1)  # one waits in the worker
    seen = Seen(drain_timeout=600)
    handles = [await client.enqueue(Echo(text=str(n)), tenant=f"t{n}") for n in range(2)]
    sessions = []

    async def work() -> None:
        async with seen.worker.running(client) as session:
            sessions.append(session)
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await eventually(lambda: sessions and sessions[0].running and sessions[0].vitals()["waiting"])
    task.cancel()
    await eventually(lambda: sessions[0].vitals()["state"] == "draining" and not sessions[0].vitals()["waiting"])
    task.cancel()
    async with asyncio.timeout(25):
        await asyncio.wait([task])
    assert task.cancelled()
    assert seen.events == ["entered", "stopped", "left"]
    assert (sessions[0].running, sessions[0].leases.held) == (0, 0)
    assert await run_elsewhere(client, handles) == [1, 1]


async def test_a_drain_that_is_cancelled_at_its_first_step_returns_the_waiting_jobs_too(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.session.prefetch", lambda concurrency, handler_s: 1)
    seen = Seen(drain_timeout=600)
    handles = [await client.enqueue(Echo(text=str(n)), tenant=f"t{n}") for n in range(2)]
    async with seen.worker.running(client) as session:
        await eventually(lambda: session.running and session.vitals()["waiting"])
        drain = asyncio.create_task(session.drain())
        await eventually(lambda: session.vitals()["state"] == "draining")
        drain.cancel()
        async with asyncio.timeout(25):
            await asyncio.wait([drain])
        assert drain.cancelled()
        assert seen.events == ["entered", "stopped", "left"]
        assert (session.running, session.vitals()["waiting"], session.leases.held) == (0, 0, 0)
    assert await run_elsewhere(client, handles) == [1, 1]


async def test_a_start_that_fails_late_returns_the_jobs_of_the_first_families(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.session.prefetch", lambda concurrency, handler_s: 1)
    seen = Seen()
    find_lanes = LaneDiscovery._find_lanes

    @seen.worker.handle(Document)
    async def document(job: aiqueue.Job[Document]) -> None: ...

    async def find_lanes_later(discovery: LaneDiscovery, family: Family) -> None:
        """Look at the second family when jobs of the first one run and wait, and its stream has just been deleted."""
        if family.name == "rag.ingest":
            await eventually(lambda: "entered" in seen.events and free() < 0)
            await client.connection.api(f"STREAM.DELETE.{family.stream}")
        await find_lanes(discovery, family)

    def free() -> int:
        return sessions[0]._count_free_slots()

    sessions: list[Any] = []
    init = Session.__init__

    def remember(session: Any, *arguments: Any) -> None:
        init(session, *arguments)
        sessions.append(session)

    monkeypatch.setattr(Session, "__init__", remember)
    monkeypatch.setattr(LaneDiscovery, "_find_lanes", find_lanes_later)
    handles = [await client.enqueue(Echo(text=str(n)), tenant=f"t{n}") for n in range(2)]
    with pytest.raises(NotFound, match="there is no stream"):
        async with seen.worker.running(client):
            pass
    assert seen.events == ["entered", "stopped", "left"]
    assert (sessions[0].running, sessions[0].vitals()["waiting"], sessions[0].leases.held) == (0, 0, 0)
    assert await run_elsewhere(client, handles) == [1, 1]


async def test_a_worker_without_its_stream_says_only_that_and_enters_no_lifespan(
    account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    entered: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        entered.append("entered")
        yield

    worker = aiqueue.Worker(lifespan=lifespan)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return job.message.text

    server = {"url": account.url, "user": account.user, "password": account.password}
    async with aiqueue.connect(**server) as empty:  # no stream has been created
        with pytest.raises(NotFound, match="there is no stream AI_AGENT_TASKS: run `aiqueue apply` first"):
            async with worker.running(empty):
                pass
    assert (entered, caplog.text) == ([], "")
