"""``schedule rm``, ``prune``, ``pause`` and ``resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import output
from ..audit import run_counted
from ..options import FAILED, Json, ServerOptions, print_error
from .arguments import ScheduleId, Tenant, describe_next

if TYPE_CHECKING:
    from ...schedules import UndeclaredSchedule
    from ..json_keys import PausedScheduleJson, PrunedJson, RemovedScheduleJson, ResumedScheduleJson


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
    removed = run_counted(
        options,
        "schedule.rm",
        {"schedule": schedule_id, "tenant": tenant, "owner": owner},
        lambda client: client.schedules.remove(schedule_id, tenant=tenant, owner=owner),
        int,
    )
    if json:
        shown: RemovedScheduleJson = {"removed": removed}
        output.print_json(shown)
    elif removed:
        again = f"; running workers of {owner} that declare it add it again" if owner else ""
        output.print_line(f"removed schedule {schedule_id} of {tenant}{again}")
    else:
        print_error(f"there is no schedule {schedule_id} of {tenant}: `aiqueue schedule ls` lists all")
    if not removed:
        raise typer.Exit(FAILED)


def prune(
    options: ServerOptions,
    *,
    owner: Annotated[str, typer.Option(metavar="OWNER", help="Service whose workers declare schedules in code.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Remove them.")] = False,
    json: Json = False,
) -> None:
    """List the schedules of an owner that its workers' code declares no more; with --yes, remove them.

    Workers that run or ran within 90 seconds decide; if there are none, the newest ones. Jobs that are enqueued stay.

    Exit codes: 0; 1 no worker of this owner ran in the last 30 days.
    """
    if yes:
        found = run_counted(
            options, "schedule.prune", {"owner": owner}, lambda client: client.schedules.prune(owner), len
        )
    else:
        found = options.run_with_client(lambda client: client.schedules.find_undeclared(owner), reads=True)
    if json:
        shown: PrunedJson = {
            "owner": owner,
            "removed": yes,
            "schedules": [{"id": each.id, "tenant": each.tenant, "declared_at": each.declared_at} for each in found],
        }
        output.print_json(shown)
        return
    for each in found:
        output.print_line(f"{'removed' if yes else 'would remove'} {each.id} of {each.tenant}: {_explain(each)}")
    if not found:
        output.print_line(f"nothing to prune: workers of {owner} declare all its schedules")
    elif not yes:
        count = output.format_count(len(found), "schedule")
        output.print_line(f"\nnothing was removed: `aiqueue schedule prune --owner {owner} --yes` removes {count}")


def _explain(found: UndeclaredSchedule) -> str:
    """Return why a schedule is pruned."""
    owner, ended = found.document.owner, found.ended_at
    why = (
        f"no running worker of {owner} declares it" if ended is None
        else f"the newest workers of {owner}, last seen {output.format_ago(ended)}, did not declare it"
    )  # fmt: skip
    if found.declared_at is None:
        return f"{why}, nor any in the last 30 days"
    return f"{why}; the last one that did was seen {output.format_ago(found.declared_at)}"


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
    paused = run_counted(
        options,
        "schedule.pause",
        {"schedule": schedule_id, "tenant": tenant, "reason": reason},
        lambda client: client.schedules.pause(schedule_id, tenant=tenant, reason=reason),
    )
    if json:
        pause = paused.paused
        shown: PausedScheduleJson = {
            "id": paused.id, "tenant": paused.tenant,
            "paused": pause and {"since": pause.since, "by": pause.by, "reason": pause.reason},
        }  # fmt: skip
        output.print_json(shown)
    else:
        output.print_line(f"paused schedule {schedule_id} of {tenant}")


def resume(options: ServerOptions, schedule_id: ScheduleId, *, tenant: Tenant, json: Json = False) -> None:
    """Have a schedule fire again, from its next tick after now. Ticks of the pause are left out: see `backfill`."""
    found = run_counted(
        options,
        "schedule.resume",
        {"schedule": schedule_id, "tenant": tenant},
        lambda client: client.schedules.resume(schedule_id, tenant=tenant),
    )
    if json:
        next_at = None if found.next_ms is None else found.next_ms / 1000
        shown: ResumedScheduleJson = {"id": found.id, "tenant": found.tenant, "next_at": next_at}
        output.print_json(shown)
    else:
        output.print_line(f"resumed schedule {schedule_id} of {tenant}; next: {describe_next(found)}")
