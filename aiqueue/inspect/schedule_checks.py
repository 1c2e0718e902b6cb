"""Doctor's checks of schedules: broken chains, zones that are unknown here, and ticks that no worker takes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection
from typing import TYPE_CHECKING

from .. import subjects
from ..errors import BadInput, DecodeError, NotFound
from .finding import Finding, Subject, warn
from .schedule_stats import read_documents

if TYPE_CHECKING:
    from ..schedules import ScheduleDocument

SHOWN_MAX = 10  # findings of one kind


async def check_schedules(subject: Subject) -> AsyncIterator[Finding]:
    """Check that the next tick of each schedule is stored, that its time can be told, and that workers take ticks."""
    try:
        documents, unreadable = await read_documents(subject.connection, subject.topology)
        for each in unreadable[:SHOWN_MAX]:
            yield warn("schedules", "schedule-unreadable", each.problem, schedule=f"{each.id} --tenant {each.tenant}")
        if not documents:
            return
        firing = [each for each in documents if each.paused is None and each.next_ms is not None]
        paused = sum(each.paused is not None for each in documents)
        count = "1 schedule" if len(documents) == 1 else f"{len(documents):,} schedules"
        yield Finding("schedules", "ok", f"{count}, {len(firing):,} with a next tick, {paused:,} paused")
        for finding in _check_documents(documents):
            yield finding
        for broken in await _find_broken(subject, firing):
            text = f"the next tick of schedule {broken.name} is neither parked nor due: it does not fire"
            yield warn("schedules", "schedule-chain", text, level="fail", schedule=_options(broken))
        async for finding in _check_workers(subject, firing):
            yield finding
    except NotFound:
        return  # the stream has a finding already


def _check_documents(documents: Collection[ScheduleDocument]) -> list[Finding]:
    """Return what the documents say, such as zones that this host does not know."""
    found, shown = list[Finding](), Counter[str]()
    for each in documents:
        problems: dict[str, str] = {}
        try:
            each.recurrence  # noqa: B018  (parses)
        except BadInput as error:
            zone = each.recurrence_document.get("tz", "UTC")
            code = "schedule-zone" if getattr(error, "zone", None) == zone else "schedule-unreadable"
            problems[code] = f"schedule {each.name}: {error}"
        for code, text in problems.items():
            shown[code] += 1
            if shown[code] <= SHOWN_MAX:
                found.append(warn("schedules", code, text, schedule=_options(each)))
    return found


async def _find_broken(subject: Subject, firing: Collection[ScheduleDocument]) -> list[ScheduleDocument]:
    """Return the schedules whose next tick is nowhere. The documents were read before: one may have fired meanwhile."""
    from ..schedules import ScheduleStore, Ticks  # noqa: PLC0415

    ticks, store = Ticks(subject.connection, subject.topology), ScheduleStore(subject.connection, subject.topology)
    stored = await ticks.list_subjects() if firing else set()
    broken: list[ScheduleDocument] = []
    for each in firing:
        where = each.route, each.tenant, each.id
        if {subjects.tick(*where, each.next_ms or 0), subjects.tick(*where)} & stored:
            continue
        with contextlib.suppress(DecodeError):
            now = await store.get(each.tenant, each.id)
            if now is not None and now.paused is None and now.next_ms is not None and not await ticks.has(now):
                broken.append(now)
        if len(broken) == SHOWN_MAX:
            break
    return broken


async def _check_workers(subject: Subject, firing: Collection[ScheduleDocument]) -> AsyncIterator[Finding]:
    """Check that a worker asks for the ticks that any worker fires, and for those of each owner."""
    stream = subject.topology.ticks_stream.name
    for route, count in sorted(Counter(each.route for each in firing).items()):
        try:
            info = await subject.connection.api(f"CONSUMER.INFO.{stream}.ticks-{route}")
        except NotFound:
            info = {}
        if info.get("num_waiting") or info.get("num_ack_pending"):
            continue
        schedules = "1 schedule" if count == 1 else f"{count:,} schedules"
        if route == "-":
            yield warn("schedules", "schedule-unserved", f"no worker takes the ticks of {schedules}", level="fail")
        else:
            text = f"no worker of owner {route} runs, which makes the messages of {schedules}"
            yield warn("schedules", "schedule-owner", text, level="fail")


def _options(document: ScheduleDocument) -> str:
    """Return the arguments that name a schedule on the command line."""
    return f"{document.id} --tenant {document.tenant}"
