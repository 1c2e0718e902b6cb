"""``enqueue``: one job, or a file of them."""

from __future__ import annotations

import contextlib
import io
import json as jsonlib
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AIQueueError, BadInput, JobFailed, ResultDisabled, ResultTimeout
from . import many, output
from .options import FAILED, Where, complain, duration, moment, verb

if TYPE_CHECKING:
    from ..client import Client, Handle
    from ..job import Message

AT_ONCE = 256
CHUNK_BYTES = 65_536
LINE_BYTES_MAX = 64 * 1024 * 1024


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "enqueue")(enqueue)


def enqueue(  # noqa: PLR0913  (a verb's options)
    where: Where,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="The kind of message, such as agent.task.")],
    body: Annotated[
        str,
        typer.Argument(metavar="JSON|@FILE|-", help="Its fields; or a file, or stdin, with one JSON object a line."),
    ],
    *,
    tenant: Annotated[str, typer.Option(help="Whose job it is.")],
    family: Annotated[
        str | None, typer.Option(help="Default: the one whose own kind KIND is, else agent.tasks.", show_default=False)
    ] = None,
    priority: Annotated[str, typer.Option(help="One that the family has: high, normal, low …")] = "normal",
    unique: Annotated[
        str | None, typer.Option(metavar="KEY", help="The job's id: the same one is not stored twice.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Travels with the job; repeatable.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(parser=duration, metavar="DURATION", help="A job not begun by then ends as a dead letter."),
    ] = None,
    delay: Annotated[
        float | None, typer.Option(parser=duration, metavar="DURATION", help="It waits so long before it is queued.")
    ] = None,
    at: Annotated[
        float | None, typer.Option(parser=moment, metavar="TIME", help="The same until a time, with its time zone.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    timeout: Annotated[float, typer.Option(parser=duration, metavar="DURATION", help="How long --wait waits.")] = "10m",  # type: ignore[assignment]  # typer gives defaults to the parser too
    json: Annotated[bool, typer.Option("--json", help="One JSON object a job, each on its line.")] = False,
) -> None:
    """Store jobs, and say their ids once the server has them."""
    order = _Order(
        kind=kind, tenant=tenant, family=family, priority=priority, unique=unique, headers=_headers(header),
        deadline=deadline, delay=delay, at=at, wait_s=timeout if wait else None, json=json,
    )  # fmt: skip
    with _source(body) as source:

        async def send(client: Client) -> _Tally:
            return await _send(client, order, source)

        tally = where.drive(send)
    if tally.failed:
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Order:
    kind: str
    tenant: str
    family: str | None
    priority: str
    unique: str | None
    headers: Mapping[str, str]
    deadline: float | None
    delay: float | None
    at: float | None
    wait_s: float | None
    json: bool


@dataclass
class _Tally:
    """How far it got."""

    stored: int = 0
    duplicates: int = 0
    failed: int = 0
    first: Handle | None = None
    results: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """Where bodies come from: a text, or an open file."""

    name: str
    text: bytes = b""
    fd: int | None = None
    size: int | None = None

    @property
    def several(self) -> bool:
        return self.name != "JSON"


def _headers(given: list[str] | None) -> dict[str, str]:
    pairs = [each.partition("=") for each in given or ()]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise BadInput(f"header {name!r} must be NAME=VALUE")
    return {name: value for name, _, value in pairs}


@contextlib.contextmanager
def _source(body: str) -> Iterator[_Source]:
    """The bodies that an argument names. Raises BadInput for a file that cannot be read."""
    import os  # noqa: PLC0415
    import stat  # noqa: PLC0415

    if body == "-":
        try:
            yield _Source("stdin", fd=sys.stdin.fileno())
        except io.UnsupportedOperation:
            yield _Source("stdin", text=sys.stdin.buffer.read())
    elif body.startswith("@"):
        try:
            fd = os.open(body[1:], os.O_RDONLY)
        except OSError as error:
            raise BadInput(f"cannot read {body[1:]!r}: {error.strerror}") from None
        try:
            about = os.fstat(fd)
            if stat.S_ISDIR(about.st_mode):
                raise BadInput(f"cannot read {body[1:]!r}: it is a directory")
            yield _Source(body[1:], fd=fd, size=about.st_size if stat.S_ISREG(about.st_mode) else None)
        finally:
            os.close(fd)
    else:
        yield _Source("JSON", text=body.encode("utf-8", "surrogateescape"))


async def _send(client: Client, order: _Order, source: _Source) -> _Tally:
    from ..job import parse_message, untyped  # noqa: PLC0415

    if order.family is not None:
        family = client.topology.family(order.family)
    else:
        family = client.topology.family_of_kind(order.kind) or client.topology.family("agent.tasks")
    try:
        model = untyped(order.kind, family.name)
    except ValueError as error:
        raise BadInput(str(error)) from None
    tally = _Tally()
    begun = time.monotonic()

    async def messages() -> AsyncIterator[tuple[Message, int]]:
        async for line, value, size in _documents(source):
            place = f"{source.name} line {line}: " if source.several else ""
            if not isinstance(value, dict):
                hint = "; for many jobs give one object a line" if isinstance(value, list) else ""
                raise BadInput(f"{place}a job's body is a JSON object and not {_called(value)}{hint}")
            try:
                yield parse_message(model, value), size
            except BadInput as error:
                raise BadInput(f"{place}{error}") from None

    with many.progress("enqueueing", source.size, unit="jobs") as advance:

        async def one(handle: Handle) -> None:
            await _one(order, handle, tally, several=source.several)

        stored = _stored(client, order, _alone(messages()) if order.unique else messages(), source, tally, advance)
        try:
            if order.wait_s is None:
                async for handle in stored:
                    await one(handle)
            else:
                await many.each(stored, one, at_once=AT_ONCE)
        except AIQueueError:
            if tally.stored:
                output.say(f"{output.count(tally.stored, 'job')} had been enqueued before this:", err=True)
            raise
    if not tally.stored:
        raise BadInput(f"{source.name} holds no job")
    _report(order, tally, time.monotonic() - begun)
    return tally


async def _alone(messages: AsyncIterator[tuple[Message, int]]) -> AsyncIterator[tuple[Message, int]]:
    """The only message there is. Raises BadInput, before it is sent, if there are more."""
    first = await anext(messages, None)
    if first is None:
        return
    if await anext(messages, None) is not None:
        raise BadInput("--unique is the id of one job, and there are several: give each its own key as a field")
    yield first


async def _stored(
    client: Client,
    order: _Order,
    messages: AsyncIterator[tuple[Message, int]],
    source: _Source,
    tally: _Tally,
    advance: many.Advance,
) -> AsyncIterator[Handle]:
    """The handles of what was stored. The first error ends it: no message is read after it, those under way are
    awaited, and it is raised.
    """
    from ..job import JobSpec  # noqa: PLC0415

    first: AIQueueError | None = None
    sizes: deque[int] = deque()

    async def items() -> AsyncIterator[JobSpec]:
        async for message, size in messages:
            if first is not None:
                return
            sizes.append(size)
            yield JobSpec(message, unique=order.unique)

    outcomes = client.enqueue_many(
        items(), tenant=order.tenant, priority=order.priority, headers=order.headers, deadline=order.deadline,
        delay=order.delay, at=order.at, on_full="wait" if source.several else "raise",
    )  # fmt: skip
    async with contextlib.aclosing(outcomes):
        async for outcome in outcomes:
            size = sizes.popleft()
            if isinstance(outcome, AIQueueError):
                first = first or outcome
                continue
            advance(size if source.size is not None else 1)
            tally.stored += 1
            tally.duplicates += outcome.duplicate
            tally.first = tally.first or outcome
            yield outcome
    if first is not None:
        raise first


async def _one(order: _Order, handle: Handle, tally: _Tally, *, several: bool) -> None:
    told: dict[str, Any] = {
        "job_id": handle.id, "family": handle.family, "tenant": handle.tenant, "priority": handle.lane.priority,
        "duplicate": handle.duplicate,
    }  # fmt: skip
    if handle.due is not None:
        told["due"] = handle.due
    if order.wait_s is not None:
        if not several and not order.json:
            output.say(_stored_line(handle), err=True)
        try:
            told["result"] = await handle.result(order.wait_s)
        except ResultDisabled as error:
            told["result"] = None
            output.say(str(error), err=True)
        except (JobFailed, ResultTimeout) as error:
            tally.failed += 1
            told["error"] = str(error)
            complain(str(error))
    if order.json:
        output.say_json(told, lines=True)
    elif "result" in told:
        if several:
            output.say_json({"job_id": handle.id, "result": told["result"]}, lines=True)
        else:
            output.say(output.pretty(told["result"]))


def _report(order: _Order, tally: _Tally, took_s: float) -> None:
    if order.json or tally.first is None:
        return
    if tally.stored == 1:
        if order.wait_s is None:
            output.say(_stored_line(tally.first))
        return
    from ..units import short_duration  # noqa: PLC0415

    where = output.lane(*tally.first.lane)
    known = f", {tally.duplicates:,} of them there already" if tally.duplicates else ""
    rate = f"{tally.stored / max(took_s, 1e-6):,.0f}/s"
    output.say(
        f"enqueued {output.count(tally.stored, 'job')} in {where} in {short_duration(took_s)} ({rate}){known}",
        err=order.wait_s is not None,
    )


def _stored_line(handle: Handle) -> str:
    where = output.lane(*handle.lane)
    if handle.due is not None:
        where += f", due in {output.age(handle.due - time.time())} ({output.clock(handle.due)})"
    if handle.duplicate:
        return f"there already: {handle.id} in {where}; nothing was stored"
    return f"enqueued {handle.id} in {where}"


def _called(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


async def _documents(source: _Source) -> AsyncIterator[tuple[int, Any, int]]:
    """The JSON values, one a line, or the only one over several lines: line number, value, bytes."""
    number, seen = 0, False
    lines = _lines(source)
    async for line in lines:
        number += 1
        if not line.strip():
            continue
        try:
            value = _parse(line)
        except ValueError as error:
            if seen:
                raise BadInput(f"{source.name} line {number}: not JSON: {error}") from None
            whole = [line]
            async for more in lines:
                whole.append(more)
                if sum(map(len, whole[-2:])) > LINE_BYTES_MAX:
                    break
            text = b"".join(whole)
            try:
                yield 1, _parse(text), len(text)
            except ValueError as problem:
                what = source.name if source.several else "the body"
                raise BadInput(f"{what} is not JSON: {problem}") from None
            return
        seen = True
        yield number, value, len(line)


def _parse(text: bytes) -> Any:
    try:
        return jsonlib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


async def _lines(source: _Source) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in _chunks(source):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
        if len(rest) > LINE_BYTES_MAX:
            raise BadInput(f"{source.name}: a line is longer than {LINE_BYTES_MAX:,} bytes")
    if rest:
        yield rest


async def _chunks(source: _Source) -> AsyncIterator[bytes]:
    """What there is to read. A thread of its own reads, which an interrupt need not wait for."""
    import asyncio  # noqa: PLC0415
    import os  # noqa: PLC0415
    import threading  # noqa: PLC0415

    if source.fd is None:
        yield source.text
        return
    fd = os.dup(source.fd)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | OSError] = asyncio.Queue(maxsize=4)

    def read() -> None:
        try:
            while True:
                try:
                    got: bytes | OSError = os.read(fd, CHUNK_BYTES)
                except OSError as error:
                    got = error
                asyncio.run_coroutine_threadsafe(queue.put(got), loop).result()
                if not got or isinstance(got, OSError):
                    return
        except RuntimeError:
            return  # the loop is closed: nobody reads on
        finally:
            os.close(fd)

    threading.Thread(target=read, name="aiqueue-stdin", daemon=True).start()
    while chunk := await queue.get():
        if isinstance(chunk, OSError):
            raise BadInput(f"cannot read {source.name}: {chunk.strerror}")
        yield chunk
