"""Checks what the connected server does for the promises of docs/guarantees.md, and what is about to go wrong.

Reads only. Each check yields findings: what happened, to what, and what to do.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import units
from ..connection import Connection, timestamp
from ..errors import AIQueueError, BadInput, NotFound
from ..topology import StreamSpec, Topology, provision
from . import stats

Level = Literal["ok", "warn", "fail"]

API_LEVEL_MIN = 2  # message schedules: nats-server 2.12
PAYLOAD_WISE_MAX = 8 * 1024 * 1024
NEAR, FULL = 0.8, 0.95  # shares of a limit
CLOCK_SKEW_MAX_S = 1.0
DISK_LOW_BYTES, DISK_OUT_BYTES = 1024**3, 100 * 1024**2
REREAD_AFTER_S = 1.0  # jobs that are still pending then, although workers pull, are not delivered
LANES_SHOWN_MAX = 3
REPLICA_AWAY_S = 4.0  # without a message from a replica, which sends one every second
MONITOR_TIMEOUT_S = 3.0
SYNC_DEFAULT_S = 120.0  # nats-server's own


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, and what to do about it. `remedy` is empty if nothing is to be done."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What to examine. `directory`: the embedded server's, None for any other server. `monitor`: the address of the
    server's monitoring, such as ``http://127.0.0.1:8222``.
    """

    connection: Connection
    topology: Topology
    directory: Path | None = None
    monitor: str | None = None


async def examine(subject: Subject) -> AsyncIterator[Finding]:
    """Run all checks, and yield their findings. A check that cannot be made is a finding too."""
    checks: dict[str, Callable[[Subject], AsyncIterator[Finding]]] = {
        "server": _check_server,
        "storage": _check_storage,
        "sync": _check_sync,
        "streams": _check_streams,
        "lanes": _check_lanes,
        "clock": _check_clock,
    }
    for name, check in checks.items():
        try:
            async for finding in check(subject):
                yield finding
        except AIQueueError as error:
            yield Finding(name, "fail", f"cannot be checked: {error}")


async def _check_server(subject: Subject) -> AsyncIterator[Finding]:
    connection = subject.connection
    info = await connection.api("INFO")
    level = (info.get("api") or {}).get("level", 0)
    where = f"nats-server {connection.server_version} at {connection.server}, JetStream API level {level}"
    if level < API_LEVEL_MIN:
        yield Finding("server", "fail", where, "use nats-server 2.12 or newer: delays need its message schedules")
    else:
        yield Finding("server", "ok", where)
    limit = connection.max_payload
    text = f"max_payload is {units.short_size(limit)}"
    if limit > PAYLOAD_WISE_MAX:
        wise = units.short_size(PAYLOAD_WISE_MAX)
        yield Finding("payload", "warn", text, f"lower it: above {wise}, large messages delay all others")
    else:
        yield Finding("payload", "ok", text)


async def _check_storage(subject: Subject) -> AsyncIterator[Finding]:
    info = await subject.connection.api("INFO")
    limits = info.get("limits") or {}
    for kind in ("storage", "memory"):
        used, limit = info.get(kind, 0), limits.get(f"max_{kind}", -1)
        reserved = info.get(f"reserved_{kind}", 0)
        if kind == "memory" and not used and limit <= 0:
            continue
        bound = f"of {units.short_size(limit)}" if limit > 0 else "without a limit of the account"
        text = f"{units.short_size(used)} of {kind} used {bound}, {units.short_size(reserved)} reserved by streams"
        level = _level_of_use(used, limit)
        yield Finding(kind, level, text, "raise the account's limit, or purge streams" if level != "ok" else "")
    for kind in ("streams", "consumers"):
        used, limit = info.get(kind, 0), limits.get(f"max_{kind}", -1)
        if (level := _level_of_use(used, limit)) != "ok":
            yield Finding(kind, level, f"{used:,} of {limit:,} {kind} of the account", "raise the account's limit")
    if subject.directory is not None:
        free = shutil.disk_usage(subject.directory).free
        level = "fail" if free < DISK_OUT_BYTES else "warn" if free < DISK_LOW_BYTES else "ok"
        remedy = (
            "" if level == "ok" else "free disk space: once it is full, streams store nothing until a server restart"
        )
        yield Finding("disk", level, f"{units.short_size(free)} free in {subject.directory}", remedy)


async def _check_sync(subject: Subject) -> AsyncIterator[Finding]:
    """Check how often the server syncs to disk: a power cut loses what was acknowledged since."""
    if subject.directory is not None:
        interval_s = SYNC_DEFAULT_S  # the embedded server's configuration sets none
    elif subject.monitor:
        interval_s = await asyncio.to_thread(_read_sync_interval_s, subject.monitor)
    else:
        remedy = "pass the server's monitoring address: --monitor http://HOST:8222"
        yield Finding("sync", "warn", "clients cannot see how often the server syncs to disk", remedy)
        return
    if interval_s == 0:
        yield Finding("sync", "ok", "every write is synced before it is acknowledged")
        return
    text = f"synced every {units.short_duration(interval_s)}: a power cut may lose what was acknowledged since"
    where = "of several servers at once " if subject.connection.cluster else ""
    how = "run your own server with" if subject.directory is not None else "set"
    remedy = f"if a power cut {where}may not lose jobs, {how} `sync_interval: always` in its jetstream block"
    yield Finding("sync", "warn", text, remedy)


def _read_sync_interval_s(monitor: str) -> float:
    """Return the sync interval that a server's monitoring reports; 0 for every write. Raises BadInput."""
    if not monitor.startswith(("http://", "https://")):
        raise BadInput(f"--monitor {monitor}: must be an address such as http://127.0.0.1:8222")
    try:
        with urllib.request.urlopen(f"{monitor.rstrip('/')}/varz", timeout=MONITOR_TIMEOUT_S) as answer:  # noqa: S310
            config = json.load(answer)["jetstream"]["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--monitor {monitor}: no monitoring of a JetStream server answers there: {error}") from None
    return 0.0 if config.get("sync_always") else float(config.get("sync_interval", 0)) / 1e9


async def _check_streams(subject: Subject) -> AsyncIterator[Finding]:
    plan = await provision.plan(subject.connection, subject.topology)
    for spec in subject.topology.streams.values():
        try:
            info = await subject.connection.api(f"STREAM.INFO.{spec.name}")
        except NotFound:
            yield Finding(spec.name, "fail", "is missing", "run `aiqueue apply`, which creates it")
            continue
        drift = [line for change in plan.changes if change.stream == spec.name for line in change.lines()]
        yield _stream_finding(spec, info, drift)
        if problem := _replica_problem(info):
            remedy = "bring back the server that is away: without a majority of them nothing is stored"
            yield Finding(spec.name, "fail", problem, remedy)


def _stream_finding(spec: StreamSpec, info: dict[str, Any], drift: list[str]) -> Finding:
    config, state = info["config"], info["state"]
    copies, limit = config.get("num_replicas", 1), config.get("max_bytes", -1)
    leader = (info.get("cluster") or {}).get("leader") if copies > 1 else None
    bound = f" of {units.short_size(limit)}" if limit > 0 else ""
    messages = f"{state['messages']:,} message{'' if state['messages'] == 1 else 's'}"
    text = (
        f"{config['storage']}, {copies} {'copy' if copies == 1 else 'copies'}{f', led by {leader}' if leader else ''}, "
        f"{messages}, {units.short_size(state['bytes'])}{bound}"
    )
    consumers, most = state.get("consumer_count", 0), config.get("max_consumers", -1)
    if drift:
        remedy = "`aiqueue plan` shows all differences, `aiqueue apply` removes them"
        return Finding(spec.name, "warn", f"{text}; differs: {drift[0]}", remedy)
    if (level := _level_of_use(state["bytes"], limit)) != "ok":
        return Finding(spec.name, level, text, _WHEN_FULL[spec.role])
    if (level := _level_of_use(consumers, most)) != "ok":
        return Finding(spec.name, level, f"{text}; {consumers:,} of {most:,} consumers", "raise its max_consumers")
    if config["storage"] == "memory":
        return Finding(spec.name, "warn", text, 'set storage = "file": a restart of the server loses all of it')
    if limit <= 0 and spec.role in ("work", "inbox"):
        remedy = "set max_bytes: without it the stream's messages may fill the disk of all streams"
        return Finding(spec.name, "warn", text, remedy)
    return Finding(spec.name, "ok", text)


_WHEN_FULL = {
    "work": "run more workers, or raise max_bytes: a full stream refuses jobs (StreamFull)",
    "inbox": "raise max_bytes: a full stream refuses messages",
    "journal": "raise max_bytes, or lower max_age: a full stream drops the oldest results before their time",
    "dead": "replay or purge dead letters (`aiqueue dead`), or raise max_bytes",
    "parked": "raise max_bytes, or remove it: a full stream drops the oldest parked jobs",
    "stranded": "run a worker, which reads these notices of jobs past max_deliver: a full stream drops the oldest",
    "documents": "run `aiqueue documents collect`, or raise max_bytes: a full stream refuses documents",
    "presence": "remove agents (`aiqueue inbox rm`), or raise max_bytes: a full stream refuses new agents",
}


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


async def _check_lanes(subject: Subject) -> AsyncIterator[Finding]:
    known: list[stats.LaneStats] = []
    for family in subject.topology.work_families:
        try:
            known += await stats.lanes(subject.connection, subject.topology, family.name)
        except NotFound:
            continue  # its stream has a finding already
    busy = [lane for lane in known if lane.pending]
    count = sum(lane.pending for lane in known)
    yield Finding("lanes", "ok", f"{len(known):,} lanes, {count:,} jobs are pending in {len(busy):,} of them")
    near = [lane for lane in known if _level_of_use(lane.pending + lane.in_flight, lane.limit) != "ok"]
    if near:
        remedy = "run more workers, or raise max_msgs_per_subject: a full lane refuses jobs (LaneFull)"
        yield Finding("lanes near their limit", "warn", _name_lanes(near), remedy)
    unserved = [lane for lane in busy if not lane.pulls and not lane.in_flight]
    if unserved:
        remedy = "run a worker that handles their family and tenant"
        yield Finding("lanes without a worker", "warn", _name_lanes(unserved), remedy)
    if pulled := [lane for lane in busy if lane.pulls]:
        await asyncio.sleep(REREAD_AFTER_S)
        now = [
            each
            for name in {lane.family for lane in pulled}
            for each in await stats.lanes(subject.connection, subject.topology, name)
        ]
        before = {_key(lane): lane for lane in pulled}
        stuck = [
            lane for lane in now
            if (former := before.get(_key(lane))) and lane.pulls and lane.pending >= former.pending > 0
        ]  # fmt: skip
        if stuck:
            remedy = "look for jobs past max_deliver, or a paused consumer: workers pull, and nothing is delivered"
            yield Finding("undelivered jobs", "warn", _name_lanes(stuck), remedy)


def _key(lane: stats.LaneStats) -> tuple[str, str, str]:
    return lane.family, lane.tenant, lane.priority


def _name_lanes(lanes: list[stats.LaneStats]) -> str:
    shown = [
        f"{lane.family} {lane.tenant}/{lane.priority} ({lane.pending:,} pending)" for lane in lanes[:LANES_SHOWN_MAX]
    ]
    more = f" and {len(lanes) - LANES_SHOWN_MAX} more" if len(lanes) > LANES_SHOWN_MAX else ""
    return ", ".join(shown) + more


async def _check_clock(subject: Subject) -> AsyncIterator[Finding]:
    """Check this clock against the server's: clients set deadlines and due times, workers and the server apply them."""
    name = next(iter(subject.topology.streams))
    before = time.time()
    try:
        server_time = timestamp((await subject.connection.api(f"STREAM.INFO.{name}"))["ts"])
    except NotFound:
        return
    ahead_s = server_time - (before + time.time()) / 2
    text = f"the server's clock is {abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'} this one"
    if abs(ahead_s) > CLOCK_SKEW_MAX_S:
        yield Finding("clock", "warn", text, "synchronise the clocks: deadlines and delays are off by as much")
    else:
        yield Finding("clock", "ok", text)


def _level_of_use(used: int, limit: int) -> Level:
    """Return how near a limit is; a limit of 0 or less is none."""
    if limit <= 0 or used < NEAR * limit:
        return "ok"
    return "fail" if used >= FULL * limit else "warn"
