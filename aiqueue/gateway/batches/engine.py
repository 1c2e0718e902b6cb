"""Runs a batch: the handler of its job. Whatever dies, each line has one job, and each end of a line is in one part.

The lines have jobs of their own, whose ids are made of the batch's and the line's number: so a line that is enqueued
again, after a crash, is the same request. Lines that have ended are written as parts of the output, and the batch's
document says in one write which parts there are, and which lines are in them. At the end the parts are joined.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from ...errors import Corrupt, NotFound, QueueFull, Unavailable
from ...job import Job, Reject, Retry
from ...units import Backoff
from ..usage_store import NoUsageStream
from .ended_jobs import cancel_lines, end_without_job
from .finishing import finish
from .line_jobs import LineJobs
from .lines import RawLine, parse_line, split_lines
from .messages import GatewayBatch
from .model import LineProblem, Part, RequestBatch, Status
from .output import Kind, LineEnd, Pending, ranges
from .run import BatchRun
from .validation import validate

log = logging.getLogger(__name__)

PART_BYTES: Final = 4 * 1024 * 1024  # of records, above which a part is stored
PART_S: Final = 1.0  # or this time after the last one; longer in the course of a batch, for there are to be few parts
PART_SHARE: Final = 0.005
SENT_AHEAD: Final = 512  # lines that may have jobs, as the document says, beyond those that have
KEEP_AFTER_S: Final = 2 * 24 * 3600.0  # of parts, after the batch's expiry: a crash may leave one that nobody names
_BACKOFF: Final = Backoff(first="1s", factor=2, cap="1m")


async def run_batch(job: Job[GatewayBatch]) -> dict[str, Any]:
    """Run a batch to its end, from where the last execution was. Return its id, status and counts."""
    run: BatchRun | None = None
    try:
        run = await BatchRun.claim(job)
        if run is None:
            raise Reject("the batch is not known: it was never created, or its document has expired")
        if not run.batch.has_ended:
            await run.look()
            async with run.looking_after():
                await _run(run)
    except asyncio.CancelledError:
        if run is not None and not run.stopping.is_set():  # perhaps its job was cancelled, and so is the batch
            work = end_without_job(run.runtime.client, run.store, run.batch)
            run.runtime.finish(work, f"batch {run.batch.id} is not ended yet")
        raise
    except (Unavailable, QueueFull, NoUsageStream) as error:
        raise Retry(str(error), after=_BACKOFF.delay_s(job.attempt)) from None
    batch = run.batch
    return {
        "batch_id": batch.id, "status": batch.status, "total": batch.total, "completed": batch.completed,
        "failed": batch.failed,
    }  # fmt: skip


async def _run(run: BatchRun) -> None:
    """Run the batch to its end. Raises Retry if its worker stops."""
    if run.batch.status == "validating" and not run.stop:
        await _validate(run)
    if run.batch.status in ("in_progress", "cancelling") and "in_progress_at" in run.batch.times:
        await BatchLines(run).call()
    if not run.batch.has_ended:
        await finish(run)


async def _validate(run: BatchRun) -> None:
    found = await validate(run)
    run.hand_back_if_stopping()
    at = int(await run.now())
    if found.problems:
        await run.save(lambda batch: replace(batch, problems=found.problems, total=found.total))
        return
    if run.stop:
        return

    def begin(batch: RequestBatch) -> RequestBatch:
        status: Status = "cancelling" if batch.status == "cancelling" else "in_progress"
        times = {**batch.times, "in_progress_at": at}
        return replace(
            batch, status=status, times=times, total=found.total, month=found.month,
            reserved_micros=found.bound_micros,
        )  # fmt: skip

    await run.save(begin)


class BatchLines:
    """The lines of a batch in one execution: called, awaited, and written to parts as they end."""

    def __init__(self, run: BatchRun) -> None:
        self._run = run

    async def call(self) -> None:
        """Have all lines called that are in no part, and write their ends as they come."""
        batch = self._run.batch
        done = {number for first, last in batch.done for number in range(first, last + 1)}
        pending = Pending(batch.line, batch.offset, done)
        jobs = LineJobs(self._run)
        chunks = self._run.job.open(batch.document).__aiter__()
        try:
            try:
                async with aclosing(chunks):  # type: ignore[type-var]  # it is a generator
                    async for raw in split_lines(chunks, offset=batch.offset, number=batch.line):
                        await self._begin(raw, pending, jobs)
            except (NotFound, Corrupt) as error:
                await self._fail(error, pending)
            while jobs.count:
                await self._write_some(pending, jobs)
            await self._write(pending)
        finally:
            await jobs.close()

    async def _begin(self, raw: RawLine, pending: Pending, jobs: LineJobs) -> None:
        """Have a line called that is in no part, when there is room for it."""
        is_done = raw.number in pending.done
        pending.begin(raw.number, raw.end)
        if is_done:
            return
        while jobs.is_full:
            await self._write_some(pending, jobs)
        if raw.number > self._run.batch.sent:
            await self._say_sent(raw.number + SENT_AHEAD)
        jobs.begin(parse_line(raw, self._run.batch.endpoint))
        if jobs.has_ended or pending.size >= PART_BYTES:
            await self._write_some(pending, jobs)

    async def _fail(self, error: NotFound | Corrupt, pending: Pending) -> None:
        """The input cannot be read (any more). No further line is called; those of an earlier execution are cancelled,
        whose custom_id nobody knows.
        """
        run = self._run
        log.warning("batch %s of tenant %s has failed: %s", run.batch.id, run.batch.tenant, error)
        problem = LineProblem("input_file_unreadable", str(error)[:500])
        await run.save(lambda batch: replace(batch, problems=(*batch.problems, problem)))
        run.stop = "failed"
        known = pending.done | {number for number, _ in pending.open}
        unknown = set(range(run.batch.line + 1, run.batch.sent + 1)) - known
        await cancel_lines(run.runtime.client, run.batch, unknown)

    async def _say_sent(self, number: int) -> None:
        await self._run.save(lambda batch: replace(batch, sent=number))

    async def _write_some(self, pending: Pending, jobs: LineJobs) -> None:
        """Wait until a line has ended, or a part is due, and write a part that is due."""
        begun = self._run.batch.times.get("in_progress_at", self._run.batch.created_at)
        every_s = PART_S + PART_SHARE * max(0.0, self._run.batch.written_at - begun)
        left_s = max(0.05, jobs.written_at + every_s - time.monotonic())
        for end in await jobs.ended(left_s):
            pending.add(end)
        if pending.size >= PART_BYTES or (pending.ends and time.monotonic() - jobs.written_at >= every_s):
            await self._write(pending)
            jobs.written_at = time.monotonic()
        if self._run.stopping.is_set():
            await self._write(pending)
            self._run.hand_back_if_stopping()

    async def _write(self, pending: Pending) -> None:
        """Store the records that are in no part, then say so. A crash in between leaves a part that expires."""
        ends = pending.take()
        if not ends and (pending.line, pending.offset) == (self._run.batch.line, self._run.batch.offset):
            return
        output = await self._store_part(ends, "output")
        errors = await self._store_part(ends, "error_output")
        line, offset, done = pending.line, pending.offset, ranges(pending.done)
        completed = sum(each.kind == "output" for each in ends)
        stopped = sum(each.is_stopped for each in ends)

        def change(batch: RequestBatch) -> RequestBatch:
            return replace(
                batch, line=line, offset=offset, done=done, completed=batch.completed + completed,
                failed=batch.failed + len(ends) - completed, stopped=batch.stopped + stopped,
                usage=_sum(batch.usage, *(each.usage for each in ends)), output=(*batch.output, *output),
                error_output=(*batch.error_output, *errors),
            )  # fmt: skip

        await self._run.save(change)
        await self._tell(ends)

    async def _store_part(self, ends: list[LineEnd], kind: Kind) -> list[Part]:
        body = b"".join([each.record for each in ends if each.kind == kind])
        if not body:
            return []
        keep_s = self._run.batch.expires_at - await self._run.now() + KEEP_AFTER_S
        documents, tenant = self._run.runtime.client.documents, self._run.batch.tenant
        document = await documents.put(body, tenant=tenant, keep=keep_s, hold=self._run.batch.id)
        return [(document.sha256, document.size)]

    async def _tell(self, ends: list[LineEnd]) -> None:
        await LineJobs.forget_letters(self._run, ends)
        ended, total = self._run.batch.ended, max(1, self._run.batch.total)
        await self._run.job.progress(min(1.0, ended / total), f"{ended:,} of {total:,} lines")


def _sum(*usages: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = (sum(each) for each in zip(*usages, strict=True))
    return first, second, third, fourth
