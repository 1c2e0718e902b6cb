"""``reschedule``: give a parked job another time to start."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import AIQueueError, BadInput
from . import output
from .audit import run_audited
from .options import Json, ServerOptions, add_command, duration_option, time_option

if TYPE_CHECKING:
    from ..client import AuditedAct, Client, Handle
    from ..lanes import Pause
    from .json_keys import RescheduleJson


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "reschedule",
        examples=(
            "  aiqueue reschedule report-7 --delay 2h",
            "  aiqueue reschedule report-7 --at 2026-11-24T08:00+01:00",
            "  aiqueue reschedule report-7 --now",
        ),
    )(reschedule)


def reschedule(
    options: ServerOptions,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job id, or the key that it was enqueued with.")],
    *,
    delay: Annotated[float | None, duration_option("Start the job after this time from now at the earliest.")] = None,
    at: Annotated[
        float | None, time_option("Start the job at this time at the earliest, such as 2026-11-24T08:00+01:00.")
    ] = None,
    now: Annotated[bool, typer.Option("--now", metavar="", help="Start the job at once.")] = False,
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Family of the job, if several families have the id.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Tenant of the job, if several tenants have the id.")
    ] = None,
    json: Json = False,
) -> None:
    """Give a parked job another time to start.

    A job is parked while it waits for its delay, or for its next attempt (5 s or more).

    Exit codes: 0 rescheduled; 1 the job is not parked: it waits in its lane, runs or has ended.
    """
    if (delay is not None) + (at is not None) + now != 1:
        raise BadInput("give the new time by one of --delay, --at and --now")

    async def move(client: Client, audited: AuditedAct) -> tuple[Handle, Pause | None]:
        handle = await client.job(job, family=family, tenant=tenant)
        if now:
            await handle.run_now()
        else:
            await handle.reschedule(delay=delay, at=at)
        audited.count = 1
        with contextlib.suppress(AIQueueError):  # it may have ended by now
            return handle, (await handle.status()).pause
        return handle, None

    target = {"job": job, "family": family, "tenant": tenant, "delay": delay, "at": at, "now": now}
    handle, pause = run_audited(options, "reschedule", target, move)
    if json:
        shown: RescheduleJson = {"job_id": handle.id, "due": handle.due}
        output.print_json(shown)
    elif now or handle.due is None:
        output.print_line(f"{handle.id} is due now")
    else:
        output.print_line(f"{handle.id} is due at {output.format_time(handle.due)}")
    if pause is not None:
        text = f"{pause}: it starts after `aiqueue resume {pause.scope.arguments}`"
        output.print_line(output.escape_controls(text), err=True)
