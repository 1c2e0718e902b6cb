"""``enqueue``: enqueue one job, or a file of jobs."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AIQueueError, BadInput, JobFailed, JobGone, ResultDisabled, ResultTimeout
from ..subjects import OnDuplicate
from . import output, parallel
from .bodies import Input, open_input, parse_bodies
from .options import FAILED, ServerOptions, add_command, duration_option, print_error, time_option

if TYPE_CHECKING:
    from ..client import Client, Handle
    from ..job import Message
    from .json_keys import EnqueuedJson

AT_ONCE = 256


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "enqueue",
        examples=(
            '  aiqueue enqueue agent.task \'{"text": "hello"}\' --tenant acme --wait',
            "  aiqueue enqueue rag.document @documents.jsonl --tenant acme --priority low",
            "  aiqueue enqueue agent.task '{}' --tenant acme --unique report-7 --delay 10m",
            "  aiqueue enqueue agent.task '{}' --tenant acme --unique https://a.example/x --on-duplicate rerun_failed",
        ),
    )(enqueue)


Body = Annotated[
    str,
    typer.Argument(
        metavar="JSON|@FILE|-", help="Message fields as a JSON object; @FILE or - (stdin): a JSON object on each line."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="Family of the jobs. Default: the family whose default kind is KIND, else agent.tasks.",
        show_default=False,
    ),
]
Priority = Annotated[
    str, typer.Option(metavar="PRIORITY", help="high, normal, low, or another priority of the family.")
]
Unique = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Job id, or any text to make the id of. Within 10 minutes, a job is stored once for each id.",
    ),
]
WhatIfKnown = Annotated[
    OnDuplicate,
    typer.Option(
        metavar="WHAT",
        help="If the id is known: first (store nothing), raise (fail), rerun_failed (run it anew if it has failed or "
        "was cancelled), rerun (also if it has succeeded), replace (while it waits for its delay).",
    ),
]


def enqueue(  # noqa: PLR0913  (one parameter per option)
    options: ServerOptions,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Message kind, such as agent.task.")],
    body: Body,
    *,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Tenant of the job.")],
    family: Family = None,
    priority: Priority = "normal",
    unique: Unique = None,
    on_duplicate: WhatIfKnown = "first",
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Header to store with the job; repeatable.")
    ] = None,
    deadline: Annotated[
        float | None,
        duration_option("Dead-letter the job if it does not start in this time."),
    ] = None,
    delay: Annotated[
        float | None,
        duration_option("Start the job after this time at the earliest."),
    ] = None,
    at: Annotated[
        float | None,
        time_option("Start the job at this time at the earliest, such as 2026-11-24T08:00+01:00."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait for the result and print it.")] = False,
    timeout: Annotated[
        float,
        duration_option("How long --wait waits for each result."),
    ] = "10m",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print a JSON object for each job, each on a line of its own.")
    ] = False,
) -> None:
    """Enqueue one or more jobs. Prints the id of one job in a sentence, and of several how many; --json prints all ids.

    Returns when the server has stored the jobs; with --wait, when they have ended.

    DURATION is a number of seconds or a text such as 30s, 10m, 2h.

    Exit codes: 0 enqueued (and succeeded, with --wait), 1 a job was not stored, failed or timed out.
    """
    order = _Order(
        kind=kind, tenant=tenant, family=family, priority=priority, unique=unique, headers=parse_headers(header),
        deadline=deadline, delay=delay, at=at, on_duplicate=on_duplicate, wait_s=timeout if wait else None, json=json,
    )  # fmt: skip
    totals = _Totals()
    with open_input(body) as source:
        try:
            options.run_with_client(lambda client: _enqueue_all(client, order, source, totals))
        except KeyboardInterrupt:
            _print_interrupted(order, totals)
            raise
        except (AIQueueError, output.OutputFailed) as error:
            if totals.stored:
                stored = output.format_count(totals.stored, "job")
                closed = isinstance(error, output.OutputFailed) and error.closed
                output.print_line(f"{stored} enqueued before {error if closed else 'this error:'}", err=True)
            raise
    if totals.failed:
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Order:
    """The options of one call of the command."""

    kind: str
    tenant: str
    family: str | None
    priority: str
    unique: str | None
    headers: Mapping[str, str]
    deadline: float | None
    delay: float | None
    at: float | None
    on_duplicate: OnDuplicate
    wait_s: float | None
    json: bool


@dataclass
class _Totals:
    """How many jobs were stored so far, how many of them were duplicates, and how many failed."""

    stored: int = 0
    duplicates: int = 0
    failed: int = 0
    first: Handle | None = None


def parse_headers(given: list[str] | None) -> dict[str, str]:
    """Return the headers of NAME=VALUE options. Raises BadInput."""
    pairs = [each.partition("=") for each in given or ()]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise BadInput(f"header {name!r} must be NAME=VALUE")
    return {name: value for name, _, value in pairs}


def find_model(client: Client, kind: str, family: str | None) -> type[Message]:
    """Return the class of messages of a kind, for a family, or for the kind's own. Raises BadInput (UnknownFamily)."""
    from ..job import untyped  # noqa: PLC0415

    if family is not None:
        found = client.topology.family(family)
    elif (of_kind := client.topology.family_of_kind(kind)) is not None:
        found = of_kind
    elif "agent.tasks" in client.topology.families:
        found = client.topology.family("agent.tasks")
    else:
        known = " or ".join(sorted(each.name for each in client.topology.work_families))
        raise BadInput(f"{kind} is the default kind of no family: give --family, {known}")
    try:
        return untyped(kind, found.name)
    except ValueError as error:
        raise BadInput(str(error)) from None


async def _enqueue_all(client: Client, order: _Order, source: Input, totals: _Totals) -> None:
    """Enqueue all jobs of the source, and print them. `totals` is kept up to date. Raises BadInput and others."""
    from ..payload import parse_message  # noqa: PLC0415

    model = find_model(client, order.kind, order.family)
    started = time.monotonic()

    async def messages() -> AsyncIterator[tuple[Message, int]]:
        async for line, value, size in parse_bodies(source):
            position = f"{source.name} line {line}: " if source.is_many else ""
            if not isinstance(value, dict):
                hint = "; for several jobs, write one object per line" if isinstance(value, list) else ""
                raise BadInput(f"{position}a job's body must be a JSON object, not {_json_type(value)}{hint}")
            try:
                yield parse_message(model, value), size
            except BadInput as error:
                raise BadInput(f"{position}{error}") from None

    with parallel.progress_bar("enqueueing", source.size, unit="jobs") as advance:

        async def finish(handle: Handle) -> None:
            await _finish_job(order, handle, totals, is_many=source.is_many)

        wanted = _require_one(messages()) if order.unique else messages()
        async with contextlib.aclosing(_store(client, order, wanted, source, totals, advance)) as stored:
            if order.wait_s is None:
                async for handle in stored:
                    await finish(handle)
            else:
                await parallel.for_each(stored, finish, at_once=AT_ONCE)
    if not totals.stored:
        raise BadInput(f"{source.name if source.is_many else 'the JSON argument'} contains no job")
    _print_summary(order, totals, time.monotonic() - started)


def _print_interrupted(order: _Order, totals: _Totals) -> None:
    """Say what becomes of the stored jobs after Ctrl-C, unless they are printed already: they are not cancelled."""
    if totals.first is None or (order.json and order.wait_s is None):
        return
    if totals.stored == 1:
        job_id = totals.first.id
        text = (
            f"job {job_id} is not cancelled: `aiqueue tail {job_id}` follows it, `aiqueue cancel {job_id}` cancels it"
        )
    else:
        text = f"{totals.stored:,} jobs were enqueued and are not cancelled"
    output.print_line(f"\n{text}", err=True)


async def _require_one(messages: AsyncIterator[tuple[Message, int]]) -> AsyncIterator[tuple[Message, int]]:
    """Yield the only message. Raises BadInput if there is a second one, before the first is sent."""
    first = await anext(messages, None)
    if first is None:
        return
    if await anext(messages, None) is not None:
        raise BadInput("--unique names one job, but there are several: give each body its own key field instead")
    yield first


async def _store(
    client: Client,
    order: _Order,
    messages: AsyncIterator[tuple[Message, int]],
    source: Input,
    totals: _Totals,
    advance: parallel.Advance,
) -> AsyncGenerator[Handle, None]:
    """Enqueue the messages and yield the handles of the stored jobs.

    After the first error no further message is read. The publishes under way are awaited, then the error is raised.
    """
    from ..job import JobSpec  # noqa: PLC0415

    first: AIQueueError | None = None
    sizes: deque[int] = deque()

    async def items() -> AsyncIterator[JobSpec]:
        async for message, size in messages:
            if first is not None:
                return
            sizes.append(size)
            yield JobSpec(message, unique=order.unique, on_duplicate=order.on_duplicate)

    outcomes = client.enqueue_many(
        items(), tenant=order.tenant, priority=order.priority, headers=order.headers, deadline=order.deadline,
        delay=order.delay, at=order.at, on_full="wait" if source.is_many else "raise",
    )  # fmt: skip
    async with contextlib.aclosing(outcomes):
        async for outcome in outcomes:
            size = sizes.popleft()
            if isinstance(outcome, AIQueueError):
                first = first or outcome
                continue
            advance(size if source.size is not None else 1)
            totals.stored += 1
            totals.duplicates += outcome.duplicate
            totals.first = totals.first or outcome
            yield outcome
    if first is not None:
        raise first


async def _finish_job(order: _Order, handle: Handle, totals: _Totals, *, is_many: bool) -> None:
    """Wait for the job's result if --wait is given, and print the job."""
    shown: EnqueuedJson = {
        "job_id": handle.id, "family": handle.family, "tenant": handle.tenant, "priority": handle.lane.priority,
        "duplicate": handle.duplicate,
    }  # fmt: skip
    if handle.due is not None:
        shown["due"] = handle.due
    if order.wait_s is not None:
        if not is_many and not order.json:
            output.print_line(_format_handle(handle), err=True)
        try:
            shown["result"] = await handle.result(order.wait_s)
        except ResultDisabled as error:
            shown["result"] = None
            output.print_line(str(error), err=True)
        except (JobFailed, JobGone, ResultTimeout) as error:
            totals.failed += 1
            shown["error"] = str(error)
            if isinstance(error, ResultTimeout) and error.reason:
                shown["waits_for"], shown["evidence"] = error.reason, list(error.evidence)
            print_error(str(error))
    if order.json:
        output.print_json(shown, lines=True)
    elif "result" in shown:
        if is_many:
            output.print_json({"job_id": handle.id, "result": shown["result"]}, lines=True)
        else:
            output.print_line(output.format_json(shown["result"]))


def _print_summary(order: _Order, totals: _Totals, took_s: float) -> None:
    if order.json or totals.first is None:
        return
    if totals.stored == 1:
        if order.wait_s is None:
            output.print_line(_format_handle(totals.first))
        return
    from ..units import short_duration  # noqa: PLC0415

    where = output.format_lane(*totals.first.lane)
    known = f", {totals.duplicates:,} of them duplicates" if totals.duplicates else ""
    rate = f"{totals.stored / max(took_s, 1e-6):,.0f}/s"
    output.print_line(
        f"enqueued {output.format_count(totals.stored, 'job')} in {where} in {short_duration(took_s)} ({rate}){known}",
        err=order.wait_s is not None,
    )


def _format_handle(handle: Handle) -> str:
    where = output.format_lane(*handle.lane)
    if handle.due is not None:
        where += f", due in {output.format_age(handle.due - time.time())} ({output.format_time(handle.due)})"
    if handle.duplicate:
        return f"duplicate: {handle.id} is already in {where}; nothing was stored"
    return f"enqueued {handle.id} in {where}"


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
