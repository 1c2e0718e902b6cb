"""What a child process does: it finds its worker's handlers by their names, and runs one job at a time.

A child starts as a fresh interpreter (see `pool`). Its stdin and stdout are the pipe to its worker. Handlers get an
empty stdin, and what they print goes to stderr. A child ends with its worker: when the pipe closes, and on Linux by the
kernel, whatever worker and child are doing. It ignores SIGINT and SIGTERM, which the worker handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import gc
import multiprocessing.spawn
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, BinaryIO

from .. import attempt, codec
from ..attempt import (
    Around,
    Cancelled,
    DecodedJob,
    Handler,
    Handlers,
    Outcome,
    Policies,
    RawJob,
    Refused,
    Returned,
    Threads,
)
from ..errors import AIQueueError, BadInput, EncodeError, Stale
from ..job import ANY_KIND, Child, ChildOutcome, ChildSpec, Job, MakeHeaders, Wait
from ..journal import StepNames, decode_step, encode_call, encode_step
from ..logs import running_job, set_up_as
from ..payload import Document
from ..topology import Family
from ..units import Backoff
from . import protocol
from .forks import reset_signals_at_fork
from .recipe import find_object
from .worker_pipe import WorkerPipe

_PR_SET_PDEATHSIG = 1


class Loading:
    """Whether this process is a child that still imports its worker's modules."""

    now = False


def refuse_while_loading() -> None:
    """Raises BadInput if a module starts a worker while a child imports that module."""
    if Loading.now:
        raise BadInput('a child process imports this module: start the worker under `if __name__ == "__main__":`')


def main(parent: int) -> None:
    """Serve the worker whose pid is `parent`, until it sends "end"."""
    _end_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    reset_signals_at_fork()
    pipe = WorkerPipe(*_take_pipe())
    recipe = protocol.read_frame_blocking(pipe.reader)[1]
    set_up_as(recipe["log"])
    Loading.now = True
    found = _FoundHandlers(recipe)
    Loading.now = False
    gc.freeze()  # what is loaded stays: no garbage collection is to look at it
    asyncio.run(_serve_worker(pipe, found))


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its worker ends. Exit at once if the worker has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _take_pipe() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipe's two ends, moved away from stdin and stdout, which handlers may read and print to."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return reader, writer


class _ChildContext:
    """What a job may ask for while its handler runs in a child (it implements `job.Progress`).

    Once the attempt `is_over`, questions are refused: the worker would take them for the next job's.
    """

    def __init__(self, pipe: WorkerPipe, threads: Threads, make_headers: MakeHeaders | None) -> None:
        self.make_headers = make_headers
        self._pipe = pipe
        self._threads = threads
        self._documents_opened = 0
        self._joiner = codec.TextJoiner()
        self._names = StepNames()
        self._saying = threading.Lock()  # held while something is said that the worker must not take for the next job's
        self.is_over = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._pipe.loop

    @property
    def cancelled(self) -> bool:
        return self.is_over or self._pipe.cancelled

    async def progress(self, fraction: float, note: str) -> None:
        """Have the worker write a `progress` entry. Raises what the worker's write raised."""
        await self._ask("progress", fraction, note)

    async def chunk(self, data: Any) -> None:
        """Have the worker append a part of the job's output. Raises what the worker's write raised."""
        for part in self._joiner.take(data):
            await self._ask("chunk", *codec.encode_marked(part))

    def settle(self, cost: float) -> None:
        """Tell the worker at once what the attempt has used: it may be killed later. Raises Stale."""
        with self._saying:
            self._refuse_if_over()
            self._pipe.send(protocol.SETTLE, cost)

    async def begin_call(self, cost: float | None, key: str) -> list[Any] | None:
        """Ask the worker to let the handler start. Raises what the worker raised."""
        answer: list[Any] | None = await self._ask(protocol.BEGIN, cost, key)
        return answer

    async def begin_step(self, name: str) -> tuple[Any] | None:
        """Ask the worker for the kept result of a step. Raises BadInput, and what the worker raised."""
        self._names.use(name)
        found = await self.find_encoded_step(name)
        return None if found is None else (decode_step(name, found),)

    async def find_encoded_step(self, name: str) -> bytes | None:
        """Ask the worker as `begin_step` does, and decode nothing."""
        found: bytes | None = await self._ask("step", name)
        return found

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Call a plain function in one of the child's threads."""
        return await self._threads.run(function)

    async def keep_step(self, name: str, result: Any) -> Any:
        """Have the worker keep the result of a step. Raises EncodeError, and what the worker raised."""
        encoded = encode_step(name, result)
        other = await self.keep_encoded_step(name, encoded)
        return decode_step(name, encoded.body if other is None else other)

    async def keep_encoded_step(self, name: str, encoded: codec.Encoded) -> bytes | None:
        """Have the worker keep a step, and return what the worker's `keep_encoded_step` does."""
        other: bytes | None = await self._ask("keep step", name, encoded.secrets, encoded.body)
        return other

    async def keep_call(self, data: Any) -> None:
        """Have the worker keep a note of a call. Raises EncodeError, TooLarge, and what the worker raised."""
        await self._ask("call", *encode_call(data))

    async def earlier_calls(self) -> list[Any]:
        """Ask the worker for the notes of earlier attempts."""
        return list(await self._ask("calls"))

    async def enqueue_children(self, specs: Sequence[ChildSpec]) -> list[Child]:
        """Have the worker store children. Raises what the worker raised."""
        return [Child(*each) for each in await self._ask("enqueue", [list(each) for each in specs])]

    async def gather_children(self, specs: Sequence[ChildSpec], names: Sequence[str]) -> Sequence[ChildOutcome] | Wait:
        """Have the worker gather children. Raises what the worker raised."""
        waits, found = await self._ask("gather", [list(each) for each in specs], list(names))
        return Wait(*found) if waits else [ChildOutcome(*each) for each in found]

    async def end(self) -> None:
        """Have the worker append what is left of the output, and refuse everything from here on."""
        try:
            for part in [] if self.cancelled else self._joiner.rest():
                with contextlib.suppress(AIQueueError):  # the worker meets the same error when it ends the attempt
                    await self._ask("chunk", *codec.encode_marked(part))
        finally:
            with self._saying:
                self.is_over = True

    async def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """Have the worker read a document, chunk by chunk. Raises what the worker's read raised."""
        self._documents_opened += 1
        number = self._documents_opened
        try:
            while (chunk := await self._ask("document", number, document.model_dump())) is not None:
                yield chunk
        finally:
            with contextlib.suppress(Stale):  # the worker closes what an attempt has left open
                await self._ask("close document", number)

    async def _ask(self, *items: Any) -> Any:
        self._refuse_if_over()
        return await self._pipe.ask(self._refuse_if_over, *items)

    def _refuse_if_over(self) -> None:
        """Raises Stale once the attempt is over, also for a question that waited behind another one."""
        if self.is_over:
            raise Stale("this attempt is over: it can write nothing more for its job", ended=False)


class _FoundHandlers:
    """A worker's handlers, found by the names in its recipe. `missing`: which were not found, and why."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        if recipe["main"]:
            multiprocessing.spawn.prepare(recipe["main"])
        self.families = {name: Family(**data) for name, data in recipe["families"].items()}
        self.handlers = Handlers()
        self.missing: list[list[str]] = []
        worker = None
        if recipe["worker"]:
            with contextlib.suppress(Exception):  # each handler that needs the worker will be missing
                worker = find_object(recipe["worker"])
        for family, kind, function, model, is_async, arounds in recipe["handlers"]:
            try:
                self.handlers[family, kind] = (
                    Handler(
                        find_object(model),
                        find_object(function),
                        is_async,
                        Backoff(),
                        None,
                        True,
                        on=_find_policies(worker, family, kind),
                        any_of=family if kind == ANY_KIND else "",
                        cost=_find_cost(worker, family, kind),
                        arounds=_find_arounds(worker, family, kind, arounds),
                    )
                    if function and model
                    else dataclasses.replace(_find_registered(worker, family, kind), process=False)
                )
            except Exception as error:  # noqa: BLE001  (a module may raise anything)
                self.missing.append([family, kind, f"{type(error).__name__}: {error}"])
        made_by = recipe["make_headers"]
        self.make_headers: MakeHeaders | None = find_object(made_by) if made_by else None
        self.lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None
        if recipe["lifespan"] == "worker":
            self.lifespan = getattr(worker, "lifespan", None)
        elif recipe["lifespan"]:
            self.lifespan = functools.partial(find_object(recipe["lifespan"]), *recipe["lifespan_arguments"])


async def _serve_worker(pipe: WorkerPipe, found: _FoundHandlers) -> None:
    """Enter the lifespan, send "ready", and answer requests until "end"."""
    requests: asyncio.Queue[list[Any]] = asyncio.Queue()
    threads = Threads("aiqueue-handler")
    pipe.start_reading(requests)
    async with AsyncExitStack() as stack:
        try:
            state = await stack.enter_async_context(found.lifespan()) if found.lifespan else None
        except Exception as error:  # noqa: BLE001  (a lifespan may raise anything)
            pipe.send("problem", f"its lifespan raised {type(error).__name__}: {error}")
            return
        pipe.send("ready", found.missing)
        while (request := await requests.get())[0] != "end":
            try:
                pipe.send(*await _answer_in_task(pipe, found, threads, state, request))
            except Exception as error:  # noqa: BLE001  (a fault of aiqueue's own must not convict the job)
                pipe.send("fault", f"{type(error).__name__}: {error}")


async def _answer_in_task(
    pipe: WorkerPipe, found: _FoundHandlers, threads: Threads, state: Any, request: list[Any]
) -> list[Any]:
    """Return the answer to one request, found in a task of its own with its own context variables.

    What a handler leaves behind may cancel that task, or change its context, and cannot meet the next job.
    """
    task = asyncio.create_task(_answer_request(pipe, found, threads, state, request))
    await asyncio.wait([task])
    if task.cancelled():
        return ["outcome", *attempt.outcome_to_plain(_cancelled_outcome(pipe))]
    return task.result()


async def _answer_request(
    pipe: WorkerPipe, found: _FoundHandlers, threads: Threads, state: Any, request: list[Any]
) -> list[Any]:
    """Return the answer to one request: "read" decodes a job's body, "run" calls its handler."""
    verb, plain, *rest = request
    raw = RawJob(found.families[plain[0]], *plain[1:])
    if verb == "read":
        decoded = attempt.decode_body(raw)
        return ["read", decoded.job_id, decoded.kind, decoded.version, decoded.problem]
    number, keeps_result, is_limited = rest
    outcome = await _call_handler_here(pipe, found, threads, raw, state, number, is_limited=is_limited)
    return ["outcome", *_outcome_to_send(outcome, keeps_result)]


async def _call_handler_here(
    pipe: WorkerPipe, found: _FoundHandlers, threads: Threads, raw: RawJob, state: Any, number: int, *, is_limited: bool
) -> Outcome:
    """Call the handler for attempt `number`. The worker keeps its timeout, because it can kill a child that hangs."""
    decoded = attempt.decode_body(raw)
    handler = attempt.find_handler(found.handlers, raw.family, decoded)
    context = _ChildContext(pipe, threads, found.make_headers)
    job = attempt.build_job(raw, decoded, handler, attempt=number, state=state, progress=context)
    if not isinstance(job, Job) or handler is None:
        return job  # type: ignore[return-value]  # a job has a handler
    outcome: Outcome
    try:
        if is_limited and (refusal := await _begin_call(context, job, handler, decoded, raw.family)) is not None:
            return refusal
        if pipe.cancelled:
            return Cancelled()
        running_job.set(job)
        if handler.is_async:
            pipe.task = asyncio.current_task()
            outcome = Returned(await handler.call(job))
        else:
            outcome = Returned(await handler.call_in_thread(job, threads.run))
    except asyncio.CancelledError:
        outcome = _cancelled_outcome(pipe)
    except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
        outcome = attempt.outcome_of_error(error, handler.on)
    finally:
        pipe.task = None
        await context.end()
    outcome = attempt.without_secrets(outcome, attempt.secrets_of(raw.headers, handler), decoded.data, raw.body)
    return await _take_late_cancellation(pipe, outcome)


async def _begin_call(
    context: _ChildContext, job: Job[Any], handler: Handler, decoded: DecodedJob, family: Family
) -> Outcome | None:
    """Ask the worker whether the call of a limited job may start now. Returns the outcome of one that may not."""
    cost = attempt.cost_of(handler, job.message)
    if isinstance(cost, Refused):
        return cost
    key = attempt.limit_key_of(decoded, family)
    answer = await context.begin_call(cost if handler.cost is not None else None, key)
    return None if answer is None else attempt.outcome_from_plain(answer)


def _cancelled_outcome(pipe: WorkerPipe) -> Outcome:
    """Return what a CancelledError means: the worker has cancelled the job, or the handler has failed."""
    return Cancelled() if pipe.cancelled else attempt.outcome_of_error(asyncio.CancelledError())


async def _take_late_cancellation(pipe: WorkerPipe, outcome: Outcome) -> Outcome:
    """Return the outcome of a handler that may have cancelled its own task just before it ended, without an await."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return outcome
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        return _cancelled_outcome(pipe) if isinstance(outcome, Returned) else outcome
    return outcome


def _outcome_to_send(outcome: Outcome, keeps_result: bool) -> list[Any]:
    """Return an outcome as plain data, without a result that is not kept. One that CBOR cannot hold is Refused."""
    if isinstance(outcome, Returned) and not keeps_result:
        outcome = Returned(None)
    try:
        return attempt.outcome_to_plain(outcome)
    except EncodeError as error:
        return attempt.outcome_to_plain(Refused("result", attempt.unkept_result(str(error))))


def _find_policies(worker: Any, family: str, kind: str) -> Policies:
    """Return the `on` of a worker's handler, {} if the worker has no such handler."""
    try:
        return _find_registered(worker, family, kind).on
    except LookupError:
        return {}


def _find_cost(worker: Any, family: str, kind: str) -> Callable[[Any], float] | None:
    """Return the `cost` of a worker's handler, None if the worker has no such handler."""
    try:
        return _find_registered(worker, family, kind).cost
    except LookupError:
        return None


def _find_arounds(worker: Any, family: str, kind: str, references: list[str]) -> tuple[Around, ...]:
    """Return what is around a handler, by its names. Raises LookupError for one without a name, and for no worker."""
    if "" in references:
        return _find_registered(worker, family, kind).arounds
    return tuple(attempt.parse_around(find_object(each), "the job") for each in references)


def _find_registered(worker: Any, family: str, kind: str) -> Handler:
    """Return a worker's handler for a kind. Raises LookupError."""
    for handler in worker.handlers if worker is not None else ():
        if handler.key == (family, kind):
            return handler  # type: ignore[no-any-return]
    raise LookupError("the handler is not registered when its module is imported")
