"""``jobs``: list jobs by what they have in common."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import BadInput
from . import output, parallel
from .job_holds import JobHolds
from .options import Json, ServerOptions, add_command, duration_option, split_names
from .output import Column

if TYPE_CHECKING:
    from ..client import Client, JobPlan
    from ..inspect import JobPage, ListedJob
    from .json_keys import ListedJobsJson

STATES = "queued, in_flight, parked, retrying, waiting, failed"


class _ListsByDefault(TyperGroup):
    """A group whose command `ls` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ("-h", "--help") or not args[0].startswith("-"))
        return super().parse_args(ctx, args if named else ["ls", *args])


app = typer.Typer(cls=_ListsByDefault, help="List jobs, and act on all that a filter selects.")

Family = Annotated[str | None, typer.Option(metavar="FAMILY", help="Only jobs of this family.")]
Tenant = Annotated[str | None, typer.Option(metavar="TENANT", help="Only jobs of this tenant.")]
Kind = Annotated[str | None, typer.Option(metavar="KIND", help="Only messages of this kind.")]
Priority = Annotated[str | None, typer.Option(metavar="PRIORITY", help="Only jobs in lanes of this priority.")]
Cursor = Annotated[str, typer.Option(metavar="CURSOR", help="Start where the page with this cursor has ended.")]
State = Annotated[
    list[str] | None, typer.Option(metavar="STATE", help=f"Only jobs in this state: {STATES}. Repeatable.")
]
Older = Annotated[
    float | None,
    duration_option("Only jobs enqueued at least this long ago (failed ones: failed), such as 2h.", metavar="AGE"),
]
Newer = Annotated[
    float | None, duration_option("Only jobs enqueued at most this long ago (failed ones: failed).", metavar="AGE")
]
Error = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Only failed jobs with this in their reason or error, such as ValueError."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=VALUE", help="Only jobs whose message has this value: doc=42, user.id=anna. Repeatable."
    ),
]


def ls(  # noqa: PLR0913  (the options of a filter)
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
    error: Error = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Number of jobs of the page.", min=1, max=1_000)] = 50,
    cursor: Cursor = "",
    payload: Annotated[bool, typer.Option("--payload/--no-payload", help="Show the messages.")] = True,
    json: Json = False,
) -> None:
    """List jobs with their messages, the oldest first: those in lanes, then parked ones, then dead letters.

    A queued job shows the pause, or the limit that its key has reached. Secrets are masked, long values are cut. What
    the setting redact names changes messages before they are shown.
    """
    which = filter_options(family, tenant, kind, priority, state, older, newer, where, error)
    search = _PagedSearch(limit, cursor)
    try:
        options.run_with_client(lambda client: search.run(client, payload, which, holds=not json), reads=True)
    except KeyboardInterrupt:
        if search.cursor:
            output.print_line(f"interrupted after {_searched(search)}: go on with --cursor {search.cursor}", err=True)
        raise
    if json:
        shown: ListedJobsJson = {
            "jobs": search.jobs, "cursor": search.cursor, "searched": search.searched,
            "unreadable": search.unreadable, "missing": search.missing,
            "behind": search.behind,
        }  # fmt: skip
        output.print_json(shown | {"jobs": [asdict(each) for each in search.jobs]})
    else:
        _print_jobs(search.jobs, payload, search.holds, filtered=bool(which))
    _print_rest(search)


class _PagedSearch:
    """Pages until `limit` jobs are found or all is searched, with progress."""

    def __init__(self, limit: int, cursor: str) -> None:
        self.jobs: list[ListedJob] = []
        self.cursor = cursor
        self.searched = self.unreadable = 0
        self.missing: list[str] = []
        self.behind: list[str] = []
        self.holds = JobHolds()
        self._limit = limit

    async def run(self, client: Client, payload: bool, which: dict[str, Any], *, holds: bool) -> None:
        with parallel.progress_bar("searching", None, unit="jobs searched") as advance:
            more = True
            while more and len(self.jobs) < self._limit:
                left = self._limit - len(self.jobs)
                self.take(await client.jobs.page(limit=left, cursor=self.cursor, payloads=payload, **which), advance)
                more = bool(self.cursor)
        if holds:
            await self.holds.read(client, self.jobs)

    def take(self, page: JobPage, advance: parallel.Advance) -> None:
        self.jobs += page.jobs
        self.cursor = page.cursor
        self.searched += page.searched
        self.unreadable += page.unreadable
        self.missing += [each for each in page.missing if each not in self.missing]
        self.behind += [each for each in page.behind if each not in self.behind]
        advance(page.searched)


def filter_options(
    family: str | None, tenant: str | None, kind: str | None, priority: str | None, state: list[str] | None,
    older: float | None, newer: float | None, where: list[str] | None, error: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what the options say as arguments of the client's calls. Raises BadInput."""
    conditions: dict[str, str] = {}
    for each in where or ():
        path, equals, value = each.partition("=")
        if not equals or not path:
            raise BadInput(f"--where {each!r:.80}: give FIELD=VALUE, such as doc=42")
        if path in conditions:
            raise BadInput(f"--where {path!r:.80} is given twice: a field has one value")
        conditions[path] = value
    states = split_names(state)
    if state and not states:
        raise BadInput(f"--state is empty: name one of {STATES}")
    given = {
        "family": family, "tenant": tenant, "kind": kind, "priority": priority, "state": states,
        "older": older, "newer": newer, "where": conditions or None, "error": error,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _print_jobs(found: list[ListedJob], payload: bool, holds: JobHolds, *, filtered: bool) -> None:
    if not found:
        output.print_line("no jobs match" if filtered else "no jobs")
        return
    now = time.time()
    several = len({each.family for each in found}) > 1
    rows = [
        [
            each.job_id, *([each.family] if several else []), f"{each.tenant}/{each.priority}", each.kind,
            holds.state(each), format_listed_age(each, now), format_due(each, now),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("job", style="bold"), *([Column("family", shrink=True)] if several else []),
        Column("lane", shrink=True), Column("kind", shrink=True), Column("state"), Column("age", right=True),
        Column("due", right=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[_format_below(each, payload) for each in found])
    for note in holds.notes:
        output.print_line(output.escape_controls(note))


def format_listed_age(job: ListedJob, now: float) -> str:
    """Return since when a job waits, or has failed."""
    at = job.enqueued_at if job.failed_at is None else job.failed_at
    return "-" if at is None else output.format_age(now - at)


def format_due(job: ListedJob, now: float) -> str:
    """Return when a parked job is due; "" if it is not parked."""
    if job.due_at is None:
        return ""
    return "now" if job.due_at <= now else f"in {output.format_age(job.due_at - now)}"


def _format_below(job: ListedJob, payload: bool) -> str:
    """Return the second line of a job: why it failed, then its message."""
    failure = f"{job.reason}: {job.error}" if job.failed_at is not None else ""
    if not payload:
        return failure
    message = f"({job.payload_problem})" if job.payload_problem else output.format_json(job.payload, short=True)
    return f"dead letter {job.seq}, {failure} {message}" if failure else message


def _searched(search: _PagedSearch) -> str:
    return f"{output.format_count(search.searched, 'stored job')} searched"


def print_gaps(read: _PagedSearch | JobPlan) -> None:
    """Print on stderr why what was read is not whole, or not as it is now."""
    for stream in read.missing:
        output.print_line(f"stream {stream} does not exist: run `aiqueue apply`", err=True)
    for stream in read.behind:
        text = f"a server of the cluster is behind with {stream}: some of the jobs may have ended or moved; repeat"
        output.print_line(text, err=True)


def _print_rest(search: _PagedSearch) -> None:
    """Print on stderr what the list does not show."""
    print_gaps(search)
    if search.unreadable:
        jobs = output.format_count(search.unreadable, "job")
        output.print_line(f"{jobs} may match, too: their messages are documents, or cannot be decoded", err=True)
    if search.cursor:
        output.print_line(f"there are more: --cursor {search.cursor}", err=True)


add_command(
    app,
    "ls",
    examples=(
        "  aiqueue jobs                       the oldest 50",
        "  aiqueue jobs ls --family agent.tasks --tenant acme --state queued --older 1h",
        "  aiqueue jobs ls --kind summarise --where doc=42 --json",
    ),
)(ls)
