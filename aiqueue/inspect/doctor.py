"""What the connected server does about the promises of docs/guarantees.md, and what is about to go wrong.

Reads only. One finding for each thing looked at, with what to do where it is not well.
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
NEAR, FULL = 0.8, 0.95  # of a limit
CLOCK_MAX_S = 1.0
DISK_LOW, DISK_OUT = 1024**3, 100 * 1024**2
LOOK_AGAIN_S = 1.0  # jobs that still wait then, although workers ask for them
SHOWN_MAX = 3
UNHEARD_S = 4.0  # a copy's silence; they speak every second
MONITOR_S = 3.0
SYNC_DEFAULT_S = 120.0  # nats-server's own


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `do` says what to do about it, where there is something."""

    check: str
    level: Level
    says: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined. `directory`: that of the embedded server, None for any other. `monitor`: the address of the
    server's monitoring, such as ``http://127.0.0.1:8222``.
    """

    connection: Connection
    topology: Topology
    directory: Path | None = None
    monitor: str | None = None


async def examine(subject: Subject) -> AsyncIterator[Finding]:
    """All findings, one after the other. What cannot be looked at is a finding too."""
    checks: dict[str, Callable[[Subject], AsyncIterator[Finding]]] = {
        "server": _server,
        "storage": _storage,
        "sync": _sync,
        "streams": _streams,
        "lanes": _lanes,
        "clock": _clock,
    }
    for name, check in checks.items():
        try:
            async for finding in check(subject):
                yield finding
        except AIQueueError as error:
            yield Finding(name, "fail", f"cannot be looked at: {error}")


async def _server(subject: Subject) -> AsyncIterator[Finding]:
    connection = subject.connection
    told = await connection.api("INFO")
    level = (told.get("api") or {}).get("level", 0)
    where = f"nats-server {connection.server_version} at {connection.server}, JetStream API level {level}"
    if level < API_LEVEL_MIN:
        yield Finding("server", "fail", where, "delays need message schedules: use nats-server 2.12 or newer")
    else:
        yield Finding("server", "ok", where)
    limit = connection.max_payload
    says = f"max_payload is {units.short_size(limit)}"
    if limit > PAYLOAD_WISE_MAX:
        wise = units.short_size(PAYLOAD_WISE_MAX)
        yield Finding("payload", "warn", says, f"above {wise} large messages delay all others: lower it")
    else:
        yield Finding("payload", "ok", says)


async def _storage(subject: Subject) -> AsyncIterator[Finding]:
    told = await subject.connection.api("INFO")
    limits = told.get("limits") or {}
    for kind in ("storage", "memory"):
        used, limit = told.get(kind, 0), limits.get(f"max_{kind}", -1)
        reserved = told.get(f"reserved_{kind}", 0)
        if kind == "memory" and not used and limit <= 0:
            continue
        bound = f"of {units.short_size(limit)}" if limit > 0 else "without a limit of the account"
        says = f"{units.short_size(used)} of {kind} used {bound}, {units.short_size(reserved)} set aside by streams"
        level = _share(used, limit)
        yield Finding(kind, level, says, "raise the account's limit, or purge" if level != "ok" else "")
    for kind in ("streams", "consumers"):
        used, limit = told.get(kind, 0), limits.get(f"max_{kind}", -1)
        if (level := _share(used, limit)) != "ok":
            yield Finding(kind, level, f"{used:,} of {limit:,} {kind} of the account", "raise the account's limit")
    if subject.directory is not None:
        free = shutil.disk_usage(subject.directory).free
        level = "fail" if free < DISK_OUT else "warn" if free < DISK_LOW else "ok"
        do = "" if level == "ok" else "make room: on a full disk a stream takes nothing until the server is restarted"
        yield Finding("disk", level, f"{units.short_size(free)} free in {subject.directory}", do)


async def _sync(subject: Subject) -> AsyncIterator[Finding]:
    """How much of what was acknowledged a power cut may take."""
    if subject.directory is not None:
        interval_s = SYNC_DEFAULT_S  # our own config states none
    elif subject.monitor:
        interval_s = await asyncio.to_thread(_sync_interval_s, subject.monitor)
    else:
        do = "give the monitoring address of a server: --monitor http://HOST:8222"
        yield Finding("sync", "warn", "how often the server syncs to disk is not known to clients", do)
        return
    if interval_s == 0:
        yield Finding("sync", "ok", "every write is synced before it is acknowledged")
        return
    says = f"synced every {units.short_duration(interval_s)}: a power cut may take what was acknowledged since"
    where = "of several servers at once " if subject.connection.cluster else ""
    how = "use a server of your own with" if subject.directory is not None else "set"
    do = f"fine where a power cut {where}may cost jobs; else {how} `sync_interval: always` in its jetstream block"
    yield Finding("sync", "warn", says, do)


def _sync_interval_s(monitor: str) -> float:
    """What a server's monitoring says: 0 is always. Raises BadInput."""
    if not monitor.startswith(("http://", "https://")):
        raise BadInput(f"--monitor {monitor}: an address such as http://127.0.0.1:8222")
    try:
        with urllib.request.urlopen(f"{monitor.rstrip('/')}/varz", timeout=MONITOR_S) as answer:  # noqa: S310
            config = json.load(answer)["jetstream"]["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--monitor {monitor}: no monitoring of a JetStream server answers there: {error}") from None
    return 0.0 if config.get("sync_always") else float(config.get("sync_interval", 0)) / 1e9


async def _streams(subject: Subject) -> AsyncIterator[Finding]:
    plan = await provision.plan(subject.connection, subject.topology)
    for spec in subject.topology.streams.values():
        try:
            info = await subject.connection.api(f"STREAM.INFO.{spec.name}")
        except NotFound:
            yield Finding(spec.name, "fail", "is not there", "`aiqueue apply` makes it")
            continue
        drift = [line for change in plan.changes if change.stream == spec.name for line in change.lines()]
        yield _stream(spec, info, drift)
        if problem := _replicas(info):
            yield Finding(
                spec.name, "fail", problem, "see to the server that is away; with half of them nothing is stored"
            )


def _stream(spec: StreamSpec, info: dict[str, Any], drift: list[str]) -> Finding:
    config, state = info["config"], info["state"]
    copies, limit = config.get("num_replicas", 1), config.get("max_bytes", -1)
    leader = (info.get("cluster") or {}).get("leader") if copies > 1 else None
    bound = f" of {units.short_size(limit)}" if limit > 0 else ""
    says = (
        f"{config['storage']}, {copies} {'copy' if copies == 1 else 'copies'}{f', led by {leader}' if leader else ''}, "
        f"{state['messages']:,} messages, {units.short_size(state['bytes'])}{bound}"
    )
    consumers, most = state.get("consumer_count", 0), config.get("max_consumers", -1)
    if drift:
        return Finding(
            spec.name, "warn", f"{says}; differs: {drift[0]}", "`aiqueue plan` shows all, `aiqueue apply` mends"
        )
    if (level := _share(state["bytes"], limit)) != "ok":
        return Finding(spec.name, level, says, _WHEN_FULL[spec.role])
    if (level := _share(consumers, most)) != "ok":
        return Finding(spec.name, level, f"{says}; {consumers:,} of {most:,} consumers", "raise its max_consumers")
    if config["storage"] == "memory":
        return Finding(spec.name, "warn", says, 'a restart of the server loses all of it: storage = "file" keeps it')
    if limit <= 0 and spec.role in ("work", "inbox"):
        return Finding(
            spec.name, "warn", says, "without max_bytes its jobs may use up the disk for everybody: state one"
        )
    return Finding(spec.name, "ok", says)


_WHEN_FULL = {
    "work": "more workers, or a larger max_bytes: full, it refuses jobs (StreamFull)",
    "inbox": "a larger max_bytes: full, it refuses messages",
    "journal": "a larger max_bytes or a shorter max_age: full, it drops the oldest results before their time",
    "dead": "replay or purge dead letters (`aiqueue dead`), or a larger max_bytes",
    "parked": "a larger max_bytes, or none: full, it drops the oldest parked jobs",
    "stranded": "run a worker: it takes the server's words on stranded jobs, of which the oldest are dropped now",
    "documents": "`aiqueue documents collect`, or a larger max_bytes: full, it refuses documents",
    "presence": "take agents off the roster (`aiqueue inbox rm`), or a larger max_bytes: full, it takes no new agent",
}


def _replicas(info: dict[str, Any]) -> str:
    cluster = info.get("cluster") or {}
    if "leader" not in cluster:
        return "has no leader: nothing can be stored or read" if cluster.get("replicas") else ""
    for each in cluster.get("replicas") or ():
        unheard_s = each.get("active", 0) / 1e9
        if each.get("offline") or unheard_s > UNHEARD_S:
            return f"its copy on {each['name']} is away for {unheard_s:.0f} s"
        if not each.get("current"):
            return f"its copy on {each['name']} is behind"
    return ""


async def _lanes(subject: Subject) -> AsyncIterator[Finding]:
    known: list[stats.LaneStats] = []
    for family in subject.topology.work_families:
        try:
            known += await stats.family(subject.connection, subject.topology, family.name)
        except NotFound:
            continue  # said of its stream already
    waiting = [lane for lane in known if lane.waiting]
    held = f"{len(known):,} lanes, {sum(lane.waiting for lane in known):,} jobs wait in {len(waiting):,} of them"
    yield Finding("lanes", "ok", held)
    near = [lane for lane in known if _share(lane.waiting + lane.in_flight, lane.limit) != "ok"]
    if near:
        do = "more workers, or a larger max_msgs_per_subject: full, a lane refuses jobs (LaneFull)"
        yield Finding("lanes near their limit", "warn", _named(near), do)
    alone = [lane for lane in waiting if not lane.pulls and not lane.in_flight]
    if alone:
        yield Finding(
            "lanes without a worker", "warn", _named(alone), "run a worker that handles their family and tenant"
        )
    if asked := [lane for lane in waiting if lane.pulls]:
        await asyncio.sleep(LOOK_AGAIN_S)
        now = [
            each
            for name in {lane.family for lane in asked}
            for each in await stats.family(subject.connection, subject.topology, name)
        ]
        before = {_key(lane): lane for lane in asked}
        stuck = [
            lane for lane in now
            if (former := before.get(_key(lane))) and lane.pulls and lane.waiting >= former.waiting > 0
        ]  # fmt: skip
        if stuck:
            do = "workers ask, and these are not delivered: jobs past max_deliver, or a consumer that is paused"
            yield Finding("stranded jobs", "warn", _named(stuck), do)


def _key(lane: stats.LaneStats) -> tuple[str, str, str]:
    return lane.family, lane.tenant, lane.priority


def _named(lanes: list[stats.LaneStats]) -> str:
    shown = [f"{lane.family} {lane.tenant}/{lane.priority} ({lane.waiting:,} wait)" for lane in lanes[:SHOWN_MAX]]
    more = f" and {len(lanes) - SHOWN_MAX} more" if len(lanes) > SHOWN_MAX else ""
    return ", ".join(shown) + more


async def _clock(subject: Subject) -> AsyncIterator[Finding]:
    """Deadlines and due times are of the client's clock, and judged by the worker's or the server's."""
    name = next(iter(subject.topology.streams))
    begun = time.time()
    try:
        told = timestamp((await subject.connection.api(f"STREAM.INFO.{name}"))["ts"])
    except NotFound:
        return
    off_s = told - (begun + time.time()) / 2
    says = f"the server's clock is {abs(off_s):.2f} s {'ahead of' if off_s > 0 else 'behind'} this one"
    if abs(off_s) > CLOCK_MAX_S:
        yield Finding("clock", "warn", says, "deadlines and delays are off by as much: synchronise the clocks")
    else:
        yield Finding("clock", "ok", says)


def _share(used: int, limit: int) -> Level:
    if limit <= 0 or used < NEAR * limit:
        return "ok"
    return "fail" if used >= FULL * limit else "warn"
