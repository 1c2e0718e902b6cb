"""Which jobs producers store in the lanes of limited keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.bus import encode
from aiqueue.connection import block
from aiqueue.enqueue import ChildJobs, FailedJob, Forwarder
from aiqueue.enqueue.key_lanes import key_of_body, key_of_message
from aiqueue.errors import LaneFull
from aiqueue.job import ChildSpec
from aiqueue.lanes import WorkerRecords
from aiqueue.limits import Controls, Rules
from aiqueue.payload import encode_message
from aiqueue.subjects import Lane

from .. import keyed
from ..support import Account, eventually

MODEL = "openai/gpt-4o:2024"
RULES = '[[limit]]\nfamily = "test.calls"\nkey = "openai/*"\nrequests = 100\n'
NORMAL = Lane(keyed.FAMILY, "acme", "normal")


@pytest.fixture
async def client(account: Account, tmp_path: Path) -> AsyncIterator[aiqueue.Client]:
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "limits.toml").write_text(RULES)
    async with keyed.connect(account, tmp_path) as client:
        await know(client)
        yield client


async def know(client: aiqueue.Client) -> None:
    """Have the client know rules, stream and workers."""
    await client.key_lanes.find_token(client.topology.family(keyed.FAMILY), "acme", MODEL)


async def stored(client: aiqueue.Client) -> dict[Lane, int]:
    info = await client.connection.api(f"STREAM.INFO.{keyed.STREAM}", {"subjects_filter": ">"})
    found = {subjects.parse_lane(subject): count for subject, count in (info["state"].get("subjects") or {}).items()}
    return {lane: count for lane, count in found.items() if lane is not None}


async def last_headers(client: aiqueue.Client, lane: Lane) -> dict[str, str]:
    found = await client.connection.last(keyed.STREAM, subjects.lane(*lane))
    assert found is not None
    return dict(found.headers)


async def test_jobs_of_a_limited_key_go_into_its_lane_and_others_do_not(client: aiqueue.Client) -> None:
    hints: list[tuple[str, bytes]] = []
    await client.connection.subscribe("aiq.hint.>", lambda each: hints.append((each.subject, each.data)))
    handle = await client.enqueue(keyed.Call(model=MODEL), tenant="acme")
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme", priority="high", headers={"trace": "1"})
    await client.enqueue(keyed.Call(model="free"), tenant="acme")
    await client.enqueue(keyed.Call(), tenant="acme")
    lane = keyed.key_lane(MODEL)
    assert handle.lane == lane
    assert await stored(client) == {lane: 1, keyed.key_lane(MODEL, priority="high"): 1, NORMAL: 2}
    assert headers.limit_key(await last_headers(client, lane)) == MODEL
    assert headers.LIMIT_KEY not in await last_headers(client, NORMAL)
    await eventually(lambda: (subjects.hint(lane), MODEL.encode()) in hints)


async def test_a_job_in_a_key_lane_is_a_plain_job_to_the_worker(client: aiqueue.Client) -> None:
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme")
    found = await last_headers(client, keyed.key_lane(MODEL))
    assert headers.read_plain(block(found)) is not None


async def test_many_jobs_at_once_go_each_into_the_lane_of_its_own_key(client: aiqueue.Client) -> None:
    models = [MODEL, "openai/gpt-4o-mini", "free"]
    jobs = [keyed.Call(model=models[n % 3], n=n) for n in range(300)]
    handles = [each async for each in client.enqueue_many(jobs, tenant="acme")]
    expected = {keyed.key_lane(MODEL): 100, keyed.key_lane(models[1]): 100, NORMAL: 100}
    assert await stored(client) == expected
    assert [each.lane for each in handles[:3] if isinstance(each, aiqueue.Handle)] == list(expected)


async def test_a_delayed_job_keeps_its_key_in_its_header(client: aiqueue.Client) -> None:
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme", delay=60)
    parked = client.topology.parked_stream.name
    found = await client.connection.last(parked, subjects.parked(NORMAL, is_due=False))
    assert found is not None
    assert headers.limit_key(found.headers) == MODEL


async def test_a_key_without_a_rule_that_is_paused_has_a_lane_until_the_pause_ends(client: aiqueue.Client) -> None:
    controls = Controls(client.connection, client.topology, Rules(), client.connection.clock.now)
    await controls.pause(keyed.FAMILY, "free", for_s=60, author="test")
    family = client.topology.family(keyed.FAMILY)
    await eventually(lambda: client.key_lanes.token(family, "acme", "free"))
    await client.enqueue(keyed.Call(model="free"), tenant="acme")
    await controls.resume(keyed.FAMILY, "free")
    await eventually(lambda: not client.key_lanes.token(family, "acme", "free"))
    await client.enqueue(keyed.Call(model="free"), tenant="acme")
    assert await stored(client) == {keyed.key_lane("free"): 1, NORMAL: 1}


async def test_a_rule_that_is_set_while_the_producer_runs_holds_for_its_next_jobs(client: aiqueue.Client) -> None:
    controls = Controls(client.connection, client.topology, Rules(), client.connection.clock.now)
    family = client.topology.family(keyed.FAMILY)
    assert not client.key_lanes.token(family, "acme", "free")
    await controls.set_rule({"family": keyed.FAMILY, "key": "free", "requests": 5}, author="test")
    await eventually(lambda: client.key_lanes.token(family, "acme", "free"))


@pytest.mark.parametrize("serves", [keyed.FAMILY, "agent.tasks"])
async def test_while_a_former_worker_of_the_family_lives_jobs_go_to_the_ordinary_lane(
    account: Account, tmp_path: Path, serves: str
) -> None:
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "limits.toml").write_text(RULES)
    async with keyed.connect(account, tmp_path) as client:
        records = WorkerRecords(client.connection, client.topology)
        await records.write("former", {"worker": "former", "kinds": {serves: ["call"]}})
        await records.write("new", {"worker": "new", "kinds": {keyed.FAMILY: ["call"]}, "key_lanes": True})
        await know(client)
        await client.enqueue(keyed.Call(model=MODEL), tenant="acme")
        assert await stored(client) == {NORMAL if serves == keyed.FAMILY else keyed.key_lane(MODEL): 1}


async def test_after_an_old_apply_jobs_go_to_the_ordinary_lane_and_none_is_lost(client: aiqueue.Client) -> None:
    config = (await client.connection.api(f"STREAM.INFO.{keyed.STREAM}"))["config"]
    former = config | {"subjects": [each for each in config["subjects"] if each.count(".") < 5]}
    await client.connection.api(f"STREAM.UPDATE.{keyed.STREAM}", former)
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme")
    assert await stored(client) == {NORMAL: 1}
    await client.connection.api(f"STREAM.UPDATE.{keyed.STREAM}", config)
    client.key_lanes._refresh_at = 0.0
    family = client.topology.family(keyed.FAMILY)
    await eventually(lambda: client.key_lanes.token(family, "acme", MODEL))
    await client.connection.api(f"STREAM.UPDATE.{keyed.STREAM}", former)
    jobs = [keyed.Call(model=f"openai/{n % 4}", n=n) for n in range(500)]
    assert all([isinstance(each, aiqueue.Handle) async for each in client.enqueue_many(jobs, tenant="acme")])
    assert await stored(client) == {NORMAL: 501}


async def test_beyond_a_hundred_keys_a_tenant_s_jobs_share_one_lane(client: aiqueue.Client) -> None:
    jobs = [keyed.Call(model=f"openai/{n}") for n in range(1_000)]
    async for _ in client.enqueue_many(jobs, tenant="acme"):
        pass
    await client.enqueue(keyed.Call(model=MODEL), tenant="globex")
    found = await stored(client)
    rest = NORMAL._replace(key=subjects.REST)
    assert (len(found), found[rest]) == (101, 1_000 - 99)  # the tenant's first key was asked for by `know`
    assert found[keyed.key_lane(MODEL, tenant="globex")] == 1
    client.key_lanes._refresh_at = client.key_lanes._valid_until = 0.0
    client.key_lanes._used.clear()
    await know(client)  # what is stored counts, too
    await client.enqueue(keyed.Call(model="openai/new"), tenant="acme")
    assert (await stored(client))[rest] == found[rest] + 1


async def test_the_guides_client_stores_in_the_lanes_of_keys(account: Account, client: aiqueue.Client) -> None:
    bus = aiqueue.NATSClient(account.url, user=account.user, password=account.password, streams=client.settings.streams)
    async with bus:
        await know(bus.client)
        await bus.publish("ai.test.calls.acme", encode({"model": MODEL}))
        await bus.publish("ai.test.calls.acme.high", encode({"model": MODEL}), headers={"trace": "1"})
        await bus.publish("ai.test.calls.acme", encode({"model": "free"}))
    assert await stored(client) == {keyed.key_lane(MODEL): 1, keyed.key_lane(MODEL, priority="high"): 1, NORMAL: 1}
    for priority in ("normal", "high"):
        assert headers.limit_key(await last_headers(client, keyed.key_lane(MODEL, priority=priority))) == MODEL


async def test_a_replay_goes_into_the_lane_of_its_key(client: aiqueue.Client) -> None:
    failed = FailedJob("j1", "call", NORMAL, 1, "rejected", "no", 1, "w", 0.0, [])
    await client.dead.add(failed, {headers.LIMIT_KEY: headers.encode_key(MODEL), headers.KIND: "call"}, b"{}")
    (letter,) = [each async for each in client.dead.find()]
    await client.dead.replay(letter)
    assert await stored(client) == {keyed.key_lane(MODEL): 1}


async def test_a_client_of_families_without_a_limit_key_looks_nothing_up(client: aiqueue.Client) -> None:
    class Echo(aiqueue.Message, kind="echo"):
        pass

    client.key_lanes._wanted.clear()
    client.key_lanes._refresh_at = 0.0
    await client.enqueue(Echo(), tenant="acme")
    assert client.key_lanes._wanted == {}
    assert client.key_lanes._refreshing is None


class Size(StrEnum):
    SMALL = "small"


class Named(aiqueue.Message, kind="named", family=keyed.FAMILY):
    called: str = pydantic.Field("", alias="model")


class Open(aiqueue.Message, kind="open", family=keyed.FAMILY):
    model_config = pydantic.ConfigDict(extra="allow")


class Sized(aiqueue.Message, kind="sized", family=keyed.FAMILY):
    model: Size | float | bool | None = None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (keyed.Call(model="a/b"), "a/b"),
        (keyed.Call(model=7), "7"),
        (keyed.Call(model=None), ""),
        (keyed.Call(model=""), ""),
        (keyed.Call(model="ä\ud7ff x"), "ä\ud7ff x"),
        (Named(model="gpt"), "gpt"),
        (Open(model="gpt"), "gpt"),
        (Open(), ""),
        (Sized(model=Size.SMALL), "small"),
        (Sized(model=1.5), ""),
        (Sized(model=True), ""),
    ],
)
def test_the_key_of_a_message_is_that_of_its_body(message: Any, expected: str) -> None:
    family = keyed.topology().family(keyed.FAMILY)
    assert key_of_message(message, "model") == expected
    assert key_of_body(family, encode_message(message), kind=message.aiq_kind) == expected


async def test_a_due_job_goes_into_the_lane_of_its_key_and_otherwise_into_the_one_that_it_is_parked_for(
    client: aiqueue.Client,
) -> None:
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme", delay=0.05)
    await client.enqueue(keyed.Call(model="free"), tenant="acme", delay=0.05)
    forwarder = Forwarder(client.connection, client.topology, client.key_lanes)
    await forwarder.start()

    async def forwarded() -> None:
        assert await stored(client) == {keyed.key_lane(MODEL): 1, NORMAL: 1}

    await eventually(forwarded)
    config = (await client.connection.api(f"STREAM.INFO.{keyed.STREAM}"))["config"]
    former = config | {"subjects": [each for each in config["subjects"] if each.count(".") < 5]}
    await client.enqueue(keyed.Call(model=MODEL), tenant="acme", delay=0.3)
    await client.connection.api(f"STREAM.UPDATE.{keyed.STREAM}", former)

    async def refused() -> None:
        assert await stored(client) == {keyed.key_lane(MODEL): 1, NORMAL: 2}

    await eventually(refused)
    await forwarder.stop()


async def test_a_child_goes_into_the_lane_of_its_key(client: aiqueue.Client) -> None:
    jobs = ChildJobs(client.connection, client.topology, client.key_lanes)
    for name, model in (("a", MODEL), ("b", "free")):
        body = encode_message(keyed.Call(model=model))
        spec = ChildSpec(name, "call", keyed.FAMILY, body, None, None, None, {}, {}, [])
        await jobs.store(spec, jobs.lane_of(spec, "acme", "normal"), f"child-{name}", {})
    assert await stored(client) == {keyed.key_lane(MODEL): 1, NORMAL: 1}
    assert headers.limit_key(await last_headers(client, keyed.key_lane(MODEL))) == MODEL


async def test_a_full_lane_of_a_key_is_named_by_its_value(account: Account, tmp_path: Path) -> None:
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "limits.toml").write_text(RULES)
    file = keyed.FILE.replace('"64MiB"', '"64MiB"\nmax_msgs_per_subject = 2')
    async with keyed.connect(account, tmp_path, file) as client:
        await know(client)
        jobs = [keyed.Call(model=MODEL, n=n) for n in range(4)]
        found = [each async for each in client.enqueue_many(jobs, tenant="acme")]
        refused = [str(each) for each in found if isinstance(each, LaneFull)]
        assert len(refused) == 2
        with pytest.raises(LaneFull) as caught:
            await client.enqueue(keyed.Call(model=MODEL), tenant="acme")
        assert {*refused, str(caught.value)} == {str(caught.value)}
        assert f"test.calls acme/normal, model {MODEL}" in str(caught.value)
        await client.enqueue(keyed.Call(model="free"), tenant="acme")  # other lanes take jobs
