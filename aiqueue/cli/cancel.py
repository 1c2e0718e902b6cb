"""``cancel``: cancel a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .audit import run_audited
from .options import FAILED, Json, ServerOptions, add_command, print_error

if TYPE_CHECKING:
    from ..client import AuditedAct, Client, Verdict
    from .json_keys import CancelJson


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(app, "cancel")(cancel)


def cancel(
    options: ServerOptions,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job id.")],
    *,
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Family of the job, if several families have the id.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Tenant of the job, if several tenants have the id.")
    ] = None,
    json: Json = False,
) -> None:
    """Cancel a job.

    A job that is queued, parked or waiting for a retry will not run. A running job is stopped by its worker.

    Exit codes: 0 cancelled, now or before; 1 the job has already succeeded or failed, or is not found.
    """

    async def cancel_job(client: Client, audited: AuditedAct) -> Verdict:
        verdict = await client.cancels.cancel_by_id(job, family=family, tenant=tenant)
        audited.count, audited.details["detail"] = int(verdict.cancelled), verdict.detail
        return verdict

    verdict = run_audited(options, "cancel", {"job": job, "family": family, "tenant": tenant}, cancel_job)
    if json:
        shown: CancelJson = {"job_id": job, "cancelled": verdict.cancelled, "detail": verdict.detail}
        output.print_json(shown)
    elif verdict.cancelled:
        output.print_line(f"cancelled {job}: {verdict.detail}")
    if not verdict.cancelled:
        if not json:
            print_error(f"job {job} was not cancelled: {verdict.detail}")
        raise typer.Exit(FAILED)
