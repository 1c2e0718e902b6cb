"""What a worker's child process does: it finds the worker's handlers by their names and runs them, one at a time.

It starts as a fresh interpreter (see `processes`). Its stdin and stdout are the pipe to its worker; handlers get an
empty stdin, and what they print goes to stderr. It ends with its worker: by the pipe's end, and on Linux by the
kernel, whatever the worker or the child is doing. SIGINT and SIGTERM are the worker's to answer and do nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import logging
import multiprocessing.spawn
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, BinaryIO

from .. import attempt
from ..attempt import Cancelled, Handler, Outcome, Policies, RawJob, Refused, Returned, Threads
from ..backoff import Backoff
from ..document_ref import Document
from ..errors import BadInput, EncodeError, Stale
from ..job import Job
from ..topology import Family
from . import protocol

_PR_SET_PDEATHSIG = 1


class Loading:
    """Whether this process is a child that still imports its worker's modules."""

    now = False


def refuse_while_loading() -> None:
    """Raises BadInput where a module starts a worker when a child imports it."""
    if Loading.now:
        raise BadInput('a child process imports this module: start the worker under `if __name__ == "__main__":`')


def main(parent: int) -> None:
    """Serve the worker whose pid is `parent`; returns when it says so."""
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    line = _Line(*_take_pipe())
    recipe = protocol.hear_blocking(line.ears)[1]
    _set_up_logging(recipe["log"])
    Loading.now = True
    bench = _Bench(recipe)
    Loading.now = False
    asyncio.run(_serve(line, bench))


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.name == "posix" and os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _take_pipe() -> tuple[BinaryIO, BinaryIO]:
    """The pipe, out of the reach of whoever reads stdin and prints."""
    ears, mouth = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return ears, mouth


def _set_up_logging(levels: dict[str, int]) -> None:
    """As the worker's process has it, as far as numbers tell; a module that sets up logging itself wins."""
    if levels:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Line:
    """The child's end of the pipe. A thread listens, so that the parent's end is noticed while the loop is busy."""

    def __init__(self, ears: BinaryIO, mouth: BinaryIO) -> None:
        self.ears = ears
        self._mouth = mouth
        self._speaking = threading.Lock()
        self._told: asyncio.Future[list[Any]] | None = None
        self.task: asyncio.Task[None] | None = None  # in which an async handler runs
        self.cancelled = False  # the job that runs was
        self._telling = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "it is set by listen"
        return self._loop

    def say(self, *words: Any) -> None:
        self._send(protocol.pack(list(words)))

    def _send(self, packed: bytes) -> None:
        frame = memoryview(packed)
        with self._speaking:
            while frame:
                frame = frame[self._mouth.write(frame) or 0 :]

    def listen(self, requests: asyncio.Queue[list[Any]]) -> None:
        """Put the parent's requests in `requests`. Ends this process with the pipe."""
        self._loop = loop = asyncio.get_running_loop()

        def run() -> None:
            with contextlib.suppress(EOFError, OSError, RuntimeError):
                while True:
                    said = protocol.hear_blocking(self.ears)
                    loop.call_soon_threadsafe(self._on_frame, requests, said)
            os._exit(0)

        threading.Thread(target=run, name="aiqueue-pipe", daemon=True).start()

    async def ask(self, *words: Any) -> Any:
        """What the parent answers while it waits for this child's outcome."""
        async with self._telling:
            if self._told is not None:  # of one whose asker was cancelled: the next answer is its own
                await asyncio.wait([self._told])
            packed = protocol.pack(list(words))
            self._told = asyncio.get_running_loop().create_future()
            self._send(packed)
            problem, value = await asyncio.shield(self._told)
        if problem:
            raise protocol.error_of(problem)
        return value

    def _on_frame(self, requests: asyncio.Queue[list[Any]], said: list[Any]) -> None:
        if said[0] == "stop":
            self.cancelled = True
            if self.task is not None:
                self.task.cancel()
        elif said[0] != "told":
            self.cancelled = False
            requests.put_nowait(said)
        elif self._told is not None and not self._told.done():
            self._told.set_result(said[1:])


class _Voice:
    """What a job may ask for while its handler runs here: see `job.Progress`. What is asked for later is refused: the
    parent would take it for the next job's.
    """

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._opened = 0
        self.over = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._line.loop

    @property
    def cancelled(self) -> bool:
        return self.over or self._line.cancelled

    async def progress(self, fraction: float, note: str) -> None:
        """Have the parent write it to the journal. Raises what the parent's write raised."""
        await self._ask("progress", fraction, note)

    async def chunk(self, data: Any) -> None:
        """As `progress`: a part of what comes out of the job."""
        await self._ask("chunk", data)

    async def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """Have the parent read a document, chunk by chunk. Raises what the parent's reading raised."""
        self._opened += 1
        number = self._opened
        try:
            while (chunk := await self._ask("document", number, document.model_dump())) is not None:
                yield chunk
        finally:
            if not self.over:
                await self._ask("shut", number)

    async def _ask(self, *words: Any) -> Any:
        if self.over:
            raise Stale("this attempt is over, and says nothing more of its job", ended=False)
        return await self._line.ask(*words)


class _Bench:
    """The handlers of a recipe, found in this process. `missing`: those that were not, and why."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        if recipe["main"]:
            multiprocessing.spawn.prepare(recipe["main"])
        self.families = {name: Family(**data) for name, data in recipe["families"].items()}
        self.handlers: dict[tuple[str, str], Handler] = {}
        self.missing: list[list[str]] = []
        worker = None
        if recipe["worker"]:
            with contextlib.suppress(Exception):  # every handler that it is needed for will be missing
                worker = find(recipe["worker"])
        for family, kind, call, model, is_async in recipe["handlers"]:
            try:
                self.handlers[family, kind] = (
                    Handler(
                        find(model), find(call), is_async, Backoff(), None, True, on=_policies(worker, family, kind)
                    )
                    if call and model
                    else attempt.here(_registered(worker, family, kind))
                )
            except Exception as error:  # noqa: BLE001  (a module may raise anything)
                self.missing.append([family, kind, f"{type(error).__name__}: {error}"])
        self.lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None
        if recipe["lifespan"] == "worker":
            self.lifespan = getattr(worker, "lifespan", None)
        elif recipe["lifespan"]:
            self.lifespan = find(recipe["lifespan"])


async def _serve(line: _Line, bench: _Bench) -> None:
    requests: asyncio.Queue[list[Any]] = asyncio.Queue()
    threads = Threads("aiqueue-handler")
    line.listen(requests)
    async with AsyncExitStack() as stack:
        try:
            state = await stack.enter_async_context(bench.lifespan()) if bench.lifespan else None
        except Exception as error:  # noqa: BLE001  (a lifespan may raise anything)
            line.say("problem", f"its lifespan raised {type(error).__name__}: {error}")
            return
        line.say("ready", bench.missing)
        while (request := await requests.get())[0] != "end":
            try:
                line.say(*await _answer(line, bench, threads, state, request))
            except Exception as error:  # noqa: BLE001  (a fault of aiqueue's own: no job shall be convicted of it)
                line.say("fault", f"{type(error).__name__}: {error}")


async def _answer(line: _Line, bench: _Bench, threads: Threads, state: Any, request: list[Any]) -> list[Any]:
    word, plain, *rest = request
    raw = RawJob(bench.families[plain[0]], *plain[1:])
    if word == "read":
        found = attempt.read(raw)
        return ["read", found.job_id, found.kind, found.problem]
    number, keeps_result = rest
    return ["outcome", *_plain(await _attempt(line, bench, threads, raw, state, number), keeps_result)]


async def _attempt(line: _Line, bench: _Bench, threads: Threads, raw: RawJob, state: Any, number: int) -> Outcome:
    """One run of a handler. Its timeout is the parent's to keep: it can end what hangs here."""
    found = attempt.read(raw)
    handler = bench.handlers.get((raw.family.name, found.kind))
    context = _Voice(line)
    job = attempt.prepare(raw, found, handler, attempt=number, state=state, progress=context)
    if not isinstance(job, Job) or handler is None:
        return job  # type: ignore[return-value]  # a job has a handler
    task = asyncio.current_task()
    try:
        if line.cancelled:
            return Cancelled()
        if not handler.is_async:
            return Returned(await threads.run(lambda: handler.call(job)))
        line.task = task
        return Returned(await handler.call(job))
    except asyncio.CancelledError:
        return Cancelled() if line.cancelled else attempt.Raised("the handler was cancelled from within", "")
    except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
        return attempt.raised(error, handler.on)
    finally:
        context.over, line.task = True, None
        if line.cancelled and task is not None:
            task.uncancel()


def _plain(outcome: Outcome, keeps_result: bool) -> list[Any]:
    if isinstance(outcome, Returned) and not keeps_result:
        outcome = Returned(None)
    try:
        return attempt.to_plain(outcome)
    except EncodeError as error:
        return attempt.to_plain(Refused("result", f"the result cannot be kept: {error}"))


def find(reference: str) -> Any:
    """What ``module:qualified.name`` names. Raises what importing the module raises, AttributeError."""
    module, _, path = reference.partition(":")
    found: Any = sys.modules["__main__"] if module == "__main__" else importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _policies(worker: Any, family: str, kind: str) -> Policies:
    try:
        return _registered(worker, family, kind).on
    except LookupError:
        return {}


def _registered(worker: Any, family: str, kind: str) -> Handler:
    for handler in worker.handlers if worker is not None else ():
        if (handler.model.aiq_family, handler.model.aiq_kind) == (family, kind):
            return handler  # type: ignore[no-any-return]
    raise LookupError("importing its module does not register it")
