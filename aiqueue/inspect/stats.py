"""Reads the state of families, lanes and single jobs from the server, and changes nothing.

The one read model: the command line and every other view show these classes and compute nothing of their own.
Each count is of its own moment: on a busy queue, counts that belong together may differ by a few jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import subjects
from ..connection import Connection, timestamp
from ..enqueue import has_listeners
from ..errors import BadInput, NotFound
from ..lanes import ActivePauses, Pause, has_line
from ..subjects import Lane
from ..topology import Family, Topology
from .keys import read_keys
from .lookup import JobStats, job
from .message_counts import count_messages
from .pauses import read_pauses_if_allowed
from .records import read_records_if_allowed
from .stream_reads import StreamSample, count_subjects, list_consumers, sample_stream

__all__ = ["FamilyStats", "JobStats", "LaneStats", "Samples", "family_with_lanes", "job", "lanes", "overview"]

AGED_LANES_MAX = 1_000  # lanes of one family whose oldest job is read, one request each
ASKED_LANES_MAX = 16  # lanes of one family that are asked for their oldest job if only the oldest of all counts
REQUESTS_AT_ONCE = 16
FIRST_BATCH = 16  # jobs read at once to find the oldest pending one
PAUSED_NS = 5_000_000_000  # a shorter pause is a worker's, which is about to remove the consumer


@dataclass(frozen=True, slots=True)
class FamilyStats:
    """One family.

    - `missing`: the server has no such stream. What is read from it is 0 or None.
    - `pending`: jobs in their lanes that no worker holds. `in_flight`: jobs that a worker holds, or that wait in their
      lane for the next attempt. `redelivered`: jobs in flight that were delivered more than once.
    - `parked`: jobs that wait for their time, outside of their lanes. `dead`: dead letters. None: no such stream.
    - `oldest_age_s`: age of the oldest pending job, in seconds. None: no job is pending. `lanes`: how many have jobs or
      a consumer.
    - `rate_in`, `rate_done`: jobs a second that were stored and that ended. None: not measured.
    - `size_bytes`: what the stream stores. `size_limit_bytes`: its limit on the server; None: no limit.
    - `partial`: a cluster has not reported all consumers, so `in_flight` may be low and `pending` high; or one of its
      servers that is behind has counted `parked` or `dead`.
    - `pauses`: of the family, and of tenants and kinds in it. Empty also if this user may not read them.
    """

    family: str
    stream: str
    missing: bool = False
    pending: int = 0
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
    partial: bool = False
    pauses: tuple[Pause, ...] = ()


@dataclass(frozen=True, slots=True)
class LaneStats:
    """One lane; tenant ``*`` if all tenants share it. `pending`, `in_flight`, `redelivered`, `parked`: as of families.

    - `limit`: how many jobs it may hold. `in_flight_limit`: how many in flight. `limit_key`: the field of `key`.
    - `consumer`: the lane has one, so a worker has served it. `pulls`: open pull requests, so a worker serves it now.
    - `oldest_age_s`: age of the oldest pending job, in seconds. None: no job is pending. Also None for lanes after the
      first AGED_LANES_MAX.
    - `listening`: a worker of the family waits for news of lanes, of this one too unless it serves other tenants. None:
      not known, because all lanes are busy or this user may not ask.
    - `in_line`: a worker that serves it has more lanes with jobs than it pulls on at a time; they take turns.
    - `pause`: all its jobs are paused, by `aiqueue pause`. `paused`: somebody has paused its consumer, by `nats`. In
      both cases nothing is delivered.
    - `partial`: a cluster has not reported its consumer, so `in_flight`, `redelivered` and `pulls` may be low.
    - `key`: its jobs have this value of the field `limit_key`, such as "gpt-4o" of "model", for which a limit or a
      pause holds. Workers pull only what the limit allows. `key_hash`: how its subject names the value; "rest" for the
      lane of all values for which the tenant has no lane left, which has no `key`. All three are empty for other
      lanes, `key` also if nothing names the value any more.
    """

    family: str
    tenant: str
    priority: str
    pending: int
    in_flight: int
    redelivered: int
    oldest_age_s: float | None
    limit: int
    in_flight_limit: int
    consumer: bool
    pulls: int
    parked: int = 0
    listening: bool | None = None
    paused: bool = False
    partial: bool = False
    pause: Pause | None = None
    limit_key: str = ""
    key: str = ""
    key_hash: str = ""
    in_line: bool = False

    def __str__(self) -> str:
        """Return its names, such as "llm.calls acme/normal, model gpt-4o"."""
        lane = f"{self.family} {self.tenant}/{self.priority}"
        return f"{lane}, {self.shown_key}" if self.key_hash else lane

    @property
    def shown_key(self) -> str:
        """The key for people, such as "model gpt-4o"; empty for a lane without one."""
        if not self.key_hash:
            return ""
        name = self.limit_key or "key"
        if self.key_hash == subjects.REST:
            return f"{name} (others)"
        return f"{name} {self.key or f'#{self.key_hash[:8]}'}"

    @property
    def waits_in_line(self) -> bool:
        """Whether a worker is there, and pulls nothing although jobs are pending: other lanes have their turn."""
        return bool(self.in_line and not self.key_hash and self.pending and not self.pulls and not self.in_flight)

    @property
    def waits_for_limit(self) -> bool:
        """Whether a worker is there, and pulls nothing although jobs are pending: the limit of the key is reached."""
        return bool(self.key_hash and self.pending and not self.pulls and not self.in_flight and self.listening)


@dataclass(slots=True)
class _LaneCounts:
    """The numbers of a lane while they are collected. `stored` includes jobs in flight, and not parked ones."""

    stored: int = 0
    parked: int = 0
    in_flight: int = 0
    redelivered: int = 0
    consumer: Mapping[str, Any] | None = None
    partial: bool = False

    @property
    def pending(self) -> int:
        return max(0, self.stored - self.in_flight)

    @property
    def first_pending_seq(self) -> int:
        """The first sequence that no worker can have been given. Jobs that wait for another delivery are in flight."""
        return int(self.consumer["delivered"]["stream_seq"]) + 1 if self.consumer is not None else 1


Samples = MutableMapping[str, StreamSample]
ChooseAged = Callable[[Sequence[LaneStats]], Iterable[LaneStats]]


async def overview(
    connection: Connection, topology: Topology, *, sample_s: float = 0.5, samples: Samples | None = None,
    names: Collection[str] | None = None,
) -> list[FamilyStats]:  # fmt: skip
    """Return the families, of these names or all (None), in the order of their declaration. The inboxes of an inbox
    family count as lanes.

    Takes `sample_s` seconds, over which rates are measured (0: no rates). With `samples`, an empty dict for the first
    call, rates are measured since the call before, without waiting. Raises Unavailable, AccessDenied.
    """
    families = [each for each in topology.families.values() if names is None or each.name in names]
    reads = (_read_family(connection, topology, each, sample_s, samples) for each in families)
    pauses, found = await asyncio.gather(read_pauses_if_allowed(connection, topology), asyncio.gather(*reads))
    return [replace(each, pauses=tuple(one for one in pauses if one.family == each.family)) for each in found]


async def lanes(connection: Connection, topology: Topology, family_name: str) -> list[LaneStats]:
    """Return the lanes of a family that have jobs, parked ones too, or a consumer.

    Sorted by tenant, then by priority, the highest first, then by key. Raises UnknownFamily, BadInput for a family
    without lanes, NotFound if its stream is missing.
    """
    return (await family_with_lanes(connection, topology, family_name))[1]


async def family_with_lanes(
    connection: Connection,
    topology: Topology,
    family_name: str,
    *,
    samples: Samples | None = None,
    choose_aged: ChooseAged = lambda found: found,
) -> tuple[FamilyStats, list[LaneStats]]:
    """Return a family and its lanes, as `overview` and `lanes` do, of one moment and for the price of the lanes.

    `choose_aged`: gets the lanes without ages, and says whose oldest job is read, one request each; at most the first
    AGED_LANES_MAX of them. Raises as `lanes`.
    """
    family = topology.family(family_name)
    if family.role != "work":
        raise BadInput(f"family {family_name} has inboxes and no lanes: name a family of jobs")
    aside, counts = await asyncio.gather(_count_aside(connection, topology, family), _count_lanes(connection, family))
    sample = await sample_stream(connection, family.stream)
    oldest_age_s, pauses = await asyncio.gather(
        _read_oldest_age(connection, family, counts, sample.at), read_pauses_if_allowed(connection, topology)
    )
    before = sample if samples is None else _exchange(samples, family, sample)
    stats = _make_family(family, before, sample, counts, oldest_age_s, aside)
    stats = replace(stats, pauses=tuple(each for each in pauses if each.family == family.name))
    await _add_parked(connection, topology, family, counts)
    found = await _make_lanes(connection, topology, family, counts, pauses)
    names = {_lane_of(each): each for each in found}
    chosen = [_lane_of(each) for each in choose_aged(found)]
    ages = await _read_oldest_ages(connection, family, counts, chosen, sample.at)
    return stats, [replace(each, oldest_age_s=ages.get(lane)) for lane, each in names.items()]


def _lane_of(found: LaneStats) -> Lane:
    return Lane(found.family, found.tenant, found.priority, found.key_hash)


async def _make_lanes(
    connection: Connection, topology: Topology, family: Family, counts: Mapping[Lane, _LaneCounts],
    pauses: Sequence[Pause],
) -> list[LaneStats]:  # fmt: skip
    """Return the lanes in order, without ages."""
    order = {priority: position for position, priority in enumerate(family.priorities)}
    keys = await read_keys(connection, topology, family, {lane: count.stored for lane, count in counts.items()})
    ordered = sorted(
        counts,
        key=lambda lane: (
            lane.tenant, order.get(lane.priority, len(order)), lane.priority, keys.get(lane.key, lane.key)
        ),
    )  # fmt: skip
    quiet = {bool(lane.key) for lane, count in counts.items() if not count.partial and not count.in_flight}
    listening = {has_key: await has_listeners(connection, family, has_key=has_key) for has_key in quiet}
    active = ActivePauses(pauses)
    records = await read_records_if_allowed(connection, topology) if quiet else []
    found = []
    for lane in ordered:
        count = counts[lane]
        config = count.consumer["config"] if count.consumer else {}
        found.append(
            LaneStats(
                family=family.name, tenant=lane.tenant, priority=lane.priority, pending=count.pending,
                in_flight=count.in_flight, redelivered=count.redelivered, oldest_age_s=None,
                limit=family.max_msgs_per_subject,
                in_flight_limit=config.get("max_ack_pending", family.max_ack_pending),
                consumer=count.consumer is not None, pulls=(count.consumer or {}).get("num_waiting", 0),
                parked=count.parked, listening=listening.get(bool(lane.key)), partial=count.partial,
                paused=(count.consumer or {}).get("pause_remaining", 0) > PAUSED_NS, pause=active.of_lane(lane),
                limit_key=(lane.key and family.limit_key) or "", key=keys.get(lane.key, ""), key_hash=lane.key,
                in_line=has_line(records, family.name, lane.tenant),
            )
        )  # fmt: skip
    return found


async def _read_family(
    connection: Connection, topology: Topology, family: Family, sample_s: float, samples: Samples | None
) -> FamilyStats:
    # asked at once: then the server is not idle while an answer is on its way, and 256 consumers are an answer
    aside, read = await asyncio.gather(
        _count_aside(connection, topology, family),
        _read_stream(connection, family, sample_s if samples is None else 0),
    )
    if read is None:
        return FamilyStats(
            family.name, family.stream, missing=True, dead=aside.dead, parked=aside.parked, partial=aside.behind
        )
    first, last, counts, oldest_age_s = read
    if samples is not None:
        first = _exchange(samples, family, last)
    return _make_family(family, first, last, counts, oldest_age_s, aside)


class _Aside(NamedTuple):
    """Jobs of a family outside of its stream. `behind`: a server of a cluster has counted that lacks changes."""

    dead: int | None
    parked: int | None
    behind: bool


async def _count_aside(connection: Connection, topology: Topology, family: Family) -> _Aside:
    dead = count_messages(connection, topology.dead_stream.name, subjects.dead(family.name))
    if family.role != "work":
        found = await dead
        return _Aside(found.messages, None, found.behind)
    parked = count_messages(connection, topology.parked_stream.name, _parked_filter(family))
    found, waiting = await asyncio.gather(dead, parked)
    return _Aside(found.messages, waiting.messages, found.behind or waiting.behind)


def _exchange(samples: Samples, family: Family, sample: StreamSample) -> StreamSample:
    """Keep a sample, and return the one before it; itself if there is none."""
    before = samples.get(family.stream, sample)
    samples[family.stream] = sample
    return before


def _make_family(
    family: Family, first: StreamSample, last: StreamSample, counts: Mapping[Lane, _LaneCounts],
    oldest_age_s: float | None, aside: _Aside,
) -> FamilyStats:  # fmt: skip
    """Return the numbers of a family. Rates are those between the samples."""
    rate_in = rate_done = None
    if last.at > first.at:
        came = max(0, last.last_seq - first.last_seq)
        rate_in = came / (last.at - first.at)
        rate_done = max(0, came - (last.messages - first.messages)) / (last.at - first.at)
    in_flight = sum(each.in_flight for each in counts.values())
    return FamilyStats(
        family=family.name,
        stream=family.stream,
        pending=max(0, last.messages - in_flight),
        in_flight=in_flight,
        redelivered=sum(each.redelivered for each in counts.values()),
        oldest_age_s=oldest_age_s,
        rate_in=rate_in,
        rate_done=rate_done,
        lanes=len(counts),
        dead=aside.dead,
        parked=aside.parked,
        size_bytes=last.size_bytes,
        size_limit_bytes=last.size_limit_bytes,
        partial=aside.behind or any(each.partial for each in counts.values()),
    )


async def _read_stream(
    connection: Connection, family: Family, sample_s: float
) -> tuple[StreamSample, StreamSample, dict[Lane, _LaneCounts], float | None] | None:
    """Return two samples that are `sample_s` seconds apart, the lanes, and the age of the oldest pending job.

    None: the stream is missing.
    """
    try:
        first, counts = await asyncio.gather(sample_stream(connection, family.stream), _count_lanes(connection, family))
        oldest_age_s = await _read_oldest_age(connection, family, counts, first.at)
        if sample_s <= 0:
            return first, first, counts, oldest_age_s
        await asyncio.sleep(sample_s)
        return first, await sample_stream(connection, family.stream), counts, oldest_age_s
    except NotFound:
        return None


async def _count_lanes(connection: Connection, family: Family) -> dict[Lane, _LaneCounts]:
    """Return the numbers of all lanes that have stored jobs or a consumer, without parked jobs."""
    counts: dict[Lane, _LaneCounts] = {}

    async def add_stored() -> None:
        for subject, stored in (await count_subjects(connection, family.stream, f"ai.{family.name}.>")).items():
            lane = subjects.parse_lane(subject)
            if lane is not None:
                shared = family.lanes == "shared"
                counts.setdefault(lane._replace(tenant="*") if shared else lane, _LaneCounts()).stored += stored

    async def add_consumers() -> None:
        async for name, info in list_consumers(connection, family.stream):
            lane = family.lane_of(name)
            if lane is None:
                continue  # not a lane's
            count = counts.setdefault(lane, _LaneCounts())
            if info is None:
                count.partial = True
                continue
            count.consumer = info
            count.in_flight = info.get("num_ack_pending", 0)
            count.redelivered = info.get("num_redelivered", 0)

    await asyncio.gather(add_stored(), add_consumers())
    return counts


async def count_pending(connection: Connection, family: Family) -> dict[Lane, int]:
    """Return how many jobs of each lane no worker holds. Raises NotFound if the family's stream is missing."""
    return {lane: count.pending for lane, count in (await _count_lanes(connection, family)).items()}


async def _add_parked(
    connection: Connection, topology: Topology, family: Family, counts: dict[Lane, _LaneCounts]
) -> None:
    """Add the parked jobs to the numbers of their lanes."""
    try:
        found = await count_subjects(connection, topology.parked_stream.name, _parked_filter(family))
    except NotFound:
        return
    for subject, stored in found.items():
        if (parked := subjects.parse_parked(subject)) is not None:
            lane = parked.lane._replace(tenant="*") if family.lanes == "shared" else parked.lane
            counts.setdefault(lane, _LaneCounts()).parked += stored


def _parked_filter(family: Family) -> str:
    """Return the filter over a family's parked jobs, due ones too."""
    return subjects.parked(Lane(family.name, "*", "*"), is_due=False).replace(".at.", ".*.", 1)


async def _read_oldest_ages(
    connection: Connection, family: Family, counts: Mapping[Lane, _LaneCounts], lanes: Iterable[Lane], now: float
) -> dict[Lane, float]:
    """Return the age of the oldest pending job in each lane, in seconds, for at most AGED_LANES_MAX lanes. `now`: by
    the server's clock.
    """
    asked = [lane for lane in lanes if counts[lane].pending][:AGED_LANES_MAX]
    if not asked:
        return {}
    ages: dict[Lane, float] = {}
    gate = asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def read_age(lane: Lane) -> None:
        request = {"seq": counts[lane].first_pending_seq, "next_by_subj": subjects.lane(*lane)}
        async with gate:
            try:
                answer = await connection.api(f"STREAM.MSG.GET.{family.stream}", request)
            except NotFound:
                return  # its last pending job has been delivered meanwhile
        ages[lane] = max(0.0, now - timestamp(answer["message"]["time"]))

    await asyncio.gather(*(read_age(lane) for lane in asked))
    return ages


async def _read_oldest_age(
    connection: Connection, family: Family, counts: Mapping[Lane, _LaneCounts], now: float
) -> float | None:
    """Return the age of a family's oldest pending job, in seconds. None: no job is pending. `now`: see above.

    1. At most ASKED_LANES_MAX lanes have pending jobs: the oldest of them, one request for each lane.
    2. More lanes: reads the stream from the first sequence that may be pending. It passes only jobs in flight.
    """
    waiting = [count for count in counts.values() if count.pending]
    if len(waiting) <= ASKED_LANES_MAX:
        return max((await _read_oldest_ages(connection, family, counts, counts, now)).values(), default=None)
    first = min(count.first_pending_seq for count in waiting)
    async for stored in connection.read(family.stream, ">", seq=first, batch=FIRST_BATCH):
        lane = subjects.parse_lane(stored.subject)
        if lane is not None and family.lanes == "shared":
            lane = lane._replace(tenant="*")
        if lane is None or lane not in counts or stored.seq >= counts[lane].first_pending_seq:
            return max(0.0, now - stored.time)
    return None
