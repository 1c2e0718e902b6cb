"""Stores one job that starts at a later time, or whose id may be in use: what a known id leads to (`on_duplicate`).

A rerun is stored under a Msg-Id that names the end which it follows. So of several reruns of one end the server stores
one. How, and what is not promised: docs/decisions/reruns.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from .. import headers, subjects
from ..connection import PubAck
from ..enqueue import (
    SOON_S,
    AttachedJob,
    DeadLetter,
    DeadLetters,
    Enqueued,
    Filter,
    JobTemplate,
    OnFull,
    ParkedJob,
    Parking,
    Producer,
    resolve_job_id,
    retry_while_full,
    start_send,
    with_header,
    with_step,
)
from ..errors import AIQueueError, BadInput, Conflict, DuplicateJob, LaneFull, NotFound, Unavailable
from ..inspect import look_up
from ..job import Message
from ..journal import RESULT, RETRY, Entry, Journal
from ..payload import encode_message
from ..requests import Claims
from ..subjects import OnDuplicate
from ..tracing import names

log = logging.getLogger(__name__)

TRIES_MAX = 8
LEAVING_PAUSE_S = 0.05  # between looks at a job that is about to leave parking


@dataclass(frozen=True)
class _NewJob:
    """A job that is to be stored, until `end` (monotonic seconds). `due_at`: seconds since the epoch; None: at once."""

    template: JobTemplate
    job_id: str
    by_caller: bool
    attached: AttachedJob
    due_at: float | None
    on_full: OnFull
    end: float

    @property
    def all_lanes(self) -> subjects.Lane:
        """The lanes of all priorities in which a job of this id may be."""
        return self.template.lane._replace(priority="*")

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()


class Storing:
    """Stores single jobs for one client."""

    def __init__(self, producer: Producer, parking: Parking, journal: Journal, dead: DeadLetters) -> None:
        self._producer = producer
        self._connection = producer.connection
        self._parking = parking
        self._journal = journal
        self._dead = dead
        self._claims = Claims(journal, parking)

    async def enqueue(
        self,
        message: Message,
        template: JobTemplate,
        unique: str | None,
        *,
        due_at: float | None,
        on_duplicate: OnDuplicate,
        on_full: OnFull,
        timeout_s: float,
    ) -> Enqueued:
        """Store one job with its documents. `due_at`: seconds since the epoch; None: at once.

        Raises what `Client.enqueue` raises.
        """
        producer, end = self._producer, time.monotonic() + timeout_s
        job_id, by_caller, shown = resolve_job_id(template.family, message, unique, producer.clock)
        _check_order(template, on_duplicate, by_caller=by_caller)
        header_block = template.header_block(job_id, producer.clock)
        if shown:
            header_block = with_header(header_block, headers.UNIQUE, shown)
        with start_send(producer.tracing, template, job_id, header_block) as sending:
            sending.set(names.DUE_AT, due_at)
            header_block = sending.add_to(header_block)
            body, print_, tenant = encode_message(message), "", template.lane.tenant
            if by_caller and template.family.fingerprint is not None and on_duplicate != "replace":
                print_ = await producer.fingerprints.of_new(template.family, tenant, job_id, header_block, body)
            attached = await producer.attach_documents(
                message, template, header_block, body, end=end, by_caller=by_caller
            )
            job = _NewJob(template, job_id, by_caller, attached, due_at, on_full, end)
            try:
                enqueued = await self._store_as_asked(job, on_duplicate)
            except AIQueueError as error:
                await producer.release_unless_stored(attached, error)
                raise
            if enqueued.duplicate:
                if enqueued.parking_id:
                    await producer.documents.end_holds(template.lane.tenant, attached.document_headers)
                else:
                    await producer.release_unless_stored(attached, PubAck(enqueued.stream, enqueued.seq, True))
                if on_duplicate == "raise":
                    raise DuplicateJob(job_id, str(template.lane))
                await producer.fingerprints.check_stored(
                    template.family, tenant, job_id, print_, enqueued.stream, enqueued.seq
                )
            return enqueued._replace(fingerprint=print_)

    async def _store_as_asked(self, job: _NewJob, on_duplicate: OnDuplicate) -> Enqueued:
        match on_duplicate:
            case "rerun" | "rerun_failed":
                return await self._rerun(job, also_done=on_duplicate == "rerun")
            case "replace":
                return await self._replace(job)
            case _:
                return await self._store(job)

    async def _store(self, job: _NewJob, step: str = "") -> Enqueued:
        """Store the job, or find that the server knows it. `step`: as of `subjects.msg_id`, for a job without delay."""
        template, attached, due_at = job.template, job.attached, job.due_at
        if due_at is None:
            block = with_step(attached.block, step)
            ack = await self._producer.store(template, block, attached.body, job.on_full, job.end)
            # the server can know a fresh id only from an earlier try of this same call
            known = ack.duplicate and job.by_caller
            return Enqueued(job.job_id, template.lane, ack.stream, ack.seq, known)

        async def park(left_s: float) -> Enqueued:
            return await self._parking.store_delayed(
                template, job.job_id, due_at, attached.block, attached.body, by_caller=job.by_caller, timeout_s=left_s
            )

        return await retry_while_full(park, template, job.on_full, job.left_s)

    # -- reruns

    async def _rerun(self, job: _NewJob, *, also_done: bool) -> Enqueued:
        """Store the job unless its id is in use; store it anew if the newest run has failed or, `also_done`, has ended.

        1. A job of the id is parked, or its newest run has begun and not ended: that is the duplicate.
        2. The newest run has ended, and such an end is to be rerun: store the job under a Msg-Id that names this end.
           If the server knows it, another caller's rerun of it is the duplicate.
        3. It has ended otherwise: its run is the duplicate.
        4. The journal has no end, and nothing of the id is found: store the job under its own Msg-Id. If the server
           knows it, that job is the duplicate. Only if it is gone too, without a trace, `also_done` has it rerun.
        """
        letters = await self._find_letters(job)  # first, so that none of them is of a later run
        gone = 0
        for _ in range(TRIES_MAX):
            newest = await self._find_newest(job)
            if isinstance(newest, Enqueued):
                return newest
            if newest is not None:
                if newest.event == RESULT and not also_done:
                    return self._known(job, newest.run)
                return await self._store_again(job, f"again-{newest.run}-{newest.seq}", letters)
            enqueued = await self._store(job)
            if not enqueued.duplicate:
                await self._drop_letters(letters)
                return enqueued
            if not also_done or enqueued.parking_id:
                return enqueued
            if await self._connection.get(enqueued.stream, enqueued.seq) is not None:
                return enqueued
            if gone == enqueued.seq:  # and still nothing in the journal, which an end is written to first
                return await self._store_again(job, f"again-{gone}", letters)
            gone = enqueued.seq
        raise Unavailable(
            f"job {job.job_id} has changed before each of {TRIES_MAX} tries to store it", maybe_stored=True
        )

    async def _store_again(self, job: _NewJob, step: str, letters: list[DeadLetter]) -> Enqueued:
        enqueued = await self._store(job, step)
        if not enqueued.duplicate:
            await self._drop_letters(letters)
        return enqueued

    async def _find_newest(self, job: _NewJob) -> Enqueued | Entry | None:
        """Return the job of this id that has not ended, else the final entry of its newest run; None: neither is there.

        A job that waits in its lane and was never delivered again leaves no trace that is indexed by its id.
        """
        parked = await self._parking.find_all(job.all_lanes, job.job_id)
        if parked:
            return self._known_parked(job, parked[-1])
        subject = self._journal_subject(job)
        head = await self._journal.head(subject)
        if head is None or head.final:
            return head
        if await self._claims.is_alive(job.template.family, subject, head) or await self._is_back_in_lane(job, head):
            return self._known(job, head.run)
        return None

    async def _is_back_in_lane(self, job: _NewJob, head: Entry) -> bool:
        """Return whether the run that wrote `head` waits in a lane at a sequence that no entry states.

        It was parked, for longer than its entry says: rescheduled, or for its children; or it waits in a long lane.
        """
        if head.event != RETRY:
            return False
        lane = job.template.lane
        found = await look_up(
            self._connection, self._producer.topology, job.job_id, family=lane.family, tenant=lane.tenant,
            since=head.time,
        )  # fmt: skip
        stored = found.stored if found is not None else None
        return stored is not None and headers.run(stored.headers, stored.seq, stored.time)[0] == head.run

    def _known(self, job: _NewJob, run: int) -> Enqueued:
        """Return a run of the id as its duplicate."""
        return Enqueued(job.job_id, job.template.lane, job.template.family.stream, run, True)

    def _known_parked(self, job: _NewJob, parked: ParkedJob) -> Enqueued:
        """Return a parked job of the id as its duplicate."""
        if parked.run:
            return self._known(job, parked.run)._replace(lane=parked.subject.lane)
        return Enqueued(
            job.job_id, parked.subject.lane, self._parking.stream, parked.stored.seq, True, parked.due_at,
            parked.parking_id,
        )  # fmt: skip

    def _journal_subject(self, job: _NewJob) -> str:
        family = job.template.family
        if family.journal is None:
            raise NotFound(f"family {family.name} keeps no journal, so nothing tells whether a job of it has failed")
        return subjects.journal(family.journal, job.template.lane.tenant, job.job_id)

    async def _find_letters(self, job: _NewJob) -> list[DeadLetter]:
        """Return the dead letters of the id. A user without the right to read them reruns the job all the same."""
        lane = job.template.lane
        try:
            wanted = Filter(family=lane.family, tenant=lane.tenant, job_id=job.job_id)
            return [letter async for letter in self._dead.find(wanted)]
        except AIQueueError as error:
            log.info("the dead letters of job %s are not found before its rerun: %s", job.job_id, error)
            return []

    async def _drop_letters(self, letters: list[DeadLetter]) -> None:
        """Delete the dead letters of runs that are run anew: a replay would run the job once more."""
        for letter in letters:
            try:
                await self._dead.purge(letter)
            except AIQueueError as error:
                log.warning("dead letter %d of job %s stays, although the job runs anew: %s", letter.seq,
                            letter.job_id, error)  # fmt: skip

    # -- replacing a parked job

    async def _replace(self, job: _NewJob) -> Enqueued:
        """Store the job in the place of the delayed one of its id. If none waits for its time, store it as a new job.

        A job that is about to leave parking is waited for: it runs, and this one is stored beside it.
        """
        while job.left_s > 0:
            found = await self._parking.find_delayed(job.template.lane, job.job_id)
            if found is None:
                enqueued = await self._store(job)
                if not enqueued.duplicate or not enqueued.parking_id:
                    return enqueued
                continue  # parked meanwhile
            if found.is_waiting and job.on_full == "raise":
                raise LaneFull(str(job.template.lane), f"job {job.job_id}, which is to be replaced, waits for a place")
            now = self._producer.clock.now()
            soon_s = found.fires_at - now
            if found.is_waiting or soon_s <= SOON_S:
                await asyncio.sleep(LEAVING_PAUSE_S)
                continue
            try:
                enqueued = await self._parking.replace(
                    found, now if job.due_at is None else job.due_at, job.attached.block, job.attached.body,
                    timeout_s=min(job.left_s, soon_s),
                )  # fmt: skip
            except (Conflict, Unavailable):  # the latter: no PubAck before its time; look whether it was stored
                continue
            await self._producer.documents.end_holds(job.template.lane.tenant, found.stored.headers)
            return enqueued
        raise Unavailable(f"job {job.job_id} was not stored: a parked one of its id changed before each try")


def _check_order(template: JobTemplate, on_duplicate: OnDuplicate, *, by_caller: bool) -> None:
    """Raise BadInput for an `on_duplicate` that cannot apply."""
    if on_duplicate == "first":
        return
    if not by_caller:
        raise BadInput(
            f"on_duplicate={on_duplicate!r} needs an id: pass unique=, or set the family's key in the message"
        )
    if on_duplicate == "rerun" and template.family.claim:
        raise BadInput(
            f'family {template.family.name} runs an id once (claim = true), so on_duplicate="rerun" has no effect: '
            'use "rerun_failed", or a new id'
        )
