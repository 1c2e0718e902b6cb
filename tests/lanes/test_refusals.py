"""Pull requests that the server refuses for good: they shrink to what is allowed, or are repeated with pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.lanes.refusals import PAUSE_CAP_S, PullLimits

from ..support import Account, NatsProcess, create_streams, eventually

A_WHILE_S = 2.0


class Echo(aiqueue.Message, kind="echo"):
    n: int = 0


@contextlib.asynccontextmanager
async def pulls_counted(server: Any) -> AsyncIterator[list[float]]:
    """The times of all pull requests of an account, monotonic seconds."""
    times: list[float] = []

    async def note(_message: Any) -> None:
        times.append(time.monotonic())

    connection = await nats.connect(server.url, user=server.user, password=server.password)
    await connection.subscribe("$JS.API.CONSUMER.MSG.NEXT.AI_AGENT_TASKS.>", cb=note)
    await connection.flush()
    yield times
    await connection.close()


@contextlib.asynccontextmanager
async def opened(server: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        yield client


def echoing(concurrency: int = 100) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=concurrency)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> int:
        return job.message.n

    return worker


def fastest(times: list[float]) -> int:
    """The most requests within one second."""
    return max((sum(at <= each < at + 1 for each in times) for at in times), default=0)


async def test_where_the_server_allows_small_batches_only_all_jobs_run_and_few_pulls_are_sent(
    own_server: Callable[..., NatsProcess], caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server(storage="limits { max_request_batch: 50 }")
    caplog.set_level(logging.WARNING, "aiqueue.lanes")
    async with opened(server) as client, pulls_counted(server) as times:
        handles = [await client.enqueue(Echo(n=n), tenant="acme") for n in range(200)]
        async with echoing().running(client):
            assert [await handle.result(30) for handle in handles] == list(range(200))
            await asyncio.sleep(A_WHILE_S)  # the time in which pulls are counted
    assert 0 < fastest(times) < 200
    said = [each.getMessage() for each in caplog.records if "MaxRequestBatch of 50" in each.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("pull requests ask for at most 50 jobs from now on")


@pytest.mark.parametrize(
    "edit",
    [
        {"max_batch": 1},
        {"max_expires": 5_000_000_000},
        {"max_expires": 10_000_000},
        {"priority_groups": ["jobs"], "priority_policy": "overflow"},
    ],
    ids=["batches of 1", "5 s", "10 ms", "another kind of pulls"],
)
async def test_a_consumer_edited_by_hand_is_not_asked_without_pause(account: Account, edit: dict[str, Any]) -> None:
    async with opened(account) as client, pulls_counted(account) as times, echoing().running(client) as session:
        await (await client.enqueue(Echo(), tenant="acme")).result(25)
        (lane,) = session.puller.lanes
        info = await client.connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
        request = {"stream_name": lane.stream, "config": {**info["config"], **edit}, "action": "update"}
        subject = f"CONSUMER.CREATE.{lane.stream}.{lane.consumer}.{info['config']['filter_subject']}"
        await client.connection.api(subject, request)
        del times[:]
        session.puller.restart_pulls()  # the pull that is open was accepted before
        await eventually(lambda: len(times) > 0)
        await asyncio.sleep(A_WHILE_S)  # the time in which pulls are counted
        assert fastest(times) < 10
        if "priority_groups" not in edit:
            del times[:]
            handles = [await client.enqueue(Echo(n=n), tenant="acme") for n in range(20)]
            assert [await handle.result(25) for handle in handles] == list(range(20))
            assert fastest(times) < 200


@given(st.lists(st.sampled_from(["Leadership Change", "Exceeded MaxWaiting", "Bad Request"]), min_size=2))
def test_the_first_refusal_makes_no_pause_and_later_ones_make_growing_ones(descriptions: list[str]) -> None:
    limits = PullLimits()
    assert [limits.learn_limit(each) for each in descriptions] == [""] * len(descriptions)
    pauses = [limits.note_refusal() for _ in descriptions]
    assert pauses[0] == 0
    assert pauses[1:] == sorted(pauses[1:])
    assert 0 < pauses[1] <= pauses[-1] <= PAUSE_CAP_S


@given(st.integers(-5, 100))
def test_a_limit_is_learned_once_and_only_if_it_is_one(allowed: int) -> None:
    limits = PullLimits()
    assert bool(limits.learn_limit(f"Exceeded MaxRequestBatch of {allowed}")) == (allowed > 0)
    assert limits.learn_limit(f"Exceeded MaxRequestBatch of {allowed}") == ""
    assert (limits.batch_max == allowed) == (allowed > 0)


@pytest.mark.parametrize(("text", "allowed_s"), [("5s", 5), ("1m0s", 30), ("100ms", 0.1), ("0s", 30), ("soon", 30)])
def test_a_standing_pull_expires_within_what_is_allowed(text: str, allowed_s: float) -> None:
    limits = PullLimits()
    limits.learn_limit(f"Exceeded MaxRequestExpires of {text}")
    request = limits.standing_request(3)
    assert request["expires"] == int(allowed_s * 1e9)
    assert 0 < request["idle_heartbeat"] * 2 <= request["expires"]
