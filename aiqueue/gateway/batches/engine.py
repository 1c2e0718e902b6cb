"""Runs a batch: the handler of its job. Whatever dies, each line has one job, and each end of a line is in one part.

The lines have jobs of their own, whose ids are made of the batch's and the line's number: so a line that is enqueued
again, after a crash, is the same request. Lines that have ended are written as parts of the output, and the batch's
document says in one write which parts there are, and which lines are in them. At the end the parts are joined.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...errors import AIQueueError, Conflict, Corrupt, NotFound, QueueFull, Stale, Unavailable
from ...job import Job, Reject, Retry
from ...units import Backoff
from ..runtime import Runtime
from .finishing import finish
from .line_jobs import LineJobs
from .lines import parse_line, split_lines
from .messages import GatewayBatch
from .model import Batch, BatchQuotas, LineProblem, Part, Status
from .output import Kind, LineEnd, Pending, ranges
from .store import BatchStore
from .validation import validate

log = logging.getLogger(__name__)

PART_BYTES: Final = 4 * 1024 * 1024  # of records, above which a part is stored
PART_S: Final = 1.0  # or this time after the last one; longer in the course of a batch, for there are to be few parts
PART_SHARE: Final = 0.005
LOOK_S: Final = 1.0  # how often the batch is looked at for whether it was cancelled
ALIVE_S: Final = 60.0  # how often it is written at least
SENT_AHEAD: Final = 512  # lines that may have jobs, as the document says, beyond those that have
KEEP_AFTER_S: Final = 2 * 24 * 3600.0  # of parts, after the batch's expiry: a crash may leave one that nobody names
_BACKOFF: Final = Backoff(first="1s", factor=2, cap="1m")


async def run_batch(job: Job[GatewayBatch]) -> dict[str, Any]:
    """Run a batch to its end, from where the last execution was. Return its id, status and counts."""
    try:
        run = await BatchRun.claim(job)
        if run is None:
            raise Reject("the batch is not known: it was never created, or its document has expired")
        if not run.batch.has_ended:
            await run.look()
            async with run.looking_after():
                await run.run()
    except (Unavailable, QueueFull) as error:
        raise Retry(str(error), after=_BACKOFF.delay_s(job.attempt)) from None
    batch = run.batch
    return {
        "batch_id": batch.id, "status": batch.status, "total": batch.total, "completed": batch.completed,
        "failed": batch.failed,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchState:
    """What the handler has of its worker: the state of its jobs."""

    runtime: Runtime
    quotas: BatchQuotas = field(default_factory=BatchQuotas)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # its worker stops, so batches are handed back


class BatchRun:
    """One execution of a batch. It writes the batch's document, of which others write only that it is cancelled."""

    def __init__(self, job: Job[GatewayBatch], store: BatchStore, batch: Batch) -> None:
        self.job, self.store, self.batch = job, store, batch
        self.runtime: Runtime = job.state.runtime
        self.quotas: BatchQuotas = job.state.quotas
        self.stopping: asyncio.Event = job.state.stopping
        self.stop = ""  # "cancelled", "expired": no further line is called
        self._saving = asyncio.Lock()

    @classmethod
    async def claim(cls, job: Job[GatewayBatch]) -> BatchRun | None:
        """Become the one that writes the batch, and return its run. None: there is no such batch."""
        client = job.state.runtime.client
        store = BatchStore(client.connection, client.topology)
        batch = await _read(store, job.tenant, job.message.batch_id)
        if batch is None:
            return None
        run, owner = cls(job, store, batch), secrets.token_hex(8)
        while not run.batch.has_ended:
            draft = replace(run.batch, owner=owner)
            try:
                await run._put(draft)
                break
            except Conflict:
                found = await _read(store, job.tenant, batch.id)
                if found is None:
                    return None
                run.batch = found
        return run

    async def run(self) -> None:
        """Run the batch to its end. Raises Retry if its worker stops."""
        if self.batch.status == "validating" and not self.stop:
            await self._validate()
        if self.batch.status in ("in_progress", "cancelling") and "in_progress_at" in self.batch.times:
            try:
                await self._call_lines()
            except (NotFound, Corrupt) as error:
                log.warning("batch %s of tenant %s has failed: %s", self.batch.id, self.batch.tenant, error)
                problem = LineProblem("input_file_unreadable", str(error)[:500])
                await self.save(lambda batch: replace(batch, problems=(problem,)))
        if not self.batch.has_ended:
            await finish(self)

    # -- its document

    async def save(self, change: Callable[[Batch], Batch]) -> None:
        """Store what `change` makes of the batch, which somebody may have cancelled meanwhile. Raises Stale if another
        execution has taken over, and Unavailable.
        """
        async with self._saving:
            while True:
                try:
                    await self._put(change(self.batch))
                except Conflict:
                    found = await _read(self.store, self.batch.tenant, self.batch.id)
                    if found is None or found.owner != self.batch.owner:
                        raise Stale(f"batch {self.batch.id} is run elsewhere", ended=found is None) from None
                    self.batch = found
                else:
                    return

    async def _put(self, batch: Batch) -> None:
        keep_s = batch.output_keep_s if batch.has_ended else None
        seq = await self.store.put(
            "batch", batch.tenant, batch.id, batch.plain(), expected=self.batch.seq, keep_s=keep_s
        )
        self.batch = replace(batch, seq=seq, written_at=await self.store.now())

    async def now(self) -> float:
        return await self.store.now()

    @asynccontextmanager
    async def looking_after(self) -> AsyncIterator[None]:
        """Look meanwhile for whether the batch is cancelled or has expired, and show that it is alive."""
        task = asyncio.create_task(self._look_after())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def look(self) -> None:
        """See whether the batch is to be stopped. Raises Unavailable."""
        found = await _read(self.store, self.batch.tenant, self.batch.id)
        if found is not None and found.status == "cancelling":
            self.stop = "cancelled"
        elif await self.now() >= self.batch.expires_at:
            self.stop = self.stop or "expired"

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
                if await self.now() - self.batch.written_at > ALIVE_S:
                    await self.save(lambda batch: batch)
            except AIQueueError as error:
                log.debug("batch %s is not looked at now: %s", self.batch.id, error)

    # -- its lines

    async def _validate(self) -> None:
        found = await validate(self)
        self.hand_back_if_stopping()
        at = int(await self.now())
        if found.problems:
            await self.save(lambda batch: replace(batch, problems=found.problems, total=found.total))
            return
        if self.stop:
            return

        def begin(batch: Batch) -> Batch:
            status: Status = "cancelling" if batch.status == "cancelling" else "in_progress"
            times = {**batch.times, "in_progress_at": at}
            return replace(
                batch, status=status, times=times, total=found.total, month=found.month,
                reserved_micros=found.bound_micros,
            )  # fmt: skip

        await self.save(begin)

    async def _call_lines(self) -> None:
        """Have all lines called that are in no part, and write their ends as they come."""
        batch = self.batch
        done = {number for first, last in batch.done for number in range(first, last + 1)}
        pending = Pending(batch.line, batch.offset, done)
        jobs = LineJobs(self)
        chunks = self.job.open(batch.document).__aiter__()
        try:
            async with aclosing(chunks):  # type: ignore[type-var]  # it is a generator
                async for raw in split_lines(chunks, offset=batch.offset, number=batch.line):
                    is_done = raw.number in pending.done
                    pending.begin(raw.number, raw.end)
                    if is_done:
                        continue
                    while jobs.is_full:
                        await self._write_some(pending, jobs)
                    if raw.number > self.batch.sent:
                        await self._say_sent(raw.number + SENT_AHEAD)
                    jobs.begin(parse_line(raw, batch.endpoint))
                    if jobs.has_ended or pending.size >= PART_BYTES:
                        await self._write_some(pending, jobs)
            while jobs.count:
                await self._write_some(pending, jobs)
            await self._write(pending)
        finally:
            await jobs.close()

    async def _say_sent(self, number: int) -> None:
        await self.save(lambda batch: replace(batch, sent=number))

    async def _write_some(self, pending: Pending, jobs: LineJobs) -> None:
        """Wait until a line has ended, or a part is due, and write a part that is due."""
        begun = self.batch.times.get("in_progress_at", self.batch.created_at)
        every_s = PART_S + PART_SHARE * max(0.0, self.batch.written_at - begun)
        left_s = max(0.05, jobs.written_at + every_s - time.monotonic())
        for end in await jobs.ended(left_s):
            pending.add(end)
        if pending.size >= PART_BYTES or (pending.ends and time.monotonic() - jobs.written_at >= every_s):
            await self._write(pending)
            jobs.written_at = time.monotonic()
        if self.stopping.is_set():
            await self._write(pending)
            self.hand_back_if_stopping()

    def hand_back_if_stopping(self) -> None:
        """Raise Retry if the worker stops: another one goes on from what is stored."""
        if self.stopping.is_set():
            raise Retry("its worker stops", after=0.0)

    async def _write(self, pending: Pending) -> None:
        """Store the records that are in no part, then say so. A crash in between leaves a part that expires."""
        ends = pending.take()
        if not ends and (pending.line, pending.offset) == (self.batch.line, self.batch.offset):
            return
        output = await self._store_part(ends, "output")
        errors = await self._store_part(ends, "error_output")
        line, offset, done = pending.line, pending.offset, ranges(pending.done)
        completed = sum(each.kind == "output" for each in ends)
        stopped = sum(each.is_stopped for each in ends)

        def change(batch: Batch) -> Batch:
            return replace(
                batch, line=line, offset=offset, done=done, completed=batch.completed + completed,
                failed=batch.failed + len(ends) - completed, stopped=batch.stopped + stopped,
                usage=_sum(batch.usage, *(each.usage for each in ends)), output=(*batch.output, *output),
                error_output=(*batch.error_output, *errors),
            )  # fmt: skip

        await self.save(change)
        await self._tell(ends)

    async def _store_part(self, ends: list[LineEnd], kind: Kind) -> list[Part]:
        body = b"".join([each.record for each in ends if each.kind == kind])
        if not body:
            return []
        keep_s = self.batch.expires_at - await self.now() + KEEP_AFTER_S
        documents, tenant = self.runtime.client.documents, self.batch.tenant
        document = await documents.put(body, tenant=tenant, keep=keep_s, hold=self.batch.id)
        return [(document.sha256, document.size)]

    async def _tell(self, ends: list[LineEnd]) -> None:
        await LineJobs.forget_letters(self, ends)
        total = max(1, self.batch.total)
        await self.job.progress(min(1.0, self.batch.ended / total), f"{self.batch.ended:,} of {total:,} lines")


async def _read(store: BatchStore, tenant: str, batch_id: str) -> Batch | None:
    kept = await store.get("batch", tenant, batch_id)
    return None if kept is None else Batch.parse(tenant, kept.content, seq=kept.seq, written_at=kept.at)


def _sum(*usages: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = (sum(each) for each in zip(*usages, strict=True))
    return first, second, third, fourth
