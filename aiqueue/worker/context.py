"""What a job may ask for while it runs: progress, chunks, documents, and whether it was cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Protocol

from .. import headers, subjects
from ..attempt import Outcome, RunningAttempt, Threads, outcome_to_plain
from ..codec import Encoded
from ..documents import Documents
from ..errors import AIQueueError, BadInput, Stale
from ..job import Child, ChildOutcome, ChildSpec, MakeHeaders, Wait
from ..journal import PROGRESS, Checkpoints, Journal, Retention, Writer
from ..lanes import Delivery
from ..payload import Document
from ..topology import Family
from .gathering import ChildrenResources, Gathering
from .opening import OpenedJob, may_have_history
from .step_documents import StepDocuments
from .takeover import order_delivery

log = logging.getLogger(__name__)


class WorkerResources:
    """What the attempts of one worker share.

    `retention`: by family, how long journal entries are kept. `checkpoints`: the stream of what runs keep. `children`:
    for jobs that enqueue others.
    """

    def __init__(
        self,
        journal: Journal,
        documents: Documents,
        families: Mapping[str, Family],
        checkpoints: str,
        children: ChildrenResources,
    ) -> None:
        self.children = children
        self.journal = journal
        self.checkpoints = checkpoints
        self.documents = documents
        self.families = families
        self.loop = asyncio.get_running_loop()
        self.threads = Threads("aiqueue-handler")
        self.retention = {
            name: Retention(family.journal_ttl_s, family.chunk_ttl_s) for name, family in families.items()
        }


class Admission(Protocol):
    """Lets the calls of a limited job begin; `limiting.LimitedCall`. `key`: "" while it is not known."""

    key: str

    async def begin(self, cost: float | None = None, key: str = "") -> Outcome | None: ...
    def hold(self) -> Callable[[], None]: ...


class JobContext(RunningAttempt):
    """One attempt as its handler sees it (it implements `job.Progress`), and as `Cancellations` stops it.

    `has_checkpoints`: this attempt has asked for what its run keeps. `settled`: what it has used, if it has said so.

    `journal_muted`: nothing is written while a suspect runs in this process, because an entry would hide the newest
    `trial` entry. The journal writer is made when it is first needed: most jobs write nothing while they run.
    """

    journal_muted = False
    _writer: Writer | None = None
    has_checkpoints = False
    settled: float | None = None
    admission: Admission | None = None
    _checkpoints: Checkpoints | None = None
    _gathering: Gathering | None = None
    _handler_task: asyncio.Task[None] | None = None  # where that is not the delivery's

    def __init__(
        self, resources: WorkerResources, delivery: Delivery, opened: OpenedJob, started_at: float = 0.0
    ) -> None:
        """`started_at`: as of `mark_started`, if the handler is about to be called."""
        if delivery.task is None:  # it has started eagerly
            delivery.task = asyncio.current_task(resources.loop)
        self.journaled = bool(opened.family.journal)
        self._resources = resources
        self._delivery = delivery
        self._opened = opened
        self._consumer_created_at = delivery.lane.created
        self._started_at = delivery.run_started_at = started_at  # monotonic

    @property
    def delivery(self) -> Delivery:
        return self._delivery

    @property
    def kind(self) -> str:
        """The kind of the job, as it was read."""
        return self._opened.kind

    @property
    def job_id(self) -> str:
        return self._opened.job_id

    @property
    def attempt(self) -> int:
        return self._opened.attempt

    @property
    def is_suspect(self) -> bool:
        """Whether it is tried apart from others, because it may end its process."""
        return self._opened.is_suspect

    @property
    def is_limited(self) -> bool:  # type: ignore[override]
        return self.admission is not None

    async def begin_call(self, cost: float | None, key: str) -> list[Any] | None:
        """Let the handler of a limited job start in a child. Returns None, or the outcome of one that may not, as plain
        data.
        """
        refusal = None if self.admission is None else await self.admission.begin(cost, key)
        return None if refusal is None else outcome_to_plain(refusal)

    @property
    def make_headers(self) -> MakeHeaders | None:
        return self._resources.children.client.make_headers

    @property
    def task(self) -> asyncio.Task[None]:  # type: ignore[override]
        """The task that runs the handler.

        It is not kept here: the task's context holds the job (`logs.running_job`), so each job would be in a reference
        cycle, and its memory free only at the next collection.
        """
        task = self._handler_task or self._delivery.task
        assert task is not None
        return task

    def set_task(self, task: asyncio.Task[None]) -> None:
        """Have `task` cancelled instead when the attempt is to stop: it runs the handler from now on."""
        self._handler_task = task

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._resources.loop

    @property
    def cancelled(self) -> bool:
        """Whether the handler should end: its job was cancelled, or its attempt is over, such as by a timeout."""
        return self.cancel_requested or self.is_over

    @property
    def writer(self) -> Writer | None:
        """The journal writer of this attempt. None: the family has no journal."""
        family = self._opened.family
        if self._writer is None and family.journal:
            resources, delivery, opened = self._resources, self._delivery, self._opened
            self._writer = Writer(
                resources.journal,
                self.journal_key[0],
                run=delivery.run,
                enqueued_at=delivery.enqueued_at,
                attempt=opened.attempt,
                record=opened.record,
                parking_id=headers.parking_id(opened.raw.headers),
                ignore_before=self._consumer_created_at,
                retention=resources.retention[family.name],
                job_headers=opened.raw.headers,
            )
            self._writer.started_at = self.started_at
            self._writer.kind = opened.kind
            if family.fingerprint is not None:
                self._writer.fingerprint = opened.fingerprint
        return self._writer

    @property
    def checkpoints(self) -> Checkpoints:
        """What the run keeps. Raises Stale if the attempt is over."""
        self._refuse_if_over()
        if self._checkpoints is None:
            family, delivery, opened = self._opened.family, self._delivery, self._opened
            connection, run = self._resources.journal.connection, opened.run_of(delivery)
            self.has_checkpoints = True
            self._checkpoints = Checkpoints(
                connection,
                self._resources.checkpoints,
                run.checkpoints(delivery.tenant),
                run=delivery.run,
                attempt=opened.attempt,
                find_order=lambda: order_delivery(connection, delivery, family),
                has_past=_may_have_kept(delivery, opened),
                large=StepDocuments(self._resources.documents, delivery.tenant, run),
            )
        return self._checkpoints

    @property
    def gathering(self) -> Gathering:
        """The children of the job. Raises Stale if the attempt is over."""
        checkpoints = self.checkpoints
        if self._gathering is None:
            run = self._opened.run_of(self._delivery)
            self._gathering = Gathering(
                self._resources.children, self._delivery, self._opened, checkpoints, run, self.writer
            )
        return self._gathering

    async def forget_checkpoints(self, *, cancelled: bool = False) -> None:
        """Delete what the run keeps, because the run has ended. A failure is harmless: it expires.

        `cancelled`: the children of the run are cancelled too, and what it keeps of them is left to the canceller. A
        child may have children that its canceller has not found.
        """
        is_child = headers.PARENT in self._opened.raw.headers if cancelled and not self._opened.plain else False
        try:
            if cancelled and (is_child or (self._checkpoints is not None and self._checkpoints.children)):
                cancels = self._resources.children.client.cancels
                await cancels.cancel_children_of(self._opened.family.name, self._delivery.tenant, self._opened.job_id)
                if self._checkpoints is not None:
                    await self._checkpoints.forget_documents()
            elif self._checkpoints is not None:
                await self._checkpoints.forget()
        except AIQueueError as error:
            log.debug("job %s: what it keeps is not deleted, and will expire: %s", self._opened.job_id, error)

    @property
    def journal_key(self) -> tuple[str, int]:
        """The subject of the job's journal, and the run."""
        journal = self._opened.family.journal or ""
        return subjects.journal(journal, self._delivery.tenant, self._opened.job_id), self._delivery.run

    def read_headers(self) -> Mapping[str, str]:
        """Return the job's headers, as they were stored."""
        return self._delivery.message.headers

    @property
    def has_writer(self) -> bool:
        """Whether this attempt has, or may have, written to its journal."""
        return self._writer is not None

    @property
    def started_at(self) -> float:
        """When the handler was called, seconds since the epoch; 0 before that."""
        return self._started_at and time.time() - (time.monotonic() - self._started_at)

    def mark_started(self, now: float) -> None:
        """Note the time, in monotonic seconds: the handler is about to be called."""
        self._started_at = self._delivery.run_started_at = now
        if self._writer is not None:
            self._writer.started_at = self.started_at

    @property
    def has_chunks(self) -> bool:
        """Whether the job has given chunks, so that there may be something to flush."""
        return self._writer is not None and self._writer.has_chunks

    async def flush(self) -> None:
        """Wait until all chunks are stored. Raises what `Writer.flush` raises."""
        if self._writer is not None:
            await self._writer.flush_chunks()

    def close(self) -> None:
        """Drop the chunks that are not stored."""
        if self._writer is not None:
            self._writer.discard_chunks()

    async def progress(self, fraction: float, note: str) -> None:
        """Write a `progress` entry. Raises Stale if the attempt may not write any more, and what `write` raises."""
        self._refuse_if_over()
        if not self.journal_muted and (writer := self.writer) is not None:
            await writer.write(PROGRESS, {"fraction": fraction, "note": note})

    async def chunk(self, data: Any) -> None:
        """Append a part of the job's output. Muted, count it as lost. Raises as `progress`."""
        self._refuse_if_over()
        if (writer := self.writer) is None:
            return
        if self.journal_muted:
            writer.count_lost_chunks(1)
        else:
            await writer.add_chunk(data)

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Call a plain function in one of the worker's threads.

        A thread that goes on alone keeps what its call has reserved, such as a place in flight.
        """
        ended = self.admission.hold() if self.admission is not None else None
        return await self._resources.threads.run(function, ended)

    def settle(self, cost: float) -> None:
        """Note what the attempt has used, also after its job was cancelled. Raises Stale once the attempt is over."""
        if self.is_over:
            raise Stale("this attempt is over: what it has used is settled", ended=False)
        self.settled = cost
        self._delivery.settle(cost)

    async def begin_step(self, name: str) -> tuple[Any] | None:
        """Begin a step of a handler in this process. Raises what `StepNames.use` and `Checkpoints.find_step` raise."""
        checkpoints = self.checkpoints
        checkpoints.names.use(name)
        return await checkpoints.find_step(name)

    async def find_encoded_step(self, name: str) -> bytes | None:
        """See `Checkpoints.find_encoded_step`. For a step of a handler in a child process, which knows its names."""
        return await self.checkpoints.find_encoded_step(name)

    async def keep_step(self, name: str, result: Any) -> Any:
        """See `Checkpoints.keep_step`."""
        return await self.checkpoints.keep_step(name, result)

    async def keep_encoded_step(self, name: str, encoded: Encoded) -> bytes | None:
        """See `Checkpoints.keep_encoded_step`."""
        return await self.checkpoints.keep_encoded_step(name, encoded)

    async def keep_call(self, data: Any) -> None:
        """See `Checkpoints.keep_call`."""
        await self.checkpoints.keep_call(data)

    async def earlier_calls(self) -> list[Any]:
        """See `Checkpoints.earlier_calls`."""
        return await self.checkpoints.earlier_calls()

    async def enqueue_children(self, specs: Sequence[ChildSpec]) -> list[Child]:
        """See `Gathering.enqueue`."""
        return await self.gathering.enqueue(specs)

    async def gather_children(self, specs: Sequence[ChildSpec], names: Sequence[str]) -> Sequence[ChildOutcome] | Wait:
        """See `Gathering.gather`."""
        return await self.gathering.gather(specs, names)

    def _refuse_if_over(self) -> None:
        """Raises Stale if the job was cancelled, or the attempt is over."""
        if self.cancel_requested:  # the journal would refuse too, but a fast stream can keep the canceller's entry out
            raise Stale("the job was cancelled", ended=True)
        if self.is_over:
            raise Stale("this attempt is over: it can write nothing more for its job", ended=False)

    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """Read a document of the job's own tenant, chunk by chunk. Raises BadInput for another tenant's."""
        tenant = self._delivery.tenant
        if document.tenant != tenant:  # a child process may ask for any document
            raise BadInput(f"a document of tenant {document.tenant} cannot be read by a job of {tenant}")
        return self._resources.documents.read_chunks(document)


def _may_have_kept(delivery: Delivery, opened: OpenedJob) -> bool:
    """Return whether earlier attempts may have kept something. A consumer that was created after the job was stored
    may have replaced one that had delivered the job: it counts deliveries from 1, as after a day without workers.
    """
    is_younger = delivery.lane.created > delivery.stored_at
    return is_younger or headers.RESUMES in opened.raw.headers or may_have_history(delivery, opened)
