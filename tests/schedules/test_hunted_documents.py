"""What somebody else has written: into the bucket of schedules, and on the subjects of ticks."""

from __future__ import annotations

import time
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.errors import DecodeError
from aiqueue.schedules import (
    Declared,
    DeclaredSet,
    DeclaredSets,
    Declarer,
    Every,
    Once,
    ScheduleDocument,
    reconciler,
    ticks,
)
from aiqueue.schedules.reconciler import Reconciler

from ..support import Account, eventually
from .chain import jobs, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")
GOOD = codec.decode(ScheduleDocument.of_spec(spec("report", Every("1s")), 1e9).encode(), codec.CBOR)
LAST = {"tick_ms": 1, "job_id": "a", "family": "agent.tasks", "seq": 1, "at": 0.0}
WRONG: list[dict[str, Any]] = [
    {"family": "agent.tasks.victim"}, {"family": "agent"}, {"family": 7}, {"priority": "high.x"}, {"priority": 5},
    {"kind": "a b"}, {"kind": None}, {"body": "text"}, {"body": None}, {"headers": ["a"]}, {"headers": {"a": 1}},
    {"headers": {"Nats-Msg-Id": "x"}}, {"headers": {"aiq-parent": "x"}}, {"secrets": 8}, {"grace": "10s"},
    {"grace": float("nan")}, {"grace": -1}, {"bound": "x"}, {"bound": 0}, {"bound": 10**9}, {"deadline": "x"},
    {"next": 10**30}, {"next": -1}, {"next": True}, {"next": 1.5}, {"fired": "x"}, {"fired": None}, {"failed": -1},
    {"owner": "a.b"}, {"owner": None}, {"generation": "x"}, {"version": None}, {"created": "x"}, {"updated": None},
    {"error": 5}, {"paused": 7}, {"paused": {"since": "x"}}, {"last": {**LAST, "seq": "x"}}, {"missed": {"at": 1}},
    {"last": {**LAST, "job_id": 7}}, {"recurrence": "0 6 * * *"}, {"misfire": ["all"]}, {"overlap": "kill"},
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_document_with_a_wrong_value_is_damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match=r"schedule acme\.report is damaged"):
        ScheduleDocument.decode("acme", "report", codec.dump({**GOOD, **changes}), 1)


@pytest.mark.parametrize("name", [("ac me", "report"), ("acme", "re*port"), ("acme", "x" * 65)], ids=str)
def test_a_document_whose_key_is_no_name_is_damaged(name: tuple[str, str]) -> None:
    with pytest.raises(DecodeError, match="damaged"):
        ScheduleDocument.decode(*name, codec.dump(GOOD), 1)


def test_a_document_of_a_newer_version_keeps_its_fields() -> None:
    read = ScheduleDocument.decode("acme", "report", codec.dump({**GOOD, "colour": "red", "last": {**LAST, "n": 1}}), 1)
    assert codec.decode(read.encode(), codec.CBOR) == {**GOOD, "colour": "red", "last": LAST}


async def test_who_may_write_schedules_of_one_tenant_has_no_job_stored_in_a_lane_of_another(
    client: aiqueue.Client, account: Account
) -> None:
    """Of a tenant that is named as a priority: ``ai.agent.tasks.victim.high`` is another tenant's lane."""
    schedules, tick = schedules_of(client), round(time.time()) * 1000
    body = codec.dump({**GOOD, "family": "agent.tasks.victim", "next": tick})
    await client.connection.store(schedules.store.key("high", "report"), body, {headers.MSG_ID: subjects.new_id()})
    due = {headers.MSG_ID: subjects.new_id(), headers.SCHEDULED_FOR: f"{tick / 1000:.3f}"}
    await client.connection.store(subjects.tick("-", "high", "report"), b"", due)
    await schedules.add(spec("other", Every("1s")))
    async with ticking(account):

        async def others_fire() -> None:
            assert len([each for each in await jobs(client) if each[0] == "other"]) >= 2

        await eventually(others_fire)
    assert await jobs(client, "victim") == []


async def test_a_document_that_is_damaged_keeps_the_reconciler_from_no_other_schedule(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("lost", Every("1h")))).document
    for name, changes in {"bad": {"next": 10**30}, "worse": {"owner": "a.b"}, "worst": {"grace": "x"}}.items():
        body = codec.dump({**GOOD, **changes})
        await client.connection.store(schedules.store.key("acme", name), body, {headers.MSG_ID: subjects.new_id()})
    await schedules.ticks.unpark(added)
    assert await Reconciler(client.connection, client.topology).look() == 1
    assert await schedules.ticks.has(added)


@pytest.mark.parametrize("time_text", ["1.7e308", "-5", "1e18", "nan", "x"])
async def test_a_tick_that_names_no_time_is_taken_and_does_nothing(
    client: aiqueue.Client, account: Account, time_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    schedules, fields = schedules_of(client), {headers.SCHEDULED_FOR: time_text, headers.DUE: time_text}
    added = (await schedules.add(spec("report", Every("1h")))).document
    fields[headers.MSG_ID] = subjects.new_id()
    await client.connection.store(subjects.tick("-", "acme", "report"), b"", fields)
    async with ticking(account):

        async def taken() -> None:
            assert await schedules.ticks.list_subjects() == {subjects.tick("-", "acme", "report", added.next_ms)}

        await eventually(taken)
    assert await jobs(client) == []
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("wrong", [{"generation": "x"}, {"first": None}, {"seen": float("nan")}], ids=str)
async def test_a_set_of_declarations_with_a_wrong_value_is_passed_over(
    client: aiqueue.Client, wrong: dict[str, Any]
) -> None:
    sets, now = DeclaredSets(schedules_of(client).store), time.time()
    mine = DeclaredSet.of_specs([spec(owner="billing")], 1, now)
    assert await sets.refresh("billing", mine)
    body = codec.dump({"v": 1, "generation": 1, "first": now, "seen": now, "schedules": [["acme", "report"]], **wrong})
    key = schedules_of(client).store.key("owner", "billing", "f" * 32)
    await client.connection.store(key, body, {headers.MSG_ID: subjects.new_id()})
    assert [each.fingerprint for each in await sets.list("billing")] == [mine.fingerprint]


@pytest.mark.parametrize("until", [1e18, 5_000_000_000, float("inf"), "tomorrow", None], ids=str)
async def test_a_turn_that_lasts_longer_than_any_keeps_nobody_from_looking(
    client: aiqueue.Client, until: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of before the server's clock was set back, or of somebody else."""
    monkeypatch.setattr(reconciler, "FIRST_S", 0.0)
    schedules = schedules_of(client)
    added = (await schedules.add(spec("lost", Every("1h")))).document
    await schedules.ticks.unpark(added)
    turn = {headers.MSG_ID: subjects.new_id()}
    await client.connection.store(schedules.store.key("turn"), codec.dump({"until": until}), turn)
    looking = Reconciler(client.connection, client.topology)
    looking.start()
    try:

        async def healed() -> None:
            assert await schedules.ticks.has(added)

        await eventually(healed)
    finally:
        await looking.stop()


async def test_a_set_of_declarations_that_was_seen_in_the_future_decides_nothing_and_is_refreshed(
    client: aiqueue.Client,
) -> None:
    """As after the server's clock was set back by an hour, in which no worker looked after its schedules."""
    schedules, declared = schedules_of(client), [spec(owner="billing")]
    sets, now = DeclaredSets(schedules.store), time.time()
    mine = DeclaredSet.of_specs(declared, 0, now)
    newer = DeclaredSet.of_specs([spec(owner="billing", priority="high")], 7, now)
    for each in (mine, newer):
        assert await sets.refresh("billing", each._replace(first=now + 3_600, seen=now + 3_600))
    declarer = Declarer(client.connection, client.topology, Declared("billing", 0, declared))
    assert await declarer.reconcile(is_first=False) == (1, 0, 0)
    found = await sets.get("billing", mine.fingerprint)
    assert found is not None
    assert abs(found.seen - now) < 60


@pytest.mark.parametrize("at", [None, "@at 2199-01-01T00:00:00Z"])
async def test_a_message_in_the_place_of_a_parked_tick_that_is_none_is_found_and_replaced(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch, at: str | None
) -> None:
    """It becomes due never, or at a plain client's wrong time, and whoever parks the tick finds its place taken."""
    for module in (ticks, reconciler):
        monkeypatch.setattr(module, "STUCK_S", 0.1)
    monkeypatch.setattr(ticks, "WAIT_MAX_S", 0.1)
    schedules, tick = schedules_of(client), round(time.time() + 0.2, 3)
    document = ScheduleDocument.of_spec(spec("report", Once(tick)), time.time())
    where = subjects.tick("-", "acme", "report", document.next_ms)
    fields = {headers.SCHEDULE: at, headers.SCHEDULE_TARGET: subjects.tick("-", "acme", "report")} if at else {}
    await client.connection.store(where, b"", {headers.MSG_ID: subjects.new_id(), **fields})
    await schedules.ticks.park(await schedules.store.put(document))
    later = (await schedules.add(spec("later", Every("1h")))).document
    async with ticking(account) as ticker:

        async def fired() -> None:
            await ticker.reconciler.look()
            assert await jobs(client) == [("report", tick)]

        await eventually(fired)
    assert await schedules.ticks.has(later), "one whose time has not come stays"
