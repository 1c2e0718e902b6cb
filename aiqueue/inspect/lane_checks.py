"""Doctor's checks of the lanes and inboxes: near a limit, without a worker, stuck, or of a tenant that is invalid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from .. import subjects
from ..errors import NotFound
from . import stats
from .finding import Finding, Subject, level_of_use, warn
from .stream_reads import count_subjects
from .unknown_kinds import describe_waiting, read_waiting_kinds

REREAD_AFTER_S = 1.0  # jobs that are still pending then, although workers pull, are not delivered
SHOWN_MAX = 3


async def check_lanes(subject: Subject) -> AsyncIterator[Finding]:
    """Check the lanes of all families."""
    known: list[stats.LaneStats] = []
    for family in subject.topology.work_families:
        try:
            known += await stats.lanes(subject.connection, subject.topology, family.name)
        except NotFound:
            continue  # its stream has a finding already
    busy = [lane for lane in known if lane.pending]
    count = sum(lane.pending for lane in known)
    jobs = "1 job is" if count == 1 else f"{count:,} jobs are"
    lanes = "1 lane" if len(known) == 1 else f"{len(known):,} lanes"
    yield Finding("lanes", "ok", f"{lanes}, {jobs} pending in {len(busy):,} of them")
    if partial := [lane for lane in known if lane.partial]:
        text = (
            f"the cluster has not reported the consumers of {_name_lanes(partial)}: in flight may be low, pending high"
        )
        yield warn("lanes not reported", "counts-low", text)
    near = [lane for lane in known if level_of_use(lane.pending + lane.in_flight, lane.limit) != "ok"]
    if near:
        yield warn("lanes near their limit", "lane-full", _name_lanes(near))
    if paused := [lane for lane in known if lane.paused]:
        stream, consumer = _place(subject, paused[0])
        text = f"{_name_lanes(paused)}: nothing is delivered"
        yield warn("paused lanes", "lane-paused", text, stream=stream, consumer=consumer)
    served = [lane for lane in busy if not (lane.paused or lane.pause or lane.partial) and _is_valid(lane)]
    idle = [lane for lane in served if not lane.pulls and not lane.in_flight]
    if limited := [lane for lane in idle if lane.waits_for_limit]:
        yield Finding("limited keys", "ok", f"wait for what their limits allow: {_name_lanes(limited)}")
    if waiting := [lane for lane in idle if lane.waits_in_line]:
        yield Finding("lanes in line", "ok", f"wait for their turn: {_name_lanes(waiting)}")
    if unserved := [lane for lane in idle if lane not in limited and lane not in waiting]:
        yield warn("lanes without a worker", "lane-unserved", _name_lanes(unserved))
    if pulled := [lane for lane in served if lane.pulls and lane.in_flight < lane.in_flight_limit]:
        await asyncio.sleep(REREAD_AFTER_S)
        if stuck := await _still_pending(subject, pulled):
            stream, consumer = _place(subject, stuck[0])
            yield warn("undelivered jobs", "lane-stuck", _name_lanes(stuck), stream=stream, consumer=consumer)


async def check_kinds(subject: Subject) -> AsyncIterator[Finding]:
    """Check for jobs that wait until a worker knows their kind."""
    for waiting in await read_waiting_kinds(subject.connection, subject.topology, subject.topology.work_families):
        text = describe_waiting(waiting)
        if not waiting.unserved or waiting.paused >= waiting.jobs:
            yield Finding(waiting.family, "ok", text)
        else:
            yield warn(waiting.family, "kind-unknown", text)


async def check_tenants(subject: Subject) -> AsyncIterator[Finding]:
    """Check for messages of tenants and agents that are no tokens. Any client can store them, nobody can serve them."""
    for family in subject.topology.families.values():
        try:
            counts = await count_subjects(subject.connection, family.stream, f"ai.{family.name}.>")
        except NotFound:
            continue  # its stream has a finding already
        wrong = [name for name in counts if not all(map(subjects.TOKEN.fullmatch, name.split(".")[3:]))]
        if wrong:
            count = sum(counts[name] for name in wrong)
            text = (
                f"{count:,} {'message' if count == 1 else 'messages'} on {_list(wrong)}: no worker or agent can serve "
                "this tenant, because a tenant is 1 to 64 characters of A-Z a-z 0-9 _ -"
            )
            yield warn(family.stream, "tenant-invalid", text, level="fail", stream=family.stream, subject=wrong[0])


async def _still_pending(subject: Subject, before: list[stats.LaneStats]) -> list[stats.LaneStats]:
    """Return the lanes of `before` whose workers still pull, and that have no fewer pending jobs."""
    former = {_identity(lane): lane.pending for lane in before}
    now = [
        lane
        for name in {lane.family for lane in before}
        for lane in await stats.lanes(subject.connection, subject.topology, name)
    ]
    return [lane for lane in now if lane.pulls and lane.pending >= former.get(_identity(lane), 0) > 0]


def _identity(lane: stats.LaneStats) -> tuple[str, str, str, str]:
    return lane.family, lane.tenant, lane.priority, lane.key_hash


def _is_valid(lane: stats.LaneStats) -> bool:
    return lane.tenant == "*" or subjects.TOKEN.fullmatch(lane.tenant) is not None


def _place(subject: Subject, lane: stats.LaneStats) -> tuple[str, str]:
    """Return the stream and the consumer of a lane. All tenants of a shared lane have the same."""
    family = subject.topology.family(lane.family)
    return family.stream, family.lane_name("any" if lane.tenant == "*" else lane.tenant, lane.priority, lane.key_hash)


def _name_lanes(lanes: list[stats.LaneStats]) -> str:
    return _list([f"{lane} ({lane.pending:,} pending)" for lane in lanes])


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    return ", ".join(names[:SHOWN_MAX]) + more
