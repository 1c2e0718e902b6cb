"""What the commands on schedules share: arguments, and how times are shown."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from .. import output

if TYPE_CHECKING:
    from datetime import datetime

    from ...schedules import ScheduleDocument

ScheduleId = Annotated[str, typer.Argument(metavar="ID", help="Id of the schedule, from `schedule ls`.")]
Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Tenant of the schedule.")]


def describe_document(document: ScheduleDocument) -> str:
    """Return "report of acme: at 06:00 on Monday to Friday, Europe/Berlin"."""
    return f"{document.id} of {document.tenant}: {document.recurrence.describe()}"


def describe_next(document: ScheduleDocument) -> str:
    """Return when a schedule fires next, in its time zone: "Mon 2026-11-30 06:00:00 +01:00, in 12h3m"."""
    from datetime import UTC, datetime  # noqa: PLC0415

    if document.paused is not None:
        return "none before `aiqueue schedule resume`: it is paused"
    if document.next_ms is None:
        return "none: it has ended"
    zone = getattr(document.recurrence, "zone", UTC)
    return format_tick(datetime.fromtimestamp(document.next_ms / 1000, zone))


def format_tick(tick: datetime) -> str:
    """Return a time with its offset, and how far away it is: "Mon 2026-11-30 06:00:00 +01:00, in 12h3m"."""
    left_s = tick.timestamp() - time.time()
    away = f"in {output.format_age(left_s)}" if left_s >= 0 else f"{output.format_age(-left_s)} ago"
    return f"{tick:%a} {tick.isoformat(' ', 'seconds')[:19]} {format_offset(tick)}, {away}"


def format_offset(tick: datetime) -> str:
    """Return the offset from UTC: "+01:00"."""
    return tick.isoformat()[-6:]
