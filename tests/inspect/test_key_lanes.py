"""Jobs in the lanes of limited keys are counted, found, cancelled and dead-lettered as all others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import headers, subjects
from aiqueue.cli.app import app
from aiqueue.client.cancel import WILL_NOT_RUN
from aiqueue.enqueue import Filter
from aiqueue.errors import JobCancelled, NotFound
from aiqueue.inspect import Subject, examine, lane_scan, stats
from aiqueue.limits import StoredUse
from aiqueue.subjects import Lane

from .. import keyed
from ..support import Account, eventually

MODEL = "openai/gpt-4o:2024"


@pytest.fixture
async def client(account: Account, tmp_path: Path) -> AsyncIterator[aiqueue.Client]:
    async with keyed.connect(account, tmp_path) as client:
        yield client


async def lanes(client: aiqueue.Client) -> dict[Lane, stats.LaneStats]:
    found = await stats.lanes(client.connection, client.topology, keyed.FAMILY)
    return {Lane(each.family, each.tenant, each.priority, each.key_hash): each for each in found}


async def test_sums_include_the_jobs_in_key_lanes(client: aiqueue.Client) -> None:
    ordinary = Lane(keyed.FAMILY, "acme", "normal")
    rest = ordinary._replace(key=subjects.REST)
    await client.enqueue(keyed.Call(model="free"), tenant="acme")
    for _ in range(3):
        await keyed.store(client, keyed.key_lane(MODEL), MODEL)
    await keyed.store(client, keyed.key_lane(MODEL, priority="high"), MODEL)
    await keyed.store(client, rest, "one of many")
    found = await lanes(client)
    assert {lane: (each.pending, each.key, each.shown_key) for lane, each in found.items()} == {
        ordinary: (1, "", ""),
        keyed.key_lane(MODEL): (3, MODEL, f"model {MODEL}"),
        keyed.key_lane(MODEL, priority="high"): (1, MODEL, f"model {MODEL}"),
        rest: (1, "", "model (others)"),
    }
    assert all(each.oldest_age_s is not None for each in found.values())
    (family,) = [each for each in await stats.overview(client.connection, client.topology, sample_s=0)
                 if each.family == keyed.FAMILY]  # fmt: skip
    assert (family.pending, family.lanes) == (6, 4)


async def test_the_value_of_an_empty_lane_is_that_of_its_limits_use(client: aiqueue.Client) -> None:
    lane, other = keyed.key_lane(MODEL), keyed.key_lane("never seen")
    await keyed.make_consumer(client, lane)
    await keyed.make_consumer(client, other)
    limits = client.topology.limits_stream.name
    subject = subjects.limit(limits, "use", keyed.FAMILY, MODEL, subjects.limit_scope(None))
    await client.connection.store(subject, StoredUse(MODEL).encode(), {headers.MSG_ID: "use"})
    found = await lanes(client)
    assert (found[lane].key, found[lane].consumer) == (MODEL, True)
    assert (found[other].key, found[other].shown_key) == ("", f"model #{other.key[:8]}")


async def test_a_lane_whose_limit_is_reached_is_not_without_a_worker(client: aiqueue.Client) -> None:
    await keyed.store(client, keyed.key_lane(MODEL), MODEL)

    async def codes() -> set[str]:
        subject = Subject(client.connection, client.topology)
        return {each.code or each.check async for each in examine(subject)}

    assert "lane-unserved" in await codes()
    family = client.topology.family(keyed.FAMILY)
    await client.connection.subscribe(f"{subjects.HINTS}.{family.name}.*.*", lambda message: None)
    assert "lane-unserved" in await codes()  # a worker of a former version: it serves no such lane
    await client.connection.subscribe(f"{subjects.HINTS}.{family.name}.>", lambda message: None)
    assert "lane-unserved" not in (found := await codes())
    assert "limited keys" in found
    assert (await lanes(client))[keyed.key_lane(MODEL)].waits_for_limit


async def test_a_job_in_a_key_lane_is_found_by_its_id(client: aiqueue.Client) -> None:
    job_id, _ = await keyed.store(client, keyed.key_lane(MODEL), MODEL)
    found = await stats.job(client.connection, client.topology, job_id)
    assert (found.state, found.tenant, found.priority) == ("queued", "acme", "normal")
    assert (found.limit_key, found.key) == ("model", MODEL)
    assert found.note == "no worker serves its lane at the moment"
    await keyed.make_consumer(client, keyed.key_lane(MODEL))
    assert (await stats.job(client.connection, client.topology, job_id)).note == ""


async def test_a_job_that_waits_in_a_key_lane_is_cancelled_and_the_next_one_stays(client: aiqueue.Client) -> None:
    job_id, _ = await keyed.store(client, keyed.key_lane(MODEL), MODEL)
    other, _ = await keyed.store(client, keyed.key_lane(MODEL), MODEL)
    await keyed.make_consumer(client, keyed.key_lane(MODEL))
    handle = await client.job(job_id)
    assert handle.lane == keyed.key_lane(MODEL)
    assert await handle.cancel()
    with pytest.raises(JobCancelled):
        await handle.result(10)
    found = await lanes(client)
    assert found[keyed.key_lane(MODEL)].pending == 1
    assert (await client.job(other)).id == other


async def test_a_dead_letter_and_its_replay_keep_the_value(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(keyed.Call)
    async def refuse(job: aiqueue.Job[keyed.Call]) -> None:
        raise aiqueue.Reject("no")

    letters = [letter async for letter in client.dead.find(Filter())]
    async with worker.running(client):
        lane = Lane(keyed.FAMILY, "acme", "normal")  # where replays go, too
        job_id, _ = await keyed.store(client, lane, MODEL)
        handle = await client.job(job_id)
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(20)
    letters = [letter async for letter in client.dead.find(Filter())]
    assert [(each.key, each.lane, each.summary()["key"]) for each in letters] == [(MODEL, lane, MODEL)]
    await client.dead.replay(letters[0])
    stored = await client.connection.last(keyed.STREAM, subjects.lane(*lane))
    assert stored is not None
    assert headers.limit_key(stored.headers) == MODEL


def limited_worker(directory: Path) -> aiqueue.Worker:
    """A worker, and a rule beside the streams by which it runs one job and moves all others."""
    (directory / "streams").mkdir()
    rule = f'[[limit]]\nfamily = "{keyed.FAMILY}"\nkey = "openai/*"\nrequests = 1\nwindow = "1h"\n'
    (directory / "streams" / "limits.toml").write_text(rule)
    worker = aiqueue.Worker()

    @worker.handle(keyed.Call)
    async def run(job: aiqueue.Job[keyed.Call]) -> None: ...

    return worker


async def test_a_moved_job_is_found_behind_more_jobs_than_a_search_reads(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = limited_worker(tmp_path)
    monkeypatch.setattr(lane_scan, "SCAN_JOBS_MAX", 3)
    monkeypatch.setattr(lane_scan, "MOVED_SLACK_S", 0.0)  # one server has one clock
    async with keyed.connect(account, tmp_path) as client:
        for _ in range(10):
            await keyed.store(client, keyed.key_lane(MODEL), MODEL)
        async with worker.running(client):
            handle = await client.enqueue(keyed.Call(model=MODEL), tenant="acme", unique="the last one")

            async def is_moved() -> bool:
                try:
                    found = await handle.status()
                except NotFound:
                    return False  # it is behind more jobs than are read, and has no journal yet
                return found.state == "queued" and any(each.event == "moved" for each in found.timeline)

            await eventually(is_moved)
            assert await handle.cancel()
            assert (await lanes(client))[keyed.key_lane(MODEL)].pending <= 10


@pytest.mark.parametrize("by_handle", [True, False])
async def test_a_job_that_a_worker_has_moved_is_found_shown_and_cancelled(
    account: Account, tmp_path: Path, by_handle: bool
) -> None:
    worker = limited_worker(tmp_path)
    async with keyed.connect(account, tmp_path) as client, worker.running(client):
        handles = [await client.enqueue(keyed.Call(model=MODEL, n=n), tenant="acme") for n in range(3)]

        async def moved() -> list[aiqueue.Handle]:
            states = [(await each.status()).state for each in handles]
            assert sorted(states) == ["done", "queued", "queued"]
            found = await lanes(client)
            assert found[keyed.key_lane(MODEL)].waits_for_limit
            return [each for each, state in zip(handles, states, strict=True) if state == "queued"]

        first, second = await eventually(moved)
        found = await first.status()
        assert (found.key, found.limit_key, found.attempt or 0) == (MODEL, "model", 0)
        events = [each for each in found.timeline if each.event == "moved"]
        assert [(each.text, each.attempt) for each in events] == [(f"to the lane of its limited key {MODEL}", 1)]
        assert (await (first if by_handle else await client.job(first.id)).verdict()) == WILL_NOT_RUN
        assert (await first.status()).state == "cancelled"
        assert (await lanes(client))[keyed.key_lane(MODEL)].pending == 1, "its message is gone"
        assert (await second.status()).state == "queued"


def test_inspect_shows_the_value_as_it_was_given(account: Account, tmp_path: Path) -> None:
    async def fill() -> None:
        async with keyed.connect(account, tmp_path) as client:
            await keyed.store(client, keyed.key_lane(MODEL), MODEL, job_id="call-1")
            await client.enqueue(keyed.Call(), tenant="acme")

    asyncio.run(fill())
    options = {"url": account.url, "user": account.user, "password": account.password, "streams": tmp_path / "streams"}
    environment = {**{f"AIQUEUE_{name.upper()}": str(value) for name, value in options.items()}, "COLUMNS": "200"}

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["inspect", *words], env=environment)
        assert result.exit_code == 0, result.output
        return result.output

    assert f"model {MODEL}" in run(keyed.FAMILY)
    (shown,) = [each for each in json.loads(run(keyed.FAMILY, "--json")) if each["key_hash"]]
    assert (shown["limit_key"], shown["key"], shown["pending"]) == ("model", MODEL, 1)
    assert shown["key_hash"] == subjects.hashed(MODEL)
    assert f"model   {MODEL}".replace(" ", "") in run("call-1").replace(" ", "")
