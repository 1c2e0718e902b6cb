"""``schedule rm``, ``pause`` and ``resume``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import output
from ..options import FAILED, Json, ServerOptions, print_error
from .arguments import ScheduleId, Tenant, describe_next


def rm(
    options: ServerOptions,
    schedule_id: ScheduleId,
    *,
    tenant: Tenant,
    owner: Annotated[
        str,
        typer.Option(metavar="OWNER", help="Owner that declares it in code, to remove it all the same."),
    ] = "",
    json: Json = False,
) -> None:
    """Remove a schedule. Jobs that it has enqueued stay.

    Exit codes: 0 removed; 1 there is no such schedule.
    """
    removed = options.run_with_client(lambda client: client.schedules.remove(schedule_id, tenant=tenant, owner=owner))
    if json:
        output.print_json({"removed": removed})
    elif removed:
        output.print_line(f"removed schedule {schedule_id} of {tenant}")
    else:
        print_error(f"there is no schedule {schedule_id} of {tenant}: `aiqueue schedule ls` lists all")
    if not removed:
        raise typer.Exit(FAILED)


def pause(
    options: ServerOptions,
    schedule_id: ScheduleId,
    *,
    tenant: Tenant,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Shown to other operators.")] = "",
    json: Json = False,
) -> None:
    """Have a schedule enqueue no jobs before `aiqueue schedule resume`. Jobs that are enqueued stay.

    `aiqueue pause` is another matter: ticks of a paused family or tenant are enqueued, and their jobs wait.
    """
    paused = options.run_with_client(lambda client: client.schedules.pause(schedule_id, tenant=tenant, reason=reason))
    if json:
        pause_data = paused.paused and paused.paused._asdict()
        output.print_json({"id": paused.id, "tenant": paused.tenant, "paused": pause_data})
    else:
        output.print_line(f"paused schedule {schedule_id} of {tenant}")


def resume(options: ServerOptions, schedule_id: ScheduleId, *, tenant: Tenant, json: Json = False) -> None:
    """Have a schedule fire again, from its next tick after now. Ticks of the pause are left out: see `backfill`."""
    found = options.run_with_client(lambda client: client.schedules.resume(schedule_id, tenant=tenant))
    if json:
        next_at = None if found.next_ms is None else found.next_ms / 1000
        output.print_json({"id": found.id, "tenant": found.tenant, "next_at": next_at})
    else:
        output.print_line(f"resumed schedule {schedule_id} of {tenant}; next: {describe_next(found)}")
