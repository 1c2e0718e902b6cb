"""What follows a failed call: by its kind a retry, a pause of its model for all, a fallback model, or the end."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Backoff, JobFailed
from aiqueue.errors import JobCancelled
from aiqueue.gateway import Budgets, UsageLedger, UsageRecord, UsageStore, budgets, handler, http_provider
from aiqueue.gateway import standin as standin_module
from aiqueue.gateway.ledger import month_of
from aiqueue.gateway.standin import Behaviour, Fault, StandIn
from aiqueue.gateway.stored_chunks import as_chunks

from ..support import Eventually
from .running import KEY, KEY_VARIABLE, ask, billed, records, running, write_config

BUDGET = '[[budget]]\ntenant = "acme"\nmonth = 1.0\n'


@pytest.fixture
def config(tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gateway.toml in which "small" falls back to "large", and acme has a budget."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="10ms", cap="50ms"))
    return write_config(tmp_path, standin.url, small='fallbacks = ["large"]', more=BUDGET)


async def charged(client: aiqueue.Client) -> tuple[int, int, int]:
    """What acme's budget has spent, reserved and held."""
    store = UsageStore(client.connection, client.topology)
    (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
    return stats.spent_micros, stats.reserved_micros, stats.held_micros


@pytest.mark.parametrize("fault", [Fault(500), Fault(503), Fault(429), Fault(502), Fault(abort_after=0)])
async def test_what_can_go_away_is_tried_again_and_costs_once(
    client: aiqueue.Client, config: Path, standin: StandIn, fault: Fault
) -> None:
    standin.order(fault)
    async with running(client, config):
        answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    failed, made = await records(client)
    maybe = fault.status in (200, 502)  # the connection broke, or a proxy has heard nothing: the model may have run
    assert (failed.outcome, made.outcome) == ("possibly_billed" if maybe else "failed", "ok")
    assert (answer["aiqueue"]["possibly_billed"], answer["aiqueue"]["attempts"]) == (int(maybe), 2)
    assert await charged(client) == (made.cost_micros, 0, failed.reserved_micros if maybe else 0)
    assert [each.attempt for each in (failed, made)] == [1, 2]


async def test_many_earlier_calls_are_settled_at_once(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of a limited model has to begin within a second of its handler."""
    monkeypatch.setattr(budgets, "GATHER_S", 0.1)
    standin.order(Fault(429, count=12))
    async with running(client, config):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=20)
    at = [each.started_at for each in standin.calls]
    assert at[-1] - at[-2] < handler.START_WITHIN_S


async def test_an_answer_that_takes_too_long_is_held_by_the_budget_and_tried_again(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    config.write_text(config.read_text().replace('timeout = "10s"', 'timeout = "200ms"', 1).replace('"5s"', '"100ms"'))
    standin.order(Fault(delay_s=30))
    async with running(client, config):
        answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    assert answer["aiqueue"]["possibly_billed"] == 1
    assert [each.outcome for each in await records(client)] == ["possibly_billed", "ok"]


async def test_a_stream_that_breaks_begins_again_behind_a_restart(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    standin.order(Fault(abort_after=3))
    texts, restarts = [""], 0
    async with running(client, config):
        handle = await client.enqueue(ask(stream=True), tenant="acme")
        async with aclosing(handle.stream(timeout=10)) as items:
            async for item in items:
                if item.event == "restart":
                    restarts += 1
                    texts.append("")
                elif item.event == "chunk":
                    assert item.data["object"] == "chat.completion.chunk"
                    texts[-1] += "".join(each["delta"].get("content") or "" for each in item.data["choices"])
        answer: Any = await handle.result(timeout=10)
    assert (texts, restarts) == (["one two", "one two three one two"], 1)
    assert answer["choices"][0]["message"]["content"] == texts[-1]
    assert answer["aiqueue"]["possibly_billed"] == 1
    assert len(standin.calls) == 2


@pytest.mark.parametrize(("status", "calls"), [(400, 1), (401, 1), (500, 5)])
async def test_a_model_that_has_failed_for_good_is_replaced_by_its_fallback(
    client: aiqueue.Client, config: Path, standin: StandIn, status: int, calls: int
) -> None:
    standin.order(Fault(status, model="small-1", count=99))
    async with running(client, config):
        handle = await client.enqueue(ask(request_id="req-1"), tenant="acme")
        answer: Any = await handle.result(timeout=15)
    assert [each.model for each in standin.calls] == ["small-1"] * calls + ["large-1"]
    assert answer["choices"][0]["message"]["content"] == "one two three one two"
    about = answer["aiqueue"]
    assert (answer["model"], about["model"], about["fallback_of"]) == ("small", "large", "small")
    assert (about["request_id"], about["attempts"], about["possibly_billed"]) == ("req-1", calls + 1, 0)
    found = await records(client)
    assert [(each.model, each.request_id) for each in found[-2:]] == [("small", "req-1"), ("large", "req-1")]
    assert await charged(client) == (billed(standin), 0, 0)


async def test_a_fallback_is_called_after_as_many_failed_calls_as_its_model_says(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    config.write_text(config.read_text().replace('fallbacks = ["large"]', 'fallbacks = ["large"]\nattempts = 2'))
    standin.order(Fault(500, model="small-1", count=10))
    async with running(client, config):
        answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    assert (answer["aiqueue"]["model"], answer["aiqueue"]["attempts"]) == ("large", 3)


async def test_the_answer_of_a_fallback_is_streamed_too(client: aiqueue.Client, config: Path, standin: StandIn) -> None:
    standin.order(Fault(400, model="small-1"))
    text = ""
    async with running(client, config):
        handle = await client.enqueue(ask(stream=True), tenant="acme")
        async with aclosing(handle.stream(timeout=10)) as items:
            async for item in items:
                if item.event == "restart":
                    text = ""
                elif item.event == "chunk":
                    text += "".join(each["delta"].get("content") or "" for each in item.data["choices"])
    assert text == "one two three one two"


@pytest.mark.parametrize("removed", ["the model", "its fallbacks", "its key"])
async def test_an_answer_that_a_fallback_is_paid_for_comes_though_the_file_has_changed_meanwhile(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    standin.order(Fault(400, model="small-1"))
    standin.order(Fault(model="large-1", delay_s=0.3))
    text = config.read_text()
    first, second = text.index("[[model]]"), text.index("[[model]]", text.index("[[model]]") + 1)
    async with running(client, config) as worker:
        handle = await client.enqueue(ask(), tenant="acme")
        await asyncio.wait_for(_begun(standin, 2), 10)
        if removed == "the model":
            config.write_text(text[:first] + text[second:])
        elif removed == "its fallbacks":
            config.write_text(text.replace('fallbacks = ["large"]', ""))
        else:
            monkeypatch.delenv(KEY_VARIABLE)
        await worker.reload(client)
        answer: Any = await handle.result(timeout=10)
    assert (answer["model"], answer["aiqueue"]["model"]) == ("small", "large")
    assert await charged(client) == (billed(standin), 0, 0)


async def _begun(standin: StandIn, calls: int) -> None:
    while len(standin.calls) < calls:
        await asyncio.sleep(0.005)


KEYLESS = """
[[provider]]
name = "q"
kind = "openai"
base_url = "{url}"
key_env = "GATEWAY_TEST_NO_KEY"

[[model]]
name = "keyless"
provider = "q"
context = 8_000
max_output_tokens = 100
price = {{ input = 1, output = 2 }}
fallbacks = [{fallbacks}]
"""
NO_KEY = "provider q has no key: environment variable GATEWAY_TEST_NO_KEY is empty or not set; set it where"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_whose_key_this_worker_has_not_is_replaced_by_its_fallback(
    client: aiqueue.Client, config: Path, standin: StandIn, *, stream: bool
) -> None:
    config.write_text(config.read_text() + KEYLESS.format(url=standin.url, fallbacks='"large"'))
    async with running(client, config):
        handle = await client.enqueue(ask(model="keyless", stream=stream), tenant="acme")
        answer: Any = await handle.result(timeout=10)
    assert [each.model for each in standin.calls] == ["large-1"]
    assert (answer["aiqueue"]["fallback_of"], answer["aiqueue"]["attempts"]) == ("keyless", 1)
    assert await charged(client) == (billed(standin), 0, 0)


@pytest.mark.parametrize("fallbacks", ["", '"large"'])
async def test_a_missing_key_is_said_with_its_variable_where_no_fallback_answers(
    client: aiqueue.Client, config: Path, standin: StandIn, fallbacks: str
) -> None:
    standin.order(Fault(400, model="large-1", message="second"))
    config.write_text(config.read_text() + KEYLESS.format(url=standin.url, fallbacks=fallbacks))
    async with running(client, config):
        with pytest.raises(JobFailed) as failed:
            await (await client.enqueue(ask(model="keyless"), tenant="acme")).result(timeout=10)
    assert failed.value.error.startswith(NO_KEY)
    assert ("second" in failed.value.error) is bool(fallbacks)


async def test_a_key_that_goes_while_its_call_is_begun_costs_nothing_and_is_replaced_by_the_fallback(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_TEST_NO_KEY", KEY)
    config.write_text(config.read_text() + KEYLESS.format(url=standin.url, fallbacks='"large"'))
    begin = UsageLedger.begin

    async def begin_without_key(ledger: UsageLedger, record: UsageRecord) -> int:
        if record.model == "keyless":
            monkeypatch.delenv("GATEWAY_TEST_NO_KEY")
            await worker.reload(client)
        return await begin(ledger, record)

    monkeypatch.setattr(UsageLedger, "begin", begin_without_key)
    async with running(client, config) as worker:
        answer: Any = await (await client.enqueue(ask(model="keyless"), tenant="acme")).result(timeout=10)
    assert [each.model for each in standin.calls] == ["large-1"]
    assert answer["aiqueue"]["possibly_billed"] == 0
    assert await charged(client) == (billed(standin), 0, 0)


async def test_if_the_fallback_fails_too_all_reasons_are_said(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    standin.order(Fault(400, model="small-1", message="first"))
    standin.order(Fault(400, model="large-1", message="second"))
    async with running(client, config):
        handle = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await handle.result(timeout=10)
    assert "first" in failed.value.error
    assert "fallback large: " in failed.value.error
    assert "second" in failed.value.error
    assert len(standin.calls) == 2


async def test_a_fault_of_our_own_in_an_answer_is_paid_once(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_provider, "usage_of", lambda answer: answer["nothing"])
    async with running(client, config):
        handle = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(JobFailed, match="cannot be used: KeyError") as failed:
            await handle.result(timeout=10)
    assert "fallback large" in failed.value.error
    assert [each.model for each in standin.calls] == ["small-1", "large-1"]
    assert await charged(client) == (0, 0, sum(each.reserved_micros for each in await records(client)))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_nested_more_deeply_than_a_result_is_kept_and_paid_once(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    deep, usage_of = json.loads("[" * 300 + "]" * 300), standin_module._usage
    monkeypatch.setattr(standin_module, "_usage", lambda call: {**usage_of(call), "details": deep})
    async with running(client, config):
        handle = await client.enqueue(ask(stream=stream), tenant="acme")
        answer: Any = await handle.result(timeout=10)
        chunks = [item.data async for item in handle.stream(timeout=10) if item.event == "chunk"]
    assert answer["choices"][0]["message"]["content"] == "one two three one two"
    assert "[[[[" in str(answer["usage"]["details"])
    assert len(standin.calls) == 1
    assert await charged(client) == (billed(standin), 0, 0)
    assert len(chunks) == (8 if stream else 0)  # the role, five words, the end, the usage


@pytest.mark.parametrize("answer", [5, {"message": 5}, {"message": {"content": "x", "tool_calls": [5, {"id": "a"}]}}])
def test_an_odd_answer_of_a_fallback_is_streamed_as_far_as_it_goes(answer: Any) -> None:
    chunks = as_chunks({"choices": [answer], "usage": None})
    made = [each["delta"] for chunk in chunks for each in chunk["choices"]]
    is_good = isinstance(answer, dict) and isinstance(answer["message"], dict)
    assert made == ([{"content": "x", "tool_calls": [{"index": 1, "id": "a"}]}] if is_good else [])


@pytest.mark.parametrize("how", ["replay", "rerun"])
async def test_a_failed_request_that_runs_anew_calls_its_model_again(
    client: aiqueue.Client, config: Path, standin: StandIn, how: str
) -> None:
    standin.order(Fault(400, model="small-1"))
    standin.order(Fault(400, model="large-1"))
    async with running(client, config):
        handle = await client.enqueue(ask(request_id="req-1"), tenant="acme")
        with pytest.raises(JobFailed):
            await handle.result(timeout=10)
        if how == "replay":
            (letter,) = [each async for each in client.dead.find() if each.job_id == "req-1"]
            await client.dead.replay(letter)
            again = await client.job("req-1", family="gateway.requests", tenant="acme")
        else:
            again = await client.enqueue(ask(request_id="req-1"), tenant="acme", on_duplicate="rerun_failed")
        answer: Any = await again.result(timeout=10)
    assert [each.model for each in standin.calls] == ["small-1", "large-1", "small-1"]
    about = answer["aiqueue"]
    assert (about["model"], about["possibly_billed"]) == ("small", 0)
    assert about["attempts"] == (2 if how == "replay" else 1)  # a rerun counts its own calls
    assert [each.request_id for each in await records(client)] == ["req-1"] * 3


@pytest.mark.parametrize("is_limited", [True, False])
async def test_a_429_with_retry_after_pauses_the_model_for_all_its_requests(
    client: aiqueue.Client, config: Path, standin: StandIn, *, is_limited: bool
) -> None:
    if is_limited:
        await client.set_limit("gateway.requests", "*", requests=1_000)
    standin.order(Fault(429, retry_after_s=1.0))
    async with running(client, config):
        first = await client.enqueue(ask(), tenant="acme")
        await asyncio.wait_for(_called(standin, 1), 10)
        await asyncio.sleep(0.1)
        other = await client.enqueue(ask(), tenant="globex")
        elsewhere = await client.enqueue(ask(model="large"), tenant="acme")
        await asyncio.gather(*(each.result(timeout=15) for each in (first, other, elsewhere)))
    refused = standin.calls[0]
    assert [each.model for each in standin.calls[:2]] == ["small-1", "large-1"]
    assert standin.calls[1].started_at - refused.started_at < 0.9
    assert all(each.started_at - refused.started_at >= 1.0 for each in standin.calls[2:])
    assert len(standin.calls) == 4


@pytest.mark.parametrize("status", [429, 503, 500])
async def test_retry_after_zero_is_tried_again_soon_and_not_in_a_storm(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="1m", cap="1m"))
    monkeypatch.setattr(handler, "AT_ONCE", Backoff(first="50ms", cap="50ms", jitter=0))
    standin.order(Fault(status, retry_after_s=0.0, count=3))
    async with running(client, config):
        answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    assert answer["aiqueue"]["attempts"] == 4
    at = [each.started_at for each in standin.calls]
    assert all(later - earlier >= 0.05 for earlier, later in itertools.pairwise(at))


async def _called(standin: StandIn, calls: int) -> None:
    while len(standin.calls) < calls or standin.calls[-1].ended_at is None:
        await asyncio.sleep(0.005)


async def test_cancelling_stops_the_provider_s_call_and_leaves_its_reservation_held(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(token_s=0.05, completion_tokens=500)
    async with running(client, config):
        handle = await client.enqueue(ask(stream=True, max_tokens=None), tenant="acme")
        async with aclosing(handle.stream(timeout=20)) as items:
            async for item in items:
                if item.event == "chunk":
                    break
        assert standin.calls[0].outcome == "running"  # a reader that leaves does not stop it
        assert await handle.cancel()
        await eventually(lambda: standin.calls[0].outcome == "lost")
        with pytest.raises(JobCancelled):
            await handle.result(timeout=10)
    (record,) = await records(client)
    assert record.outcome == "possibly_billed"
    assert await charged(client) == (0, 0, record.reserved_micros)
