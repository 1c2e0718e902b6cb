"""Server-sent events on their way to a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from aiqueue.errors import BadInput
from aiqueue.starlette import server_events

from ..gateway.front.fronts import parse_events


async def test_a_slow_client_holds_up_what_makes_its_events() -> None:
    made = 0

    async def parts() -> AsyncGenerator[bytes, None]:
        nonlocal made
        for number in range(1_000):
            made = number + 1
            yield server_events.event(number)

    async with server_events.EventFlow(parts()) as flow:
        await flow.begin(1)
        await asyncio.sleep(0)
        assert made <= server_events.AHEAD_MAX
        read = b""
        while (part := await flow.read()) is not None:
            read += part
    assert [json.loads(each.data) for each in parse_events(read.decode())] == list(range(1_000))


async def test_an_error_comes_behind_the_events_before_it() -> None:
    async def parts() -> AsyncGenerator[bytes, None]:
        yield server_events.event(1)
        raise BadInput("broken")

    async with server_events.EventFlow(parts()) as flow:
        await flow.begin(1)
        assert await flow.read() == b"data: 1\n\n"
        with pytest.raises(BadInput, match="broken"):
            await flow.read()

    async def none() -> AsyncGenerator[bytes, None]:
        raise BadInput("at once")
        yield b""

    async with server_events.EventFlow(none()) as flow:
        with pytest.raises(BadInput, match="at once"):
            await flow.begin(1)
