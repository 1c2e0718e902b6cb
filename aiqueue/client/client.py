"""The client: a connection to the queue, and everything that a user does with jobs except running them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack, cast, overload

from .. import subjects
from ..config import Settings, SettingsOptions
from ..connection import Connection
from ..documents import Documents
from ..enqueue import (
    Bulk,
    BulkOptions,
    Enqueued,
    Items,
    JobTemplate,
    KeyLanes,
    OnFull,
    Parking,
    Producer,
    ProgressCallback,
    check_on_duplicate,
    resolve_due_at,
)
from ..errors import AIQueueError, BadInput
from ..inspect import find_job
from ..job import JobSpec, MakeHeaders, Message, check_make_headers, check_model
from ..journal import Journal
from ..mailbox import Inboxes
from ..payload import R
from ..requests import request_result
from ..server import EmbeddedServer
from ..subjects import OnDuplicate
from ..topology import Topology
from ..tracing import Tracing, find_tracing
from ..units import Deadline, Duration, Time, parse_deadline, parse_duration
from .cancel import Canceller
from .embedding import acquire, declare_streams, settings_of
from .fork import NOT_OPEN_AFTER_FORK, close_in_forks
from .handle import Handle
from .limiting import load_declared
from .looking import LookCalls
from .operating import OperatorCalls
from .options import ManyOptions
from .storing import Storing
from .timeouts import TimeoutReasons

log = logging.getLogger(__name__)

NOT_OPEN = "the client is not open: use `async with aiqueue.connect() as client:`"


class Client(LookCalls, OperatorCalls):
    """A connection to the queue. Create it with `connect`, and use it as an async context manager."""

    def __init__(self, settings: Settings, headers: MakeHeaders | None = None, tracer_provider: Any = None) -> None:
        check_make_headers(headers)
        self._tracer_provider = tracer_provider
        self.tracing: Tracing | None = None  # for aiqueue's own modules; set while the client is open
        self.make_headers = headers
        self.settings = settings
        self.topology = Topology.of(settings)
        self._declared_limits = load_declared(self.topology, *([settings.streams] if settings.streams else ()))
        self._embedded: EmbeddedServer | None = None
        self._declared_pid: int | None = None  # of the embedded server whose streams were created or updated
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._for_handles: tuple[Journal, Canceller] | None = None  # shared by all handles, because there may be many
        self._timeout_reasons: TimeoutReasons | None = None
        self._not_open = NOT_OPEN

    @property
    def connection(self) -> Connection:
        """The open connection; for aiqueue's own modules. Raises BadInput if the client is not open."""
        if self._connection is None:
            raise BadInput(self._not_open)
        return self._connection

    @property
    def journal(self) -> Journal:
        """The jobs' journals; for aiqueue's own modules."""
        return Journal(self.connection, self.topology.journal_stream.name)

    @property
    def documents(self) -> Documents:
        """Documents, which are large bytes stored beside the jobs: `put`, `open`, `get`, `find`, `forget`."""
        return Documents(self.connection, self.topology)

    @property
    def inboxes(self) -> Inboxes:
        """Agents' inboxes: `send`, `broadcast`, `read`, `create`, `remove`, `stats`."""
        return Inboxes(self.connection, self.topology, self.tracing)

    @property
    def parking(self) -> Parking:
        """Jobs that wait for a time; for aiqueue's own modules."""
        return Parking(self.connection, self.topology)

    @property
    def cancels(self) -> Canceller:
        """What `cancel` uses; for aiqueue's own modules."""
        return Canceller(self.connection, self.topology, self._timeout_reasons)

    @property
    def key_lanes(self) -> KeyLanes:
        """Where jobs of limited keys are stored; for aiqueue's own modules."""
        return cast("KeyLanes", self._open_producer().key_lanes)

    @property
    def embedded(self) -> bool:
        """Whether the client uses the directory's embedded server, because no server address was given."""
        return self._embedded is not None

    async def open(self, *, declare: bool = True, start: bool = True) -> Self:
        """Connect. On an embedded server, with `declare`, also create or update the streams. Safe twice.

        Without `start`, an embedded server that does not run is not started: EmbeddedError. Raises Unavailable,
        AccessDenied, EmbeddedError, and SettingsError, also where no server address is set and `Settings.embedded`
        forbids an embedded server.
        """
        if self._connection is not None:
            return self
        found = find_tracing(self.settings.traces, self.settings.trace_ratio, self.settings.name, self._tracer_provider)
        settings, origin = self.settings, f"from {self.settings.source('url')}"
        if not settings.servers:
            self._embedded = await acquire(settings, start=start)
            settings, origin = settings_of(self._embedded, settings), f"embedded in {self._embedded.directory}"
        connection = Connection(settings, revive=self._revive if self._embedded else None)
        try:
            await connection.open()
            log.info("using the server %s, %s", connection.server, origin)
            if self._embedded is not None and declare:
                await declare_streams(connection, self.topology)
                self._declared_pid = self._embedded.pid
        except BaseException:
            await connection.close()
            await self._release()
            raise
        self._connection = connection
        key_lanes = KeyLanes(connection, self.topology, lambda: self.limit_rules)
        self.tracing = found
        self._producer = Producer(connection, self.topology, key_lanes, self.make_headers, tracing=found)
        self._timeout_reasons = TimeoutReasons(connection, self.topology, self._declared_limits)
        self._for_handles = self.journal, self.cancels
        close_in_forks(self)
        return self

    async def close(self) -> None:
        """Disconnect. The embedded server stops when its last user has left. Safe twice and unopened."""
        connection, self._connection = self._connection, None
        self._not_open = NOT_OPEN
        producer, self._producer, self._for_handles = self._producer, None, None
        if producer is not None:
            await producer.close()
        if connection is not None:
            await connection.close()
        if self.tracing is not None:
            self.tracing.late_spans.make()
        await self._release()

    def forget_after_fork(self) -> list[Any]:
        """In a forked child process: forget what is open. For aiqueue's own modules."""
        left: list[Any] = [self._connection, self._embedded, self._producer]
        if self._connection is not None:
            self._not_open = NOT_OPEN_AFTER_FORK
            left.append(self._connection.abandon())
        self._connection = self._producer = self._for_handles = self._embedded = None
        return left

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def enqueue(  # noqa: PLR0913  (the options of one job)
        self,
        message: Message[R],
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: Deadline | None = None,
        delay: Duration | None = None,
        at: Time | None = None,
        on_duplicate: OnDuplicate = "first",
        on_full: OnFull = "raise",
        timeout: Duration = 30.0,
    ) -> Handle[R]:
        """Store one job, and return its handle once the server has acknowledged the job.

        - `unique`: the job's id, or any other text, such as a URL, of which the id is then a hash. A second job of the
          same tenant, family and id is not stored within the stream's duplicate window (10 minutes). Without `unique`,
          the message's key is the id (request_id, query_id or task_id, depending on the family), and without a key
          the id is new.
        - `on_duplicate`: what a known id leads to. "first": the handle of the first job, with `duplicate` set. "raise":
          DuplicateJob. "rerun_failed": the job runs anew if it has failed or was cancelled. "rerun": also if it has
          succeeded. "replace": while a delayed job of the id waits for its time, it gets this message and this time.
        - `headers`: ASCII, sent with the job.
        - `deadline` (a duration from now, such as "5m", or a datetime): a job that has not started by then becomes a
          dead letter.
        - `delay` (a duration: seconds, "10m" or a timedelta), or `at` (a datetime with a time zone, or seconds since
          the epoch): the job waits until then, at most a year, before it enters its lane. It is never early, and
          usually at most half a second late. A time in the past means at once. While it waits, a second delayed job of
          its id is a duplicate.
        - `on_full`: "raise" QueueFull, or "wait" with backoff.
        - `timeout` (a duration): for the whole call, retries included.

        Raises BadInput (InvalidToken, EncodeError, TooLarge, UnknownFamily), QueueFull, DuplicateJob, AccessDenied,
        NotFound (the stream is missing: run `aiqueue apply`), and Unavailable. Its `maybe_stored` tells whether the job
        may have been stored; trying again is safe with the same `unique`.
        """
        producer, timeout_s = self._open_producer(), parse_duration("timeout", timeout)
        if on_full not in ("raise", "wait"):
            raise BadInput(f'on_full must be "raise" or "wait", not {on_full!r}')
        assert self._for_handles is not None
        journal, cancels = self._for_handles
        if delay is not None or at is not None or deadline is not None or on_duplicate not in ("first", "raise"):
            await producer.clock.ensure(self.topology.parked_stream.name)
        due_at = None if delay is None and at is None else resolve_due_at(delay, at, producer.clock)
        if due_at is not None or on_duplicate != "first":
            enqueued = await self._storing().enqueue(
                message,
                producer.template(message, tenant, priority, headers, deadline),
                unique,
                due_at=due_at,
                on_duplicate=check_on_duplicate(on_duplicate),
                on_full=on_full,
                timeout_s=timeout_s,
            )
        else:
            enqueued = await producer.enqueue(
                message, tenant=tenant, priority=priority, unique=unique, extra=headers, deadline=deadline,
                on_full=on_full, timeout_s=timeout_s,
            )  # fmt: skip
        family = self.topology.family(message.aiq_family)
        return Handle(enqueued, family, journal, cancels, None if message.aiq_result is Any else type(message))

    def _storing(self) -> Storing:
        """Return what stores jobs with a delay or an `on_duplicate`."""
        return Storing(self._open_producer(), self.parking, self.journal, self.dead)

    @overload
    def enqueue_many(
        self, items: Iterable[Message[R] | JobSpec[R]] | AsyncIterable[Message[R] | JobSpec[R]],
        **options: Unpack[ManyOptions],
    ) -> AsyncGenerator[Handle[R] | AIQueueError, None]: ...  # fmt: skip
    @overload
    def enqueue_many(
        self, items: Items, **options: Unpack[ManyOptions]
    ) -> AsyncGenerator[Handle | AIQueueError, None]: ...
    def enqueue_many(  # noqa: PLR0913  (the options of all jobs)
        self,
        items: Items,
        *,
        tenant: str | None = None,
        priority: str = subjects.NORMAL,
        headers: Mapping[str, str] | None = None,
        deadline: Deadline | None = None,
        delay: Duration | None = None,
        at: Time | None = None,
        on_duplicate: OnDuplicate = "first",
        on_full: OnFull = "raise",
        window: int = 1_000,
        timeout: Duration = 30.0,
        progress: ProgressCallback | None = None,
    ) -> AsyncGenerator[Handle | AIQueueError, None]:
        """Store many jobs. Yield for each item, in order, its handle or the error because of which it was not stored::

            async for outcome in client.enqueue_many(messages, tenant="acme"):
                if isinstance(outcome, aiqueue.AIQueueError): ...  # outcome.item was not stored

        `items`: any iterable or async iterable, also an endless one, of Message or JobSpec (a message with its own
        tenant, priority, unique, headers, deadline, delay, at or on_duplicate). At most `window` items, and 32 MiB of
        bodies, are taken and not yet yielded; no more is read. A plain iterable is read on the event loop, so it should
        not block. An error that the iterable raises is raised here, after the outcomes of all items before it. An error
        about one item is yielded, not raised, and does not stop the others.

        A lane holds its jobs in the order of the items, except those that had to be retried: after a lost PubAck, a
        full lane, a cluster without a leader, or, on a server that syncs every write, a batch that was refused because
        of another job. Each item is retried with the same id until `timeout` is over, counted from when it was taken;
        `deadline` and `delay` count from then, too. `on_full`: items of a full lane fail with QueueFull ("raise"), or
        are retried with backoff ("wait"). Items of other lanes are stored meanwhile, but yielded after them. So a lane
        that stays full blocks the window for at most `timeout`.

        An item with an `on_duplicate` other than "first" is stored by itself, so it may be stored after later items of
        other ids.

        `progress(stored, failed)` gets the counts of yielded items, at most 10 times a second and at the end. Leaving
        early (`aclose`, `contextlib.aclosing`, cancellation) drops the items that are not yielded yet; those that were
        sent may still be stored. Raises BadInput for a wrong argument, at once.
        """
        producer = self._open_producer()
        journal, cancels = self.journal, self.cancels
        if isinstance(items, Message | str | bytes | Mapping) or not isinstance(items, Iterable | AsyncIterable):
            raise BadInput(f"items must be a list or another iterable of messages, not {type(items).__name__}")
        if tenant is not None:
            subjects.token("tenant", tenant)
        if progress is not None and not callable(progress):
            raise BadInput(f"progress must be a function of two numbers (stored items, failed items), not {progress!r}")
        if deadline is not None:
            parse_deadline("deadline", deadline, 0.0)
        resolve_due_at(delay, at, producer.clock)
        timeout_s = parse_duration("timeout", timeout)
        options = BulkOptions(
            tenant, priority, headers, deadline, delay, at, on_duplicate, on_full, window, timeout_s, progress
        )

        def make_handle(enqueued: Enqueued, template: JobTemplate) -> Handle:
            return Handle(enqueued, template.family, journal, cancels, template.model)

        return Bulk(producer, self.parking, options, make_handle, self._storing().enqueue).run(items)

    @overload
    async def job(
        self, job_id: str, *, model: type[Message[R]], family: str | None = None, tenant: str | None = None
    ) -> Handle[R]: ...
    @overload
    async def job(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Handle: ...
    async def job(
        self, job_id: str, *, model: type[Message] | None = None, family: str | None = None, tenant: str | None = None
    ) -> Handle:
        """Return the handle of a job by its id, or by its `unique`, for jobs that were enqueued elsewhere.

        `model`: the class of the job's message, so that the result has the type that the class declares; the job's kind
        is not checked. `family` (default: that of `model`) and `tenant` narrow the search, which is the one of `aiqueue
        inspect`. If the id was used repeatedly, the handle is the newest job's. Raises NotFound if nothing is known of
        the job, BadInput if several tenants or families have this id, Unavailable.
        """
        if model is not None:
            check_model("job", model)
            family, model = family or model.aiq_family, None if model.aiq_result is Any else model
        found = await find_job(self.connection, self.topology, job_id, family=family, tenant=tenant)
        enqueued = found.to_enqueued(subjects.job_id(job_id), self.parking.stream)
        return Handle(enqueued, found.family, self.journal, self.cancels, model)

    async def request(
        self,
        message: Message[R],
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: Duration | None = None,
    ) -> R:
        """Request the result of a message's job, and return it, as `Handle.result` does.

        A responder (`aiqueue respond`, or any other service on the family's answer subject) enqueues the job once, and
        answers when it has ended. This works for families with `reply_within` (gateway.requests, rag.queries).
        `unique`, or the message's key, is the job's id: a repeated request with the same id is answered by the same
        job. `timeout` (seconds or "30s"; default: the family's `reply_within`): if a responder dies meanwhile, the
        request is sent again.

        Raises JobFailed, ResultInvalid, ResultTimeout (the job continues), QueueFull, BadInput, and Unavailable if
        there is no responder for 5 seconds.
        """
        timeout_s = None if timeout is None else parse_duration("timeout", timeout)
        return await request_result(
            self._open_producer(),
            message,
            tenant=tenant,
            priority=priority,
            unique=unique,
            extra=headers,
            timeout_s=timeout_s,
        )

    async def cancel(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> bool:
        """Cancel a job by its id, wherever it is; see `Handle.cancel`. `family` and `tenant` narrow the search.

        Raises NotFound if nothing is known of the job, BadInput if several tenants or families have this id,
        Unavailable.
        """
        return (await self.cancels.cancel_by_id(job_id, family=family, tenant=tenant)).cancelled

    def _open_producer(self) -> Producer:
        """Return the producer of the open client. Raises BadInput if the client is not open."""
        if self._producer is None:
            raise BadInput(self._not_open)
        return self._producer

    async def _revive(self, settings: Settings) -> Settings:
        """Start the embedded server again if it has died, and return its address and credentials.

        If its directory was removed, the server is a new one: it has no streams and other credentials.
        """
        assert self._embedded is not None
        await asyncio.to_thread(self._embedded.ensure)
        settings = settings_of(self._embedded, settings)
        if self._declared_pid not in (None, self._embedded.pid):
            connection = Connection(settings)
            try:
                await connection.open()
                await declare_streams(connection, self.topology)
                self._declared_pid = self._embedded.pid
            except AIQueueError as error:
                log.warning("the streams of the embedded server are not created yet: %s", error)
            finally:
                await connection.close()
        return settings

    async def _release(self) -> None:
        embedded, self._embedded = self._embedded, None
        if embedded is not None:
            await asyncio.to_thread(embedded.release)


def check_client(client: Any) -> None:
    """Raise BadInput if `client` is no Client."""
    if not isinstance(client, Client):
        raise BadInput(
            f"pass an open client, from `async with aiqueue.connect() as client:`, not {type(client).__name__}"
        )


def connect(
    url: str | None = None,
    *,
    settings: Settings | None = None,
    headers: MakeHeaders | None = None,
    tracer_provider: Any = None,
    **arguments: Unpack[SettingsOptions],
) -> Client:
    """Return a client that is not open yet: ``async with aiqueue.connect() as client:``.

    `url` and `arguments` are those of `Settings`. What is not given comes from the environment, from ``aiqueue.toml``,
    or is the default. If no server address is found, the directory's embedded server is used.

    `headers`: a plain function of the message, called where a job is enqueued, that returns headers for it, such as
    those of a trace. It is called for each job of this client, and for the children of jobs of its workers; for a
    schedule when the client adds it, or at each tick that a function makes a message for. Headers of the single call go
    first. If the function raises, nothing is enqueued (BadInput).

    `tracer_provider`: OpenTelemetry's, for the spans of this client and its workers (docs/guides/tracing.md). None: see
    the setting `traces`.

    Raises SettingsError, TopologyError, BadInput.
    """
    if settings is not None and (url is not None or arguments):
        raise BadInput("pass either settings= or single arguments, not both")
    return Client(settings or Settings.load(url=url, **arguments), headers, tracer_provider)
