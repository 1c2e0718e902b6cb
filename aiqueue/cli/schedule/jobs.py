"""``schedule run`` and ``backfill``: jobs of a schedule that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import output
from ..audit import run_counted
from ..options import Json, ServerOptions, time_option
from .arguments import ScheduleId, Tenant

if TYPE_CHECKING:
    from ...schedules import AskedJob
    from ..json_keys import AskedJobJson


def run(options: ServerOptions, schedule_id: ScheduleId, *, tenant: Tenant, json: Json = False) -> None:
    """Enqueue a job of a schedule at once, also while it is paused. Its ticks stay as they are."""
    asked = run_counted(
        options,
        "schedule.run",
        {"schedule": schedule_id, "tenant": tenant},
        lambda client: client.schedules.run_now(schedule_id, tenant=tenant),
    )
    if json:
        output.print_json(_to_data(asked))
    elif asked.by_owner:
        output.print_line(f"asked the owner's workers for {asked.job_id}: one of them enqueues it")
    else:
        output.print_line(f"enqueued {asked.job_id}")


def backfill(
    options: ServerOptions,
    schedule_id: ScheduleId,
    *,
    tenant: Tenant,
    start: Annotated[float, time_option("The first time, such as 2026-11-01T00:00+01:00.", "--from")],
    end: Annotated[float, time_option("The time before which it ends; in the past.", "--to")],
    limit: Annotated[
        int, typer.Option(metavar="N", help="Refuse to enqueue more jobs than this.", min=1, max=10_000)
    ] = 1_000,
    json: Json = False,
) -> None:
    """Enqueue the jobs of the ticks from a time to before another one, such as those of a pause.

    Ticks that have a job are left out, as far as its stream or its journal, which is kept for a day, still knows it.
    """
    found = run_counted(
        options,
        "schedule.backfill",
        {"schedule": schedule_id, "tenant": tenant, "from": start, "to": end, "limit": limit},
        lambda client: client.schedules.backfill(schedule_id, start, end, tenant=tenant, limit=limit),
        lambda asked: sum(not each.duplicate for each in asked),
    )
    if json:
        output.print_json([_to_data(each) for each in found])
        return
    known = sum(each.duplicate for each in found)
    if not found:
        output.print_line("no tick is in this time")
        return
    output.print_line(
        f"enqueued {output.format_count(len(found) - known, 'job')}"
        + (f"; {output.format_count(known, 'tick')} had one" if known else "")
    )


def _to_data(asked: AskedJob) -> AskedJobJson:
    return {
        "job_id": asked.job_id, "tick": asked.tick_ms / 1000, "duplicate": asked.duplicate, "by_owner": asked.by_owner,
    }  # fmt: skip
