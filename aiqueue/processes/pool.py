"""A worker's child processes: started, asked, timed, killed, replaced and ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any, Self

from .. import attempt, codec
from ..attempt import Handler, Outcome, Raised, RawJob, RunningAttempt
from ..connection import to_its_end
from ..errors import AIQueueError, BadInput, DecodeError, Stale, Unavailable
from ..job import ChildSpec, Progress, Wait
from ..payload import Document
from . import descendants, protocol
from .recipe import Recipe

START_S = 120.0  # what a child gets to import its worker's modules and enter the lifespan
END_S = 5.0  # what an idle child gets to leave the lifespan
PIPE_TAIL_S = 1.0  # how long the pipe of a child that has ended is read for what the child still wrote
# As in `aiqueue work`, garbage collections are rarer from the first import on.
_CODE = (
    "import gc,json,sys;gc.set_threshold(10_000,20,20);sys.path[:]=json.loads(sys.argv[1]);"
    "from aiqueue.processes.child import main;main(int(sys.argv[2]))"
)


class ChildNotStarted(Exception):
    """A child could not be started. No job is to blame. The text is one line."""


class ChildDied(Exception):
    """A child ended during a request. The text states how. `first`: it was the child's first request."""

    def __init__(self, how: str, *, first: bool) -> None:
        super().__init__(how)
        self.first = first


class ChildTimedOut(Exception):
    """A child did not answer in time, and was killed."""


class ChildProcess:
    """One child process, ready for requests. It leads a session: what it starts is killed with it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.missing: list[list[str]] = []  # the handlers that it did not find: family, kind, why
        self._request_count = 0
        self._kill_sent = False
        self._end_watch = asyncio.create_task(self._kill_what_is_left())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        assert self._process.stdout is not None
        return self._process.returncode is None and not self._process.stdout.at_eof()

    @classmethod
    async def start(cls, recipe: Recipe) -> Self:
        """Start a child, and wait until it has found its handlers and entered the lifespan. Raises ChildNotStarted."""
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -O, -W, -X: as multiprocessing
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *flags, "-P", "-c", _CODE, json.dumps(sys.path), str(os.getpid()),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ChildNotStarted(f"{sys.executable} does not start: {error.strerror}") from error
        child = cls(process)
        try:
            async with asyncio.timeout(START_S):
                await child._send(["recipe", recipe.to_plain()])
                answer = await child._receive()
        except TimeoutError:
            await child.kill()
            raise ChildNotStarted(f"it was not ready within {START_S:g} s") from None
        except (EOFError, OSError, DecodeError):
            raise ChildNotStarted(f"it ended while it started: {await child._describe_end()}") from None
        except BaseException:
            child.kill_now()
            await to_its_end(child._see_end())
            raise
        if answer[0] != "ready":
            await child.kill()
            raise ChildNotStarted(str(answer[1:]) if answer[0] != "problem" else answer[1])
        child.missing = answer[1]
        return child

    def request_stop(self) -> None:
        """Tell the child that its job was cancelled. Safe if it has ended."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.writelines(protocol.encode_frame(["stop"]))

    async def ask(
        self, request: list[Any], progress: Progress | None = None, limit: asyncio.Timeout | None = None
    ) -> list[Any]:
        """Send a request and return the answer. What the child asks for meanwhile, `progress` does: see `job.Progress`.
        `limit` stands still while the child waits for the start of its call.

        Raises ChildDied, and RuntimeError for a fault of aiqueue's own in the child.
        """
        self._request_count += 1
        first = self._request_count == 1
        open_documents: dict[int, AsyncGenerator[bytes, None]] = {}
        try:
            await self._send(request)
            while (items := await self._receive())[0] in protocol.QUESTIONS or items[0] == protocol.SETTLE:
                if items[0] != protocol.SETTLE:
                    with _standing_still(limit if items[0] == protocol.BEGIN else None):
                        answer = await _answer_child(progress, open_documents, items)
                    await self._send(["answer", *answer])
                elif progress is not None:
                    with contextlib.suppress(Stale):
                        progress.settle(items[1])
        except (EOFError, OSError, DecodeError):
            raise ChildDied(await self._describe_end(), first=first) from None
        finally:
            for chunks in open_documents.values():
                await chunks.aclose()
        if items[0] == "fault":
            raise RuntimeError(f"in a child process: {items[1]}")
        return items

    def has_started_since(self, ticks: int) -> bool:
        """Return whether something lives that the child has started since `descendants.clock_ticks` was `ticks`."""
        return any(at >= ticks for at in descendants.find_started(self._process.pid).values())

    def kill_now(self) -> None:
        """Send SIGKILL to the child and what it started, without waiting for the end.

        Nothing is sent twice, because the system may give the pid of a child that has ended to another process.
        """
        if not self._kill_sent:
            self._kill_sent = True
            descendants.kill_session(self._process.pid)

    async def _kill_what_is_left(self) -> None:
        """As soon as the child has ended, kill what it has started: see `kill_now` for why not later."""
        await self._process.wait()
        self.kill_now()

    async def wait(self) -> None:
        """Wait for the child's end."""
        await self._process.wait()

    async def _see_end(self) -> None:
        """Wait for the end of a child that is killed; not for long, as a process that is left may hold its pipes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PIPE_TAIL_S):
                await self._process.wait()

    async def kill(self) -> None:
        """Send SIGKILL to the child and what it started, and wait for the child's end."""
        self.kill_now()
        await self.wait()

    async def end(self) -> None:
        """Have an idle child leave its lifespan and end. After END_S, and to what it leaves behind, send SIGKILL.

        Nothing is sent if the child has ended before this call: see `kill_now`.
        """
        if self._process.returncode is not None:
            return
        self._kill_sent = True  # by this method, which knows more processes
        started = descendants.find_started(self._process.pid)
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(END_S):
                    await self._send(["end"])
                    await self._process.wait()
        finally:
            descendants.kill_session(self._process.pid, started)
        await self.wait()

    async def _send(self, items: list[Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.writelines(protocol.encode_frame(items))
        await self._process.stdin.drain()

    async def _receive(self) -> list[Any]:
        """Read the child's next frame. Raises EOFError also if the child has ended, and a process that it started
        holds the pipe open.
        """
        assert self._process.stdout is not None
        reading = asyncio.create_task(protocol.read_frame(self._process.stdout))
        try:
            while not reading.done():
                ended = self._process.returncode is not None
                await asyncio.wait({reading}, timeout=PIPE_TAIL_S)
                if ended and not reading.done():
                    raise EOFError
            return reading.result()
        finally:
            reading.cancel()

    async def _describe_end(self) -> str:
        """Return how the child ended. A child that has only closed its pipe is killed; what it started is too."""
        try:
            async with asyncio.timeout(END_S):
                code = await self._process.wait()
        except TimeoutError:
            return "it closed its pipe"
        finally:
            await self.kill()
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {-code} ({signal.Signals(-code).name})"
        return f"signal {-code}"


@contextlib.contextmanager
def _standing_still(limit: asyncio.Timeout | None) -> Iterator[None]:
    """Let the time of a limit not pass meanwhile."""
    loop, when = asyncio.get_running_loop(), None if limit is None else limit.when()
    if limit is None or when is None:
        yield
        return
    left_s = when - loop.time()
    limit.reschedule(None)
    yield
    limit.reschedule(loop.time() + left_s)


class ChildSlot:
    """Keeps one child: started for the first request, kept for the next one, replaced when it has died.

    Serves one request at a time; callers take turns.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._child: ChildProcess | None = None
        self._killed: ChildProcess | None = None

    @property
    def child(self) -> ChildProcess | None:
        """The living child. None: there is none."""
        return self._child if self._child is not None and self._child.alive else None

    async def get_child(self) -> ChildProcess:
        """Return the living child, or start one. Raises ChildNotStarted."""
        if self.child is None:
            await self.end_child()
            self._child = await ChildProcess.start(self._recipe)
        assert self._child is not None
        return self._child

    async def ask(
        self,
        request: list[Any],
        *,
        timeout_s: float | None,
        progress: Progress | None = None,
        running: RunningAttempt | None = None,
    ) -> list[Any]:
        """Return the child's answer. The child is killed after `timeout_s` seconds (None: no limit), and when this task
        is cancelled. Meanwhile a cancellation of `running` asks the child to stop; if something that the child started
        is left of the request then, the child is killed too.

        Raises ChildDied, ChildTimedOut, ChildNotStarted.
        """
        child = await self.get_child()
        started_at = descendants.clock_ticks()
        answered = False
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if running is not None:
                    running.request_stop = child.request_stop
                answer = await child.ask(request, progress, limit)
            stopped = running is not None and running.cancel_requested
            answered = not stopped or not child.has_started_since(started_at)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ChildTimedOut from None
        finally:
            if running is not None:
                running.request_stop = None
            if not answered:
                self._child, self._killed = None, child
                child.kill_now()
        return answer

    async def end_child(self) -> None:
        """End the child, if there is one, and wait for the end of one that was killed."""
        child, self._child = self._child, None
        killed, self._killed = self._killed, None
        if killed is not None:
            await killed.wait()
        if child is not None:
            await child.end()


class Processes:
    """The child pool for handlers registered with ``process=True``: at most `size` children, reused and replaced.

    With `late`, the first child is started for the first job, and a job whose handler it does not find fails.
    """

    def __init__(self, recipe: Recipe, size: int, *, late: bool = False) -> None:
        self._late = late
        self._recipe = recipe
        self._process_handlers = [each for each in recipe.handlers.values() if each.process]
        self._slots = [ChildSlot(recipe) for _ in range(size)]
        self._free = list(self._slots)
        self._capacity = asyncio.Semaphore(size)

    async def __aenter__(self) -> Self:
        """If there are such handlers, start one child, to learn whether it finds them all. Raises BadInput.

        With `late`, no child is started.
        """
        for handler in self._process_handlers:
            problem = self._recipe.find_problem(handler)
            if problem:
                raise BadInput(f"the handler of {handler.what} cannot run with process=True: {problem}")
        if self._process_handlers and not self._late:
            try:
                child = await self._free[-1].get_child()
            except ChildNotStarted as error:
                raise BadInput(f"no child process for handlers with process=True: {error}") from None
            for problem in filter(None, (_find_missing(child, each) for each in self._process_handlers)):
                await self._free[-1].end_child()
                raise BadInput(problem)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(slot.end_child() for slot in self._slots))

    @property
    def pids(self) -> list[int]:
        """The pids of the living children."""
        return [slot.child.pid for slot in self._slots if slot.child is not None]

    async def run_handler(
        self, raw: RawJob, number: int, handler: Handler, progress: Progress, running: RunningAttempt
    ) -> Outcome:
        """Run attempt `number` in a child, once one is free. The handler's timeout counts from then.

        If the child dies, the attempt has failed. Raises Unavailable if no child can be started.
        """
        async with self._capacity:
            slot = self._free.pop()
            try:
                if self._late and (problem := _find_missing(await slot.get_child(), handler)):
                    return Raised(problem, "")
                return await run_in_slot(slot, raw, number, handler, progress, running)
            except ChildDied as died:
                return Raised(f"worker process died: {died}", "")
            except ChildNotStarted as error:
                raise Unavailable(f"no child process: {error}") from None
            finally:
                self._free.append(slot)


def _find_missing(child: ChildProcess, handler: Handler) -> str:
    """Return why a child did not find a handler; "": it did."""
    found = next((why for family, kind, why in child.missing if (family, kind) == handler.key), "")
    return found and f"the handler of {handler.what} cannot run with process=True: a child process reports {found}"


async def run_in_slot(
    slot: ChildSlot, raw: RawJob, number: int, handler: Handler, progress: Progress, running: RunningAttempt
) -> Outcome:
    """Run attempt `number` in the child of a slot. Raises ChildDied, ChildNotStarted."""
    request = ["run", protocol.raw_job_to_plain(raw), number, handler.keeps_result, running.is_limited]
    try:
        answer = await slot.ask(request, timeout_s=handler.timeout_s, progress=progress, running=running)
    except ChildTimedOut:
        return attempt.timeout_outcome(handler.timeout_s)
    try:
        return attempt.outcome_from_plain(answer[1:])
    except (ValueError, TypeError, DecodeError) as error:
        return Raised(f"the child process sent an invalid answer: {error}", "")


async def _answer_child(
    progress: Progress | None, open_documents: dict[int, AsyncGenerator[bytes, None]], items: list[Any]
) -> list[Any]:
    """Do what a child asks for while it runs a job. Returns the error as plain data, and the answer."""
    if progress is None:
        return [None, None]
    try:
        return [None, await _do_as_asked(progress, open_documents, items)]
    except AIQueueError as error:
        return [protocol.error_to_plain(error), None]


async def _do_as_asked(
    progress: Progress, open_documents: dict[int, AsyncGenerator[bytes, None]], items: list[Any]
) -> Any:
    answer: Any = None
    match items:
        case ["progress", fraction, note]:
            await progress.progress(fraction, note)
        case ["chunk", body, secrets]:
            await progress.chunk(codec.Encoded(body, secrets))
        case ["step", name]:
            answer = await progress.find_encoded_step(name)
        case ["keep step", name, secrets, body]:
            answer = await progress.keep_encoded_step(name, codec.Encoded(body, secrets))
        case [protocol.BEGIN, cost, key]:
            answer = await progress.begin_call(cost, key)
        case ["call", body, secrets]:
            await progress.keep_call(codec.Encoded(body, secrets))
        case ["calls"]:
            answer = await progress.earlier_calls()
        case ["enqueue", specs]:
            enqueued = await progress.enqueue_children([ChildSpec(*each) for each in specs])
            answer = [dataclasses.astuple(each) for each in enqueued]
        case ["gather", specs, names]:
            outcomes = await progress.gather_children([ChildSpec(*each) for each in specs], names)
            answer = [isinstance(outcomes, Wait), list(outcomes)]
        case ["document", number, fields]:
            if number not in open_documents:
                open_documents[number] = progress.chunks(Document(**fields))
            answer = await anext(open_documents[number], None)
        case ["close document", number] if number in open_documents:
            await open_documents.pop(number).aclose()
    return answer
