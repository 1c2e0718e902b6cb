"""What disturbs the declared streams is named by plan and doctor, with a command; what apply can undo, it undoes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import aiqueue
from aiqueue.agent import router
from aiqueue.enqueue import forwarder
from aiqueue.inspect import Subject, examine
from aiqueue.topology import Topology, provision
from aiqueue.topology.problems import FATAL_SETTINGS, REMEDIES, SERVICE_CONSUMERS, fatal_settings
from aiqueue.topology.provision import Plan, apply, plan
from aiqueue.worker import stranded

from ..support import Account, Eventually

STREAM = "AI_AGENT_TASKS"
# A value of each fatal setting, and a stream that the server lets have it.
FATAL: dict[str, tuple[Any, str]] = {
    "sealed": (True, STREAM),
    "persist_mode": ("async", "AI_DEAD"),
    "deny_delete": (True, STREAM),
    "deny_purge": (True, "AI_AGENT_MESSAGE"),
    "sources": ([{"name": "OTHER"}], STREAM),
    "no_ack": (True, STREAM),
    "subject_transform": ({"src": "ai.dead.*.*.*.*", "dest": "other.{{wildcard(1)}}"}, "AI_DEAD"),
    "consumer_limits": ({"inactive_threshold": 10**9, "max_ack_pending": 1}, STREAM),
    "subject_delete_marker_ttl": (10**9, STREAM),
    "discard_new_per_subject": (True, "KV_AI_PRESENCE"),
    "mirror": ({"name": "OTHER"}, "AI_DEAD"),
    "allow_msg_counter": (True, "AI_DEAD"),
}
MADE_SO = {"persist_mode", "mirror", "allow_msg_counter"}  # only a new stream can have them


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0


async def planned(client: aiqueue.Client) -> Plan:
    return await plan(client.connection, client.topology)


async def doctor_says(client: aiqueue.Client, code: str) -> str:
    """The text and the remedy of the doctor's finding of this kind, which must be a failure."""
    found = [each async for each in examine(Subject(client.connection, client.topology)) if each.code == code]
    assert [each.level for each in found] == ["fail"], found
    return f"{found[0].check}: {found[0].text} -> {found[0].remedy}"


async def make_lane(client: aiqueue.Client, tenant: str, **other: Any) -> None:
    config = client.topology.family("agent.tasks").lane_config(tenant, "normal") | other
    call = f"CONSUMER.CREATE.{STREAM}.{config['durable_name']}.{config['filter_subject']}"
    await client.connection.api(call, {"stream_name": STREAM, "config": config})


class TestForeignReaders:
    @pytest.mark.parametrize("has_lane", [False, True])
    @pytest.mark.parametrize("kind", ["mirror", "source"])
    async def test_a_mirror_or_source_of_a_work_stream_is_named(
        self, client: aiqueue.Client, kind: str, has_lane: bool
    ) -> None:
        if has_lane:
            await make_lane(client, "acme")
        reads = {"mirror": {"name": STREAM}} if kind == "mirror" else {"sources": [{"name": STREAM}]}
        await client.connection.api("STREAM.CREATE.COPY", {"name": "COPY", "storage": "memory", **reads})
        found = await planned(client)
        assert [(each.stream, each.code) for each in found.problems] == [(STREAM, f"foreign-{kind}")]
        assert "the stream COPY" in found.problems[0].text
        assert "COPY" in found.problems[0].remedy
        assert not found.changes
        assert found.problems[0].line() in found.lines()
        assert found.problems[0].text in await doctor_says(client, f"foreign-{kind}")
        await apply(client.connection, client.topology)
        assert (await client.connection.api("STREAM.INFO.COPY"))["config"]["name"] == "COPY"

    async def test_copies_of_streams_where_reading_removes_nothing_are_no_problem(self, client: aiqueue.Client) -> None:
        for stream in ("AI_RESULTS", "AI_DEAD"):
            config = {"name": f"{stream}_COPY", "storage": "memory", "mirror": {"name": stream}}
            await client.connection.api(f"STREAM.CREATE.{stream}_COPY", config)
            await client.connection.api(
                f"CONSUMER.CREATE.{stream}.peek", {"stream_name": stream, "config": {"durable_name": "peek"}}
            )
        assert not (await planned(client)).problems

    @pytest.mark.parametrize(
        ("stream", "config"),
        [
            (STREAM, {}),
            (STREAM, {"filter_subject": "ai.agent.tasks.acme.normal"}),
            (STREAM, {"filter_subjects": ["ai.agent.tasks.acme.high", "ai.agent.tasks.acme.low"]}),
            (STREAM, {"name": "acme-normal", "filter_subject": "ai.agent.tasks.globex.normal"}),
            (STREAM, {"name": "acme-normal", "filter_subject": "ai.agent.tasks.acme.normal", "deliver_subject": "x"}),
            ("AI_AGENT_MESSAGE", {"filter_subject": "ai.agent.message.acme.*"}),
            ("AI_PARKED", {"filter_subject": "ai.parked.at.>"}),
            ("AI_STRANDED", {}),
        ],
    )
    async def test_a_consumer_of_another_program_is_named(
        self, client: aiqueue.Client, stream: str, config: dict[str, Any]
    ) -> None:
        name = config.pop("name", "peek")
        request = {"stream_name": stream, "config": {"durable_name": name, "ack_policy": "explicit"} | config}
        subject = config.get("filter_subject")
        call = f"CONSUMER.CREATE.{stream}.{name}" + (f".{subject}" if subject else "")
        await client.connection.api(call, request)
        problems = (await planned(client)).problems
        assert [(each.stream, each.code) for each in problems] == [(stream, "foreign-consumer")]
        assert f"the consumer {name} of another program" in problems[0].text
        assert f"nats consumer rm {stream} {name}" in problems[0].remedy
        assert f"nats consumer rm {stream} {name}" in await doctor_says(client, "foreign-consumer")

    async def test_a_worker_whose_lane_a_foreign_consumer_covers_names_it(
        self, client: aiqueue.Client, eventually: Eventually, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = aiqueue.Worker()
        worker.handle(Ping)(lambda job: job.message.n)
        async with worker.running(client):  # the consumer comes after the worker's start
            request = {"stream_name": STREAM, "config": {"durable_name": "peek", "ack_policy": "explicit"}}
            await client.connection.api(f"CONSUMER.CREATE.{STREAM}.peek", request)
            handle = await client.enqueue(Ping(n=3), tenant="acme")

            def is_named() -> bool:
                lines = [each.getMessage() for each in caplog.records if "cannot be served" in each.getMessage()]
                return any("the consumer peek" in each and f"nats consumer rm {STREAM} peek" in each for each in lines)

            await eventually(is_named)
            await client.connection.api(f"CONSUMER.DELETE.{STREAM}.peek")
            assert await handle.result(25) == 3

    async def test_a_worker_names_a_mirror_when_it_starts(
        self, client: aiqueue.Client, eventually: Eventually, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = {"name": "COPY", "storage": "memory", "mirror": {"name": STREAM}}
        await client.connection.api("STREAM.CREATE.COPY", config)
        worker = aiqueue.Worker()
        worker.handle(Ping)(lambda job: None)
        async with worker.running(client):

            def is_named() -> bool:
                lines = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
                return any("the stream COPY is a mirror" in each and "nats stream rm COPY" in each for each in lines)

            await eventually(is_named)

    async def test_our_own_consumers_and_a_plain_clients_own_inbox_are_no_problem(
        self, client: aiqueue.Client, eventually: Eventually
    ) -> None:
        worker, agent = aiqueue.Worker(), aiqueue.Agent("bob", tenant="acme")
        worker.handle(Ping)(lambda job: job.message.n)
        agent.handle(Ping)(lambda mail: None)
        read = {"durable_name": "reader", "ack_policy": "explicit", "filter_subject": "ai.agent.message.acme.eve"}
        await client.connection.api(
            "CONSUMER.CREATE.AI_AGENT_MESSAGE.reader.ai.agent.message.acme.eve",
            {"stream_name": "AI_AGENT_MESSAGE", "config": read},
        )
        async with worker.running(client), agent.running(client):
            await (await client.enqueue(Ping(), tenant="acme")).result(25)
            await (await client.enqueue(Ping(), tenant="acme", delay=0.1)).result(25)

            async def all_there() -> bool:
                counts = [
                    (await client.connection.api(f"CONSUMER.NAMES.{stream}"))["total"]
                    for stream in (STREAM, "AI_AGENT_MESSAGE", "AI_PARKED", "AI_STRANDED")
                ]
                return counts[0] >= 1 and counts[1] >= 2 and counts[2:] == [1, 1]

            await eventually(all_there)
            assert not (await planned(client)).problems

    def test_the_names_of_our_consumers_are_those_that_the_rooms_create(self) -> None:
        made = {"inbox": router.CONSUMER, "parked": forwarder.CONSUMER, "stranded": stranded.CONSUMER}
        assert made == SERVICE_CONSUMERS


class TestFatalSettings:
    @pytest.mark.parametrize("key", FATAL)
    async def test_is_named_although_no_file_states_it(self, client: aiqueue.Client, key: str) -> None:
        value, stream = FATAL[key]
        await client.connection.api("STREAM.CREATE.OTHER", {"name": "OTHER", "subjects": ["other"]})
        await configure(client, stream, key, value)
        found = await planned(client)
        cure = next(each.cure for each in FATAL_SETTINGS if each.key == key)
        if cure == "apply":
            assert [(each.stream, [f.key for f in each.fields]) for each in found.changes] == [(stream, [key])]
            assert found.changes[0].fields[0].why
            assert not (await apply(client.connection, client.topology)).problems
            assert found.changes
            assert (await planned(client)).lines() == []
        else:
            code = "stream-setting" if cure == "edit" else "stream-unusable"
            assert [(each.stream, each.code) for each in found.problems] == [(stream, code)]
            assert found.problems[0].text.startswith(f"{key} is set: ")
            assert f"{key} is set: " in await doctor_says(client, code)

    def test_every_fatal_setting_is_tried(self) -> None:
        assert set(FATAL) == {each.key for each in FATAL_SETTINGS}

    async def test_apply_does_what_it_can_beside_a_sealed_stream(self, client: aiqueue.Client) -> None:
        await configure(client, STREAM, "sealed", True)
        await client.connection.api("STREAM.DELETE.AI_RAG_INGEST")
        made = await apply(client.connection, client.topology)
        assert made.lines()[0] == "+ create stream AI_RAG_INGEST"
        assert [each.code for each in made.problems] == ["stream-unusable"]

    async def test_a_setting_that_a_file_states_is_no_problem(self) -> None:
        presence = Topology.load().presence_stream
        assert presence.config["deny_delete"]
        assert not fatal_settings(presence, dict(presence.config))

    @pytest.mark.parametrize(
        "other",
        [
            {"headers_only": True},
            {"backoff": [30 * 10**9, 60 * 10**9]},
            {"priority_groups": ["a"], "priority_policy": "overflow"},
        ],
    )
    async def test_a_fatal_setting_of_a_lane_is_named_and_unset(
        self, client: aiqueue.Client, other: dict[str, Any]
    ) -> None:
        await make_lane(client, "acme", **other)
        lines = (await planned(client)).lines()
        assert len(lines) == len(other)
        assert all(f"~ {STREAM} lane acme-normal.{key}: " in line for key, line in zip(other, lines, strict=True))
        await apply(client.connection, client.topology)
        assert (await planned(client)).lines() == []


async def configure(client: aiqueue.Client, stream: str, key: str, value: Any) -> None:
    """Give a stream a setting, in place where the server can, else by creating it anew."""
    api = client.connection.api
    config = (await api(f"STREAM.INFO.{stream}"))["config"]
    if key == "mirror":
        config = {"name": stream, "storage": "file"}
    if key == "allow_msg_counter":
        config = {"name": stream, "storage": "file", "subjects": config["subjects"], "allow_direct": True}
    if key in MADE_SO:
        await api(f"STREAM.DELETE.{stream}")
    await api(f"STREAM.{'CREATE' if key in MADE_SO else 'UPDATE'}.{stream}", {**config, key: value})


def test_every_remedy_contains_a_command() -> None:
    assert not [code for code, remedy in REMEDIES.items() if not re.search(r"`(nats|aiqueue) .+`", remedy)]


def test_a_plan_with_problems_is_plain_data(account: Account) -> None:
    problem = provision.Problem("S", "foreign-mirror", "text", "remedy")
    assert Plan((), (problem,)).lines() == ["! S: text -> remedy"]
    assert json.dumps(problem.line())
