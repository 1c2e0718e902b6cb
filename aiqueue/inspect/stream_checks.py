"""Doctor's checks of the streams: as declared, within limits, replicated, read and stored by nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from .. import units
from ..connection import Connection, Received
from ..errors import NotFound
from ..topology import Family, StreamSpec, provision
from .finding import WHEN_FULL, Finding, Subject, level_of_use, warn

REPLICA_AWAY_S = 4.0  # without a message from a replica, which sends one every second
PROBE_TENANT = "aiqueue-doctor"
PROBE_HEADERS = {"Nats-Expected-Stream": "aiqueue-doctor-stores-nothing"}  # each stream refuses it and answers
ANSWERS_S = 0.5  # how long the answers of servers behind a leaf connection are waited for
WRONG_STREAM = 10060  # the err_code of these answers


async def check_streams(subject: Subject) -> AsyncIterator[Finding]:
    """Check each declared stream."""
    plan = await provision.plan(subject.connection, subject.topology)
    for spec in subject.topology.streams.values():
        try:
            info = await subject.connection.api(f"STREAM.INFO.{spec.name}")
        except NotFound:
            yield warn(spec.name, "stream-missing", "is missing", level="fail")
            continue
        drift = [line for change in plan.changes if change.stream == spec.name for line in change.lines()]
        yield _describe_stream(spec, info, drift)
        for problem in plan.problems:
            if problem.stream == spec.name:
                yield Finding(spec.name, "fail", problem.text, problem.remedy, problem.code)
        if away := _replica_problem(info):
            yield warn(spec.name, "replica-away", away, level="fail")


def _describe_stream(spec: StreamSpec, info: dict[str, Any], drift: list[str]) -> Finding:
    config, state = info["config"], info["state"]
    copies, limit = config.get("num_replicas", 1), config.get("max_bytes", -1)
    leader = (info.get("cluster") or {}).get("leader") if copies > 1 else None
    bound = f" of {units.short_size(limit)}" if limit > 0 else ""
    count = state["messages"]
    text = (
        f"{config['storage']}, {copies} {'copy' if copies == 1 else 'copies'}{f', led by {leader}' if leader else ''}, "
        f"{count:,} {'message' if count == 1 else 'messages'}, {units.short_size(state['bytes'])}{bound}"
    )
    consumers, most = state.get("consumer_count", 0), config.get("max_consumers", -1)
    if drift:
        return warn(spec.name, "stream-drift", f"{text}; differs: {drift[0]}")
    # counters of former hours are to fill their stream, and make room for new ones
    if spec.role != "metrics" and (level := level_of_use(state["bytes"], limit)) != "ok":
        return warn(spec.name, "stream-full", text, level=level, advice=WHEN_FULL[spec.role])
    if (level := level_of_use(consumers, most)) != "ok":
        return warn(spec.name, "stream-consumers", f"{text}; {consumers:,} of {most:,} consumers", level=level)
    if config["storage"] == "memory":
        return warn(spec.name, "stream-memory", text, stream=spec.name)
    if limit <= 0 and spec.role in ("work", "inbox"):
        return warn(spec.name, "stream-unbounded", text)
    return Finding(spec.name, "ok", text)


def _replica_problem(info: dict[str, Any]) -> str:
    """Return what is wrong with the replicas of a stream, empty if nothing is."""
    cluster = info.get("cluster") or {}
    if "leader" not in cluster:
        return "has no leader: nothing can be stored or read" if cluster.get("replicas") else ""
    for each in cluster.get("replicas") or ():
        silent_s = each.get("active", 0) / 1e9
        if each.get("offline") or silent_s > REPLICA_AWAY_S:
            return f"its copy on {each['name']} is away for {silent_s:.0f} s"
        if not each.get("current"):
            return f"its copy on {each['name']} is behind"
    return ""


async def check_answers(subject: Subject) -> AsyncIterator[Finding]:
    """Check that one stream answers what is published for each family, and nobody else.

    Streams of a leaf's domain and of the hub's may have the same subjects: then each stores the job, and it runs twice.
    The published message names a stream that does not exist, so all of them refuse it.
    """
    families = list(subject.topology.families.values())
    for family, answers in zip(families, await _collect_answers(subject.connection, families), strict=True):
        refused = [each for each in answers if each is not None]
        published = f"what is published on ai.{family.name}.*"
        if len(refused) > 1:
            names = " and ".join(sorted(refused))
            text = f"{len(refused)} streams store {published} ({names}), such as a hub's and a leaf's: jobs run twice"
            yield warn(family.stream, "stored-twice", text, level="fail", stream=family.stream)
        if len(refused) < len(answers):
            text = f"a subscriber answers {published}: clients may take its answer for the stream's"
            yield warn(family.stream, "foreign-responder", text)


async def _collect_answers(connection: Connection, families: list[Family]) -> list[list[str | None]]:
    """Publish a message that no stream stores for each family. Return the names of the streams that refused it; None
    for an answer of something that is no stream.
    """
    answers: list[list[str | None]] = [[] for _ in families]
    subscriptions = []
    try:
        for family, found in zip(families, answers, strict=True):
            inbox = connection.new_inbox()
            subscriptions.append(await connection.subscribe(inbox, partial(_note, found)))
            await connection.publish(f"ai.{family.name}.{PROBE_TENANT}", headers=PROBE_HEADERS, reply=inbox)
        await asyncio.sleep(ANSWERS_S)
    finally:
        for subscription in subscriptions:
            await subscription.close()
    return answers


def _note(found: list[str | None], message: Received) -> None:
    if message.status is not None:
        return  # no responders: the stream is missing, which is a finding already
    try:
        answer = json.loads(message.data)
        is_stream = answer["error"]["err_code"] == WRONG_STREAM
        found.append(str(answer["stream"]) if is_stream else None)
    except (ValueError, KeyError, TypeError):
        found.append(None)
