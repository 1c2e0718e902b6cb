"""What there is to see: families, lanes and single jobs, read from the server without changing anything.

The one read model: the command line and every other view show these classes and compute nothing of their own.
All counts are of one moment each and not of the same one: on a busy queue they may differ by a few jobs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import subjects
from ..connection import Connection, timestamp
from ..errors import BadInput, NotFound, Unavailable
from ..subjects import Lane
from ..topology import Family, Topology
from .lookup import JobStats, job

__all__ = ["FamilyStats", "JobStats", "LaneStats", "family", "job", "overview"]

AGED_LANES_MAX = 1_000  # lanes of one family whose oldest job is looked up, a request each
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class FamilyStats:
    """One family. `waiting`: stored and leased to nobody; `in_flight`: leased, or between two attempts;
    `redelivered`: those in flight that were delivered more than once. `lanes` are those with jobs or a consumer.

    `missing`: the server has no such stream, and the counts say nothing. Rates are jobs a second, None where no
    sample was taken; `dead` and `parked` are None where the server has no stream for them. `parked` jobs wait for a
    time, outside of their lanes. `size_limit_bytes` is what the stream may hold on the server now, None: without a
    limit.
    """

    family: str
    stream: str
    missing: bool = False
    waiting: int = 0
    in_flight: int = 0
    redelivered: int = 0
    oldest_age_s: float | None = None
    rate_in: float | None = None
    rate_done: float | None = None
    lanes: int = 0
    dead: int | None = None
    parked: int | None = None
    size_bytes: int = 0
    size_limit_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LaneStats:
    """One lane; tenant ``*`` where all tenants share it. `limit` is what it may hold, `in_flight_limit` what of it
    may be leased at once. `consumer`: the lane has one, so a worker has been there; `pulls`: open requests for its
    jobs, so one is there now. `oldest_age_s` is None without jobs, and past the first AGED_LANES_MAX lanes.
    """

    family: str
    tenant: str
    priority: str
    waiting: int
    in_flight: int
    redelivered: int
    oldest_age_s: float | None
    limit: int
    in_flight_limit: int
    consumer: bool
    pulls: int
    parked: int = 0


class _Sample(NamedTuple):
    at: float
    last_seq: int
    messages: int
    oldest_age_s: float | None
    size_bytes: int
    size_limit_bytes: int | None


@dataclass(slots=True)
class _Counts:
    """A lane's numbers while they are collected. `stored` counts jobs in flight too, not those that are parked."""

    stored: int = 0
    parked: int = 0
    in_flight: int = 0
    redelivered: int = 0
    consumer: Mapping[str, Any] | None = None

    @property
    def waiting(self) -> int:
        return max(0, self.stored - self.in_flight)


async def overview(connection: Connection, topology: Topology, *, sample_s: float = 0.5) -> list[FamilyStats]:
    """All families, in the order of their declaration; an inbox family's mailboxes count as lanes. It takes
    `sample_s` seconds, over which rates are measured (0: no rates). Raises Unavailable, AccessDenied.
    """
    looks = (_family(connection, topology, each, sample_s) for each in topology.families.values())
    return list(await asyncio.gather(*looks))


async def family(connection: Connection, topology: Topology, name: str) -> list[LaneStats]:
    """The lanes of a family that hold jobs, parked ones too, or have a consumer, by tenant, the highest priority first.

    Raises UnknownFamily, BadInput for a family without lanes, NotFound where its stream is missing.
    """
    declared = topology.family(name)
    if declared.role != "work":
        raise BadInput(f"family {name} has mailboxes and no lanes")
    counts = await _lanes(connection, declared)
    await _add_parked(connection, topology, declared, counts)
    order = {priority: place for place, priority in enumerate(declared.priorities)}
    lanes = sorted(counts, key=lambda lane: (lane.tenant, order.get(lane.priority, len(order)), lane.priority))
    ages = await _ages(connection, declared, [lane for lane in lanes if counts[lane].stored])
    found = []
    for lane in lanes:
        count = counts[lane]
        config = count.consumer["config"] if count.consumer else {}
        found.append(
            LaneStats(
                family=name, tenant=lane.tenant, priority=lane.priority, waiting=count.waiting,
                in_flight=count.in_flight, redelivered=count.redelivered, oldest_age_s=ages.get(lane),
                limit=declared.max_msgs_per_subject,
                in_flight_limit=config.get("max_ack_pending", declared.max_ack_pending),
                consumer=count.consumer is not None, pulls=(count.consumer or {}).get("num_waiting", 0),
                parked=count.parked,
            )
        )  # fmt: skip
    return found


async def _family(connection: Connection, topology: Topology, declared: Family, sample_s: float) -> FamilyStats:
    dead = await _count(connection, topology.dead_stream.name, subjects.dead(declared.name))
    parked = None
    if declared.role == "work":
        parked = await _count(connection, topology.parked_stream.name, _parked_filter(declared))
    try:
        first = await _sample(connection, declared.stream)
        counts = await _lanes(connection, declared)
        if sample_s > 0:
            await asyncio.sleep(sample_s)
            last = await _sample(connection, declared.stream)
        else:
            last = first
    except NotFound:
        return FamilyStats(declared.name, declared.stream, missing=True, dead=dead, parked=parked)
    rate_in = rate_done = None
    if last.at > first.at:
        came = max(0, last.last_seq - first.last_seq)
        rate_in = came / (last.at - first.at)
        rate_done = max(0, came - (last.messages - first.messages)) / (last.at - first.at)
    in_flight = sum(each.in_flight for each in counts.values())
    return FamilyStats(
        family=declared.name,
        stream=declared.stream,
        waiting=max(0, last.messages - in_flight),
        in_flight=in_flight,
        redelivered=sum(each.redelivered for each in counts.values()),
        oldest_age_s=last.oldest_age_s,
        rate_in=rate_in,
        rate_done=rate_done,
        lanes=len(counts),
        dead=dead,
        parked=parked,
        size_bytes=last.size_bytes,
        size_limit_bytes=last.size_limit_bytes,
    )


async def _sample(connection: Connection, stream: str) -> _Sample:
    info = await connection.api(f"STREAM.INFO.{stream}")
    state, at = info["state"], timestamp(info["ts"])  # the server's clock on both sides: ours may differ
    age_s = max(0.0, at - timestamp(state["first_ts"])) if state["messages"] else None
    limit = info["config"].get("max_bytes", -1)
    return _Sample(at, state["last_seq"], state["messages"], age_s, state["bytes"], limit if limit > 0 else None)


async def _lanes(connection: Connection, declared: Family) -> dict[Lane, _Counts]:
    counts: dict[Lane, _Counts] = {}
    for subject, stored in (await _subjects(connection, declared.stream, f"ai.{declared.name}.>")).items():
        lane = subjects.parse_lane(subject)
        if lane is not None:
            shared = declared.lanes == "shared"
            counts.setdefault(lane._replace(tenant="*") if shared else lane, _Counts()).stored += stored
    async for info in _consumers(connection, declared.stream):
        lane = declared.lane_of(info["name"])
        if lane is None:
            continue  # somebody else's
        count = counts.setdefault(lane, _Counts())
        count.consumer = info
        count.in_flight = info.get("num_ack_pending", 0)
        count.redelivered = info.get("num_redelivered", 0)
    return counts


async def _add_parked(
    connection: Connection, topology: Topology, declared: Family, counts: dict[Lane, _Counts]
) -> None:
    try:
        found = await _subjects(connection, topology.parked_stream.name, _parked_filter(declared))
    except NotFound:
        return
    for subject, stored in found.items():
        if (place := subjects.parse_parked(subject)) is not None:
            lane = place.lane._replace(tenant="*") if declared.lanes == "shared" else place.lane
            counts.setdefault(lane, _Counts()).parked += stored


def _parked_filter(declared: Family) -> str:
    return subjects.parked(Lane(declared.name, "*", "*"), due=False).replace(".at.", ".*.", 1)


async def _subjects(connection: Connection, stream: str, wanted: str) -> dict[str, int]:
    """How many messages a stream holds on each subject, page by page."""
    found: dict[str, int] = {}
    while True:
        info = await connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": wanted, "offset": len(found)})
        page: dict[str, int] = info["state"].get("subjects") or {}
        found |= page
        if not page or len(found) >= info.get("total", 0):
            return found


async def _consumers(connection: Connection, stream: str) -> AsyncIterator[dict[str, Any]]:
    """The stream's consumers, page by page: the server gives 256 at a time."""
    offset = 0
    while True:
        page = await connection.api(f"CONSUMER.LIST.{stream}", {"offset": offset})
        found = page.get("consumers") or []
        for each in found:
            yield each
        offset += len(found)
        if not found or offset >= page["total"]:
            return


async def _ages(connection: Connection, declared: Family, lanes: Iterable[Lane]) -> dict[Lane, float]:
    ages: dict[Lane, float] = {}
    gate = asyncio.Semaphore(AT_ONCE)
    now = timestamp((await connection.api(f"STREAM.INFO.{declared.stream}"))["ts"])

    async def look(lane: Lane) -> None:
        request = {"seq": 1, "next_by_subj": subjects.lane(*lane)}
        async with gate:
            try:
                answer = await connection.api(f"STREAM.MSG.GET.{declared.stream}", request)
            except NotFound:
                return  # done meanwhile
        ages[lane] = max(0.0, now - timestamp(answer["message"]["time"]))

    await asyncio.gather(*(look(lane) for lane in list(lanes)[:AGED_LANES_MAX]))
    return ages


async def _count(connection: Connection, stream: str, wanted: str) -> int | None:
    """How many messages match, None where the stream is missing: the first one says how many follow."""
    request = {"seq": 1, "batch": 1, "next_by_subj": wanted}
    subject = f"$JS.API.DIRECT.GET.{stream}"
    try:
        answer = await connection.request(subject, json.dumps(request).encode())
    except Unavailable as error:
        if "no responders" in str(error):
            return None
        raise
    if answer.status is not None:
        return 0
    following = (answer.headers or {}).get("Nats-Num-Pending", "")
    return 1 + (int(following) if following.isdigit() else 0)
