"""A worker's child processes: how they are told what to run, asked, timed, killed, replaced and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .. import attempt
from ..attempt import Handler, Outcome, Raised, RawJob, RunningAttempt
from ..document_ref import Document
from ..errors import AIQueueError, BadInput, DecodeError, Unavailable
from ..job import Progress
from ..topology import Family
from . import protocol
from .child import find

log = logging.getLogger("aiqueue.processes")

START_S = 120.0  # what a child gets to import its worker's modules and enter the lifespan
END_S = 5.0  # what an idle child gets to leave the lifespan
LAST_WORDS_S = 1.0  # how long the pipe of a child that has ended is read on
_CODE = (
    "import json,sys;sys.path[:]=json.loads(sys.argv[1]);"
    "from aiqueue.processes.child import main;main(int(sys.argv[2]))"
)


class NoChild(Exception):
    """A child could not be started: nobody's job is to blame. The text is one line."""


class Died(Exception):
    """The child ended while it was at work. The text says how; `first`: that work was the first it was given."""

    def __init__(self, how: str, *, first: bool) -> None:
        super().__init__(how)
        self.first = first


class Overdue(Exception):
    """The child did not answer in time and was killed."""


@dataclass(frozen=True)
class Recipe:
    """What a fresh interpreter needs to find the handlers of a worker."""

    families: Mapping[str, Family]
    handlers: Mapping[tuple[str, str], Handler]
    lifespan: Callable[[], Any] | None = None
    worker: object = None

    def problem(self, handler: Handler) -> str:
        """Why a child cannot find this handler, as far as can be told from here; "" if nothing speaks against it."""
        if self._worker_reference():
            return ""
        if handler.process and handler.on:
            return "its policies (`on`) are found through its worker only, which is no global in the handler's module"
        for thing, what in ((handler.call, "the handler"), (handler.model, "the message class")):
            if not reference(thing):
                return f"{what} {_shown(thing)} is not found under its name in its module"
        if self.lifespan is not None and not reference(self.lifespan):
            return f"the lifespan {_shown(self.lifespan)} is not found under its name in its module"
        return ""

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data."""
        lifespan = "" if self.lifespan is None else reference(self.lifespan) or "worker"
        handlers = [
            [*key, reference(each.call), reference(each.model), each.is_async]
            for key, each in self.handlers.items()
            if not self.problem(each)
        ]
        worker = self._worker_reference()
        named = [lifespan, worker, *(str(name) for each in handlers for name in each[2:4])]
        main = any(name.startswith("__main__:") for name in named)
        root = logging.getLogger()
        return {
            "families": {name: protocol.plain_family(each) for name, each in self.families.items()},
            "handlers": handlers,
            "lifespan": lifespan,
            "worker": worker,
            "main": _main_module() if main else {},
            "log": {"": root.level, "aiqueue": logging.getLogger("aiqueue").level} if root.handlers else {},
        }

    def _worker_reference(self) -> str:
        """Where the worker stands as a global, in a module of one of its handlers."""
        for handler in self.handlers.values():
            module = getattr(handler.call, "__module__", None) or ""
            for name, value in list(vars(sys.modules.get(module, None) or object).items()):
                if value is self.worker and self.worker is not None:
                    return f"{module}:{name}"
        return ""


class Child:
    """One child process, ready to be asked."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.missing: list[list[str]] = []
        self.asked = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        assert self._process.stdout is not None
        return self._process.returncode is None and not self._process.stdout.at_eof()

    @classmethod
    async def start(cls, recipe: Recipe) -> Self:
        """A child that has found its handlers (but for `missing`) and entered the lifespan. Raises NoChild."""
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -O, -W, -X: as multiprocessing
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *flags, "-P", "-c", _CODE, json.dumps(sys.path), str(os.getpid()),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise NoChild(f"{sys.executable} does not start: {error.strerror}") from error
        child = cls(process)
        try:
            async with asyncio.timeout(START_S):
                await child._say(["recipe", recipe.plain()])
                said = await child._hear()
        except TimeoutError:
            await child.kill()
            raise NoChild(f"it was not ready within {START_S:g} s") from None
        except (EOFError, OSError, DecodeError):
            raise NoChild(f"it ended while it started: {await child._how()}") from None
        except BaseException:
            child.kill_now()
            raise
        if said[0] != "ready":
            await child.kill()
            raise NoChild(str(said[1:]) if said[0] != "problem" else said[1])
        child.missing = said[1]
        return child

    def stop(self) -> None:
        """Tell it that the job that it runs was cancelled. Safe on one that has ended."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(protocol.pack(["stop"]))

    async def ask(self, request: list[Any], progress: Progress | None = None) -> list[Any]:
        """The answer to one request; what the child asks for meanwhile, `progress` does: see `job.Progress`.

        Raises Died, and RuntimeError for a fault of aiqueue's own there.
        """
        self.asked += 1
        first = self.asked == 1
        opened: dict[int, AsyncGenerator[bytes, None]] = {}
        try:
            await self._say(request)
            while (said := await self._hear())[0] in ("progress", "chunk", "document", "shut"):
                await self._say(["told", *await _serve(progress, opened, said)])
        except (EOFError, OSError, DecodeError):
            raise Died(await self._how(), first=first) from None
        finally:
            for chunks in opened.values():
                await chunks.aclose()
        if said[0] == "fault":
            raise RuntimeError(f"in a child process: {said[1]}")
        return said

    def kill_now(self) -> None:
        """SIGKILL, without waiting for its end. Safe on one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def kill(self) -> None:
        self.kill_now()
        await self._process.wait()

    async def end(self) -> None:
        """Have an idle child leave its lifespan and end; SIGKILL after END_S."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(END_S):
                await self._say(["end"])
                await self._process.wait()
        await self.kill()

    async def _say(self, words: list[Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(protocol.pack(words))
        await self._process.stdin.drain()

    async def _hear(self) -> list[Any]:
        """The child's next words. A child of the child may hold the pipe open: the end of the process counts too."""
        assert self._process.stdout is not None
        reading = asyncio.create_task(protocol.hear(self._process.stdout))
        try:
            while not reading.done():
                gone = self._process.returncode is not None
                await asyncio.wait({reading}, timeout=LAST_WORDS_S)
                if gone and not reading.done():
                    raise EOFError
            return reading.result()
        finally:
            reading.cancel()

    async def _how(self) -> str:
        """How it ended. One that has only closed its pipe is killed."""
        try:
            async with asyncio.timeout(END_S):
                code = await self._process.wait()
        except TimeoutError:
            await self.kill()
            return "it closed its pipe"
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {-code} ({signal.Signals(-code).name})"
        return f"signal {-code}"


class Seat:
    """Room for one child: started when there is something to ask, kept for the next, replaced when it has died.

    Not for two at once.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._child: Child | None = None
        self._killed: Child | None = None

    @property
    def child(self) -> Child | None:
        """The living child, if there is one."""
        return self._child if self._child is not None and self._child.alive else None

    async def fill(self) -> Child:
        """The child, started if need be. Raises NoChild."""
        if self.child is None:
            await self.clear()
            self._child = await Child.start(self._recipe)
        assert self._child is not None
        return self._child

    async def ask(
        self,
        request: list[Any],
        *,
        timeout_s: float | None,
        progress: Progress | None = None,
        stop: RunningAttempt | None = None,
    ) -> list[Any]:
        """The child's answer. It is killed after `timeout_s` seconds (None: no limit), and when this is cancelled. From
        its beginning on `stop` has the child itself end what it does.

        Raises Died, Overdue, NoChild.
        """
        child = await self.fill()
        answered = False
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if stop is not None:
                    stop.tell = child.stop
                said = await child.ask(request, progress)
            answered = True
        except TimeoutError:
            if not limit.expired():
                raise
            raise Overdue from None
        finally:
            if stop is not None:
                stop.tell = None
            if not answered:
                self._child, self._killed = None, child
                child.kill_now()
        return said

    async def clear(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        killed, self._killed = self._killed, None
        if killed is not None:
            await killed.kill()  # and wait for it
        if child is not None:
            await child.end()


class Processes:
    """The children of handlers registered with ``process=True``: at most `size`, reused, replaced when they die."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        self._recipe = recipe
        self._wanted = [each for each in recipe.handlers.values() if each.process]
        self._seats = [Seat(recipe) for _ in range(size)]
        self._free = list(self._seats)
        self._room = asyncio.Semaphore(size)

    async def __aenter__(self) -> Self:
        """Where there is such a handler, start one child, to learn that it can be found. Raises BadInput."""
        for handler in self._wanted:
            problem = self._recipe.problem(handler)
            if problem:
                raise BadInput(f"kind {handler.model.aiq_kind!r} cannot run with process=True: {problem}")
        if self._wanted:
            try:
                child = await self._free[-1].fill()
            except NoChild as error:
                raise BadInput(f"no child process for handlers with process=True: {error}") from None
            for family, kind, problem in child.missing:
                if self._recipe.handlers[family, kind].process:
                    await self._free[-1].clear()
                    raise BadInput(f"kind {kind!r} cannot run with process=True: a child process says {problem}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(seat.clear() for seat in self._seats))

    @property
    def pids(self) -> list[int]:
        """The processes that are alive."""
        return [seat.child.pid for seat in self._seats if seat.child is not None]

    async def run(
        self, raw: RawJob, number: int, handler: Handler, progress: Progress, stop: RunningAttempt
    ) -> Outcome:
        """Attempt `number` in a child, once one is free. A child that dies has failed the attempt.

        Its timeout counts from then. Raises Unavailable where no child can be started.
        """
        async with self._room:
            seat = self._free.pop()
            try:
                return await run(seat, raw, number, handler, progress, stop)
            except Died as died:
                return Raised(f"worker process died: {died}", "")
            except NoChild as error:
                raise Unavailable(f"no child process: {error}") from None
            finally:
                self._free.append(seat)


async def run(
    seat: Seat, raw: RawJob, number: int, handler: Handler, progress: Progress, stop: RunningAttempt
) -> Outcome:
    """Attempt `number` in the child of a seat. Raises Died, NoChild."""
    request = ["run", protocol.plain_parcel(raw), number, handler.keeps_result]
    try:
        said = await seat.ask(request, timeout_s=handler.timeout_s, progress=progress, stop=stop)
    except Overdue:
        return attempt.timed_out(handler.timeout_s)
    try:
        return attempt.outcome_of(said[1:])
    except (ValueError, TypeError, DecodeError) as error:
        return Raised(f"the child process answered nonsense: {error}", "")


def reference(thing: object) -> str:
    """``module:qualified.name``, where that leads to this very thing; "" for closures, lambdas, and the like."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules or "<" in name:
        return ""
    try:
        found = find(f"{module}:{name}")
    except AttributeError:
        return ""
    return f"{module}:{name}" if found is thing else ""


def _main_module() -> dict[str, Any]:
    """How a child imports a script that is ``__main__`` here: as multiprocessing does, under another name."""
    data = multiprocessing.spawn.get_preparation_data("aiqueue child")
    kept = ("sys_path", "sys_argv", "dir", "orig_dir", "init_main_from_name", "init_main_from_path")
    return {key: data[key] for key in kept if key in data}


async def _serve(
    progress: Progress | None, opened: dict[int, AsyncGenerator[bytes, None]], said: list[Any]
) -> list[Any]:
    """What a child asks for while it runs a job: the error, and the answer."""
    if progress is None:
        return [None, None]
    try:
        match said:
            case ["progress", fraction, note]:
                await progress.progress(fraction, note)
            case ["chunk", data]:
                await progress.chunk(data)
            case ["document", number, told]:
                if number not in opened:
                    opened[number] = progress.chunks(Document(**told))
                return [None, await anext(opened[number], None)]
            case ["shut", number] if number in opened:
                await opened.pop(number).aclose()
    except AIQueueError as error:
        return [protocol.plain_error(error), None]
    return [None, None]


def _shown(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', None) or repr(thing)}"
