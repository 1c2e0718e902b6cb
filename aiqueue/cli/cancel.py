"""``cancel``: take back a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import FAILED, Json, Where, complain, verb

if TYPE_CHECKING:
    from ..client import Client, Verdict


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "cancel")(cancel)


def cancel(
    where: Where,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its id.")],
    *,
    family: Annotated[str | None, typer.Option(help="Where it is, if several families have this id.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose it is, if several tenants have this id.")] = None,
    json: Json = False,
) -> None:
    """Take back a job that is parked, queued, between two attempts or running. Exit code 1: it has ended already."""

    async def take(client: Client) -> Verdict:
        return await client.cancels.by_id(job, family=family, tenant=tenant)

    verdict = where.drive(take)
    if json:
        output.say_json({"job_id": job, "cancelled": verdict.cancelled, "said": verdict.said})
    elif verdict.cancelled:
        output.say(f"cancelled {job}: {verdict.said}")
    if not verdict.cancelled:
        if not json:
            complain(f"job {job} is not cancelled: {verdict.said}")
        raise typer.Exit(FAILED)
