"""What becomes of ticks that nobody fired in time, of those whose lane is full, and of those that overlap."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.errors import BadInput
from aiqueue.payload import encode_message
from aiqueue.schedules import Every, FiredTick, Misfire, ScheduleDocument
from aiqueue.schedules.firing import COUNT_MAX, Decision, decide

from ..support import Account, create_streams, eventually
from .chain import FAMILY, jobs, make_late, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


def due(first: float = 1000.0, **changes: Any) -> ScheduleDocument:
    """A schedule that ticks each second, whose next tick is at `first`."""
    return ScheduleDocument.of_spec(spec("report", Every("1s"), **changes), first - 0.5)


def decided(document: ScheduleDocument, now: float, *, is_in_time: bool = False) -> Decision:
    return decide(document, document.recurrence, now, is_in_time=is_in_time)


def test_a_tick_within_the_grace_is_fired_whatever_the_policy() -> None:
    for misfire in ("skip", "once", "all"):
        assert decided(due(misfire=misfire), 1010.0) == Decision([1_000_000], 1_000_000)


def test_missed_ticks_are_skipped() -> None:
    assert decided(due(misfire="skip"), 1010.5) == Decision([], 1_010_000, 11)


def test_of_missed_ticks_the_newest_is_fired_once() -> None:
    assert decided(due(misfire="once"), 1010.5) == Decision([1_010_000], 1_010_000, 11)


def test_of_missed_ticks_the_newest_are_fired_up_to_the_bound() -> None:
    found = decided(due(misfire="all", bound=3), 1010.5)
    assert found == Decision([1_008_000, 1_009_000, 1_010_000], 1_010_000, 11)
    assert decided(due(misfire="all", bound=11), 1010.5).fire == [1_000_000 + n * 1000 for n in range(11)]
    assert len(decided(due(misfire="all"), 1010.5).fire) == 11


def test_a_tick_whose_lane_was_full_in_time_is_no_misfire() -> None:
    assert decided(due(misfire="skip"), 2000.0, is_in_time=True) == Decision([1_000_000], 1_000_000)


def test_a_tick_that_jitter_has_not_fired_yet_is_not_missed() -> None:
    document = ScheduleDocument.of_spec(spec("report", Every("1m", jitter="50s"), misfire="once"), 0.0)
    for minute in range(20, 40):
        at = document.recurrence.jittered(document.name, minute * 60.0)
        assert decided(document, at - 0.001).through == (minute - 1) * 60_000
        assert decided(document, at).through == minute * 60_000


def test_three_days_of_a_tick_a_second_are_decided_in_a_moment_and_counted_up_to_a_bound() -> None:
    began = time.process_time()
    found = decided(due(misfire="all", bound=5), 1000.0 + 3 * 86_400)
    assert time.process_time() - began < 1
    assert (found.missed, found.more, len(found.fire)) == (COUNT_MAX, True, 5)


@pytest.mark.parametrize(("misfire", "enqueued"), [("skip", 0), ("once", 1), ("all", 5)])
async def test_after_an_outage_the_policy_decides(
    client: aiqueue.Client, account: Account, misfire: Misfire, enqueued: int, caplog: pytest.LogCaptureFixture
) -> None:
    schedules = schedules_of(client)
    recurrence = Every("1m", starting=(time.time() - 5) % 60)
    added = (await schedules.add(spec("report", recurrence, misfire=misfire, bound=5))).document
    late = await make_late(client, added, 60 * 13 + 30)
    async with ticking(account):

        async def went_on() -> None:
            document = await schedules.get("acme", "report")
            assert document.next_ms == added.next_ms
            assert document.missed is not None
            assert document.missed[:4] == (late.next_ms, (added.next_ms or 0) - 60_000, 15, enqueued)
            assert (document.fired, document.misfired) == (enqueued, 15 - enqueued)
            assert await schedules.ticks.has(document)

        await eventually(went_on)
    newest = (added.next_ms or 0) / 1000 - 60
    assert await jobs(client) == [("report", newest - 60 * n) for n in reversed(range(enqueued))]
    assert f"15 ticks from {late.recurrence.describe()[:0]}" in caplog.text
    assert f"policy {misfire} enqueues {enqueued} of them" in caplog.text


async def test_all_ticks_of_a_short_outage_are_fired(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", Every("1s"), misfire="skip"))).document
    late = await make_late(client, added, 6)
    async with ticking(account):

        async def fired() -> None:
            assert (await schedules.get("acme", "report")).fired >= 7

        await eventually(fired)
    found = await jobs(client)
    assert found == [("report", (late.next_ms or 0) / 1000 + n) for n in range(len(found))]


# -- overlap


async def end(client: aiqueue.Client, job_id: str) -> None:
    journal = subjects.journal(client.topology.family(FAMILY).journal or "", "acme", job_id)
    fields = {headers.MSG_ID: subjects.new_id(), headers.EVENT: "result", headers.CONTENT_TYPE: codec.CBOR}
    await client.connection.store(journal, codec.encode(None), fields)


async def test_a_tick_is_skipped_while_the_job_of_the_one_before_has_not_ended(
    client: aiqueue.Client, account: Account
) -> None:
    schedules = schedules_of(client)
    await schedules.add(spec("report", Every("1s", starting=time.time() - 0.6), overlap="skip"))
    async with ticking(account):

        async def counts(fired: int, skipped: int) -> None:
            document = await schedules.get("acme", "report")
            assert document.fired >= fired
            assert document.skipped >= skipped

        await eventually(lambda: counts(1, 1))
        document = await schedules.get("acme", "report")
        assert document.fired == 1
        assert document.last is not None
        await end(client, document.last.job_id)
        await eventually(lambda: counts(2, 1))


@pytest.mark.parametrize(
    ("event", "unfinished"),
    [("started", True), ("retry", True), ("result", False), ("failed", False), ("cancelled", False), ("", True)],
)
async def test_a_job_has_ended_when_its_journal_says_so(client: aiqueue.Client, event: str, unfinished: bool) -> None:
    """Without an entry, it has not while it is stored."""
    schedules = schedules_of(client)
    await schedules.add(spec())
    asked = await schedules.run_now("acme", "report")
    stored = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.acme.normal")
    assert stored is not None
    last = FiredTick(asked.tick_ms, asked.job_id, FAMILY, stored.seq, 0.0)
    if event:
        journal = subjects.journal(client.topology.family(FAMILY).journal or "", "acme", asked.job_id)
        fields = {headers.MSG_ID: subjects.new_id(), headers.EVENT: event, headers.CONTENT_TYPE: codec.CBOR}
        await client.connection.store(journal, codec.encode(None), fields)
    assert await schedules._jobs.is_unfinished("acme", last) is unfinished
    if not event:
        await client.connection.delete("AI_AGENT_TASKS", stored.seq)
        assert not await schedules._jobs.is_unfinished("acme", last)


# -- full lanes


class Small(aiqueue.Message, kind="small", family="small.jobs"):
    n: int = 0


async def test_a_tick_whose_lane_is_full_waits_and_the_later_ones_are_missed(
    account: Account, streams: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        schedules = schedules_of(client)
        for _ in range(3):
            await client.enqueue(Small(), tenant="acme")
        start = round(time.time() - 0.6, 3)
        small = spec(
            "report", Every("1s", starting=start), family="small.jobs", kind="small", body=encode_message(Small()),
            grace_s=0.3, misfire="skip",
        )  # fmt: skip
        first = (await schedules.add(small)).document.next_ms
        async with ticking(account):
            await eventually(lambda: time.time() > (first or 0) / 1000 + 1.2)
            assert (await schedules.get("acme", "report")).next_ms == first
            purged = await client.connection.api("STREAM.PURGE.SMALL")
            assert purged["purged"] == 3

            async def went_on() -> None:
                document = await schedules.get("acme", "report")
                assert document.misfired >= 1
                assert document.fired >= 2

            await eventually(went_on)
        assert (await jobs(client, family="small.jobs"))[0] == ("report", (first or 0) / 1000)


def test_policies_that_contradict_each_other_are_refused(client: aiqueue.Client) -> None:
    with pytest.raises(BadInput, match='misfire="all" and overlap="skip" contradict each other'):
        schedules_of(client).check(spec(misfire="all", overlap="skip"))
