"""A job as its handler gets it, and what the handler may ask for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, overload

import pydantic

from .. import headers as wire
from ..errors import BadInput
from ..payload import Document, DocumentReader, R, SyncDocumentReader, run_from_thread
from ..units import COST_MAX, Duration, real_number
from .children import (
    Child,
    ChildError,
    Wait,
    WaitsForChildren,
    check_gathered,
    make_child_spec,
    value_of_outcome,
)
from .message import M_co, Message, S_co
from .progress import Progress
from .steps import StepEnded, in_step, refuse_in_step, step_span

if TYPE_CHECKING:
    Children: TypeAlias = Sequence[Child[R] | tuple[str, Message[R]]]
OnFailed = Literal["raise", "return"]

PROGRESS_EVERY_S = 1.0  # of `Job.steps`
_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = functools.lru_cache(256)(pydantic.TypeAdapter)


class Job(Generic[M_co, S_co]):
    """A job as its handler gets it: a message, and the data of this attempt.

    `message` is of the handler's class, and a `RawMessage` in a handler of every kind.

    `attempt` counts from 1. `enqueued_at` and `deadline` are seconds since the epoch; `deadline` may be None.
    `first_stored` says when the job was stored first, and as which message. `state` is the value that the worker's
    lifespan yielded, of the second type in brackets. `headers` are the job's headers on the wire.
    """

    __slots__ = (
        "_child_ids", "_headers", "_progress", "_stored", "attempt", "deadline", "enqueued_at", "family", "id", "kind",
        "message", "priority", "state", "tenant",
    )  # fmt: skip

    def __init__(
        self,
        message: M_co,
        *,
        job_id: str,
        lane: tuple[str, str, str],
        attempt: int,
        enqueued_at: float,
        deadline: float | None,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]],
        state: S_co,
        progress: Progress,
        stored: tuple[int, float] = (0, 0.0),
    ) -> None:
        """`headers` may be a function that returns them. `stored`: sequence and time of the delivered message."""
        self.message: M_co = message
        self.id = job_id
        self.kind = message.aiq_kind
        self.family, self.tenant, self.priority = lane
        self.attempt = attempt
        self.enqueued_at = enqueued_at
        self.deadline = deadline
        self._headers = headers
        self.state: S_co = state
        self._progress = progress
        self._stored = stored

    @property
    def headers(self) -> Mapping[str, str]:
        """The message's headers, those of the server left out."""
        if callable(self._headers):
            self._headers = self._headers()
        return self._headers

    @property
    def first_stored(self) -> tuple[float, int]:
        """When the stream has first stored this job (seconds since the epoch), and its sequence then.

        Retries, parking, moves to another lane and replays of its dead letter keep both. A delayed job is first stored
        when it is due. Never later than this message was stored, whatever a plain publisher's headers say.
        """
        return wire.first_stored(self.headers, *self._stored)

    @property
    def schedule(self) -> str | None:
        """The id of the schedule that has enqueued this job, or the first of its ancestors; None for other jobs."""
        return self.headers.get(wire.SCHEDULED_BY)

    @property
    def scheduled_for(self) -> float | None:
        """The time for which its schedule has enqueued this job, in seconds since the epoch; None for other jobs.

        Retries, parking and replays keep it, and children have that of their parent.
        """
        return wire.decimal(self.headers.get(wire.SCHEDULED_FOR, ""))

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.kind} {self.tenant}/{self.priority} attempt {self.attempt}>"

    @property
    def cancelled(self) -> bool:
        """Whether this attempt should stop: its job was cancelled, its timeout is over, or the worker is stopping.

        An async handler then gets asyncio.CancelledError. A handler that is a plain function cannot be interrupted: it
        should check this regularly, and return.
        """
        return self._progress.cancelled

    @property
    def is_abandoned(self) -> bool:
        """Whether this attempt is over, and its handler goes on alone in a thread; for aiqueue's own modules."""
        return self._progress.is_over

    async def progress(self, fraction: float, note: str = "") -> None:
        """Report how far the job is, by a `fraction` from 0 to 1 and a note. Written to the job's journal.

        Raises Stale if another attempt has taken over the job. Do not catch it: the work is no longer needed.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, not {fraction!r}")
        await self._progress.progress(float(fraction), note)

    def progress_sync(self, fraction: float, note: str = "") -> None:
        """As `progress`, for a handler that is a plain function."""
        run_from_thread(self.progress(fraction, note), self._progress.loop, "`progress` and not `progress_sync`")

    async def chunk(self, data: Any) -> None:
        """Write a part of the job's output, such as a few words of an answer, for readers of `Handle.stream`.

        `data` may be anything that a result may be. It is written to the job's journal, before the result.

        Chunks wait for the write in progress, at most 256 chunks or 1 MiB; this returns as soon as there is capacity.
        Raises TooLarge for a chunk that exceeds a message, and errors of earlier writes: Unavailable, and Stale if
        another attempt has taken over the job. Do not catch Stale: the work is no longer needed.
        """
        refuse_in_step("chunk")
        await self._progress.chunk(data)

    def chunk_sync(self, data: Any) -> None:
        """As `chunk`, for a handler that is a plain function: it waits in its thread until there is capacity."""
        run_from_thread(self.chunk(data), self._progress.loop, "`chunk` and not `chunk_sync`")

    def settle(self, cost: float) -> None:
        """State what this attempt has really used, such as tokens, for the limits of the job's key.

        What ``cost=`` of `Worker.handle` has reserved above that is given back when the handler ends, however it ends.
        What was used above the reservation is taken from later jobs. Without this call, all that was reserved counts.

        - `cost`: 0 to 1e15, in the unit of the rules in ``limits.toml``. The last call before the handler ends counts.
        - It is the same, and is not awaited, in an async handler, in a plain one, and in a child process.
        - Nothing happens if no rule holds for the job's key.

        Raises BadInput for what is no such number, and Stale after the attempt has ended.
        """
        self._progress.settle(real_number("cost", cost, 0, COST_MAX))

    async def step(self, name: str, function: Callable[..., Any], *args: Any, returns: Any = None) -> Any:
        """Call `function(*args)`, and keep its result. Later attempts get the kept result without a call.

        The result is kept before this returns, also for a replay from the dead letters. If the worker dies before
        that, the next attempt calls the function again: a step runs at least once, and one result is kept.

        - `name`: 1 to 256 printable characters, once in an execution of the handler, the same in each.
        - `function`: async, or a plain function, which runs in a thread.
        - The result: what a handler may return, of any size; above 64 KiB it is stored as a document. It is returned
          as plain data, also by the attempt that calls the function; with `returns`, a type that pydantic can read, as
          an instance of that.

        Raises what the function raises; then nothing is kept. Raises BadInput for a second step of this name, the
        2,001st step, or a step within a step; EncodeError for a result that cannot be kept; NotFound or Corrupt if a
        kept result can never be read again; Unavailable, QueueFull, AccessDenied; Stale if another attempt has taken
        over the job: do not catch Stale.
        """
        kept = await self._begin_step(name, function)
        if kept is None:
            with in_step(name), step_span(name):
                if inspect.iscoroutinefunction(function):
                    result = await function(*args)
                else:
                    result = await self._progress.run_in_thread(lambda: function(*args))
                    if inspect.isawaitable(result):
                        result = await result
            kept = (await self._progress.keep_step(name, result),)
        return kept[0] if returns is None else _adapter(returns).validate_python(kept[0])

    def step_sync(self, name: str, function: Callable[..., Any], *args: Any, returns: Any = None) -> Any:
        """As `step`, for a handler that is a plain function. So is `function`, which runs in the handler's thread."""
        loop, instead = self._progress.loop, "`step` and not `step_sync`"
        kept = run_from_thread(self._begin_step(name, function), loop, instead)
        if kept is None:
            with in_step(name), step_span(name):
                result = function(*args)
            if inspect.iscoroutine(result):
                result.close()
                raise BadInput(f"step {name!r}: a handler that is a plain function has plain functions as steps")
            kept = (run_from_thread(self._progress.keep_step(name, result), loop, instead),)
        return kept[0] if returns is None else _adapter(returns).validate_python(kept[0])

    async def steps(
        self,
        name: str,
        items: Iterable[Any],
        function: Callable[[Any], Any],
        *,
        concurrency: int = 1,
        returns: Any = None,
    ) -> list[Any]:
        """Call `function(item)` for each item in a `step` of its own, ``{name}-0`` and on. Return the results in order.

        At most `concurrency` steps run at once. How many are done is reported as `progress`, at most once a second.
        Raises what `step` raises, for the first step that fails: no further one starts.
        """
        wanted, done, reported_at = list(items), 0, 0.0
        results: list[Any] = [None] * len(wanted)
        numbers = iter(range(len(wanted)))

        async def run_some() -> None:
            nonlocal done, reported_at
            for number in numbers:
                try:
                    results[number] = await self.step(f"{name}-{number}", function, wanted[number], returns=returns)
                except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
                    task = asyncio.current_task()
                    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                        raise  # the group ends
                    raise StepEnded(error) from None
                done += 1
                if time.monotonic() - reported_at >= PROGRESS_EVERY_S:
                    reported_at = time.monotonic()
                    await self.progress(done / len(wanted), f"{name}: {done:,} of {len(wanted):,}")

        if type(concurrency) is not int or concurrency < 1:
            raise BadInput(f"concurrency must be a whole number from 1, not {concurrency!r}")
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(wanted))):
                    group.create_task(run_some())
        except BaseExceptionGroup as failed:
            first = failed.exceptions[0]
            raise first.error if isinstance(first, StepEnded) else first from None
        return results

    def steps_sync(
        self, name: str, items: Iterable[Any], function: Callable[[Any], Any], *, returns: Any = None
    ) -> list[Any]:
        """As `steps`, one at a time, for a handler that is a plain function."""
        wanted, reported_at = list(items), 0.0
        results = []
        for number, item in enumerate(wanted):
            results.append(self.step_sync(f"{name}-{number}", function, item, returns=returns))
            if time.monotonic() - reported_at >= PROGRESS_EVERY_S:
                reported_at = time.monotonic()
                self.progress_sync((number + 1) / len(wanted), f"{name}: {number + 1:,} of {len(wanted):,}")
        return results

    async def _begin_step(self, name: str, function: Any) -> tuple[Any] | None:
        refuse_in_step("step")
        if not callable(function):
            raise BadInput(
                f"step {name!r}: pass the function, and its arguments after it, not {type(function).__name__}"
            )
        return await self._progress.begin_step(name)

    async def called(self, data: Any) -> None:
        """Note an external call that is about to be made, such as one that costs money. `data`: at most 64 KiB.

        The note is kept before this returns, for `calls` of a later attempt. A job keeps at most 2,000 notes, those of
        its earlier attempts too: then this raises BadInput. Otherwise raises as `step`.
        """
        await self._progress.keep_call(data)

    async def calls(self) -> list[Any]:
        """Return what earlier attempts of this job have noted with `called`, the oldest first. Such a call may have
        been made, and billed, without its result being kept.
        """
        return await self._progress.earlier_calls()

    def called_sync(self, data: Any) -> None:
        """As `called`, for a handler that is a plain function."""
        run_from_thread(self.called(data), self._progress.loop, "`called` and not `called_sync`")

    def calls_sync(self) -> list[Any]:
        """As `calls`, for a handler that is a plain function."""
        return run_from_thread(self.calls(), self._progress.loop, "`calls` and not `calls_sync`")

    async def enqueue(
        self,
        message: Message[R],
        name: str,
        *,
        priority: str | None = None,
        delay: Duration | None = None,
        deadline: Duration | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Child[R]:
        """Enqueue a child: a job that belongs to this one. Later attempts of this job find the child by its name, and
        do not store it again.

        - `name`: 1 to 256 printable characters, once in an execution of the handler, the same in each. The message of
          a later attempt is not stored.
        - The child has this job's tenant. By default it has the same priority, if its family has that, and deadline.
        - `priority`, `delay`, `deadline`, `headers`: as of `Client.enqueue`.

        While the child's lane is full, this waits, at most 30 seconds. A run has at most 5,000 children, and a job at
        most 32 ancestors. Cancelling this job cancels its children. Raises BadInput, QueueFull, Unavailable; Stale if
        another attempt has taken over the job: do not catch Stale.
        """
        with self._child_names_used([name]):
            spec = make_child_spec(
                name, message, priority=priority, delay=delay, deadline=deadline, headers=headers,
                make_headers=self._progress.make_headers,
            )  # fmt: skip
            enqueued = (await self._progress.enqueue_children([spec]))[0]
            self._child_ids[name] = enqueued.id
        return replace(enqueued, _model=type(message))

    @overload
    async def gather(
        self, children: Children[R], *, on_failed: Literal["raise"] = "raise", priority: str | None = None
    ) -> list[R]: ...
    @overload
    async def gather(
        self, children: Children[R], *, on_failed: Literal["return"], priority: str | None = None
    ) -> list[R | ChildError]: ...
    @overload  # of several types, for pyright; not list[Any], which mypy would take for a list of anything
    async def gather(
        self, children: Children[Any], *, on_failed: OnFailed = "raise", priority: str | None = None
    ) -> list[object]: ...
    async def gather(
        self, children: Children[Any], *, on_failed: OnFailed = "raise", priority: str | None = None
    ) -> list[Any]:
        """Wait for children, and return their results, in order. Enqueue those that are not enqueued yet.

        A child is the pair of its name and its message, see `enqueue`, or what `enqueue` has returned. Each result is
        of the type that the message's class declares, as that of `Handle.result`; without one it is plain data.

        A job that waits holds no slot. While children have not ended, the handler ends here, by an exception
        that must not be caught (no `Exception`), and does not count as an attempt. When the last child has ended, the
        handler runs again from its start: do with `step` what must not be done twice. Its timeout begins anew.

        When all children have ended, raises the first error (`on_failed="raise"`), or returns the errors in the list
        ("return"): ChildFailed, ChildCancelled, ChildLost if nothing is left of a child, ResultInvalid if a result is
        not of its type. Otherwise raises as `enqueue`.
        """
        found = check_gathered(children, getattr(self, "_child_ids", {}))
        if on_failed not in ("raise", "return"):
            raise BadInput(f'on_failed must be "raise" or "return", not {on_failed!r}')
        new = [(each.name, each.message) for each in found if each.message is not None]
        with self._child_names_used([name for name, _ in new]):
            make = self._progress.make_headers
            specs = [make_child_spec(name, message, priority=priority, make_headers=make) for name, message in new]
            outcomes = await self._progress.gather_children(specs, [each.name for each in found])
        if isinstance(outcomes, Wait):
            raise WaitsForChildren(outcomes)
        results = [value_of_outcome(child, outcome) for child, outcome in zip(found, outcomes, strict=True)]
        failed = next((each for each in results if isinstance(each, ChildError)), None)
        if failed is not None and on_failed == "raise":
            raise failed
        return results

    def enqueue_sync(
        self,
        message: Message[R],
        name: str,
        *,
        priority: str | None = None,
        delay: Duration | None = None,
        deadline: Duration | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Child[R]:
        """As `enqueue`, for a handler that is a plain function."""
        work = self.enqueue(message, name, priority=priority, delay=delay, deadline=deadline, headers=headers)
        return run_from_thread(work, self._progress.loop, "`enqueue` and not `enqueue_sync`")

    @overload
    def gather_sync(
        self, children: Children[R], *, on_failed: Literal["raise"] = "raise", priority: str | None = None
    ) -> list[R]: ...
    @overload
    def gather_sync(
        self, children: Children[R], *, on_failed: Literal["return"], priority: str | None = None
    ) -> list[R | ChildError]: ...
    @overload
    def gather_sync(
        self, children: Children[Any], *, on_failed: OnFailed = "raise", priority: str | None = None
    ) -> list[object]: ...
    def gather_sync(
        self, children: Children[Any], *, on_failed: OnFailed = "raise", priority: str | None = None
    ) -> list[Any]:
        """As `gather`, for a handler that is a plain function."""
        work = self.gather(children, on_failed=on_failed, priority=priority)
        return run_from_thread(work, self._progress.loop, "`gather` and not `gather_sync`")

    @contextlib.contextmanager
    def _child_names_used(self, names: Sequence[str]) -> Iterator[None]:
        """Note which children this execution of the handler makes. An error takes that back, so that it can try again.

        Raises BadInput within a step, or for a second use of a name.
        """
        refuse_in_step("enqueue or gather")
        if not hasattr(self, "_child_ids"):  # made here, so that a job without children costs nothing
            self._child_ids: dict[str, str] = {}  # by name; "" for those that `gather` has enqueued
        used = self._child_ids
        if twice := next((name for name in names if name in used), None):
            raise BadInput(
                f"a second child {twice!r} in one execution of the handler: number the children of a loop, as in "
                "'page-1'"
            )
        used.update(dict.fromkeys(names, ""))
        try:
            yield
        except BaseException:
            for name in names:
                used.pop(name, None)
            raise

    def open(self, document: Document) -> DocumentReader:
        """Open a document of this job's tenant: ``async for chunk in job.open(document)``, or its `read` or `save`.

        Raises BadInput for a document of another tenant.
        """
        self._check_tenant(document)
        return DocumentReader(document, self._progress.chunks)

    def open_sync(self, document: Document) -> SyncDocumentReader:
        """As `open`, for a handler that is a plain function."""
        self._check_tenant(document)
        return SyncDocumentReader(document, self._progress.chunks, self._progress.loop)

    def _check_tenant(self, document: Document) -> None:
        """Raise BadInput for a document of another tenant."""
        if document.tenant != self.tenant:
            raise BadInput(f"a job of tenant {self.tenant} cannot read a document of tenant {document.tenant}")
