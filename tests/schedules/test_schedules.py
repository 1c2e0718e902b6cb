"""What programs do with schedules: add and change, pause and resume, run and backfill, and what is refused."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers, subjects
from aiqueue.enqueue import inherited_headers
from aiqueue.errors import BadInput, DecodeError, InvalidToken, NotFound, TooLarge, UnknownFamily
from aiqueue.schedules import Cron, Every, Once, ScheduleDocument, Tick, tick_job_id

from ..connection.test_permissions import documented, two, user
from ..support import Account, eventually
from .chain import Task, jobs, make_late, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


async def test_a_schedule_is_stored_with_its_first_tick_parked(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    added = await schedules.add(spec("report", Every("1h")))
    assert added.action == "added"
    assert await schedules.get("acme", "report") == added.document
    assert added.document.next_ms == (int(time.time()) // 3600 + 1) * 3_600_000
    assert await schedules.ticks.list_subjects() == {f"ai.ticks.at.-.acme.report.{added.document.next_ms}"}


async def test_what_does_the_same_already_stays_as_it_is(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    first = (await schedules.add(spec())).document
    again = await schedules.add(spec())
    assert again.action == "unchanged"
    assert again.document == first


async def test_a_schedule_that_is_added_again_while_its_tick_is_due_has_no_second_tick(client: aiqueue.Client) -> None:
    schedules, wanted = schedules_of(client), spec("report", Once(time.time() + 0.4))
    await schedules.add(wanted)

    async def is_due() -> bool:
        return await schedules.ticks.list_subjects() == {"ai.ticks.due.-.acme.report"}

    await eventually(is_due)
    assert (await schedules.add(wanted)).action == "unchanged"
    assert (await schedules.add(wanted)).action == "unchanged"
    info = await client.connection.api(f"STREAM.INFO.{schedules.ticks.stream}")
    assert info["state"]["messages"] == 1


async def test_a_change_keeps_the_counts_and_the_pause_and_moves_the_parked_tick(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    first = (await schedules.add(spec("report", Once(time.time() + 7_200)))).document
    first = await schedules.store.put(replace(first, fired=3, extra={"later": 1}))
    changed = await schedules.add(spec("report", Once(time.time() + 3_600), misfire="skip"))
    assert changed.action == "changed"
    document = changed.document
    assert (document.fired, document.version, document.misfire, document.extra) == (3, 2, "skip", {"later": 1})
    assert await schedules.ticks.list_subjects() == {f"ai.ticks.at.-.acme.report.{document.next_ms}"}
    await schedules.pause("acme", "report", by="anna")
    again = (await schedules.add(spec("report", Once(time.time() + 1_800)))).document
    assert again.paused is not None
    assert again.paused.by == "anna"


async def test_a_tick_that_is_due_is_not_lost_by_a_change_that_keeps_it(
    client: aiqueue.Client, account: Account
) -> None:
    """As in a deployment at the time of the tick."""
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", Every("1h")))).document
    late = await make_late(client, added, 0, grace_s=7_200.0)
    changed = await schedules.add(spec("report", Every("30m"), grace_s=7_200.0))
    assert changed.document.next_ms == late.next_ms
    moved = await schedules.add(spec("report", Every("1h", starting=1_800.0 + 7), grace_s=7_200.0))
    assert (moved.document.next_ms or 0) / 1000 > time.time()


async def test_a_schedule_that_is_not_to_be_replaced_or_of_another_owner_is_refused(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    await schedules.add(spec("report", owner="billing"))
    with pytest.raises(BadInput, match="schedule report of acme is declared by 'billing': choose another id"):
        await schedules.add(spec("report", Every("2h")))
    with pytest.raises(BadInput, match="schedule report of acme is declared by 'billing'"):
        await schedules.remove("acme", "report", owner="other")
    with pytest.raises(BadInput, match="there is a schedule report of acme already: choose another id"):
        await schedules.add(spec("report", Every("2h"), owner="billing"), replaces=False)
    assert (await schedules.get("acme", "report")).version == 1


async def test_a_removed_schedule_fires_no_more_and_its_id_can_be_used_again(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    await schedules.add(spec())
    assert await schedules.remove("acme", "report")
    assert not await schedules.remove("acme", "report")
    assert await schedules.list() == []
    assert await schedules.ticks.list_subjects() == set()
    with pytest.raises(NotFound, match="there is no schedule report of acme: `aiqueue schedule ls` lists all"):
        await schedules.get("acme", "report")
    assert (await schedules.add(spec())).action == "added"


async def test_lists_are_of_a_tenant_and_an_owner(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    for tenant, name, owner in (("b", "x", ""), ("a", "y", "billing"), ("a", "x", "")):
        await schedules.add(spec(name, tenant=tenant, owner=owner))
    assert [each.name for each in await schedules.list()] == ["a.x", "a.y", "b.x"]
    assert [each.name for each in await schedules.list(tenant="a")] == ["a.x", "a.y"]
    assert [each.name for each in await schedules.list(owner="billing")] == ["a.y"]


async def test_a_paused_schedule_does_not_fire_and_a_resumed_one_goes_on_after_now(
    client: aiqueue.Client, account: Account
) -> None:
    schedules, start = schedules_of(client), round(time.time() + 0.5, 3)
    await schedules.add(spec("report", Every("1s", starting=start), misfire="all"))
    await schedules.add(spec("other", Once(round(start + 0.3, 3))))
    paused = await schedules.pause("acme", "report", reason="month end")
    assert (await schedules.pause("acme", "report")).paused is not None
    async with ticking(account):

        async def other_fired() -> None:
            assert (await schedules.get("acme", "other")).next_ms is None

        await eventually(other_fired)
        assert await jobs(client) == [("other", round(start + 0.3, 3))]
        assert (await schedules.get("acme", "report")).next_ms == paused.next_ms
        resumed = await schedules.resume("acme", "report")
        assert (resumed.next_ms or 0) / 1000 > time.time() - 0.1

        async def fires() -> None:
            assert (await schedules.get("acme", "report")).fired >= 1

        await eventually(fires)
    document = await schedules.get("acme", "report")
    assert (document.misfired, document.missed) == (0, None)
    assert (await jobs(client))[1] == ("report", (resumed.next_ms or 0) / 1000)


async def test_a_pause_that_returned_before_a_tick_stops_it_also_where_a_worker_holds_it(
    client: aiqueue.Client, account: Account
) -> None:
    schedules = schedules_of(client)
    async with ticking(account) as ticker:
        await schedules.add(spec("report", Once(time.time() + 0.8)))
        await eventually(lambda: any(each.tasks for each in ticker._consumers))
        await schedules.pause("acme", "report")
        await eventually(lambda: not any(each.tasks for each in ticker._consumers))
    assert await jobs(client) == []


async def test_a_job_that_is_asked_for_leaves_the_ticks_alone(client: aiqueue.Client) -> None:
    schedules = schedules_of(client)
    before = (await schedules.add(spec())).document
    asked = await schedules.run_now("acme", "report")
    assert await jobs(client) == [("report", asked.tick_ms / 1000)]
    assert asked.job_id.startswith("report-2")
    assert asked.job_id.endswith("-now")
    assert await schedules.get("acme", "report") == before


async def test_a_backfill_enqueues_the_ticks_of_a_time_once(client: aiqueue.Client) -> None:
    schedules, now = schedules_of(client), time.time()
    await schedules.add(spec("report", Every("1h")))
    since = now - now % 3600 - 3 * 3600
    found = await schedules.backfill("acme", "report", since, since + 3 * 3600)
    assert [(each.tick_ms, each.duplicate) for each in found] == [
        (round((since + n * 3600) * 1000), False) for n in range(3)
    ]
    assert await jobs(client) == [("report", since + n * 3600) for n in range(3)]
    again = await schedules.backfill("acme", "report", since, since + 3 * 3600)
    assert all(each.duplicate for each in again)
    assert len(await jobs(client)) == 3
    with pytest.raises(BadInput, match="there are more than 2 ticks: backfill a shorter time, or raise the limit"):
        await schedules.backfill("acme", "report", since, since + 3 * 3600, limit=2)
    with pytest.raises(BadInput, match="must start before it ends, and end in the past"):
        await schedules.backfill("acme", "report", since, now + 60)


async def test_workers_of_the_owner_make_the_jobs_that_are_asked_for(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    await schedules.add(spec("mine", body=None, owner="billing"))
    asked = await schedules.run_now("acme", "mine")
    assert asked.by_owner
    asked_ticks: list[Tick] = []

    def make(tick: Tick) -> Task:
        asked_ticks.append(tick)
        return Task(n=3)

    async with ticking(account, owner="billing", makers={("acme", "mine"): make}):

        async def stored() -> None:
            assert await jobs(client) == [("mine", asked.tick_ms / 1000)]

        await eventually(stored)
    assert asked_ticks == [Tick("acme", "mine", asked.tick_ms / 1000)]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tenant": "a.b"}, InvalidToken, "tenant 'a.b' must be"),
    ({"id": "x y"}, InvalidToken, "schedule 'x y' must be"),
    ({"recurrence": "0 6 * * *"}, BadInput, "recurrence must be a Cron, an Every, a Calendar or a Once"),
    ({"family": "no.such"}, UnknownFamily, "unknown family 'no.such'"),
    ({"kind": "a b"}, BadInput, "kind 'a b' must be"),
    ({"priority": "urgent"}, BadInput, "has no priority 'urgent'"),
    ({"body": None}, BadInput, "needs a message, or an owner whose code makes one"),
    ({"body": b"x" * 65_537}, TooLarge, "exceed the limit of 65,536: have the handler read large data, or schedule a"),
    ({"misfire": "never"}, BadInput, "misfire must be one of skip, once, all, not 'never'"),
    ({"overlap": "queue"}, BadInput, "overlap must be one of run, skip, not 'queue'"),
    ({"misfire": "all", "overlap": "skip"}, BadInput, "contradict each other"),
    ({"bound": 0}, BadInput, "bound must be a whole number from 1 to 10,000"),
    ({"grace_s": -1.0}, BadInput, "grace must be from 0 to 7 days"),
    ({"grace_s": float("nan")}, BadInput, "grace must be from 0 to 7 days"),
    ({"deadline_s": -1.0}, BadInput, "deadline: "),
    ({"owner": "-"}, BadInput, "owner '-' is reserved"),
    ({"owner": "a b"}, InvalidToken, "owner 'a b' must be"),
    ({"headers": {"Aiq-Kind": "x"}}, BadInput, "reserved for aiqueue"),
    ({"headers": {"mine": "ä"}}, BadInput, ""),
    ({"recurrence": Once(1.0)}, BadInput, "never fires: once at 1970-01-01T00:00:01Z has no time after now"),
]


@pytest.mark.parametrize(("fields", "kind", "says"), WRONG, ids=[str(each[0])[:40] for each in WRONG])
async def test_what_could_not_fire_is_refused_in_one_line_and_nothing_is_stored(
    shared: Account, tenant: str, fields: dict[str, Any], kind: type[Exception], says: str
) -> None:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        schedules = schedules_of(client)
        with pytest.raises(kind) as raised:
            await schedules.add(replace(spec(tenant=tenant), **fields))
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
        assert await schedules.list(tenant=tenant) == []


# -- what is stored


def test_the_id_of_a_ticks_job_names_schedule_and_tick_within_64_characters() -> None:
    assert tick_job_id("report", 1_795_967_113_000) == "report-20261129T154513Z"
    assert tick_job_id("report", 1_795_967_113_274) == "report-20261129T154513274Z"
    assert tick_job_id("r" * 64, 0).endswith("-19700101T000000Z")
    assert len(tick_job_id("r" * 64, 0)) == 64


@given(st.from_regex(subjects.TOKEN, fullmatch=True), st.integers(0, 7_258_118_399_999), st.sampled_from(["", "-now"]))
def test_the_id_of_a_ticks_job_is_a_token(schedule_id: str, tick_ms: int, suffix: str) -> None:
    assert subjects.TOKEN.fullmatch(tick_job_id(schedule_id, tick_ms, suffix))


def test_long_ids_that_begin_alike_have_jobs_of_different_ids() -> None:
    assert tick_job_id("r" * 63 + "a", 0) != tick_job_id("r" * 63 + "b", 0)


def test_a_document_is_read_as_it_was_written() -> None:
    document = ScheduleDocument.of_spec(spec("report", Cron("0 6 * * mon-fri", tz="Europe/Berlin")), 1_795_000_000.0)
    assert ScheduleDocument.decode("acme", "report", document.encode(), 0) == document


async def test_fields_of_a_newer_version_are_kept_by_this_ones_writes(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", Every("1s")))).document
    fields = {**cbor2.loads(added.encode()), "colour": "red"}
    await schedules.store.write(schedules.store.key("acme", "report"), added.seq, cbor2.dumps(fields), {}, 5.0)
    await schedules.pause("acme", "report")
    await schedules.resume("acme", "report")
    async with ticking(account):

        async def fired() -> None:
            assert (await schedules.get("acme", "report")).fired >= 1

        await eventually(fired)
    assert (await schedules.get("acme", "report")).extra == {"colour": "red"}


async def test_a_document_of_a_newer_format_is_left_alone(
    client: aiqueue.Client, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("newer", Once(time.time() + 0.4)))).document
    fields = {**cbor2.loads(added.encode()), "v": 2}
    key = schedules.store.key("acme", "newer")
    await schedules.store.write(key, added.seq, cbor2.dumps(fields), {}, 5.0)
    await schedules.add(spec("report", Once(time.time() + 0.5)))
    async with ticking(account):

        async def other_fired() -> None:
            assert [schedule for schedule, _ in await jobs(client)] == ["report"]
            assert "schedule newer of acme" in caplog.text or "acme.newer is of format 2: update aiqueue" in caplog.text

        await eventually(other_fired)
    stored = await client.connection.last("KV_AI_SCHEDULES", key)
    assert stored is not None
    assert cbor2.loads(stored.data) == fields
    with pytest.raises(DecodeError, match="is of format 2: update aiqueue on this host"):
        await schedules.get("acme", "newer")
    with pytest.raises(BadInput, match="format 2"):
        await schedules.add(spec("newer"))
    assert [each.id for each in await schedules.list()] == ["report"]


# -- the reconciler


async def test_ticks_that_were_lost_are_parked_again(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    for n in range(40):
        await schedules.add(spec(f"s{n}", Every("1h", starting=n * 60.0)))
    async with ticking(account) as one, ticking(account) as other:
        await one.reconciler.stop()
        await other.reconciler.stop()
        parked = await schedules.ticks.list_subjects()
        assert await one.reconciler.look() == 0
        await client.connection.api("STREAM.PURGE.AI_TICKS")
        await asyncio.gather(one.reconciler.look(), other.reconciler.look())
        assert await schedules.ticks.list_subjects() == parked
        info = await client.connection.api("STREAM.INFO.AI_TICKS")
        assert info["state"]["messages"] == 40, "each is parked once"


async def test_a_lost_tick_fires_though_its_time_has_come(client: aiqueue.Client, account: Account) -> None:
    schedules, tick = schedules_of(client), round(time.time() + 0.3, 3)
    added = (await schedules.add(spec("report", Once(tick)))).document
    await schedules.ticks.unpark(added)
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        await eventually(lambda: time.time() > tick)
        assert await ticker.reconciler.look() == 1

        async def fired() -> None:
            assert await jobs(client) == [("report", tick)]

        await eventually(fired)


async def test_jobs_that_are_asked_for_do_not_pass_for_the_next_tick_while_the_owner_has_no_worker(
    client: aiqueue.Client, account: Account
) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("mine", body=None, owner="billing"))).document
    await schedules.run_now("acme", "mine")
    hour = (added.next_ms or 0) / 1000 - 7_200
    await schedules.backfill("acme", "mine", hour, hour + 3_601)
    await schedules.backfill("acme", "mine", hour, hour + 3_601)
    assert len(await schedules.ticks.list_subjects()) == 4, "each is asked for once"
    await schedules.ticks.unpark(added)
    assert not await schedules.ticks.has(added)
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        assert await ticker.reconciler.look() == 1
    assert await schedules.ticks.has(added)


async def test_a_tick_that_a_worker_holds_is_not_taken_for_lost(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        await schedules.add(spec("report", Once(time.time() + 0.9)))
        await eventually(lambda: any(each.tasks for each in ticker._consumers))
        assert await ticker.reconciler.look() == 0


async def test_a_look_asks_nothing_about_ticks_that_wait_for_the_end_of_their_jitter(
    client: aiqueue.Client, account: Account
) -> None:
    """Each look took three requests for each of them, for up to a day."""
    schedules, recurrence = schedules_of(client), Every("1d", starting=time.time() - 120, jitter="1d")
    for n in range(20):
        document = ScheduleDocument.of_spec(spec(f"s{n}", recurrence), time.time() - 300)
        await schedules.ticks.park(await schedules.store.put(document))
    asked: list[str] = []
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        subscription = await client.connection.subscribe("$JS.API.>", lambda each: asked.append(each.subject))
        await client.connection.flush()
        assert await ticker.reconciler.look() == 0
        await client.connection.flush()
        await subscription.close()
    assert asked
    assert len(asked) < 30, asked


async def test_what_is_paused_or_removed_has_no_tick_to_be_lost(client: aiqueue.Client, account: Account) -> None:
    schedules = schedules_of(client)
    for name in ("paused", "removed", "ended"):
        await schedules.add(spec(name))
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        assert await ticker.reconciler.look() == 0
        await schedules.pause("acme", "paused")
        await schedules.remove("acme", "removed")
        await schedules.store.put(replace(await schedules.get("acme", "ended"), next_ms=None))
        await client.connection.api("STREAM.PURGE.AI_TICKS")
        assert await ticker.reconciler.look() == 0
        await schedules.resume("acme", "paused")
        assert await ticker.reconciler.look() == 0
        assert len(await schedules.ticks.list_subjects()) == 1


async def test_a_removed_schedule_whose_marker_has_expired_is_asked_for_once(
    client: aiqueue.Client, account: Account
) -> None:
    """Another worker had each turn while the marker of the removal was there."""
    schedules = schedules_of(client)
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        await schedules.add(spec("report"))
        assert await ticker.reconciler.look() == 0
        await schedules.remove("acme", "report")
        await client.connection.api("STREAM.PURGE.KV_AI_SCHEDULES", {"filter": schedules.store.key("acme", "report")})
        assert await ticker.reconciler.look() == 0
        assert not ticker.reconciler._known


async def test_one_worker_looks_at_a_time(client: aiqueue.Client, account: Account) -> None:
    async with ticking(account) as one, ticking(account) as other:
        await schedules_of(client).add(spec())
        took = await asyncio.gather(*(each.reconciler._take_turn() for each in (one, other, one)))
        assert sorted(took) == [False, False, True]


async def test_a_next_tick_that_another_time_zone_database_has_made_is_moved(
    client: aiqueue.Client, account: Account
) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", Cron("0 6 * * *", tz="Europe/Berlin")))).document
    await schedules.ticks.unpark(added)
    stored = await schedules.store.put(replace(added, next_ms=(added.next_ms or 0) + 3_600_000))
    await schedules.ticks.park(stored)
    async with ticking(account) as ticker:
        await ticker.reconciler.stop()
        assert await ticker.reconciler.look() == 1
    assert (await schedules.get("acme", "report")).next_ms == added.next_ms
    assert await schedules.ticks.list_subjects() == {f"ai.ticks.at.-.acme.report.{added.next_ms}"}


# -- the first stored form, which every later version has to read

FIRST_FORM: dict[str, Any] = {
    "v": 1, "recurrence": {"format": 1, "type": "every", "interval": 60.0, "starting": 0.0, "jitter": 0.0},
    "family": "agent.tasks", "kind": "task", "body": b"\xa1an\x01", "priority": "normal", "deadline": 60.0,
    "headers": {"trace": "7"}, "secrets": "", "misfire": "once", "bound": 100, "grace": 10.0, "overlap": "run",
    "owner": "billing", "generation": 3, "version": 2, "created": 1795967113.5, "updated": 1795967114.5,
    "paused": {"since": 5.5, "by": "anna", "reason": "month end", "colour": "red"}, "next": 1796014800000,
    "last": {"tick_ms": 1795928400000, "job_id": "r-20261129T050000Z", "family": "agent.tasks", "seq": 17, "at": 2.5},
    "missed": {"from_ms": 1, "to_ms": 2, "ticks": 15, "fired": 1, "at": 3.5, "more": False},
    "fired": 4, "misfired": 14, "skipped": 1, "failed": 2, "error": "ValueError: no",
}  # fmt: skip


def test_a_document_of_the_first_form_is_read() -> None:
    read = ScheduleDocument.decode("acme", "report", cbor2.dumps(FIRST_FORM), 9)
    assert read.recurrence == Every("1m")
    assert (read.tenant, read.id, read.seq, read.body, read.deadline_s) == ("acme", "report", 9, b"\xa1an\x01", 60.0)
    assert (read.owner, read.generation, read.version, read.next_ms) == ("billing", 3, 2, 1796014800000)
    assert read.paused == (5.5, "anna", "month end")
    assert read.last == (1795928400000, "r-20261129T050000Z", "agent.tasks", 17, 2.5)
    assert read.missed == (1, 2, 15, 1, 3.5, False)
    assert (read.fired, read.misfired, read.skipped, read.failed, read.error) == (4, 14, 1, 2, "ValueError: no")
    paused = {key: value for key, value in FIRST_FORM["paused"].items() if key != "colour"}
    assert cbor2.loads(read.encode()) == {**FIRST_FORM, "paused": paused, "recurrence": FIRST_FORM["recurrence"]}


@pytest.mark.parametrize("field", ["recurrence", "family", "misfire", "next"])
def test_a_damaged_document_says_what_to_do(field: str) -> None:
    damaged = {**FIRST_FORM, field: "soon"}
    if field == "family":
        del damaged[field]
    with pytest.raises(DecodeError, match=r"the document of schedule acme\.report is damaged"):
        ScheduleDocument.decode("acme", "report", cbor2.dumps(damaged), 9)


def test_children_of_a_scheduled_job_have_its_schedule_and_tick() -> None:
    parent = subjects.ParentRun("agent.tasks", "report-1", "7-1")
    given = {headers.SCHEDULED_BY: "report", headers.SCHEDULED_FOR: "1795928400.000"}
    assert inherited_headers(parent, given, None).items() >= given.items()
    assert headers.SCHEDULED_BY not in inherited_headers(parent, {}, None)


async def test_the_documented_permissions_suffice(own_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A worker's, and those of a user who does everything with schedules and nothing else."""
    rows = documented("if the user adds, changes or pauses [schedules]", "if the user runs or backfills schedules")
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{user('less', *rows)}, {user('worker', *documented('a worker'))} ] }}"
    )
    async with two(server) as (_, less):
        schedules, tick = schedules_of(less), round(time.time() + 0.7, 3)
        await schedules.add(spec("report", Once(tick)))
        await schedules.add(spec("other", Every("1h")))
        await schedules.pause("acme", "other")
        await schedules.resume("acme", "other")
        await schedules.add(spec("other", Every("2h")))
        await schedules.run_now("acme", "other")
        assert len(await schedules.backfill("acme", "other", 0.0, 7_200.0)) == 1
        assert await schedules.remove("acme", "other")
        worker, seen = aiqueue.Worker(), []

        @worker.handle(Task)
        async def task(job: aiqueue.Job[Task]) -> None:
            seen.append((job.schedule, job.scheduled_for))

        async with aiqueue.connect(url=server.url, user="worker", password="p") as client, worker.running(client):
            await eventually(lambda: ("report", tick) in seen)
        assert [each.next_ms for each in await schedules.list()] == [None]
    assert "denied" not in caplog.text
    assert "Violation" not in caplog.text
