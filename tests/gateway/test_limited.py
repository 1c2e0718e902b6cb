"""Requests of a limited model reserve their tokens, and give back what they have not used."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.errors import ResultTimeout
from aiqueue.gateway import load, tokens_at_most
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Account, Eventually
from .running import ask, child, records, running, shorten_leases

WINDOW_S = 1.0  # the stand-in notes a call late on a busy machine; without a limit, calls are less than 0.1 s apart


async def test_a_call_reserves_its_bound_and_gives_back_what_it_has_not_used(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    bound, use = tokens_at_most(ask(), load(config).find_model("small")), 8 + 5
    assert bound > 2 * use
    await client.set_limit("gateway.requests", "small", cost=bound + use)  # in a minute
    async with running(client, config):
        for _ in range(2):
            await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
        third = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(ResultTimeout):
            await third.result(timeout=0.5)
    assert sum(standin.billed()) == 2 * use


async def test_a_request_above_the_limit_itself_is_a_dead_letter(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    await client.set_limit("gateway.requests", "*", cost=10)
    async with running(client, config):
        with pytest.raises(JobFailed) as failed:
            await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    assert failed.value.reason == "limit"
    assert standin.calls == []


async def test_a_limit_of_requests_holds_while_more_wait(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    await client.set_limit("gateway.requests", "small", requests=4, window="1s")
    async with running(client, config):
        handles = [await client.enqueue(ask(), tenant=f"t{number % 2}") for number in range(10)]
        await asyncio.gather(*(each.result(timeout=20) for each in handles))
    at = sorted(each.started_at for each in standin.calls)
    assert len(at) == 10
    assert all(later - earlier > WINDOW_S / 2 for earlier, later in zip(at, at[4:], strict=False))


async def test_a_limit_holds_though_calls_wait_for_a_connection(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    config.write_text(config.read_text().replace('kind = "openai"', 'kind = "openai"\nconnections = 2', 1))
    await client.set_limit("gateway.requests", "small", requests=4, window="1s")
    standin.order(Fault(delay_s=0.95, count=2))  # two more calls have their credit, and would begin as the next ones do
    async with running(client, config):
        handles = [await client.enqueue(ask(), tenant="acme") for _ in range(8)]
        answers: Any = await asyncio.gather(*(each.result(timeout=20) for each in handles))
    at = sorted(each.started_at for each in standin.calls)
    assert len(at) == 8
    assert all(later - earlier > WINDOW_S / 2 for earlier, later in zip(at, at[4:], strict=False))
    assert [each["aiqueue"]["possibly_billed"] for each in answers] == [0] * 8


async def test_a_fallback_waits_in_the_lane_of_its_own_model_s_limit(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    config.write_text(config.read_text().replace('upstream = "small-1"', 'upstream = "small-1"\nfallbacks = ["large"]'))
    await client.set_limit("gateway.requests", "large", in_flight=1)
    standin.order(Fault(400, model="small-1", count=9))
    standin.behaviour = Behaviour(first_token_s=0.2)
    async with running(client, config):
        handles = [await client.enqueue(ask(), tenant="acme") for _ in range(3)]
        answers: Any = await asyncio.gather(*(each.result(timeout=20) for each in handles))
    assert [each["aiqueue"]["model"] for each in answers] == ["large"] * 3
    calls = sorted((each.started_at, each.ended_at or 0) for each in standin.calls if each.model == "large-1")
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(calls))


async def test_a_request_whose_workers_were_killed_three_times_is_streamed_as_ever(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    """As a suspect it would run in a child without a connection, one at a time."""
    await shorten_leases(client)
    standin.order(Fault(delay_s=60, count=3))
    handle = await client.enqueue(ask(stream=True), tenant="acme")
    for calls in (1, 2, 3):
        with child(account, config, config.with_suffix(".log")) as process:
            await eventually(lambda: len(standin.calls) == calls)  # noqa: B023
            process.kill()
            await asyncio.to_thread(process.wait)
    async with running(client, config):
        answer: Any = await handle.result(timeout=20)
    assert (answer["aiqueue"]["possibly_billed"], answer["aiqueue"]["attempts"]) == (3, 4)
    chunks = [item async for item in handle.stream(timeout=10) if item.event == "chunk"]
    assert len(chunks) == 8  # the role, five words, the end, the usage
    assert [each.outcome for each in await records(client)] == ["possibly_billed"] * 3 + ["ok"]
