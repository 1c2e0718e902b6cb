"""``jobs cancel``, ``replay``, ``purge``, ``run-now``, ``move``: act on all jobs that a filter selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from . import output, parallel
from .audit import name_operator, silence_log, warn_unaudited
from .dead import is_interactive
from .jobs import Error, Family, Kind, Newer, Older, Priority, State, Tenant, Where, filter_options, print_gaps
from .options import FAILED, Json, ServerOptions, add_command, print_error

if TYPE_CHECKING:
    from ..client import ActOutcome, Client, JobPlan
    from .json_keys import DoneJson, DryRunJson

NAMED_MAX = 5  # jobs that are named on a terminal; --json names all
_DONE = {
    "cancel": "cancelled", "replay": "replayed", "purge": "deleted", "run_now": "made due now", "move": "moved",
}  # fmt: skip
_QUESTIONS = {
    "cancel": "Cancel {}?", "replay": "Replay {}?", "purge": "Delete {} permanently?", "run_now": "Run {} now?",
    "move": "Move {}?",
}  # fmt: skip

DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Only count the jobs, and print their last sequences.")
]
Until = Annotated[
    str,
    typer.Option(metavar="SEQUENCES", help="Leave out what was stored since this dry run: the value that it printed."),
]
All = Annotated[bool, typer.Option("--all", metavar="", help="All jobs that the act is for.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask for confirmation.")]


def register(app: typer.Typer) -> None:
    """Register the commands in the group `jobs`."""
    add_command(
        app,
        "cancel",
        examples=(
            "  aiqueue jobs cancel --family agent.tasks --tenant acme --dry-run",
            "  aiqueue jobs cancel --kind crawl --older 1d --yes",
            "  aiqueue jobs cancel --where doc=42",
        ),
    )(cancel)
    add_command(app, "replay", examples=("  aiqueue jobs replay --kind summarise --error ConnectError --newer 2h",))(
        replay
    )
    add_command(app, "purge", examples=("  aiqueue jobs purge --family rag.ingest --older 7d --yes",))(purge)
    add_command(app, "run-now", examples=("  aiqueue jobs run-now --tenant acme --state retrying",))(run_now)
    add_command(app, "move", examples=("  aiqueue jobs move high --tenant acme --kind summarise",))(move)


def cancel(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    priority: Priority = None,
    state: State = None,
    older: Older = None,
    newer: Newer = None,
    where: Where = None,
    everything: All = False,
    dry_run: DryRun = False,
    until: Until = "",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Cancel jobs: those that wait will not run, running ones are stopped by their workers.

    Exit codes: 0 all cancelled or ended meanwhile, 1 some were not, or the confirmation was refused.
    """
    which = filter_options(family, tenant, kind, priority, state, older, newer, where)
    _act(options, "cancel", which, everything=everything, dry_run=dry_run, until=until, yes=yes, json=json)


def replay(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    priority: Priority = None,
    older: Older = None,
    newer: Newer = None,
    where: Where = None,
    error: Error = None,
    everything: All = False,
    dry_run: DryRun = False,
    until: Until = "",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Replay dead letters: enqueue their jobs again, with new attempts.

    Exit codes: 0 all replayed or gone meanwhile, 1 some were not, or the confirmation was refused.
    """
    which = filter_options(family, tenant, kind, priority, None, older, newer, where, error)
    _act(options, "replay", which, everything=everything, dry_run=dry_run, until=until, yes=yes, json=json)


def purge(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    priority: Priority = None,
    older: Older = None,
    newer: Newer = None,
    where: Where = None,
    error: Error = None,
    everything: All = False,
    dry_run: DryRun = False,
    until: Until = "",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete dead letters permanently.

    Exit codes: 0 all deleted or gone meanwhile, 1 some were not, or the confirmation was refused.
    """
    which = filter_options(family, tenant, kind, priority, None, older, newer, where, error)
    _act(options, "purge", which, everything=everything, dry_run=dry_run, until=until, yes=yes, json=json)


def run_now(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    priority: Priority = None,
    state: State = None,
    older: Older = None,
    newer: Newer = None,
    where: Where = None,
    everything: All = False,
    dry_run: DryRun = False,
    until: Until = "",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Have parked jobs start now: delayed ones, and those that wait for their next attempt.

    Exit codes: 0 all are due or were no longer parked, 1 some are not, or the confirmation was refused.
    """
    which = filter_options(family, tenant, kind, priority, state, older, newer, where)
    _act(options, "run_now", which, everything=everything, dry_run=dry_run, until=until, yes=yes, json=json)


def move(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    to: Annotated[str, typer.Argument(metavar="PRIORITY", help="The priority to move the jobs to.")],
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    priority: Priority = None,
    older: Older = None,
    newer: Newer = None,
    where: Where = None,
    everything: All = False,
    dry_run: DryRun = False,
    until: Until = "",
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Move queued jobs to the lanes of another priority, in the families that have it. Their lanes stand still for a
    moment, 256 jobs at a time.

    Exit codes: 0 all moved, started or ended meanwhile, 1 some were not, or the confirmation was refused.
    """
    which = filter_options(family, tenant, kind, priority, None, older, newer, where)
    _act(options, "move", which, to=to, everything=everything, dry_run=dry_run, until=until, yes=yes, json=json)


def _act(
    options: ServerOptions, act: Any, which: dict[str, Any], *, to: str = "", everything: bool, dry_run: bool,
    until: str, yes: bool, json: bool,
) -> None:  # fmt: skip
    """Find the jobs, ask, act on them, and print what came of it."""
    if bool(which) == everything:
        raise BadInput("a filter and --all exclude each other" if everything else "select jobs by a filter, or --all")
    if not (dry_run or yes or is_interactive()):
        raise BadInput("there is no terminal to confirm it: look with --dry-run, then add --yes")

    async def find(client: Client) -> JobPlan:
        with parallel.progress_bar("searching", None, unit="jobs searched") as advance:
            return await client.jobs.plan(act, to=to, until=until, on_searched=advance, **which)

    plan = options.run_with_client(find, reads=True)
    _print_gaps(plan)
    if dry_run:
        _print_dry_run(plan, json)
        return
    question = _QUESTIONS[act].format(output.format_count(plan.count, "job"))
    if plan.count and not yes and not typer.confirm(question, err=True):
        output.print_line("nothing was changed", err=True)
        raise typer.Exit(FAILED)
    _print_outcome(_carry_out(options, plan), plan, json)


def _carry_out(options: ServerOptions, plan: JobPlan) -> ActOutcome:
    settled = 0
    silence_log()

    async def run(client: Client) -> ActOutcome:
        with parallel.progress_bar(plan.act.replace("_", " "), plan.count, unit="jobs") as advance:

            def on_done(more: int) -> None:
                nonlocal settled
                settled += more
                advance(more)

            return await client.jobs.act(plan, by=name_operator(), on_done=on_done)

    try:
        return options.run_with_client(run, acts=True)
    except BaseException as error:
        if settled or isinstance(error, KeyboardInterrupt):  # of a chunk that has begun, more may be done
            rest = f"repeat it with --until {plan.until} to go on"
            output.print_line(f"stopped after at least {settled:,} of {plan.count:,} jobs: {rest}", err=True)
        raise


def _print_gaps(plan: JobPlan) -> None:
    """Print on stderr what the plan does not cover."""
    print_gaps(plan)
    if plan.unreadable:
        jobs = output.format_count(plan.unreadable, "job")
        text = f"{jobs} may match, too, and are left out: their messages are documents, or cannot be decoded"
        output.print_line(text, err=True)


def _print_dry_run(plan: JobPlan, json: bool) -> None:
    if json:
        shown: DryRunJson = {
            "act": plan.act, "matched": plan.count, "until": plan.until, "searched": plan.searched,
            "unreadable": plan.unreadable, "missing": plan.missing,
            "behind": plan.behind,
        }  # fmt: skip
        output.print_json(shown)
        return
    searched = f"{output.format_count(plan.searched, 'stored job')} searched"
    output.print_line(f"{output.format_count(plan.count, 'job')} would be {_DONE[plan.act]} ({searched})")
    output.print_line(f"to leave out what is stored from now on: --until {plan.until}")


def _print_outcome(outcome: ActOutcome, plan: JobPlan, json: bool) -> None:
    warn_unaudited(outcome.unaudited)
    if json:
        said: DoneJson = {
            "act": outcome.act, "matched": outcome.matched, "done": outcome.done,
            "ended": [{"job_id": job_id, "why": why} for job_id, why in outcome.ended],
            "failed": [{"job_id": job_id, "error": error} for job_id, error in outcome.failed],
            "unaudited": outcome.unaudited,
            "until": plan.until, "unreadable": plan.unreadable, "missing": plan.missing,
            "behind": plan.behind,
        }  # fmt: skip
        output.print_json(said)
    else:
        of_all = f" of {outcome.matched:,}" if outcome.done != outcome.matched else ""
        done = output.format_count(outcome.done, "job")
        output.print_line(f"{_DONE[outcome.act]} {done}{of_all}" if outcome.matched else "no jobs match")
        if outcome.ended:
            output.print_line(f"{output.format_count(len(outcome.ended), 'job')} did not wait for it:")
            _print_named(outcome.ended)
        for job_id, error in outcome.failed[:NAMED_MAX]:
            print_error(f"job {job_id}: {error}")
        if len(outcome.failed) > NAMED_MAX:
            print_error(f"… and {len(outcome.failed) - NAMED_MAX:,} more")
    if outcome.failed:
        raise typer.Exit(FAILED)


def _print_named(jobs: list[tuple[str, str]]) -> None:
    for job_id, why in jobs[:NAMED_MAX]:
        output.print_line(output.escape_controls(f"  {job_id}: {why}"))
    if len(jobs) > NAMED_MAX:
        output.print_line(f"  … and {len(jobs) - NAMED_MAX:,} more: --json names them all")
