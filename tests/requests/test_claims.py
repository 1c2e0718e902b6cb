"""Families that claim their ids: of several messages of one id one is run."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.enqueue.forwarder import Forwarder
from aiqueue.errors import JobFailed
from aiqueue.requests import claims
from aiqueue.requests.claims import Claims
from aiqueue.worker import settlement

from .. import keyed
from ..support import Eventually


class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str
    request_id: str = ""


async def publish(account: Any, *ids: str) -> None:
    """The guide's snippet: a plain publish without Nats-Msg-Id."""
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    for request_id in ids:
        job_headers = {"request_id": request_id, "model": "m", "priority": "normal"}
        await plain.publish("ai.gateway.requests.acme", b'{"prompt": "%b"}' % request_id.encode(), headers=job_headers)
    await plain.flush()
    await plain.close()


async def empty(client: aiqueue.Client) -> bool:
    return not (await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS"))["state"]["messages"]


async def count(client: aiqueue.Client, messages: int) -> bool:
    return bool((await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS"))["state"]["messages"] == messages)


def counting(
    *, fails: int = 0, result: bool = True, lasts_s: float = 0.0, retry_s: float = 0.05, slots: int = 100
) -> tuple[aiqueue.Worker, Counter[str]]:
    runs: Counter[str] = Counter()
    worker = aiqueue.Worker(concurrency=slots)

    @worker.handle(Request, retry=aiqueue.Backoff(attempts=2, first=retry_s), result=result)
    async def request(job: aiqueue.Job[Request]) -> str:
        runs[job.id] += 1
        await asyncio.sleep(lasts_s)
        if runs[job.id] <= fails:
            raise ValueError("not yet")
        return f"answer to {job.id}"

    return worker, runs


async def test_of_many_messages_of_one_id_one_is_run(
    client: aiqueue.Client, account: Any, eventually: Eventually
) -> None:
    ids = [f"r-{n}" for n in range(50)]
    await publish(account, *(ids * 3))
    one, ran = counting(lasts_s=0.01)
    two, also = counting(lasts_s=0.01)
    async with one.running(client), two.running(client):
        handles = [await client.enqueue(Request(prompt=each, request_id=each), tenant="acme") for each in ids]
        answers = [await handle.result(20) for handle in handles]
        await eventually(lambda: empty(client))
    assert answers == [f"answer to {each}" for each in ids]
    assert ran + also == Counter(dict.fromkeys(ids, 1))


async def test_one_that_is_published_after_the_answer_is_not_run(
    client: aiqueue.Client, account: Any, eventually: Eventually
) -> None:
    worker, runs = counting()
    async with worker.running(client):
        first = await client.enqueue(Request(prompt="r", request_id="r"), tenant="acme")
        assert await first.result(25) == "answer to r"
        await publish(account, "r", "r")
        await eventually(lambda: empty(client))
    assert runs == {"r": 1}


async def test_the_handle_of_a_duplicate_has_the_others_answer_and_its_stream(
    client: aiqueue.Client, account: Any
) -> None:
    await publish(account, "r")
    handle = await client.enqueue(Request(prompt="r", request_id="r"), tenant="acme")
    assert not handle.duplicate  # the plain one has no Msg-Id
    worker, runs = counting(lasts_s=0.2)
    async with worker.running(client):
        items = [item.event async for item in handle.stream(timeout=10)]
        assert await handle.result(25) == "answer to r"
    assert items == ["started", "result"]
    assert runs == {"r": 1}


async def test_its_retries_are_the_claimants_own(client: aiqueue.Client, account: Any, eventually: Eventually) -> None:
    worker, runs = counting(fails=1)
    await publish(account, "r", "r")
    async with worker.running(client):
        await eventually(lambda: empty(client))
    assert runs == {"r": 2}


async def test_an_id_that_failed_may_be_enqueued_again(client: aiqueue.Client, eventually: Eventually) -> None:
    worker, runs = counting(fails=2)
    config = (await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS"))["config"]
    await client.connection.api("STREAM.UPDATE.AI_GATEWAY_REQUESTS", {**config, "duplicate_window": 100_000_000})
    async with worker.running(client):
        first = await client.enqueue(Request(prompt="r", request_id="r"), tenant="acme")
        with pytest.raises(JobFailed, match="not yet"):
            await first.result(25)
        await eventually(lambda: empty(client))
        async with asyncio.timeout(25):
            while (again := await client.enqueue(Request(prompt="r", request_id="r"), tenant="acme")).duplicate:
                await asyncio.sleep(0.05)
        assert await again.result(25) == "answer to r"
    assert runs == {"r": 3}


async def test_a_claim_whose_message_was_purged_holds_nobody_up(
    client: aiqueue.Client, account: Any, eventually: Eventually
) -> None:
    started = asyncio.Event()
    stuck = aiqueue.Worker(drain_timeout=0.1)

    @stuck.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> None:
        started.set()
        await asyncio.sleep(60)

    await publish(account, "r")
    async with stuck.running(client):
        await asyncio.wait_for(started.wait(), 25)
        await client.connection.api("STREAM.PURGE.AI_GATEWAY_REQUESTS")
    worker, runs = counting()
    async with worker.running(client):
        handle = await client.enqueue(Request(prompt="r", request_id="r"), tenant="acme")
        assert await handle.result(25) == "answer to r"
    assert runs == {"r": 1}


async def test_a_handler_without_results_claims_as_well(
    client: aiqueue.Client, account: Any, eventually: Eventually
) -> None:
    worker, runs = counting(result=False)
    await publish(account, "r")
    async with worker.running(client):
        await eventually(lambda: empty(client))
        await publish(account, "r")
        await eventually(lambda: empty(client))
    assert runs == {"r": 1}


async def test_one_whose_retry_is_back_in_its_lane_keeps_its_claim(
    client: aiqueue.Client, account: Any, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message then has another sequence, which no entry states yet."""
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.1)
    monkeypatch.setattr("aiqueue.worker.claiming.CHECK_AGAIN_S", 0.2)
    first, runs = counting(fails=1, retry_s=1.0)
    await publish(account, "r")
    async with first.running(client):
        await eventually(lambda: runs["r"] == 1)
        await eventually(lambda: empty(client))  # parked
    forwarder = Forwarder(client.connection, client.topology)
    await publish(account, "r")  # ahead of it in the lane
    await forwarder.start()
    try:
        await eventually(lambda: count(client, 2))
    finally:
        await forwarder.stop()
    second, more = counting(slots=1)  # the newer message is looked at before the older one begins
    async with second.running(client):
        await eventually(lambda: empty(client))
    assert runs + more == {"r": 2}, "its two attempts, and no other run"


async def test_a_run_that_waits_for_its_limit_is_alive_however_long_it_waits(
    account: Any, tmp_path: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "streams").mkdir()
    rule = f'[[limit]]\nfamily = "{keyed.FAMILY}"\nrequests = 1\nwindow = "1h"\n'
    (tmp_path / "streams" / "limits.toml").write_text(rule)
    file = keyed.FILE.replace('limit_key = "model"', 'limit_key = "model"\nclaim = true')
    worker = aiqueue.Worker()

    @worker.handle(keyed.Call)
    async def run(job: aiqueue.Job[keyed.Call]) -> None: ...

    monkeypatch.setattr(claims, "RETURN_MAX_S", 0.0)
    async with keyed.connect(account, tmp_path, file) as client, worker.running(client):
        handles = [await client.enqueue(keyed.Call(model="m", n=n), tenant="acme") for n in range(2)]
        lane, family = keyed.key_lane("m"), client.topology.family(keyed.FAMILY)

        async def moved() -> Any:
            states = [(await each.status()).state for each in handles]
            assert sorted(states) == ["done", "queued"]
            return await client.connection.last(keyed.STREAM, subjects.lane(*lane)) or False

        waiting = await eventually(moved)
        handle = next(each for each in handles if each.id == waiting.headers["Aiq-Job-Id"])
        journal = subjects.journal(family.journal or "", "acme", handle.id)
        found = Claims(client.journal, client.parking)
        assert await found.is_taken_by_other_run(family, journal, waiting.seq + 1, waiting.time + 1) is True
        await client.connection.delete(keyed.STREAM, waiting.seq)
        assert await found.is_taken_by_other_run(family, journal, waiting.seq + 1, waiting.time + 1) is False
