"""``pause`` and ``resume``: have no worker start jobs of a family, a tenant, a kind or a key for a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from . import output
from .audit import run_audited
from .options import FAILED, Json, ServerOptions, add_command, duration_option, print_error

if TYPE_CHECKING:
    from ..client import AuditedAct, Client
    from ..lanes import Pause
    from .json_keys import ResumeJson

Tenant = Annotated[str | None, typer.Option(metavar="TENANT", help="Only the jobs of this tenant.")]
Kind = Annotated[str | None, typer.Option(metavar="KIND", help="Only the jobs of this kind.")]
Key = Annotated[
    str | None, typer.Option(metavar="KEY", help="Only the jobs with this value of the family's limit_key.")
]


def register(app: typer.Typer) -> None:
    """Register the commands."""
    add_command(
        app,
        "pause",
        examples=(
            "  aiqueue pause                                                  what is paused",
            "  aiqueue pause gateway.requests --for 10m --reason 'provider down'",
            "  aiqueue pause agent.tasks --tenant acme --kind crawl --now",
            "  aiqueue pause llm.calls --key gpt-4o --for 2m                  needs a limit_key",
        ),
    )(pause)
    add_command(app, "resume")(resume)


def pause(
    options: ServerOptions,
    family: Annotated[
        str | None, typer.Argument(metavar="FAMILY", help="Family. Default: show what is paused.")
    ] = None,
    *,
    tenant: Tenant = None,
    kind: Kind = None,
    key: Key = None,
    for_s: Annotated[float | None, duration_option("End the pause by itself after this time.", "--for")] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Shown to other operators.")] = "",
    now: Annotated[bool, typer.Option("--now", metavar="", help="Return running jobs to the queue, too.")] = False,
    json: Json = False,
) -> None:
    """Pause a family, or a tenant, kind or key of it: no worker starts such jobs before `aiqueue resume`.

    Workers heed it within a second, also those that start later. Jobs can be enqueued and cancelled as ever. Running
    jobs go on.
    """
    if family is None and (any(each is not None for each in (tenant, kind, key, for_s)) or reason or now):
        raise BadInput("name the family to pause, such as `aiqueue pause agent.tasks`")
    if family is None:
        found = options.run_with_client(lambda client: client.pauses(), reads=True)
    else:
        target, work = make_pause(family, tenant, kind, key, for_s=for_s, reason=reason, now=now)
        found = [run_audited(options, "pause", target, work, creates=True)]
    if json:
        output.print_json([asdict(each) for each in found] if family is None else asdict(found[0]))
    elif found:
        print_pauses(found)
    else:
        output.print_line("nothing is paused")


def resume(
    options: ServerOptions,
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="The family that is paused.")],
    *,
    tenant: Tenant = None,
    kind: Kind = None,
    key: Key = None,
    json: Json = False,
) -> None:
    """End a pause. Name the family, tenant, kind and key as it was paused; other pauses stay.

    Exit codes: 0 resumed; 1 there is no such pause.
    """
    from ..lanes import PauseScope  # noqa: PLC0415

    target, work = make_resume(family, tenant, kind, key)
    resumed, left = run_audited(options, "resume", target, work)
    scope = str(PauseScope(family, tenant, kind, key))
    if json:
        shown: ResumeJson = {"resumed": resumed, "left": left}
        output.print_json(shown | {"left": [asdict(each) for each in left]})
    elif resumed:
        output.print_line(f"resumed {scope}")
        print_pauses(left)
    else:
        others = "; ".join(str(each.scope) for each in left)
        print_error(f"{scope} is not paused" + (f"; paused are: {others}" if others else ""))
    if not resumed:
        raise typer.Exit(FAILED)


def make_pause(
    family: str, tenant: str | None, kind: str | None, key: str | None, *, for_s: float | None = None,
    reason: str = "", now: bool = False,
) -> tuple[dict[str, Any], Callable[[Client, AuditedAct], Awaitable[Pause]]]:  # fmt: skip
    """Return what the audit says of a pause, and what pauses."""

    async def run(client: Client, audited: AuditedAct) -> Pause:
        paused = client.pause(family, tenant=tenant, kind=kind, key=key, duration=for_s, reason=reason, now=now)
        found, audited.count = await paused, 1
        return found

    scope = {"family": family, "tenant": tenant, "kind": kind, "key": key}
    return {**scope, "for": for_s, "reason": reason, "now": now}, run


def make_resume(
    family: str, tenant: str | None, kind: str | None, key: str | None
) -> tuple[dict[str, Any], Callable[[Client, AuditedAct], Awaitable[tuple[bool, list[Pause]]]]]:
    """Return what the audit says of an end of a pause, and what ends it: whether there was one, and what is left."""

    async def run(client: Client, audited: AuditedAct) -> tuple[bool, list[Pause]]:
        resumed = await client.resume(family, tenant=tenant, kind=kind, key=key)
        audited.count = int(resumed)
        return resumed, [each for each in await client.pauses() if each.family == family]

    return {"family": family, "tenant": tenant, "kind": kind, "key": key}, run


def print_pauses(found: Sequence[Pause]) -> None:
    """Print pauses, one a line."""
    for each in found:
        output.print_line(output.escape_controls(f"{each.scope}: paused {describe_pause(each)}"))


def describe_pause(pause: Pause) -> str:
    """Return since when, by whom, until when and why, such as "3m10s ago (2026-11-23 07:05:01) by anna: too slow"."""
    by = f" by {pause.by}" if pause.by else ""
    until = "" if pause.until is None else f" until {output.format_time(pause.until)}"
    return f"{output.format_ago(pause.since)}{by}{until}{f': {pause.reason}' if pause.reason else ''}"
