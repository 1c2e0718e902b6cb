"""The handle of an enqueued job: its id, its result, its stream of items, and cancelling it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Generic

from .. import subjects
from ..enqueue import Enqueued, find_fingerprint, id_reused, is_other_body, resolve_due_at
from ..errors import BadInput, JobFailed, JobGone, NotFound, ResultDisabled, ResultTimeout, Unavailable
from ..inspect import JobStats, stats
from ..job import Message
from ..journal import CANCELLED, FAILED, Entry, Journal, StreamItem, follow_batches, is_outdated, wait_for_outcome
from ..payload import R_co, parse_result
from ..topology import Family
from ..units import Duration, Time, parse_duration
from .cancel import Canceller, Verdict
from .reschedule import reschedule

tasks_awaiting_results: set[asyncio.Task[object]] = set()  # a worker looks whether all of its handlers are among them


class Handle(Generic[R_co]):
    """An enqueued job. `duplicate`: a job of this id existed already, and nothing new was stored.

    A job id has several runs if it was replayed, rerun, or enqueued again later. The handle of a call that has stored
    a job belongs to that run. The handle of a duplicate, or of `Client.job`, returns the newest outcome of the run that
    was found, or of a later run.

    ``Handle[Summary]``: the message's class declares that the result is a Summary. Otherwise the result is plain data.
    """

    def __init__(
        self,
        enqueued: Enqueued,
        family: Family,
        journal: Journal,
        cancels: Canceller,
        model: type[Message[R_co]] | None = None,
    ) -> None:
        """`model`: the message's class, if it declares the type of its result."""
        self._enqueued = enqueued
        self._family = family
        self._journal = journal
        self._cancels = cancels
        self._model = model

    def __repr__(self) -> str:
        due = "" if self.due is None else f" due {datetime.fromtimestamp(self.due, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return f"<Handle {self.id} {self.lane}{due}{' duplicate' if self.duplicate else ''}>"

    @property
    def id(self) -> str:
        """The id of the job, which `Client.job` finds again."""
        return self._enqueued.job_id

    @property
    def lane(self) -> subjects.Lane:
        """Where the job waits: family, tenant, priority, and the hash of its limited key."""
        return self._enqueued.lane

    @property
    def tenant(self) -> str:
        """The tenant that the job is of."""
        return self._enqueued.lane.tenant

    @property
    def family(self) -> str:
        """The family that the job is of, such as agent.tasks."""
        return self._enqueued.lane.family

    @property
    def duplicate(self) -> bool:
        """Whether the job was stored before, so that the call stored none."""
        return self._enqueued.duplicate

    @property
    def due(self) -> float | None:
        """When a delayed job is to start, in seconds since the epoch; None for a job without a delay."""
        return self._enqueued.due_at

    async def result(self, timeout: Duration | None = None) -> R_co:
        """Wait for the job's result, and return it. `timeout`: seconds or "30s"; None: without end.

        The result is of the type that the message's class declares, ``Message[Summary]``. Without such a type it is
        plain data: times, dates, UUIDs, decimals and the like are text, as in JSON. Secrets are whole.

        A handler that awaits a result keeps its slot: if all handlers do so, no slot is left for the awaited jobs. In a
        handler, use `Job.gather`, which holds no slot.

        Raises JobFailed (JobCancelled for a cancelled job), ResultTimeout (its text says why the job waits, if that can
        be known in 0.3 s), ResultDisabled if a worker has ended the job
        but its handler keeps no results, JobGone if the job is gone without an outcome, for example because it was
        purged, and ResultInvalid if the result is not of its type: then `data` of the error is the result. Results are
        kept for as long as the journal's stream keeps them (a day).
        """
        left_s = None if timeout is None else parse_duration("timeout", timeout)
        task = asyncio.current_task()
        if task is None or task in tasks_awaiting_results:
            return await self._await_result(left_s)
        tasks_awaiting_results.add(task)
        try:
            return await self._await_result(left_s)
        finally:
            tasks_awaiting_results.discard(task)

    async def _await_result(self, left_s: float | None) -> R_co:
        end, run = time.monotonic() + (left_s or 0.0), self._run
        while True:
            entry, gone = None, None
            try:
                entry = await wait_for_outcome(
                    self._journal,
                    self._journal_subject(),
                    run=run,
                    timeout_s=left_s,
                    job=(self._family.stream, run),
                    parking_id=self._enqueued.parking_id,
                    parked=self._is_parked,
                    consumers=self._consumers(),
                    later_runs=self.duplicate,
                )
            except JobGone as error:
                gone = error
            except ResultTimeout as error:
                raise await self._explain(error) from None
            claimant = await self._claimant(run) if entry is None else None
            if claimant is None:
                break
            run, left_s = claimant, None if left_s is None else max(0.0, end - time.monotonic())
        if gone is not None:
            raise gone
        if entry is None:
            raise ResultDisabled(f"job {self.id} ended, and its handler keeps no result")
        if entry.event in (FAILED, CANCELLED):
            raise entry.as_error(self.id)
        self._check_body(entry.fingerprint)
        data = entry.data
        if entry.document is not None:
            data = await self._cancels.documents.read_result(
                entry.document, None if left_s is None else max(0.0, end - time.monotonic())
            )
        if self._model is None:
            return data  # type: ignore[no-any-return]
        result: R_co = parse_result(self._model, data, job_id=self.id, secrets=entry.secrets)
        return result

    async def stream(
        self, *, after: str | None = None, timeout: Duration | None = None
    ) -> AsyncGenerator[StreamItem, None]:
        """Yield the entries of the job's journal as they are written.

        Each chunk of the handler's output is an item, and so is each other entry: started, progress, retry, and at the
        end result, failed or cancelled. Their data are plain::

            async with contextlib.aclosing(handle.stream()) as items:
                async for item in items:
                    if item.event == "chunk":
                        print(item.data, end="")
                    elif item.event == "restart":  # a new attempt has started: discard the output so far
                        print()

        `after`: the `cursor` of an earlier item, to continue behind it; None starts at the beginning. Each item comes
        once and in order, also over lost links. An item "gap" marks missing items, which have expired or could not be
        stored. The stream ends after the final item, or, if the handler keeps no results, when the job ends.

        Raises ResultTimeout if the job has not ended within `timeout`, JobGone as `result` does, BadInput for an
        invalid cursor.
        """
        async with aclosing(self.stream_batches(after=after, timeout=timeout)) as batches:
            async for batch in batches:
                for item in batch:
                    yield item

    async def stream_batches(
        self,
        *,
        after: str | None = None,
        timeout: Duration | None = None,
        is_new: bool = False,
        newest_attempt: bool = False,
    ) -> AsyncGenerator[list[StreamItem], None]:
        """As `stream`, for aiqueue's own modules: items that are there at once come together. `is_new`: see
        `journal.follow_batches`. `newest_attempt`: without what earlier attempts than the present one have written.
        """
        left_s = None if timeout is None else parse_duration("timeout", timeout)
        end = time.monotonic() + (left_s or 0.0)
        run: int | None = self._run
        subject = self._journal_subject()
        while run is not None:
            head = await self._newest_entry() if newest_attempt and not is_new else None
            batches = follow_batches(
                self._journal,
                subject,
                run=run,
                after=after,
                timeout_s=left_s,
                job=(self._family.stream, run),
                parking_id=self._enqueued.parking_id,
                parked=self._is_parked,
                consumers=self._consumers(),
                is_new=is_new,
            )
            is_over, gone, is_new = False, None, False
            try:
                async with aclosing(batches):
                    async for items in batches:
                        is_over = items[-1].final
                        batch = [each for each in items if head is None or not is_outdated(each, head, subject)]
                        for place, item in enumerate(batch):
                            if item.document is not None:
                                data = await self._cancels.documents.read_result(item.document)
                                batch[place] = replace(item, data=data)
                        if batch:
                            yield batch
            except JobGone as error:
                gone = error
            except ResultTimeout as error:
                raise await self._explain(error) from None
            run = await self._claimant(run) if not is_over else None
            if run is None and gone is not None:
                raise gone
            left_s = None if left_s is None else max(0.0, end - time.monotonic())

    async def _explain(self, error: ResultTimeout) -> ResultTimeout:
        """Return the error of a timeout with the reason for which the job waits, if that can be known at once."""
        reasons = self._cancels.timeout_reasons
        return error if reasons is None else await reasons.explain(error, self._enqueued, self._family)

    async def _newest_entry(self) -> Entry | None:
        """Return the newest entry of the journal; None if there is none, or the server does not answer."""
        try:
            return await self._journal.head(self._journal_subject())
        except Unavailable:  # the stream itself waits for the server
            return None

    def _consumers(self) -> list[str]:
        """Return the consumers of the lanes that the job may be in. The lane of a job that was looked up may be `*`.

        What returns from parking may be in the ordinary lane, so a job of a limited key may be in two.
        """
        priority, keys = self.lane.priority, {"", self.lane.key}
        return [
            self._family.lane_name(self.tenant, each, key)
            for each in self._family.priorities if priority in ("*", each)
            for key in keys
        ]  # fmt: skip

    async def _claimant(self, run: int) -> int | None:
        """Return the run that was run instead of `run`, which is gone and left no final entry; None if there is none.

        In a family that claims its job ids, `run` was then a duplicate.
        """
        head = await self._journal.head(self._journal_subject()) if self._family.claim else None
        if head is None or not head.run or head.run == run:
            return None
        if self._enqueued.fingerprint:
            connection, stream = self._journal.connection, self._journal.stream
            self._check_body(await find_fingerprint(connection, stream, self._family, self.tenant, self.id))
        return head.run

    def _check_body(self, fingerprint: str) -> None:
        """Raise JobFailed if the run that holds the id has another body than this job, which workers refuse then."""
        if is_other_body(fingerprint, self._enqueued.fingerprint):
            raise JobFailed(self.id, reason="invalid", error=str(id_reused(self.id)), attempt=0)

    async def status(self) -> JobStats:
        """Return where the job is, and its state. Raises NotFound if nothing is known of it any more, Unavailable."""
        return await stats.job(
            self._journal.connection, self._cancels.topology, self.id, family=self.family, tenant=self.tenant
        )

    @property
    def _run(self) -> int:
        """The job's run; 0 for a delayed job, which gets a sequence in the work stream only when it is due."""
        return 0 if self._enqueued.parking_id else self._enqueued.seq

    def _journal_subject(self) -> str:
        """Return the subject of the job's journal. Raises NotFound if its family has none."""
        if self._family.journal is None:
            raise NotFound(f"family {self.family} keeps no journal, so there are no results")
        return subjects.journal(self._family.journal, self.tenant, self.id)

    async def cancel(self) -> bool:
        """Cancel the job, wherever it is. Return whether it was cancelled.

        True: the job does not run (again), and awaiting its result ends with JobCancelled. If the job is running, its
        worker is notified, and stops it; this call does not wait for that. Also True if the job was cancelled before,
        so that a repeated call is safe. False: the job succeeded or failed before, and nothing was changed.
        Raises Unavailable; cancelling again is safe then.
        """
        return (await self.verdict()).cancelled

    async def verdict(self) -> Verdict:
        """Cancel the job, and return the outcome with an explanation; otherwise as `cancel`."""
        return await self._cancels.cancel_enqueued(self._enqueued)

    async def reschedule(self, *, delay: Duration | None = None, at: Time | None = None) -> None:
        """Have the parked job start at another time: after `delay`, or `at` a time, as in `Client.enqueue`.

        A job is parked while it waits for its delay, or for 5 s or more for its next attempt. The new time is in `due`.
        Raises NotParked, with the job's state, if the job is in its lane, runs, or has ended. Also BadInput, and
        Unavailable; rescheduling again is safe then.
        """
        if delay is None and at is None:
            raise BadInput("reschedule needs the new time: pass delay= or at=, or call run_now")
        clock = self._journal.connection.clock
        await clock.ensure(self._cancels.parking.stream)
        await self._reschedule(resolve_due_at(delay, at, clock))

    async def run_now(self) -> None:
        """Have the parked job start at once, otherwise as `reschedule`. Safe twice, until it has started."""
        await self._reschedule(None)

    async def _reschedule(self, due_at: float | None) -> None:
        parking, clock = self._cancels.parking, self._journal.connection.clock
        await clock.ensure(parking.stream)
        self._enqueued = await reschedule(
            parking, self._journal, clock, self._family, self._enqueued, due_at, self.status
        )

    async def _is_parked(self) -> bool:
        """Whether the job is parked now."""
        run, parking_id = self._enqueued.seq, self._enqueued.parking_id
        found = await self._cancels.parking.find_all(self.lane, self.id)
        return any(each.parking_id == parking_id if parking_id else each.run == run for each in found)
