"""A record of a call is written once, by whoever is first, and a known end replaces "possibly billed"."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import nats
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiqueue
from aiqueue import subjects
from aiqueue.errors import BadInput, ConfigMismatch, InvalidToken, NotFound, QueueFull
from aiqueue.gateway import UsageLedger, UsageRecord, UsageStore
from aiqueue.gateway.ledger import COUNT_MAX, month_of, month_start, next_month_start

from ..support import Account

STREAM = "AI_GATEWAY_USAGE"
STARTED_AT = 1_764_407_529.25  # 2025-11-29


def record_of(call_id: str = "j1/1/1", tenant: str = "acme", **given: Any) -> UsageRecord:
    told: dict[str, Any] = {
        "job_id": "j1", "request_id": "r1", "model": "gpt-4o", "provider": "openai", "started_at": STARTED_AT,
        "outcome": "ok", "latency_s": 1.5, "first_token_s": 0.25, "prompt_tokens": 100, "completion_tokens": 50,
        "cached_tokens": 10, "cost_micros": 750, "reserved_micros": 2_000,
    }  # fmt: skip
    return UsageRecord(call_id=call_id, tenant=tenant, **{**told, **given})


def lost(call_id: str = "j1/1/1", tenant: str = "acme", **given: Any) -> UsageRecord:
    none = {"latency_s": None, "first_token_s": None, "prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
    return record_of(call_id, tenant, outcome="possibly_billed", cost_micros=None, **none, **given)


@pytest.fixture
async def client(shared: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        yield client


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)
COUNT = st.integers(0, COUNT_MAX)
SECONDS = st.none() | st.floats(0, 2**35, allow_nan=False)
RECORDS = st.builds(
    UsageRecord, call_id=TEXT, job_id=TEXT, request_id=TEXT, tenant=st.from_regex(subjects.TOKEN, fullmatch=True),
    model=TEXT, provider=TEXT, started_at=st.floats(0, 2**35), outcome=st.sampled_from(["ok", "failed"]),
    latency_s=SECONDS, first_token_s=SECONDS, prompt_tokens=COUNT, completion_tokens=COUNT, cached_tokens=COUNT,
    cache_write_tokens=COUNT, cost_micros=st.none() | COUNT, reserved_micros=COUNT, attempt=COUNT,
    api_key=st.just("") | st.from_regex(subjects.TOKEN, fullmatch=True),
)  # fmt: skip


@settings(max_examples=30)
@given(RECORDS)
def test_a_record_comes_back_as_it_was_also_from_a_later_version(record: UsageRecord) -> None:
    plain = json.loads(json.dumps(record.plain()))
    assert UsageRecord.parse({**plain, "a_later_field": 1}) == record


def test_a_record_of_a_version_without_api_keys_is_of_no_key() -> None:
    plain = record_of().plain()
    del plain["api_key"]
    assert UsageRecord.parse(plain) == record_of(api_key="")


@pytest.mark.parametrize(
    "given",
    [
        {"outcome": "lost"}, {"prompt_tokens": -1}, {"cost_micros": 1.5}, {"cost_micros": True}, {"attempt": 2**60},
        {"started_at": float("nan")}, {"started_at": None}, {"latency_s": -1}, {"model": ""}, {"model": "x" * 600},
        {"model": "\ud800"}, {"job_id": 7}, {"started_at": 2.0**60},
    ],
)  # fmt: skip
def test_a_record_that_could_not_be_read_again_is_refused_in_one_line(given: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as caught:
        record_of(**given)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidToken):
        record_of(tenant="a.b")


def test_months_are_utc() -> None:
    assert month_of(month_start("2026-11")) == "2026-11"
    assert month_of(month_start("2026-11") - 0.001) == "2026-10"
    assert next_month_start("2026-12") == month_start("2027-01")
    for odd in ("2026-13", "2026-1", "26-11", "", "2026-11-01", "x"):
        with pytest.raises(BadInput, match="is no month: give one such as 2026-11"):
            month_start(odd)


async def test_a_record_is_found_by_its_call(ledger: UsageLedger, tenant: str) -> None:
    assert await ledger.find(tenant, "any text: ä/*.>") is None
    record = record_of("any text: ä/*.>", tenant)
    assert await ledger.record(record) == record
    assert await ledger.find(tenant, "any text: ä/*.>") == record
    assert await ledger.find(f"{tenant}2", "any text: ä/*.>") is None


async def test_a_repeated_record_changes_nothing(
    ledger: UsageLedger, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = record_of(tenant=tenant)
    first, second = await asyncio.gather(ledger.record(record), ledger.record(record))
    assert first == second == record
    seqs = [seq async for seq, _ in ledger.records(tenant)]
    assert await ledger.record(record) == record
    assert [seq async for seq, _ in ledger.records(tenant)] == seqs
    assert not caplog.records


async def test_of_two_known_ends_the_first_stands_and_the_log_says_so(
    ledger: UsageLedger, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = await ledger.record(record_of(tenant=tenant, cost_micros=5))
    assert await ledger.record(record_of(tenant=tenant, cost_micros=6)) == first
    assert await ledger.find(tenant, first.call_id) == first
    assert "was recorded before (ok, cost 5)" in caplog.text


async def test_a_known_end_replaces_a_possibly_billed_call_and_keeps_its_start(
    ledger: UsageLedger, tenant: str
) -> None:
    await ledger.record(lost(tenant=tenant))
    await ledger.record(lost(tenant=tenant, started_at=STARTED_AT + 5))
    end = record_of(tenant=tenant, started_at=STARTED_AT + 9)
    assert await ledger.record(end) == replace(end, started_at=STARTED_AT)
    assert await ledger.record(lost(tenant=tenant)) == replace(end, started_at=STARTED_AT)
    assert [each async for _, each in ledger.records(tenant)] == [replace(end, started_at=STARTED_AT)]


async def test_a_known_end_stands_in_any_order_of_writers(ledger: UsageLedger, tenant: str) -> None:
    for number in range(20):
        call_id = f"c{number}"
        writes = [lost(call_id, tenant), lost(call_id, tenant), record_of(call_id, tenant, outcome="failed")]
        random.Random(number).shuffle(writes)
        await asyncio.gather(*(ledger.record(each) for each in writes))
        found = await ledger.find(tenant, call_id)
        assert found is not None
        assert found.outcome == "failed"


async def test_what_a_tenant_was_charged_is_the_costs_and_what_is_held_of_its_month(
    ledger: UsageLedger, tenant: str
) -> None:
    november, december = month_start("2025-11"), month_start("2025-12")
    for number, (at, outcome, cost) in enumerate(
        [
            (november, "ok", 1), (december - 0.5, "failed", 10), (december - 1, "failed", None),
            (november + 5, "possibly_billed", None), (november - 0.5, "ok", 1_000_000), (december, "ok", 1_000_000),
        ]
    ):  # fmt: skip
        record = record_of(f"c{number}", tenant, started_at=at, outcome=outcome, cost_micros=cost, reserved_micros=100)
        await ledger.record(record)
    await ledger.record(record_of("c", f"{tenant}2"))
    assert [each.charged_micros async for _, each in ledger.records(tenant)] == [1, 10, 0, 100, 10**6, 10**6]
    assert await ledger.charged_micros(tenant, "2025-10") == 1_000_000
    assert await ledger.charged_micros(tenant, "2025-11") == 111


async def test_what_is_no_record_is_logged_and_left_out(
    ledger: UsageLedger, shared: Account, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = await nats.connect(shared.url, user=shared.user, password=shared.password)
    record = record_of(tenant=tenant)
    other = json.dumps({"v": 1, **record_of(tenant=f"{tenant}2").plain()}).encode()
    for number, body in enumerate([b"", b"[]", b"{}", b"{", b'{"v":2}', b'{"v":1}', b"[" * 9_000, other]):
        await writer.jetstream().publish(f"ai.gateway.usage.{tenant}.{subjects.hashed(str(number))}", body)
    await writer.close()
    await ledger.record(record)
    assert [each async for _, each in ledger.records(tenant)] == [record]
    with pytest.raises(ConfigMismatch, match=r"is nothing that this aiqueue can read: update aiqueue, or delete it"):
        await ledger.find(tenant, "0")
    with pytest.raises(ConfigMismatch, match=r"is no record of usage .*: delete it with `nats stream rmm"):
        await ledger.find(tenant, "7")
    assert "stream rmm AI_GATEWAY_USAGE" in caplog.text


async def test_on_a_server_without_the_stream_the_error_says_what_to_do(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        ledger = UsageLedger(UsageStore(client.connection, client.topology))
        for call in (ledger.record(record_of()), ledger.find("acme", "c"), ledger.charged_micros("acme", "2026-11")):
            with pytest.raises(NotFound, match="run `aiqueue apply`"):
                await call


async def test_a_full_stream_refuses_records_and_loses_none(account: Account, caplog: pytest.LogCaptureFixture) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        spec = client.topology.usage_stream
        config = {**spec.config, "max_bytes": 20_000, "storage": "memory"}
        await client.connection.api(f"STREAM.CREATE.{spec.name}", config)
        ledger = UsageLedger(UsageStore(client.connection, client.topology))
        records = [lost(f"c{number}") for number in range(100)]
        stored = []
        with pytest.raises(QueueFull, match="maximum bytes exceeded"):  # noqa: PT012
            for each in records:
                await ledger.record(each)
                stored.append(each)
        assert len(stored) > 10
        assert [each async for _, each in ledger.records("acme")] == stored
    assert not caplog.records
