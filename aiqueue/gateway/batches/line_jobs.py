"""The jobs of a batch's lines: enqueued, awaited, and stopped with their batch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from ... import headers, subjects
from ...enqueue import Filter
from ...errors import AIQueueError, BadInput, IdReused, JobFailed, JobGone, NotFound, QueueFull, Unavailable
from ...journal import STARTED, WHILE_RUNNING
from ..failures import MODEL_NOT_ALLOWED, failure_of_input
from ..paid_call import BATCH
from .lines import BatchLine, make_request
from .output import LINES, LineEnd, answered, failed, line_id, refused, unanswered

if TYPE_CHECKING:
    from ...client import Handle
    from .run import BatchRun

log = logging.getLogger(__name__)

PRIORITY: Final = "batch"
IN_FLIGHT_MAX: Final = 256  # lines of a batch that have a job and no end
IN_FLIGHT_MIN: Final = 4
FIRST_IN_FLIGHT: Final = 16  # until it is known how large the answers are
ANSWERS_BYTES: Final = 64 * 1024 * 1024  # that all answers in flight may have together
LARGEST_DECAY: Final = 0.99
RUNNING_S: Final = 600.0  # how long calls under way may take when their batch is stopped
LOOK_S: Final = 1.0  # how soon the lines in flight hear that their batch is stopped
PAUSE_S: Final = 1.0  # while the server does not answer, or has no space
_TEXTS: Final = {
    "cancelled": ("batch_cancelled", "not called before the batch was cancelled"),
    "expired": ("batch_expired", "not called before the batch expired"),
    "failed": ("batch_failed", "not called before the batch failed"),
}


class _ModelNotAllowed(BadInput):
    """The API key of the batch may not call the model of a line."""


class LineJobs:
    """The lines of a batch that have a job and no end. `written_at`: when a part was last stored (monotonic)."""

    def __init__(self, run: BatchRun) -> None:
        self._run = run
        self._batch = run.batch
        self._client = run.runtime.client
        self._tasks: set[asyncio.Task[LineEnd]] = set()
        self._done: list[asyncio.Task[LineEnd]] = []
        self._has_done = asyncio.Event()
        self._handles: dict[int, Handle[dict[str, Any]]] = {}
        self._sent_before = run.batch.sent  # lines up to here may have a job of an earlier execution
        self._ended = 0
        self._largest = 1.0
        self._stopping: asyncio.Task[None] | None = None
        self.written_at = time.monotonic()

    @property
    def count(self) -> int:
        return len(self._tasks) + len(self._done)

    @property
    def is_full(self) -> bool:
        """Whether as many lines are in flight as may be, so that their answers fit into memory."""
        most = min(FIRST_IN_FLIGHT + 2 * self._ended, int(ANSWERS_BYTES / self._largest), IN_FLIGHT_MAX)
        return self.count >= max(IN_FLIGHT_MIN, most)

    @property
    def has_ended(self) -> bool:
        return bool(self._done)

    def begin(self, line: BatchLine) -> None:
        """Have a line called."""
        task = asyncio.create_task(self._call(line))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[LineEnd]) -> None:
        self._tasks.discard(task)
        self._done.append(task)
        self._has_done.set()

    async def ended(self, within_s: float) -> list[LineEnd]:
        """Return how lines have ended, after the first that does so, or `within_s` seconds. Raises what prevents it."""
        if self._run.stop and self._stopping is None and self._tasks:
            self._stopping = asyncio.create_task(self._stop_all())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(within_s, LOOK_S)):
                await self._has_done.wait()
        self._has_done.clear()
        done, self._done = self._done, []
        ends = [each.result() for each in done]
        for end in ends:
            self._largest = max(self._largest * LARGEST_DECAY, len(end.record))
        self._ended += len(ends)
        return ends

    async def close(self) -> None:
        """Wait for nothing any more. The jobs go on."""
        tasks = [*self._tasks, *([self._stopping] if self._stopping is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one line

    async def _call(self, line: BatchLine) -> LineEnd:
        batch, number = self._batch, line.number
        may_exist = number <= self._sent_before
        try:
            while True:
                try:
                    handle = await self._enqueue(line, may_exist=may_exist)
                    if handle is None:
                        return self._stopped(line)
                    self._handles[number] = handle
                    answer = await handle.result()
                    return answered(batch.id, number, line.custom_id, answer)
                except (Unavailable, QueueFull) as error:
                    log.debug("batch %s, line %d: %s", batch.id, number, error)
                    may_exist = True
                    await asyncio.sleep(PAUSE_S)
        except JobFailed as error:
            if self._run.stop and error.reason == "cancelled":
                return self._stopped(line, amid_call=error.error == WHILE_RUNNING["error"])
            has_begun = error.reason == "deadline" and await self._has_begun(error.job_id)
            return failed(batch.id, number, line.custom_id, error, has_begun=has_begun)
        except JobGone as error:
            text = f"the line may have been called, and its answer is lost: {error}"
            return unanswered(batch.id, number, line.custom_id, "lost", text)
        except BadInput as error:
            failure = MODEL_NOT_ALLOWED if isinstance(error, _ModelNotAllowed) else failure_of_input(error)
            return refused(batch.id, number, line.custom_id, failure, str(error))
        finally:
            self._handles.pop(number, None)

    async def _enqueue(self, line: BatchLine, *, may_exist: bool) -> Handle[dict[str, Any]] | None:
        """Return the handle of a line's job; None: it has none, and gets none, because the batch is stopped."""
        batch = self._batch
        job_id = line_id(batch.id, line.number)
        if self._run.stop:
            return await self._find(job_id) if may_exist else None
        request = make_request(line, batch.endpoint)
        if batch.models is not None and request.model not in batch.models:
            raise _ModelNotAllowed(f"this API key may not call the model {request.model[:80]!r}")
        self._run.runtime.plan(request, request.model, batch.tenant)  # raises BadInput for what cannot be answered
        try:
            return await self._client.enqueue(
                request, tenant=batch.tenant, priority=PRIORITY, unique=job_id, on_full="wait",
                headers={**batch.headers, BATCH: batch.id}, deadline=datetime.fromtimestamp(batch.expires_at, UTC),
            )  # fmt: skip
        except IdReused:  # an earlier version has written the same line in other bytes
            return await self._find(job_id)

    async def _find(self, job_id: str) -> Handle[dict[str, Any]] | None:
        try:
            return await self._client.job(job_id, family=LINES, tenant=self._batch.tenant)
        except NotFound:
            return None

    def _stopped(self, line: BatchLine, *, amid_call: bool = False) -> LineEnd:
        code, text = _TEXTS[self._run.stop]
        if amid_call:
            text = "stopped amid its call, which may be billed"
        return unanswered(self._batch.id, line.number, line.custom_id, code, text)._replace(is_stopped=True)

    # -- stopping

    async def _stop_all(self) -> None:
        """Cancel the jobs that do not run, for as long as there are any, and after a time those that do."""
        end = time.monotonic() + RUNNING_S
        while True:
            for handle in [*self._handles.values()][::-1]:  # those that begin next come last, and may have begun then
                try:
                    if time.monotonic() > end or not await self._is_running(handle):
                        await handle.cancel()
                except AIQueueError as error:
                    log.debug("batch %s: job %s is not cancelled: %s", self._batch.id, handle.id, error)
            await asyncio.sleep(PAUSE_S)

    async def _is_running(self, handle: Handle[Any]) -> bool:
        journal = self._client.topology.family(LINES).journal
        assert journal is not None
        head = await self._client.journal.head(subjects.journal(journal, handle.tenant, handle.id))
        return head is not None and head.event == STARTED

    async def _has_begun(self, job_id: str) -> bool:
        """Return whether a job that has ended was begun, as far as that is known."""
        topology, tenant = self._client.topology, self._batch.tenant
        subject = subjects.journal(topology.family(LINES).journal or "", tenant, job_id)
        with contextlib.suppress(AIQueueError):
            first = await self._client.connection.first(topology.journal_stream.name, subject)
            return first is not None and first.headers.get(headers.EVENT) == STARTED
        return True

    @staticmethod
    async def forget_letters(run: BatchRun, ends: Iterable[LineEnd]) -> None:
        """Delete the dead letters of lines that are reported as failed: a replay is paid for, and read by nobody."""
        dead, tenant = run.runtime.client.dead, run.batch.tenant
        for end in ends:
            if not end.has_letter:
                continue
            wanted = Filter(family=LINES, tenant=tenant, job_id=line_id(run.batch.id, end.number))
            try:
                for letter in [each async for each in dead.find(wanted)]:
                    await dead.purge(letter)
            except AIQueueError as error:
                log.debug("a dead letter of batch %s stays: %s", run.batch.id, error)
