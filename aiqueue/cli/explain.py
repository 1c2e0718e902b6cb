"""``explain``: say why a job waits."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import Json, ServerOptions, add_command

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import Explanation


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "explain",
        examples=(
            "  aiqueue explain 06h0ehe6b82hdkoi8l1epcnf0g",
            "  aiqueue explain report-7 --family agent.tasks --tenant acme",
        ),
    )(explain)


def explain(
    options: ServerOptions,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job id, or a job's key.")],
    *,
    family: Annotated[str | None, typer.Option(metavar="FAMILY", help="Search only this family.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Search only this tenant.")] = None,
    json: Json = False,
) -> None:
    """Say why a job waits, or what else it does: one reason, what shows it, and what to do.

    A key that is not among the first 10,000 stored jobs, the journals and the dead letters needs its family and tenant.
    Reads only, changes nothing.
    """

    async def read(client: Client) -> Explanation:
        return await client.explain(job, family=family, tenant=tenant)

    found = options.run_with_client(read, reads=True)
    if json:
        output.print_json(asdict(found))
        return
    where = output.format_lane(found.family, found.tenant, None)
    state = found.state.replace("_", " ")
    output.print_line(f"job {output.escape_controls(found.job_id)} of {output.escape_controls(where)}: {state}")
    print_explanation(found)


def print_explanation(found: Explanation) -> None:
    """Print the reason, its evidence, the remedy, and what is not known."""
    until = "" if found.until is None else f"{output.format_time(found.until)}, {_format_left(found.until)}"
    output.print_fields(
        [
            ("why", f"{found.text} ({found.reason})"),
            ("evidence", "\n".join(found.evidence)),
            ("until", until),
            ("do", found.remedy),
            ("not known", "\n".join(found.unknown)),
        ]
    )


def _format_left(until: float) -> str:
    left_s = until - time.time()
    return f"in {output.format_age(left_s)}" if left_s >= 0 else f"{output.format_age(-left_s)} ago"
