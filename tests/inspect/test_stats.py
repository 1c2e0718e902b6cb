from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.cli.inspect import describe_lane_workers
from aiqueue.connection import timestamp
from aiqueue.enqueue.deadletter import Filter
from aiqueue.errors import BadInput, InvalidToken, NotFound, ResultDisabled, Unavailable, UnknownFamily
from aiqueue.inspect import lane_scan, lookup, stats, stream_reads
from aiqueue.inspect.stats import FamilyStats, LaneStats
from aiqueue.topology import provision

from ..support import Account, Cluster, Eventually, NatsProcess


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


class Slow(aiqueue.Message, kind="slow"):
    pass


async def overview(client: aiqueue.Client, sample_s: float = 0) -> dict[str, FamilyStats]:
    found = await stats.overview(client.connection, client.topology, sample_s=sample_s)
    return {each.family: each for each in found}


async def lanes(client: aiqueue.Client, name: str = "agent.tasks") -> dict[tuple[str, str], LaneStats]:
    found = await stats.lanes(client.connection, client.topology, name)
    return {(each.tenant, each.priority): each for each in found}


async def job(client: aiqueue.Client, job_id: str, **where: Any) -> stats.JobStats:
    return await stats.job(client.connection, client.topology, job_id, **where)


async def make_lane(client: aiqueue.Client, tenant: str, priority: str = "normal", **other: Any) -> None:
    family = client.topology.family("agent.tasks")
    config = family.lane_config(tenant, priority) | other
    subject = f"CONSUMER.CREATE.{family.stream}.{config['durable_name']}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": family.stream, "config": config})


async def lease(client: aiqueue.Client, tenant: str, count: int = 1) -> None:
    """Take jobs of a lane as a worker would, and settle none."""
    link, arrived = client.connection, asyncio.Event()
    left = count

    def on_message(message: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            arrived.set()

    inbox = link.new_inbox()
    await link.subscribe(inbox, on_message)
    request = json.dumps({"batch": count, "expires": 5_000_000_000}).encode()
    await link.publish(f"$JS.API.CONSUMER.MSG.NEXT.AI_AGENT_TASKS.{tenant}-normal", request, reply=inbox)
    async with asyncio.timeout(25):
        await arrived.wait()


def failing() -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        if job.message.text == "bad":
            raise aiqueue.Reject("not wanted")
        await job.progress(0.5, "half")
        return job.message.text

    return worker


class TestWorkersOfALane:
    async def state(self, client: aiqueue.Client, lane: tuple[str, str]) -> str:
        return describe_lane_workers((await lanes(client))[lane])

    async def test_an_idle_lane_is_served_if_a_worker_listens_for_its_jobs(
        self, client: aiqueue.Client, eventually: Eventually
    ) -> None:
        await make_lane(client, "acme")
        assert await self.state(client, ("acme", "normal")) == "none"
        async with failing().running(client):  # pulls on no lane: none has a job
            before = await client.connection.api("CONSUMER.NAMES.AI_AGENT_TASKS")
            assert await self.state(client, ("acme", "normal")) == "idle"
            after = await client.connection.api("CONSUMER.NAMES.AI_AGENT_TASKS")
            assert before["consumers"] == after["consumers"]  # to ask has no effect
            await (await client.enqueue(Echo(text="good"), tenant="acme")).result(25)
            assert await self.state(client, ("acme", "normal")) == "ready"

    async def test_a_lane_with_jobs_of_a_tenant_that_the_worker_does_not_serve_has_none(
        self, client: aiqueue.Client
    ) -> None:
        worker = aiqueue.Worker(tenants=["globex"])
        worker.handle(Echo)(lambda job: None)
        await client.enqueue(Echo(), tenant="acme")
        async with worker.running(client):
            assert await self.state(client, ("acme", "normal")) == "none"


@pytest.mark.slow
async def test_counts_say_that_they_are_partial_while_a_cluster_does_not_report_a_consumer(
    own_cluster: Cluster, eventually: Eventually
) -> None:
    account = own_cluster.account
    where = {"url": account.url, "user": account.user, "password": account.password, "profile": "cluster"}
    async with aiqueue.connect(**where) as client:
        await provision.apply(client.connection, client.topology)
        for n in range(12):  # led by all three servers
            await make_lane(client, f"t{n}")
            await client.enqueue(Echo(), tenant=f"t{n}")
        assert not any(each.partial for each in (await lanes(client)).values())
        # without the leader of the stream, or that of the meta group, nothing is answered until there are new ones
        leaders = own_cluster.leader("AI_AGENT_TASKS"), own_cluster.meta_leader()
        next(node for node in own_cluster.nodes if node not in leaders).kill()
        found: list[LaneStats] = []

        async def is_partial() -> bool:
            with contextlib.suppress(Unavailable):  # the killed server was the connected one
                found[:] = [each for each in (await lanes(client)).values() if each.partial]
            return bool(found)

        await eventually(is_partial, within=20)
        assert all(describe_lane_workers(each) == "?" for each in found)


class TestOverview:
    async def test_has_every_family_empty_at_first(self, client: aiqueue.Client) -> None:
        found = await overview(client)
        assert list(found) == list(client.topology.families)
        expected = FamilyStats("agent.tasks", "AI_AGENT_TASKS", dead=0, parked=0, size_limit_bytes=2**30)
        assert found["agent.tasks"] == expected

    async def test_counts_waiting_and_leased_jobs_apart(self, client: aiqueue.Client) -> None:
        for _ in range(5):
            await client.enqueue(Echo(), tenant="acme")
        await client.enqueue(Echo(), tenant="globex", priority="high")
        await make_lane(client, "acme")
        await lease(client, "acme", 2)
        tasks = (await overview(client))["agent.tasks"]
        assert (tasks.pending, tasks.in_flight, tasks.redelivered, tasks.lanes) == (4, 2, 0, 2)
        assert tasks.oldest_age_s is not None
        assert 0 <= tasks.oldest_age_s < 30
        assert tasks.size_bytes > 0

    @pytest.mark.parametrize("lanes_max", [stats.ASKED_LANES_MAX, 0])
    async def test_the_oldest_is_the_oldest_that_waits_and_not_one_that_runs(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, lanes_max: int
    ) -> None:
        monkeypatch.setattr(stats, "ASKED_LANES_MAX", lanes_max)  # with more lanes, the stream itself is read
        await client.enqueue(Echo(), tenant="acme")
        await make_lane(client, "acme")
        await lease(client, "acme")
        assert (await overview(client))["agent.tasks"].oldest_age_s is None
        await asyncio.sleep(0.5)  # the age of the job that runs
        second = await client.enqueue(Echo(), tenant="acme")
        await client.enqueue(Echo(), tenant="globex")
        stored = await client.connection.get("AI_AGENT_TASKS", second._enqueued.seq)
        assert stored is not None
        now = timestamp((await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["ts"])
        family = (await overview(client))["agent.tasks"].oldest_age_s
        assert family is not None
        assert now - stored.time <= family
        assert family - (now - stored.time) < 0.5
        if lanes_max:
            lane = (await lanes(client))["acme", "normal"].oldest_age_s
            assert lane is not None
            assert lane - (now - stored.time) < 0.5

    async def test_tells_jobs_delivered_more_than_once(self, client: aiqueue.Client, eventually: Eventually) -> None:
        await make_lane(client, "acme", ack_wait=100_000_000)
        await client.enqueue(Echo(), tenant="acme")
        await lease(client, "acme")
        await lease(client, "acme")
        assert (await overview(client))["agent.tasks"].redelivered == 1

    async def test_counts_dead_letters_by_family(self, client: aiqueue.Client, eventually: Eventually) -> None:
        for text in ("bad", "bad", "good"):
            await client.enqueue(Echo(text=text), tenant="acme")
        async with failing().running(client):

            async def settled() -> bool:
                tasks = (await overview(client))["agent.tasks"]
                return tasks.dead == 2 and tasks.pending + tasks.in_flight == 0

            await eventually(settled)
        assert (await overview(client))["rag.ingest"].dead == 0

    async def test_measures_what_comes_in_and_what_is_done(self, client: aiqueue.Client) -> None:
        async def feed() -> None:
            while True:
                await client.enqueue(Echo(text="good"), tenant="acme")

        async with failing().running(client):
            feeding = asyncio.create_task(feed())
            await (await client.enqueue(Echo(text="good"), tenant="acme")).result(25)  # jobs flow
            tasks = (await overview(client, sample_s=0.5))["agent.tasks"]
            feeding.cancel()
        assert tasks.rate_in is not None
        assert tasks.rate_in > 1
        assert tasks.rate_done is not None
        assert tasks.rate_done > 1

    async def test_marks_a_missing_stream_and_shows_the_others(self, client: aiqueue.Client) -> None:
        await client.connection.api("STREAM.DELETE.AI_RAG_INGEST")
        await client.connection.api("STREAM.DELETE.AI_DEAD")
        found = await overview(client)
        assert found["rag.ingest"] == FamilyStats("rag.ingest", "AI_RAG_INGEST", missing=True, parked=0)
        assert not found["agent.tasks"].missing
        assert found["agent.tasks"].dead is None


class TestParked:
    async def test_parked_jobs_are_counted_by_family_and_lane(self, client: aiqueue.Client) -> None:
        for _ in range(3):
            await client.enqueue(Echo(), tenant="acme", delay="1h")
        await client.enqueue(Echo(), tenant="globex", priority="high", delay="1h")
        await client.enqueue(Echo(), tenant="globex", priority="high")
        found = await overview(client)
        assert (found["agent.tasks"].parked, found["agent.tasks"].pending) == (4, 1)
        assert (found["rag.ingest"].parked, found["agent.message"].parked) == (0, None)
        by_lane = await lanes(client)
        assert {lane: (each.parked, each.pending) for lane, each in by_lane.items()} == {
            ("acme", "normal"): (3, 0),
            ("globex", "high"): (1, 1),
        }

    async def test_a_parked_job_is_found_with_its_time(self, client: aiqueue.Client) -> None:
        handle = await client.enqueue(Echo(), tenant="acme", delay="1h", priority="low")
        found = await stats.job(client.connection, client.topology, handle.id)
        assert (found.state, found.tenant, found.priority, found.kind) == ("parked", "acme", "low", "echo")
        assert found.next_attempt_at == handle.due
        assert found.enqueued_at is not None
        assert abs(found.enqueued_at - time.time()) < 60

    async def test_an_id_that_is_parked_twice_needs_its_tenant(self, client: aiqueue.Client) -> None:
        await client.enqueue(Echo(), tenant="acme", delay="1h", unique="a")
        await client.enqueue(Echo(), tenant="globex", delay="1h", unique="a")
        with pytest.raises(BadInput, match="several jobs"):
            await stats.job(client.connection, client.topology, "a")
        found = await stats.job(client.connection, client.topology, "a", tenant="globex")
        assert (found.state, found.tenant) == ("parked", "globex")

    async def test_without_the_stream_the_rest_is_shown(self, client: aiqueue.Client) -> None:
        await client.enqueue(Echo(), tenant="acme")
        await client.connection.api("STREAM.DELETE.AI_PARKED")
        assert (await overview(client))["agent.tasks"].parked is None
        assert [each.parked for each in (await lanes(client)).values()] == [0]


class TestFamily:
    async def test_lists_lanes_by_tenant_and_rank_of_priority(self, client: aiqueue.Client) -> None:
        for tenant, priority in (("b", "low"), ("b", "high"), ("a", "normal"), ("b", "normal")):
            await client.enqueue(Echo(), tenant=tenant, priority=priority)
        assert list(await lanes(client)) == [("a", "normal"), ("b", "high"), ("b", "normal"), ("b", "low")]

    async def test_tells_waiting_leased_age_and_limit_of_a_lane(self, client: aiqueue.Client) -> None:
        for _ in range(3):
            await client.enqueue(Echo(), tenant="acme")
        await client.enqueue(Echo(), tenant="globex")
        await make_lane(client, "acme")
        await lease(client, "acme")
        found = await lanes(client)
        acme, globex = found["acme", "normal"], found["globex", "normal"]
        assert (acme.pending, acme.in_flight, acme.consumer) == (2, 1, True)
        assert (globex.pending, globex.in_flight, globex.consumer) == (1, 0, False)
        assert acme.limit == client.topology.family("agent.tasks").max_msgs_per_subject
        assert acme.oldest_age_s is not None
        assert globex.oldest_age_s is not None
        assert acme.oldest_age_s >= globex.oldest_age_s

    async def test_tells_whether_a_worker_asks_for_jobs_now(
        self, client: aiqueue.Client, eventually: Eventually
    ) -> None:
        await make_lane(client, "acme")
        assert (await lanes(client))["acme", "normal"].pulls == 0
        await client.enqueue(Echo(), tenant="acme")
        async with failing().running(client):

            async def pulled() -> bool:
                return (await lanes(client))["acme", "normal"].pulls > 0

            await eventually(pulled)

    async def test_finds_more_lanes_than_a_page_of_the_server_holds(self, client: aiqueue.Client) -> None:
        tenants = [f"t{number:03}" for number in range(300)]
        for start in range(0, 300, 50):
            await asyncio.gather(*(make_lane(client, tenant) for tenant in tenants[start : start + 50]))
        assert [tenant for tenant, _ in await lanes(client)] == tenants

    @pytest.mark.parametrize("at_once", [1, 4])
    async def test_asks_for_the_next_pages_of_consumers_before_it_uses_the_first(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, at_once: int
    ) -> None:
        names = [f"t{number:03}-normal" for number in range(600)]
        for start in range(0, 600, 100):
            await asyncio.gather(*(make_lane(client, name[:4]) for name in names[start : start + 100]))
        asked, api = [], client.connection.api

        async def note(subject: str, request: Any = None, **options: Any) -> Any:
            asked.append(request["offset"])
            return await api(subject, request, **options)

        monkeypatch.setattr(client.connection, "api", note)
        monkeypatch.setattr(stream_reads, "PAGES_AT_ONCE", at_once)
        found = []
        async for name, info in stream_reads.list_consumers(client.connection, "AI_AGENT_TASKS"):
            if not found:
                assert asked == [0, 256, 512][: at_once + 1]
            assert info is not None
            found.append(name)
        assert found == names
        assert asked == [0, 256, 512]

    async def test_passes_over_a_consumer_that_is_no_lane(self, client: aiqueue.Client) -> None:
        config = {"durable_name": "spy", "filter_subject": "ai.agent.tasks.spied.normal", "ack_policy": "explicit"}
        await client.connection.api(
            "CONSUMER.CREATE.AI_AGENT_TASKS.spy.ai.agent.tasks.spied.normal",
            {"stream_name": "AI_AGENT_TASKS", "config": config},
        )
        assert await lanes(client) == {}

    async def test_sums_the_tenants_of_a_shared_lane(self, account: Account, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(
            '[family]\nname = "x.y"\ndefault_kind = "x"\nlanes = "shared"\n'
            '[stream]\nname = "X_Y"\nmax_bytes = "1MiB"\n[consumer]\n'
        )

        class X(aiqueue.Message, kind="x", family="x.y"):
            pass

        settings = {"user": account.user, "password": account.password, "streams": tmp_path}
        async with aiqueue.connect(account.url, **settings) as client:
            await provision.apply(client.connection, client.topology)
            for tenant in ("a", "b"):
                await client.enqueue(X(), tenant=tenant)
            (lane,) = await stats.lanes(client.connection, client.topology, "x.y")
            assert (lane.tenant, lane.priority, lane.pending) == ("*", "normal", 2)

    async def test_refuses_what_has_no_lanes(self, client: aiqueue.Client) -> None:
        with pytest.raises(UnknownFamily):
            await lanes(client, "no.such")
        with pytest.raises(BadInput, match="inboxes"):
            await lanes(client, "agent.message")
        await client.connection.api("STREAM.DELETE.AI_RAG_INGEST")
        with pytest.raises(NotFound):
            await lanes(client, "rag.ingest")


class TestJob:
    async def test_is_queued_before_any_worker_came(self, client: aiqueue.Client) -> None:
        handle = await client.enqueue(Echo(), tenant="acme", priority="high")
        found = await job(client, handle.id)
        assert (found.state, found.family, found.tenant, found.priority) == ("queued", "agent.tasks", "acme", "high")
        assert found.kind == "echo"
        assert found.note == "no worker serves its lane at the moment"
        assert found.enqueued_at == pytest.approx(time.time(), abs=30)

    async def test_is_queued_behind_the_delivered_and_then_in_flight(self, client: aiqueue.Client) -> None:
        first = await client.enqueue(Echo(), tenant="acme")
        second = await client.enqueue(Echo(), tenant="acme")
        await make_lane(client, "acme")
        await lease(client, "acme")
        assert (await job(client, first.id)).state == "in_flight"
        assert (await job(client, second.id)).state == "queued"

    async def test_done_has_result_and_journal(self, client: aiqueue.Client) -> None:
        async with failing().running(client):
            handle = await client.enqueue(Echo(text="good"), tenant="acme")
            await handle.result(25)
        found = await job(client, handle.id)
        assert (found.state, found.result, found.attempt) == ("done", "good", 1)
        assert [each.event for each in found.entries] == ["progress", "result"]

    async def test_failed_leads_to_its_dead_letter(self, client: aiqueue.Client) -> None:
        async with failing().running(client):
            handle = await client.enqueue(Echo(text="bad"), tenant="acme", unique="doc-1")
            with pytest.raises(aiqueue.JobFailed):
                await handle.result(25)
        found = await job(client, "doc-1")
        assert (found.state, found.dead_seq) == ("failed", 1)
        assert found.failure == {"reason": "rejected", "error": "not wanted"}
        letter = await client.dead.get(1)
        await client.dead.purge(letter)
        gone = await job(client, "doc-1")
        assert (gone.state, gone.dead_seq) == ("failed", None)
        assert "replayed or purged" in gone.note

    async def test_replayed_is_queued_again_with_its_old_journal(self, client: aiqueue.Client) -> None:
        async with failing().running(client):
            handle = await client.enqueue(Echo(text="bad"), tenant="acme", unique="doc-1")
            with pytest.raises(aiqueue.JobFailed):
                await handle.result(25)
        async for letter in client.dead.find(Filter()):
            await client.dead.replay(letter)
        found = await job(client, "doc-1")
        assert (found.state, found.attempt) == ("queued", None)
        assert found.entries[-1].event == "failed"

    async def test_between_two_attempts_tells_when_the_next_is_due(
        self, client: aiqueue.Client, eventually: Eventually
    ) -> None:
        worker = aiqueue.Worker()

        @worker.handle(Slow, retry=aiqueue.Backoff(first="1m", jitter=0))
        async def slow(_: aiqueue.Job[Slow]) -> None:
            raise ValueError("not yet")

        handle = await client.enqueue(Slow(), tenant="acme")
        async with worker.running(client):

            async def retrying() -> bool:
                return (await job(client, handle.id)).state == "retrying"

            await eventually(retrying)
        found = await job(client, handle.id)
        assert found.attempt == 1
        assert found.next_attempt_at == pytest.approx(time.time() + 60, abs=10)

    async def test_that_ended_without_a_result_is_told_as_that(self, client: aiqueue.Client) -> None:
        worker = aiqueue.Worker()

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            await job.progress(1.0)

        async with worker.running(client):
            handle = await client.enqueue(Echo(), tenant="acme")
            with pytest.raises(ResultDisabled):
                await handle.result(25)
        assert (await job(client, handle.id)).state == "ended"

    async def test_of_a_plain_publisher_is_found_by_its_key_and_by_its_sequence(self, client: aiqueue.Client) -> None:
        link = client.connection
        ack = await link.store("ai.agent.tasks.acme", b'{"task_id": "their key"}', {"Nats-Msg-Id": "1"})
        found = await job(client, subjects.foreign_id("their key"))
        assert (found.state, found.kind) == ("queued", "agent.task")
        ack = await link.store("ai.agent.tasks.acme", b'{"goal": "x"}', {"Nats-Msg-Id": "2"})
        stored = await link.get("AI_AGENT_TASKS", ack.seq)
        assert stored is not None
        stream_id = f"s{ack.seq}-{int(stored.time * 1e6):x}"
        assert (await job(client, stream_id)).state == "queued"
        with pytest.raises(NotFound):
            await job(client, f"s{ack.seq}-1")

    async def test_of_two_tenants_must_be_named_more_exactly(self, client: aiqueue.Client) -> None:
        async with failing().running(client):
            for tenant in ("acme", "globex"):
                handle = await client.enqueue(Echo(text=tenant), tenant=tenant, unique="doc-1")
                await handle.result(25)
        with pytest.raises(BadInput, match=r"acme.*globex"):
            await job(client, "doc-1")
        assert (await job(client, "doc-1", tenant="globex")).result == "globex"

    async def test_unknown_says_so(self, client: aiqueue.Client) -> None:
        with pytest.raises(NotFound, match="never stored"):
            await job(client, "nobody")
        with pytest.raises(InvalidToken):
            await job(client, "")
        with pytest.raises(UnknownFamily):
            await job(client, "x", family="no.such")
        with pytest.raises(BadInput, match="inboxes"):
            await job(client, "x", family="agent.message")

    async def test_behind_the_bound_of_the_search_is_not_called_lost(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lane_scan, "SCAN_JOBS_MAX", 3)
        for number in range(4):
            await client.enqueue(Echo(), tenant="acme", unique=f"n{number}")
        assert (await job(client, "n2")).state == "queued"
        with pytest.raises(NotFound, match="only the first 3 stored jobs"):
            await job(client, "n3")

    async def test_a_job_with_an_id_of_ours_is_found_behind_any_number_of_others(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
    ) -> None:
        monkeypatch.setattr(lane_scan, "SCAN_JOBS_MAX", 10)
        others = [each async for each in client.enqueue_many([Echo()] * 300, tenant="acme")]
        until = time.time() + 0.1
        await eventually(lambda: time.time() > until)  # so that a clock a little off finds no others at that time
        wanted = await client.enqueue(Echo(), tenant="acme")
        others += [each async for each in client.enqueue_many([Echo()] * 300, tenant="acme")]
        assert len(others) == 600
        assert (await job(client, wanted.id)).state == "queued"
        assert await client.cancel(wanted.id)
        with pytest.raises(NotFound, match="only the first 10 stored jobs and those stored when its id was made"):
            await job(client, subjects.new_id())

    async def test_long_journal_is_cut_and_keeps_its_last_entry(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lookup, "ENTRIES_MAX", 2)
        worker = aiqueue.Worker()

        @worker.handle(Echo)
        async def echo(job: aiqueue.Job[Echo]) -> str:
            for step in range(5):
                await job.progress(step / 5)
            return "end"

        async with worker.running(client):
            handle = await client.enqueue(Echo(), tenant="acme")
            await handle.result(25)
        found = await job(client, handle.id)
        assert found.entries_cut
        assert [each.event for each in found.entries] == ["progress", "progress", "result"]
        assert found.result == "end"


async def test_reading_changes_nothing_on_the_server(client: aiqueue.Client) -> None:
    await client.enqueue(Echo(), tenant="acme", unique="doc-1")
    look: list[Callable[[], Any]] = [lambda: overview(client), lambda: lanes(client), lambda: job(client, "doc-1")]
    before = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["state"]
    for each in look:
        await each()
    after = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["state"]
    assert after == before
    assert (await client.connection.api("CONSUMER.NAMES.AI_AGENT_TASKS"))["total"] == 0


async def test_a_job_that_was_delivered_before_the_server_restarted_is_in_flight(
    own_server: Callable[..., NatsProcess], eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
        await make_lane(client, "acme")
        handle = await client.enqueue(Echo(), tenant="acme")
        await lease(client, "acme")
        server.stop()  # not killed: it would forget what it delivered last
        await eventually(lambda: not client.connection.connected)
        server.start()
        await client.connection.wait_up(25)
        assert (await job(client, handle.id)).state == "in_flight"
