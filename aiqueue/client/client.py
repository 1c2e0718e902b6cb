"""The façade: a connection, what is declared on it, and enqueueing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import codec, subjects
from ..config import Settings
from ..connection import Connection
from ..documents import Documents
from ..enqueue import (
    Bulk,
    DeadLetters,
    Enqueued,
    Form,
    Items,
    OnFull,
    Options,
    Parking,
    Producer,
    Progress,
    due_time,
    duration,
    identity,
    patiently,
)
from ..errors import AIQueueError, BadInput, ConfigMismatch, DataLossRefused
from ..inspect import find
from ..job import Message
from ..journal import Journal
from ..mailbox import Inboxes
from ..requests import call
from ..server import EmbeddedServer
from ..topology import Topology, provision
from .cancel import Cancels
from .handle import Handle

log = logging.getLogger("aiqueue.client")


class Client:
    """A connection to the queue; made by `connect`, used as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.topology = Topology.load(*([settings.streams] if settings.streams else []), profile=settings.profile)
        self._embedded: EmbeddedServer | None = None
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._ways: tuple[Journal, Cancels] | None = None  # what all handles lead by; made once, for there are many

    @property
    def connection(self) -> Connection:
        """The open connection; for aiqueue's own modules."""
        if self._connection is None:
            raise BadInput("the client is not open: use `async with aiqueue.connect() as client:`")
        return self._connection

    @property
    def journal(self) -> Journal:
        return Journal(self.connection, self.topology.journal_stream.name)

    @property
    def dead(self) -> DeadLetters:
        return DeadLetters(self.connection, self.topology)

    @property
    def documents(self) -> Documents:
        """Large bytes that are kept beside the jobs: `put`, `open`, `get`, `find`, `forget`."""
        return Documents(self.connection, self.topology)

    @property
    def inboxes(self) -> Inboxes:
        """Agents' inboxes: `send`, `broadcast`, `read`, `create`, `remove`, `stats`."""
        return Inboxes(self.connection, self.topology)

    @property
    def parking(self) -> Parking:
        return Parking(self.connection, self.topology)

    @property
    def cancels(self) -> Cancels:
        return Cancels(self.connection, self.topology)

    @property
    def embedded(self) -> bool:
        """Whether this is the directory's own server and not one that was named."""
        return self._embedded is not None

    async def open(self, *, declare: bool = True) -> Self:
        """Connect; on an embedded server, `declare` the streams too. Safe twice.

        Raises Unavailable, AccessDenied, SettingsError, EmbeddedError.
        """
        if self._connection is not None:
            return self
        settings = self.settings
        if not settings.servers:
            self._embedded = await _acquire(settings.directory)
            settings = settings.model_copy(
                update={
                    "url": self._embedded.url,
                    "user": self._embedded.user,
                    "password": Settings.secret(self._embedded.password),
                }
            )
        connection = Connection(settings, revive=self._revive if self._embedded else None)
        try:
            await connection.open()
            if self._embedded is not None and declare:
                await self._declare(connection)
        except BaseException:
            await connection.close()
            await self._release()
            raise
        self._connection = connection
        self._producer = Producer(connection, self.topology)
        self._ways = self.journal, self.cancels
        return self

    async def close(self) -> None:
        """Leave; the embedded server ends with its last user. Safe twice and unopened."""
        connection, self._connection = self._connection, None
        self._producer = self._ways = None
        if connection is not None:
            await connection.close()
        await self._release()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def enqueue(
        self,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
        delay: str | float | None = None,
        at: datetime | float | None = None,
        on_full: OnFull = "raise",
        timeout: str | float = 30.0,
    ) -> Handle:
        """Store one job and return its handle when the server has acknowledged it.

        `unique` is the job's id: a second job of the same tenant, family and id within the stream's duplicate window
        (10 minutes) is not stored, and its handle says `duplicate` and leads to the first. Without it the message's
        own key counts (request_id, query_id, task_id, document_id), else a new id is made. `headers` travel with the
        job (ASCII). `deadline` (seconds from now, or "5m"): a job not begun by then ends as a dead letter.
        `delay` (seconds or "10m") or `at` (a datetime with a time zone, or seconds since the epoch) has it wait, at
        most a year, before it enters its lane: never early, and as a rule within half a second. A time that has
        passed means at once. While it waits, a second delayed job of its id is a duplicate.
        `on_full`: "raise" QueueFull, or "wait" with backoff. `timeout` bounds everything, retries while the server
        is away included.

        Raises BadInput (InvalidToken, EncodeError, TooLarge, UnknownFamily), QueueFull, Unavailable (its
        `maybe_stored` says whether the job may be stored all the same; the same `unique` makes another try safe),
        NotFound (the stream is not there: `aiqueue apply`), AccessDenied.
        """
        producer, timeout_s = self._opened(), duration("timeout", timeout)
        assert self._ways is not None
        journal, cancels = self._ways
        due = None if delay is None and at is None else due_time(delay, at)
        if due is not None:
            form = producer.form(message, tenant, priority, headers, deadline)
            enqueued = await self._park(form, message, unique, due, on_full, timeout_s)
        else:
            enqueued = await producer.enqueue(
                message,
                tenant=tenant,
                priority=priority,
                unique=unique,
                extra=headers,
                deadline=deadline,
                on_full=on_full,
                timeout_s=timeout_s,
            )
        return Handle(enqueued, self.topology.family(message.aiq_family), journal, cancels)

    async def _park(
        self, form: Form, message: Message, unique: str | None, due: float, on_full: OnFull, timeout_s: float
    ) -> Enqueued:
        job_id, by_caller = identity(form.family, message, unique)
        producer, end = self._opened(), time.monotonic() + timeout_s
        attached = await producer.attach(
            message, form, form.block(job_id), codec.encode(message), end=end, by_caller=by_caller
        )

        async def store(left_s: float) -> Enqueued:
            return await self.parking.delay(
                form, job_id, due, attached.block, attached.body, by_caller=by_caller, timeout_s=left_s
            )

        try:
            enqueued = await patiently(store, form, on_full, end - time.monotonic())
        except AIQueueError as error:
            await producer.detach(attached, error)
            raise
        if enqueued.duplicate:
            await producer.documents.release(form.lane.tenant, attached.held)
        return enqueued

    def enqueue_many(  # noqa: PLR0913  (what holds for all jobs)
        self,
        items: Items,
        *,
        tenant: str | None = None,
        priority: str = subjects.NORMAL,
        headers: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
        delay: str | float | None = None,
        at: datetime | float | None = None,
        on_full: OnFull = "raise",
        window: int = 1_000,
        timeout: str | float = 30.0,
        progress: Progress | None = None,
    ) -> AsyncGenerator[Handle | AIQueueError, None]:
        """Store many jobs, and yield for each item, in their order, its handle or the error that kept it out::

            async for outcome in client.enqueue_many(messages, tenant="acme"):
                if isinstance(outcome, aiqueue.AIQueueError): ...  # outcome.item is what was not stored

        `items`: any iterable or async iterable, endless ones too, of Message or JobSpec (a message with its own
        tenant, priority, unique, headers, deadline, delay or at). It is read only as far as the window goes: at most
        `window` items (and 32 MiB of bodies) that were taken and not yet yielded. A plain iterable is read on the
        event loop, so it should not block. What it raises is raised here, after the outcomes of all items before it. An
        error about one item is yielded, never raised, and stops no other.

        Jobs are sent in the order of the items, so a lane holds them in that order, except where one was tried
        again: after a PubAck that did not come, a full lane, a cluster without a leader, or, on a server that syncs
        every write, in a batch that was refused for another job. Each item is tried with the same id until `timeout`
        (from when it was taken) is over. `on_full`: a full lane's items fail with QueueFull, or "wait" with backoff;
        other lanes' items pass them, but are yielded after them, so that a lane which stays full holds the window up
        for at most `timeout`. `deadline` and `delay` count from when the item was taken.

        `progress(stored, failed)` counts what was yielded; it is called at most 10 times a second and at the end.
        Leaving early (`aclose`, `contextlib.aclosing`, cancellation) forgets what is under way: those that were sent
        may be stored all the same, and nothing says so. Raises BadInput for a wrong argument, at once.
        """
        producer = self._opened()
        journal, cancels = self.journal, self.cancels
        if deadline is not None:
            duration("deadline", deadline)
        due_time(delay, at)
        options = Options(
            tenant, priority, headers, deadline, delay, at, on_full, window, duration("timeout", timeout), progress
        )

        def made(enqueued: Enqueued, form: Form) -> Handle:
            return Handle(enqueued, form.family, journal, cancels)

        return Bulk(producer, self.parking, options, made).run(items)

    async def job(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Handle:
        """The handle of a job that was enqueued elsewhere, by its id; `family` and `tenant` narrow the search, which is
        that of `aiqueue inspect`. Where an id was used again it is the newest job's.

        Raises NotFound without a trace of it, BadInput where several tenants or families have this id, Unavailable.
        """
        found = await find(self.connection, self.topology, job_id, family=family, tenant=tenant)
        return Handle(found.enqueued(job_id, self.parking.stream), found.family, self.journal, self.cancels)

    async def request(
        self,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: str | float | None = None,
    ) -> Any:
        """Ask for the result of a message's job, as plain data: a responder (`aiqueue respond`, or any other service on
        the family's answer subject) enqueues it once and answers when it has ended.

        For families with `reply_within` (gateway.requests, rag.queries). `unique`, or the message's own key, is the
        job's id: asked again with it, the same job answers. `timeout` (seconds or "30s"): by default the family's
        `reply_within`; a responder that dies meanwhile is asked again.

        Raises JobFailed, ResultTimeout (the job goes on), QueueFull, BadInput, and Unavailable where nobody answers.
        """
        timeout_s = None if timeout is None else duration("timeout", timeout)
        return await call(
            self._opened(), message, tenant=tenant, priority=priority, unique=unique, extra=headers, timeout_s=timeout_s
        )

    async def cancel(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> bool:
        """Take a job back by its id, as `Handle.cancel`, wherever it is: `family` and `tenant` narrow the search.

        Raises NotFound without a trace of it, BadInput where several tenants or families have this id, Unavailable.
        """
        return (await self.cancels.by_id(job_id, family=family, tenant=tenant)).cancelled

    def _opened(self) -> Producer:
        if self._producer is None:
            raise BadInput("the client is not open: use `async with aiqueue.connect() as client:`")
        return self._producer

    async def _declare(self, connection: Connection) -> None:
        try:
            await provision.apply(connection, self.topology)
        except (ConfigMismatch, DataLossRefused) as error:
            log.warning("the embedded server keeps its streams as they are (`aiqueue plan`): %s", error)

    async def _revive(self) -> str:
        assert self._embedded is not None
        await asyncio.to_thread(self._embedded.ensure)
        return self._embedded.url

    async def _release(self) -> None:
        embedded, self._embedded = self._embedded, None
        if embedded is not None:
            await asyncio.to_thread(embedded.release)


async def _acquire(directory: Path | None) -> EmbeddedServer:
    """A hold on the directory's server; cancelled meanwhile, the hold that the thread still gets is given up."""
    acquiring = asyncio.create_task(asyncio.to_thread(EmbeddedServer.acquire, directory))
    try:
        return await asyncio.shield(acquiring)
    except asyncio.CancelledError:
        acquiring.add_done_callback(lambda task: None if task.exception() else task.result().release())
        raise


def connect(url: str | None = None, *, settings: Settings | None = None, **arguments: Any) -> Client:
    """A client, not yet open: ``async with aiqueue.connect() as client:``.

    `url` and `arguments` are those of `Settings`; what is not given comes from the environment, ``aiqueue.toml`` and
    defaults. With no address anywhere the directory's embedded server is used. Raises SettingsError, TopologyError.
    """
    if settings is not None and (url is not None or arguments):
        raise BadInput("give either settings or single arguments, not both")
    if isinstance(arguments.get("streams"), str):
        arguments["streams"] = Path(arguments["streams"])
    return Client(settings or Settings.load(url=url, **arguments))
