"""Reads schedules, and what became of the job of each one's last tick."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from .. import subjects
from ..connection import Connection
from ..errors import AccessDenied, BadInput, NotFound
from ..journal import CANCELLED, FAILED, RESULT, RETRY, Journal
from ..topology import Topology

if TYPE_CHECKING:  # imported where it is used: clients without schedules do without it
    from ..schedules import Recurrence, ScheduleDocument, StoredSchedule

AT_ONCE = 64
Outcome = Literal["", "done", "failed", "cancelled", "queued", "running", "retrying", "unknown"]
_OF_EVENT: Mapping[str, Outcome] = {RESULT: "done", FAILED: "failed", CANCELLED: "cancelled", RETRY: "retrying"}


@dataclass(frozen=True, slots=True)
class ScheduleStats:
    """A schedule, and the last outcome. Times are seconds since the epoch.

    - `document`: as it is stored, with its pause, counts and policies.
    - `when`: in words, such as "at 06:00 on Monday to Friday, Europe/Berlin". `problem`: why this host cannot tell
      that, "" if it can.
    - `outcome`: of the last tick's job: "" (no tick has one), "done", "failed" (with `error`), "cancelled", "queued",
      "running", "retrying", or "unknown": it has no journal any more, its handler keeps no result, or this user may not
      read them.
    """

    document: ScheduleDocument
    when: str
    problem: str = ""
    outcome: Outcome = ""
    error: str = ""

    @property
    def tenant(self) -> str:
        return self.document.tenant

    @property
    def id(self) -> str:
        return self.document.id

    @property
    def paused(self) -> bool:
        return self.document.paused is not None

    @property
    def next_at(self) -> float | None:
        """Its next tick; None if it is paused, or there is none."""
        found = self.document
        return None if found.next_ms is None or found.paused is not None else found.next_ms / 1000

    @property
    def last_at(self) -> float | None:
        """The last tick that has a job."""
        return None if self.document.last is None else self.document.last.tick_ms / 1000

    def next_times(self, count: int = 5, *, after: float) -> list[datetime]:
        """Return the first ticks after a time, in the schedule's time zone. Empty while it is paused.

        Raises BadInput: this host lacks its time zone, or a newer version has written it.
        """
        return [] if self.paused else list_times(self.document.recurrence, count, after)

    def summary(self) -> dict[str, Any]:
        """Return plain data, for JSON. Without the message."""
        found = self.document
        return {
            "id": found.id,
            "tenant": found.tenant,
            "when": self.when,
            "problem": self.problem,
            "recurrence": dict(found.recurrence_document),
            "family": found.family,
            "kind": found.kind,
            "priority": found.priority,
            "deadline_s": found.deadline_s,
            "misfire": found.misfire,
            "bound": found.bound,
            "grace_s": found.grace_s,
            "overlap": found.overlap,
            "owner": found.owner,
            "generation": found.generation,
            "version": found.version,
            "message_by_owner": found.body is None,
            "created_at": found.created_at,
            "updated_at": found.updated_at,
            "paused": found.paused and found.paused._asdict(),
            "next_at": self.next_at,
            "last_at": self.last_at,
            "last_job": None if found.last is None else found.last.job_id,
            "last_outcome": self.outcome or None,
            "last_error": self.error or None,
            "fired": found.fired,
            "misfired": found.misfired,
            "skipped": found.skipped,
            "failed": found.failed,
            "error": found.error or None,
            "missed": found.missed
            and {
                "from": found.missed.from_ms / 1000,
                "to": found.missed.to_ms / 1000,
                "ticks": found.missed.ticks,
                "fired": found.missed.fired,
                "at": found.missed.at,
                "more": found.missed.more,
            },
        }


def list_times(recurrence: Recurrence, count: int, after: float) -> list[datetime]:
    """Return the first ticks after a time, in the recurrence's time zone, UTC if it has none."""
    zone, found, at = getattr(recurrence, "zone", UTC), list[datetime](), after
    while len(found) < count and (tick := recurrence.next_after(at)) is not None:
        found.append(datetime.fromtimestamp(tick, zone))
        at = tick
    return found


async def read_schedules(
    connection: Connection, topology: Topology, *, tenant: str | None = None, owner: str | None = None
) -> tuple[list[ScheduleStats], list[StoredSchedule]]:
    """Return the schedules of a tenant and an owner (None: of all), sorted by tenant and id, and those that cannot be
    read: damaged ones, and those of newer versions.

    Raises BadInput (InvalidToken), NotFound (the stream is missing: run `aiqueue apply`), AccessDenied, Unavailable.
    """
    documents, unreadable = await read_documents(connection, topology, tenant=tenant, owner=owner)
    found: list[ScheduleStats] = []
    for at in range(0, len(documents), AT_ONCE):
        some = documents[at : at + AT_ONCE]
        found += await asyncio.gather(*(describe_schedule(connection, topology, each) for each in some))
    return found, unreadable


async def read_documents(
    connection: Connection, topology: Topology, *, tenant: str | None = None, owner: str | None = None
) -> tuple[list[ScheduleDocument], list[StoredSchedule]]:
    """As `read_schedules`, without the outcomes."""
    from ..schedules import ScheduleStore  # noqa: PLC0415

    store = ScheduleStore(connection, topology)
    stored: dict[tuple[str, str], StoredSchedule] = {}
    try:
        async for each in store.read("*" if tenant is None else subjects.token("tenant", tenant)):
            stored[each.tenant, each.id] = each
    except NotFound:
        raise NotFound(f"there is no stream {store.stream}: run `aiqueue apply` first") from None
    newest = [stored[name] for name in sorted(stored)]
    documents = [each.document for each in newest if each.document is not None]
    return [each for each in documents if owner in (None, each.owner)], [each for each in newest if each.problem]


async def count_schedules_if_allowed(connection: Connection, topology: Topology) -> tuple[int, int]:
    """Return how many schedules there are and how many of them are paused, for views: (0, 0) if the stream is missing,
    or this user may not read it. Raises Unavailable.
    """
    try:
        documents, unreadable = await read_documents(connection, topology)
    except (NotFound, AccessDenied):
        return 0, 0
    return len(documents) + len(unreadable), sum(each.paused is not None for each in documents)


async def describe_schedule(connection: Connection, topology: Topology, document: ScheduleDocument) -> ScheduleStats:
    """Return a schedule with its last outcome. Raises Unavailable."""
    outcome, error = await _read_outcome(connection, topology, document)
    try:
        when, problem = document.recurrence.describe(), ""
    except BadInput as cause:
        when, problem = _words_of(document.recurrence_document), str(cause)
    return ScheduleStats(document, when, problem, outcome, error)


def _words_of(recurrence: Mapping[str, Any]) -> str:
    """Return what can be said of a recurrence that this host cannot read."""
    return ", ".join(str(recurrence[name]) for name in ("line", "type", "tz") if name in recurrence)


async def _read_outcome(connection: Connection, topology: Topology, document: ScheduleDocument) -> tuple[Outcome, str]:
    last = document.last
    if last is None:
        return "", ""
    family = topology.families.get(last.family)
    if family is None:
        return "unknown", ""
    try:
        if family.journal is not None:
            journal = Journal(connection, topology.journal_stream.name)
            head = await journal.head(subjects.journal(family.journal, document.tenant, last.job_id))
            if head is not None:
                error = str(head.data.get("error") or "") if isinstance(head.data, dict) else ""
                return _OF_EVENT.get(head.event, "running"), error if head.event in (FAILED, RETRY) else ""
        stored = await connection.get(family.stream, last.seq)
    except (NotFound, AccessDenied):
        return "unknown", ""
    return ("unknown" if stored is None else "queued"), ""
