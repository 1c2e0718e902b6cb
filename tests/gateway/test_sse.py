"""The stream of any job as server-sent events, for a framework of one's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput
from aiqueue.gateway import sse

from .front.fronts import Event, parse_events


class Count(aiqueue.Message[int], kind="count", family="agent.tasks"):
    pass


async def events_of(handle: aiqueue.Handle[Any], after: str | None = None) -> list[Event]:
    async with aclosing(sse.stream(handle, last_event_id=after, ping_s=0.02)) as parts:
        return parse_events(b"".join([part async for part in parts]).decode())


async def test_a_job_s_stream_is_resumed_behind_each_of_its_events(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Count)
    async def count(job: aiqueue.Job[Count]) -> int:
        for number in range(3):
            await job.chunk({"number": number, "text": "a\nb"})
            await asyncio.sleep(0.03)
        await job.progress(0.5, "nearly")
        return 3

    async with worker.running(client):
        handle = await client.enqueue(Count(), tenant="acme")
        events = await events_of(handle)
        other = await client.enqueue(Count(), tenant="acme")
        assert [each.name for each in events] == ["", "", "", "progress", "result"]
        assert [json.loads(each.data) for each in events[:3]] == [
            {"number": number, "text": "a\nb"} for number in range(3)
        ]
        assert events[-1].data == "3"
        for place, each in enumerate(events[:-1]):
            assert await events_of(handle, each.id) == events[place + 1 :]
        with pytest.raises(BadInput, match=f"is of job {handle.id}, not of {other.id}"):
            await events_of(other, events[0].id)
        for wrong in ("x", f"{handle.id}.", f"{handle.id}.1-2", "a.b.c"):
            with pytest.raises(BadInput):
                await events_of(handle, wrong)


async def test_a_slow_client_holds_up_what_makes_its_events() -> None:
    made = 0

    async def parts() -> AsyncGenerator[bytes, None]:
        nonlocal made
        for number in range(1_000):
            made = number + 1
            yield sse.event(number)

    async with sse.EventFlow(parts()) as flow:
        await flow.begin(1)
        await asyncio.sleep(0)
        assert made <= sse.AHEAD_MAX
        read = b""
        while (part := await flow.read()) is not None:
            read += part
    assert [json.loads(each.data) for each in parse_events(read.decode())] == list(range(1_000))


async def test_an_error_comes_behind_the_events_before_it() -> None:
    async def parts() -> AsyncGenerator[bytes, None]:
        yield sse.event(1)
        raise BadInput("broken")

    async with sse.EventFlow(parts()) as flow:
        await flow.begin(1)
        assert await flow.read() == b"data: 1\n\n"
        with pytest.raises(BadInput, match="broken"):
            await flow.read()

    async def none() -> AsyncGenerator[bytes, None]:
        raise BadInput("at once")
        yield b""

    async with sse.EventFlow(none()) as flow:
        with pytest.raises(BadInput, match="at once"):
            await flow.begin(1)
