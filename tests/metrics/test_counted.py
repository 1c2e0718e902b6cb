"""What workers count of their jobs, on a server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers
from aiqueue.connection import Connection, store_together
from aiqueue.errors import Unavailable
from aiqueue.inspect import MetricsExporter
from aiqueue.metrics import Counts, Flusher, History, flusher, retention
from aiqueue.subjects import Lane
from aiqueue.worker import counting

pytestmark = pytest.mark.families("agent.tasks")
FAMILY = "agent.tasks"


class Page(aiqueue.Message, kind="page.render", family=FAMILY):
    n: int = 0


class Other(aiqueue.Message, kind="another", family=FAMILY):
    n: int = 0


async def counters(client: aiqueue.Client, pattern: str = "ai.metrics.>") -> dict[str, int]:
    stored = client.connection.read("AI_METRICS", pattern)
    return {each.subject: int(json.loads(each.data)["val"]) async for each in stored}


async def totals(client: aiqueue.Client) -> dict[tuple[str, str], Any]:
    found = History(client.connection, client.topology, "total", since_s=0)
    await found.update()
    return dict(found.totals())


async def read(client: aiqueue.Client, level: Any, since_s: float = 3600) -> History:
    found = History(client.connection, client.topology, level, since_s=since_s)
    await found.update()
    return found


def flusher_of(client: aiqueue.Client, *counted: dict[tuple[str, str, str], Counts]) -> Flusher:
    left = list(counted)
    return Flusher(client.connection, client.topology, [FAMILY], lambda: left.pop(0) if left else {})


def some(done: int, kind: str = "k", tenant: str = "acme") -> dict[tuple[str, str, str], Counts]:
    counts = Counts()
    counts.done = done
    return {(FAMILY, tenant, kind): counts}


async def test_each_end_of_an_attempt_is_counted_by_kind_and_by_tenant(client: aiqueue.Client, eventually: Any) -> None:
    worker = aiqueue.Worker(concurrency=10)
    ran: list[int] = []
    running = asyncio.Event()

    @worker.handle(Page, retry=aiqueue.Backoff(attempts=2, first="0.1s", factor=1, jitter=0))
    async def page(job: aiqueue.Job[Page]) -> int:
        ran.append(job.message.n)
        if job.message.n == 3:
            raise ValueError("no")
        if job.message.n == 4:
            running.set()
            await asyncio.sleep(60)
        return job.message.n

    @worker.handle(Other, result=False)
    async def other(job: aiqueue.Job[Other]) -> None:
        await asyncio.sleep(0.01)

    async with worker.running(client):
        handles = [await client.enqueue(Page(n=n), tenant="acme") for n in range(5)]
        await asyncio.gather(*(client.enqueue(Other(n=n), tenant="globex") for n in range(7)))
        await running.wait()
        await handles[4].cancel()
        await eventually(lambda: ran.count(3) == 2)
    found = await totals(client)
    page_sums, other_sums = found.pop((FAMILY, "page.render")), found.pop((FAMILY, "another"))
    assert not found
    assert (page_sums.done, page_sums.retried, page_sums.dead, page_sums.cancelled) == (3, 1, 1, 1)
    assert (page_sums.failed, page_sums.ended) == (2, 6)
    assert sum(page_sums.runs.values()) == 6
    assert sum(page_sums.waits.values()) == 5  # the second attempt was no first delivery
    assert (other_sums.done, sum(other_sums.runs.values()), sum(other_sums.waits.values())) == (7, 7, 7)
    assert other_sums.run_s >= 0.07
    median = other_sums.run_percentile(0.5)
    assert median is not None
    assert median > 0.005
    for level in ("minute", "hour"):
        by_kind = await read(client, level)
        assert by_kind.families == [FAMILY]
        assert by_kind.names(FAMILY) == ["another", "page.render"]
        assert by_kind.series(FAMILY, "page.render").sums == page_sums
        assert by_kind.series(FAMILY).sums.ended == 13
    by_tenant = await read(client, "tenant")
    assert by_tenant.names(FAMILY) == ["acme", "globex"]
    assert by_tenant.series(FAMILY, "acme").sums.ended == 6
    assert by_tenant.series(FAMILY, "globex").sums.run_s == other_sums.run_s


async def test_nothing_is_counted_where_the_setting_is_off(client: aiqueue.Client, eventually: Any) -> None:
    client.settings = client.settings.with_arguments(metrics=False)
    worker = aiqueue.Worker()
    worker.handle(Other)(lambda job: 1)
    async with worker.running(client):
        assert await (await client.enqueue(Other(), tenant="acme")).result(timeout=20) == 1
    assert await counters(client) == {}


async def test_kinds_without_a_handler_and_tenants_beyond_a_number_are_counted_together(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(flusher, "TENANTS_MAX", 3)
    worker = aiqueue.Worker()
    worker.handle(Page, result=False)(lambda job: None)

    @worker.handle_any(FAMILY)
    async def any_kind(job: aiqueue.Job[aiqueue.RawMessage]) -> None:
        ran.add(job.message.kind)

    ran: set[str] = set()
    async with worker.running(client):
        for n in range(20):
            told = {headers.KIND: f"k{n}", headers.JOB_ID: f"j{n}", headers.CONTENT_TYPE: "application/json"}
            told[headers.MSG_ID] = f"j{n}"
            await client.connection.store(f"ai.{FAMILY}.t{n}", b"{}", told)
        await eventually(lambda: len(ran) == 20)
    found = await counters(client)
    assert {subject.split(".")[-2] for subject in found if ".total." in subject} == {"=other"}
    tenants = {subject.split(".")[-2] for subject in found if ".tenant." in subject}
    assert len(tenants) == 3 + len({"=other", "=workers"} & tenants) == 5
    assert (await read(client, "tenant")).series(FAMILY).sums.done == 20


def test_a_million_kinds_and_tenants_take_no_memory_between_two_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "KEYS_MAX", 100)
    clock: Any = SimpleNamespace(now=lambda: 0.0, precise=lambda: None)
    tally = counting.Tally(clock, [(FAMILY, "known")])
    for n in range(1_000):
        tally.count_dead(FAMILY, f"t{n}", f"k{n}")
    found = tally.take()
    assert len(found) == 101
    assert sum(each.dead for each in found.values()) == 1_000
    assert {kind for _, _, kind in found} == {"=other"}
    assert tally.take() == {}


JOBS = st.lists(
    st.tuples(
        st.sampled_from(["acme", "globex"]),
        st.sampled_from(["known", "another", "unknown"]),
        st.integers(min_value=1, max_value=3),  # deliveries
        st.floats(min_value=0.0, max_value=1e6),  # seconds that it ran
        st.floats(min_value=-10.0, max_value=9e8),  # and waited: below 0 where clocks differ
    ),
    max_size=60,
)


@given(flushes=st.lists(JOBS, min_size=1, max_size=9))
@mock.patch.object(counting, "ADDED_UP", 7)
def test_jobs_that_are_added_up_later_count_as_those_that_are_counted_one_by_one(
    flushes: list[list[tuple[str, str, int, float, float]]],
) -> None:
    clock: Any = SimpleNamespace(precise=lambda: 0.0)
    later, at_once = (counting.Tally(clock, [(FAMILY, "known"), (FAMILY, "another")]) for _ in range(2))
    lanes = [
        {tenant: SimpleNamespace(key=Lane(FAMILY, tenant, "normal"), counts={}) for tenant in ("acme", "globex")}
        for _ in ("later", "at once")
    ]
    for jobs in flushes:
        later._ahead_s = at_once._ahead_s = 0.25
        for tenant, kind, delivery_count, ran_s, waited_s in jobs:
            opened: Any = SimpleNamespace(kind=kind)
            ways: list[Callable[[Any, Any], None]] = [later.count_done, partial(at_once.count, "done")]
            for lane, count in zip(lanes, ways, strict=True):
                delivery: Any = SimpleNamespace(
                    lane=lane[tenant],
                    tenant=tenant,
                    delivery_count=delivery_count,
                    stored_at=1e9 - waited_s,
                    run_started_at=1e9,
                    run_ended_at=1e9 + ran_s,
                )
                count(delivery, opened)
        taken = [{key: counts.increments() for key, counts in tally.take().items()} for tally in (later, at_once)]
        assert taken[0] == taken[1]


async def test_a_flush_whose_answer_is_lost_counts_once(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing = flusher_of(client, some(5), some(2))
    lost = [True, True, False]

    async def unanswered(*given: Any, **options: Any) -> bool:
        stored = await store_together(*given, **options)
        if lost.pop(0):
            raise Unavailable("the answer was lost", maybe_stored=True)
        return stored

    monkeypatch.setattr(flusher, "store_together", unanswered)
    for _ in range(2):
        await flushing.flush()
        assert (await totals(client))[FAMILY, "k"].done == 5
    lost.append(False)
    await flushing.flush()
    assert (await totals(client))[FAMILY, "k"].done == 7
    assert (await counters(client, "ai.metrics.flush.*")).popitem()[1] == 2


async def test_a_flush_in_doubt_is_looked_up_when_the_stream_may_have_forgotten_its_id(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher, "CHECK_AFTER_S", -1.0)
    for is_stored in (True, False):

        async def in_doubt(*given: Any, is_stored: bool = is_stored, **options: Any) -> bool:
            if is_stored:
                await store_together(*given, **options)
            raise Unavailable("the answer was lost", maybe_stored=True)

        flushing = flusher_of(client, some(5, kind=f"stored-{is_stored}"))
        monkeypatch.setattr(flusher, "store_together", in_doubt)
        await flushing.flush()
        await client.connection.api("STREAM.UPDATE.AI_METRICS", await _config(client, duplicate_window=10**8))
        await asyncio.sleep(0.3)  # the stream forgets the id
        monkeypatch.setattr(flusher, "store_together", store_together)
        await flushing.flush()
        assert (await totals(client))[FAMILY, f"stored-{is_stored}"].done == 5


async def _config(client: aiqueue.Client, **changed: Any) -> dict[str, Any]:
    return {**(await client.connection.api("STREAM.INFO.AI_METRICS"))["config"], **changed}


async def test_a_flush_counts_once_though_the_server_is_killed_before_it_answers_and_others_have_counted_since(
    own_server: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """A restarted server knows the ids of stored messages only, and a counter is replaced at each increment: so the
    first message of a flush, which has its id, is on a subject of its own.
    """
    server = own_server()
    async with aiqueue.connect(server.url, families=[FAMILY], user=server.user, password=server.password) as client:
        await aiqueue.topology.provision.apply(client.connection, client.topology)
        mine, other = flusher_of(client, some(5)), flusher_of(client, some(100), some(1_000))

        async def unanswered(*given: Any, **options: Any) -> bool:
            await store_together(*given, **options)
            raise Unavailable("the answer was lost", maybe_stored=True)

        monkeypatch.setattr(flusher, "store_together", unanswered)
        await mine.flush()
        monkeypatch.setattr(flusher, "store_together", store_together)
        await other.flush()
        server.kill()
        server.start()

        async def all_are_counted() -> bool:
            await other.flush()  # one of them may find the connection lost
            await mine.flush()
            return bool((await totals(client))[FAMILY, "k"].done >= 1_105)

        await eventually(all_are_counted)
        await mine.flush()
        assert (await totals(client))[FAMILY, "k"].done == 1_105


async def test_without_the_stream_workers_go_on_with_one_line_in_the_log_until_it_is_there(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    config = await _config(client)
    await client.connection.api("STREAM.DELETE.AI_METRICS")
    monkeypatch.setattr(flusher, "EVERY_S", 0.05)
    monkeypatch.setattr(flusher, "PAUSE_S", 0.1)
    worker = aiqueue.Worker()
    worker.handle(Other)(lambda job: 1)
    with caplog.at_level(logging.WARNING, "aiqueue.metrics"):
        async with worker.running(client):
            assert await (await client.enqueue(Other(), tenant="acme")).result(timeout=20) == 1
            await eventually(lambda: caplog.messages)
            await asyncio.sleep(0.5)
            assert len(caplog.messages) == 1
            assert "not counted in the history" in caplog.text
            assert "aiqueue apply" in caplog.text
            await client.connection.api("STREAM.CREATE.AI_METRICS", config)
            await eventually(lambda: counters(client))
            assert await (await client.enqueue(Other(), tenant="acme")).result(timeout=20) == 1
    assert len(caplog.messages) == 1
    assert (await totals(client))[FAMILY, "another"].done == 1  # what was counted before is not made up


async def test_a_worker_without_the_permission_runs_its_jobs(
    own_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    monkeypatch.setattr(flusher, "EVERY_S", 0.05)
    denied = json.dumps({"publish": {"deny": ["ai.metrics.>"]}})
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{{ user: less, password: p, permissions: {denied} }} ] }}"
    )
    async with aiqueue.connect(server.url, user="all", password="p", families=[FAMILY]) as client:
        await aiqueue.topology.provision.apply(client.connection, client.topology)
    async with aiqueue.connect(server.url, user="less", password="p", families=[FAMILY]) as client:
        worker = aiqueue.Worker()
        worker.handle(Other)(lambda job: 1)
        with caplog.at_level(logging.WARNING):
            async with worker.running(client):
                assert await (await client.enqueue(Other(), tenant="acme")).result(timeout=20) == 1
                await eventually(lambda: "ai.metrics" in caplog.text)
                for _ in range(3):
                    assert await (await client.enqueue(Other(), tenant="acme")).result(timeout=20) == 1
        assert len([each for each in caplog.messages if "ai.metrics" in each]) == 1
        assert await counters(client) == {}


async def test_a_worker_that_may_not_look_up_a_flush_in_doubt_gives_up_that_one_alone(
    own_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher, "CHECK_AFTER_S", -1.0)
    denied = json.dumps({"publish": {"deny": ["$JS.API.DIRECT.GET.AI_METRICS.>", "$JS.API.STREAM.MSG.GET.AI_METRICS"]}})
    server = own_server(
        "authorization { users: [ { user: all, password: p }, "
        f"{{ user: less, password: p, permissions: {denied} }} ] }}"
    )

    async def unanswered(*given: Any, **options: Any) -> bool:
        raise Unavailable("the answer was lost", maybe_stored=True)

    async with aiqueue.connect(server.url, user="all", password="p", families=[FAMILY]) as client:
        await aiqueue.topology.provision.apply(client.connection, client.topology)
        async with aiqueue.connect(server.url, user="less", password="p", families=[FAMILY]) as less:
            flushing = flusher_of(less, some(5), some(2), some(1))
            monkeypatch.setattr(flusher, "store_together", unanswered)
            await flushing.flush()
            monkeypatch.setattr(flusher, "store_together", store_together)
            with caplog.at_level(logging.WARNING):
                await flushing.flush()
                await flushing.flush()
        assert (await totals(client))[FAMILY, "k"].done == 3  # without the 5 in doubt
    assert len([each for each in caplog.messages if "given up" in each]) == 1
    assert len(caplog.messages) == 1


async def test_a_time_in_which_nobody_has_reported_is_a_gap_and_one_without_jobs_is_none(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [client.connection.clock.now() // 60 * 60]
    monkeypatch.setattr(client.connection.clock, "now", lambda: now[0])
    flushing = flusher_of(client, some(3), {}, some(4))
    minutes = History(client.connection, client.topology, "minute", since_s=300)
    for ago in (240, 120, 0):
        now[0] += 10
        at, now[0] = now[0], now[0] - ago
        await flushing.flush()
        now[0] = at
    await minutes.update()
    points = minutes.series(FAMILY, "k").points
    assert [None if each.sums is None else each.sums.done for each in points] == [None, 3, None, 0, None, 4]
    assert [each.workers for each in points] == [0, 1, 0, 1, 0, 1]
    assert [each.rate is None for each in points] == [True, False, True, False, True, False]
    assert (points[1].length_s, points[-1].length_s) == (60, 30)


async def test_a_history_that_is_kept_reads_only_what_has_changed_and_notices_a_new_stream(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing = flusher_of(client, some(3), some(4), some(5))
    minutes = History(client.connection, client.topology, "minute", since_s=300)
    read_of = Connection.read
    pages: list[int] = []

    def noted(self: Connection, *given: Any, **options: Any) -> Any:
        pages.append(options["seq"])
        return read_of(self, *given, **options)

    monkeypatch.setattr(Connection, "read", noted)
    for expected in (3, 7):
        await flushing.flush()
        await minutes.update()
        assert minutes.series(FAMILY).sums.done == expected
    assert pages[0] == 1 < pages[1]
    config = await _config(client)
    await client.connection.api("STREAM.DELETE.AI_METRICS")
    await client.connection.api("STREAM.CREATE.AI_METRICS", config)
    await flushing.flush()
    await minutes.update()
    assert minutes.series(FAMILY).sums.done == 5
    monkeypatch.setattr(client.connection.clock, "now", lambda: minutes.now + 600)
    await minutes.update()
    assert not minutes.families


async def test_counters_of_minutes_are_removed_after_six_hours_and_others_stay(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await flusher_of(client, some(3)).flush()
    assert not await retention.drop_old_minutes(client.connection, "AI_METRICS")
    assert await counters(client, "ai.metrics.minute.>")
    now = client.connection.clock.now()
    monkeypatch.setattr(client.connection.clock, "now", lambda: now + 8 * 3600)
    assert await retention.drop_old_minutes(client.connection, "AI_METRICS")
    assert not await retention.drop_old_minutes(client.connection, "AI_METRICS")
    assert not await counters(client, "ai.metrics.minute.>")
    assert (await totals(client))[FAMILY, "k"].done == 3


async def test_many_counters_are_flushed_in_several_batches(client: aiqueue.Client) -> None:
    many: dict[tuple[str, str, str], Counts] = {}
    for n in range(800):
        many |= some(n + 1, kind=f"k{n}")
    await flusher_of(client, many).flush()
    found = await totals(client)
    assert [found[FAMILY, f"k{n}"].done for n in range(800)] == list(range(1, 801))
    assert (await counters(client, "ai.metrics.flush.*")).popitem()[1] == 3


async def test_thousands_of_counters_are_one_page_and_a_name_s_series_reads_its_own_alone(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    many: dict[tuple[str, str, str], Counts] = {}
    for n in range(900):
        many |= some(n + 1, tenant=f"t{n}")
        many[FAMILY, f"t{n}", "k"].add_run(0.1)
    await flusher_of(client, many).flush(last=True)
    pages: list[str] = []
    ask = Connection.request_many

    def noted(self: Connection, subject: str, *given: Any) -> Any:
        pages.append(subject)
        return ask(self, subject, *given)

    monkeypatch.setattr(Connection, "request_many", noted)
    found = await read(client, "tenant")
    assert pages == ["$JS.API.DIRECT.GET.AI_METRICS"]
    assert len(found.names(FAMILY)) == 900
    monkeypatch.setitem(found._values, (FAMILY, "t8"), None)  # type: ignore[arg-type]
    assert found.series(FAMILY, "t7").sums.done == 8


async def test_what_no_worker_can_have_counted_is_left_out(client: aiqueue.Client) -> None:
    await flusher_of(client, some(3)).flush()
    before = dict(await totals(client))
    increments = ("ai.metrics.total.agent.tasks.k", "1" + "0" * 400), ("ai.metrics.total.agent.tasks.k", "-7")
    hostile = [(f"{subject}.{what}", value) for subject, value in increments for what in ("run_us", "run:1", "dead")]
    hostile += [
        (f"ai.metrics.total.agent.tasks.k.run:{e}", "5") for e in ("99999", "-99999", "1_0", "+1", "\u0661", "32")
    ]
    for subject, value in hostile:
        assert await store_together(client.connection, "AI_METRICS", [(subject, {headers.INCREMENT: value})])
    found = await totals(client)
    assert found == before
    assert found[FAMILY, "k"].run_percentile(0.5) is None
    exported = MetricsExporter(client.connection, client.topology)
    assert not (await exported.scrape()).failed


async def test_a_history_that_is_kept_notices_an_older_copy_of_its_stream(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing = flusher_of(client, some(3), some(4))
    await flushing.flush()
    kept = History(client.connection, client.topology, "total", since_s=0)
    await kept.update()
    last = (await client.connection.api("STREAM.INFO.AI_METRICS"))["state"]["last_seq"]
    monkeypatch.setattr(kept, "_next_seq", last + 100)  # as if the server had lost what it had not written to its disk
    await flushing.flush()
    await kept.update()
    assert kept.totals()[FAMILY, "k"].done == 7
