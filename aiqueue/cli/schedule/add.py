"""``schedule add``: a recurrence and a message from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...errors import BadInput
from .. import output
from ..audit import run_counted
from ..bodies import open_input, parse_bodies
from ..enqueue import Family, Priority, find_model, parse_headers
from ..options import Json, ServerOptions, duration_option, parse_time, time_option
from .arguments import Tenant, describe_document, describe_next

if TYPE_CHECKING:
    from ...client import Client
    from ...job import Message
    from ...schedules import Added, Recurrence
    from ..json_keys import AddedScheduleJson

WHEN = "When (give one)"

NewId = Annotated[str, typer.Argument(metavar="ID", help="Id of the schedule, once in its tenant.")]
Kind = Annotated[str, typer.Argument(metavar="KIND", help="Message kind, such as agent.task.")]
Body = Annotated[
    str, typer.Argument(metavar="JSON|@FILE|-", help="Message fields as a JSON object, from a file or stdin.")
]
Cron = Annotated[
    str | None,
    typer.Option(
        metavar="LINE", help="Cron line: '0 6 * * mon-fri', six fields with seconds, @daily.", rich_help_panel=WHEN
    ),
]
Every = Annotated[float | None, duration_option("Fixed interval, at least 1s, counted from --starting.", panel=WHEN)]
At = Annotated[float | None, time_option("Once, such as 2027-01-01T08:00+01:00.", panel=WHEN)]
Days = Annotated[int | None, typer.Option(metavar="N", help="Every N days.", rich_help_panel=WHEN)]
Weeks = Annotated[int | None, typer.Option(metavar="N", help="Every N weeks.", rich_help_panel=WHEN)]
Months = Annotated[
    int | None,
    typer.Option(metavar="N", help="Every N months; a day that a month lacks is its last.", rich_help_panel=WHEN),
]
Years = Annotated[int | None, typer.Option(metavar="N", help="Every N years.", rich_help_panel=WHEN)]
Tz = Annotated[
    str | None,
    typer.Option(metavar="ZONE", help="Time zone of --cron or the calendar, as Europe/Berlin. Default: UTC."),
]
Time = Annotated[str | None, typer.Option(metavar="HH:MM", help="Time of day of the calendar. Default: 00:00.")]
Starting = Annotated[
    str | None,
    typer.Option(metavar="DATE|TIME", help="First date of the calendar (2027-01-31), or the time --every counts from."),
]
Start = Annotated[float | None, time_option("No tick before this time.")]
End = Annotated[float | None, time_option("No tick after this time.")]
Jitter = Annotated[float | None, duration_option("Fire up to this much later: spreads schedules that tick at once.")]
Header = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Header to send with each job; repeatable.")
]
Deadline = Annotated[
    float | None, duration_option("Dead-letter a job that does not start in this time after its tick.")
]
Misfire = Annotated[
    Literal["skip", "once", "all"],
    typer.Option(
        metavar="POLICY", help="Ticks later than --grace: skip them, run the newest once, or all (see --bound)."
    ),
]
Bound = Annotated[
    int | None, typer.Option(metavar="N", help="With --misfire all: the newest N. Default: 100.", min=1, max=10_000)
]
Grace = Annotated[float | None, duration_option("How late a tick is before it is missed. Default: 10s.")]
Overlap = Annotated[
    Literal["run", "skip"],
    typer.Option(metavar="POLICY", help="While the former job has not ended: run, or skip the tick."),
]


def add(  # noqa: PLR0913  (one parameter per option)
    options: ServerOptions,
    schedule_id: NewId,
    kind: Kind,
    body: Body,
    *,
    tenant: Tenant,
    cron: Cron = None,
    every: Every = None,
    at: At = None,
    days: Days = None,
    weeks: Weeks = None,
    months: Months = None,
    years: Years = None,
    tz: Tz = None,
    time: Time = None,
    starting: Starting = None,
    start: Start = None,
    end: End = None,
    jitter: Jitter = None,
    family: Family = None,
    priority: Priority = "normal",
    header: Header = None,
    deadline: Deadline = None,
    misfire: Misfire = "once",
    bound: Bound = None,
    grace: Grace = None,
    overlap: Overlap = "run",
    json: Json = False,
) -> None:
    """Add a schedule, or change the one of this id: at each tick, workers enqueue one job with this message.

    A change keeps the counts and the pause. Schedules that a worker's code declares are not changed here.
    """
    order = _When(cron, every, at, {"days": days, "weeks": weeks, "months": months, "years": years}, tz, time, starting)
    if bound is not None and misfire != "all":
        raise BadInput("--bound belongs to --misfire all")
    headers = parse_headers(header)
    recurrence = order.recurrence(start=start, end=end, jitter=jitter or 0.0)

    async def store(client: Client) -> Added:
        message = await _read_message(client, kind, family, body)
        return await client.schedules.add(
            schedule_id, recurrence, message, tenant=tenant, priority=priority, deadline=deadline, headers=headers,
            misfire=misfire, bound=100 if bound is None else bound, grace=10.0 if grace is None else grace,
            overlap=overlap,
        )  # fmt: skip

    target = {"schedule": schedule_id, "tenant": tenant, "when": recurrence.describe(), "kind": kind, "family": family}
    added = run_counted(
        options, "schedule.add", target, store, lambda stored: int(stored.action != "unchanged"), creates=True
    )
    document = added.document
    if json:
        next_at = None if document.next_ms is None else document.next_ms / 1000
        shown: AddedScheduleJson = {
            "id": document.id, "tenant": document.tenant, "action": added.action, "next_at": next_at,
            "when": recurrence.describe(),
        }  # fmt: skip
        output.print_json(shown)
        return
    output.print_line(f"{added.action} schedule {describe_document(document)}")
    output.print_line(f"next: {describe_next(document)}")


@dataclass(frozen=True)
class _When:
    """The options that say when a schedule fires."""

    cron: str | None
    every: float | None
    at: float | None
    units: dict[str, int | None]
    tz: str | None
    time: str | None
    starting: str | None

    def recurrence(self, **bounds: Any) -> Recurrence:
        """Return what the options say. Raises BadInput."""
        from ...schedules import Calendar, Cron, Every, Once  # noqa: PLC0415

        units = {name: value for name, value in self.units.items() if value is not None}
        single = {"--cron": self.cron, "--every": self.every, "--at": self.at}
        given = [name for name, value in single.items() if value is not None] + [f"--{name}" for name in units]
        if len(given) != 1:
            several = f"not {' and '.join(given)}" if given else "such as --cron '0 6 * * mon-fri'"
            raise BadInput(f"give one of --cron, --every, --at, --days, --weeks, --months and --years, {several}")
        self._refuse_others(given[0], is_calendar=bool(units))
        zone: dict[str, Any] = {} if self.tz is None else {"tz": self.tz}
        if self.cron is not None:
            return Cron(self.cron, **zone, **bounds)
        if self.every is not None:
            first: dict[str, Any] = (
                {} if self.starting is None else {"starting": parse_time(self.starting, "'--starting'")}
            )
            return Every(self.every, **first, **bounds)
        if self.at is not None:
            return Once(self.at, **bounds)
        more: dict[str, Any] = {"time": self.time, "starting": self.starting, **units}
        return Calendar(**zone, **{name: value for name, value in more.items() if value is not None}, **bounds)

    def _refuse_others(self, given: str, *, is_calendar: bool) -> None:
        """Refuse the options that mean nothing beside the one that is given."""
        wrong = {
            "--tz": self.tz is not None and not (is_calendar or given == "--cron"),
            "--time": self.time is not None and not is_calendar,
            "--starting": self.starting is not None and not (is_calendar or given == "--every"),
        }
        belongs = {"--tz": "--cron and to ", "--time": "", "--starting": "--every and to "}
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise BadInput(f"{name} belongs to {belongs[name]}--days, --weeks, --months and --years, not to {given}")


async def _read_message(client: Client, kind: str, family: str | None, body: str) -> Message:
    """Return the only message of the input. Raises BadInput."""
    from ...payload import parse_message  # noqa: PLC0415

    model = find_model(client, kind, family)
    with open_input(body) as source:
        values = [value async for _, value, _ in parse_bodies(source)]
    what = source.name if source.is_many else "the JSON argument"
    if len(values) != 1 or not isinstance(values[0], dict):
        raise BadInput(f"{what} must be one JSON object: a schedule has one message")
    return parse_message(model, values[0])
