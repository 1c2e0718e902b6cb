"""The client for code without asyncio, such as scripts and web apps: each call runs on an event loop in a thread."""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

from .. import subjects
from ..config import Settings, SettingsOptions
from ..documents import Source
from ..enqueue import Item, OnFull
from ..errors import AIQueueError, BadInput, Unavailable
from ..inspect import Explanation, JobStats, LimitStats, ScheduleStats, WorkerStats
from ..job import JobSpec, MakeHeaders, Message
from ..journal import StreamItem
from ..lanes import Pause
from ..payload import Document, R, R_co, SteppedGenerator, SyncDocumentReader
from ..subjects import OnDuplicate
from ..units import Deadline, Duration, Time
from .client import Client, connect
from .fork import NOT_OPEN_AFTER_FORK, close_in_forks
from .handle import Handle
from .options import LimitOptions, ManyOptions, PauseOptions, RequestOptions, ScheduleOptions

if TYPE_CHECKING:
    from ..schedules import Added, AskedJob, Recurrence, ScheduleDocument, UndeclaredSchedule

T = TypeVar("T")
_NOT_OPEN = "the client is not open: use `with aiqueue.connect_sync() as client:`"


class SyncHandle(Generic[R_co]):
    """An enqueued job, like `Handle`; the methods block the calling thread."""

    def __init__(self, owner: SyncClient, handle: Handle[R_co]) -> None:
        self._owner = owner
        self._handle = handle
        self.id = handle.id
        self.tenant = handle.tenant
        self.family = handle.family
        self.duplicate = handle.duplicate

    @property
    def due(self) -> float | None:
        """As `Handle.due`."""
        return self._handle.due

    def __repr__(self) -> str:
        return f"<SyncHandle {self.id}{' duplicate' if self.duplicate else ''}>"

    def result(self, timeout: Duration | None = None) -> R_co:
        """As `Handle.result`."""
        return self._owner._run_on_loop(self._handle.result(timeout))

    def stream(self, *, after: str | None = None, timeout: Duration | None = None) -> Iterator[StreamItem]:
        """As `Handle.stream`: ``for item in handle.stream()``."""
        items = SteppedGenerator(self._handle.stream(after=after, timeout=timeout))
        try:
            while (item := self._owner._run_on_loop(items.next())) is not None:
                yield item
        finally:
            with contextlib.suppress(Unavailable, BadInput):  # the client is closed already
                self._owner._run_on_loop(items.close())

    def status(self) -> JobStats:
        """As `Handle.status`."""
        return self._owner._run_on_loop(self._handle.status())

    def cancel(self) -> bool:
        """As `Handle.cancel`."""
        return self._owner._run_on_loop(self._handle.cancel())

    def reschedule(self, *, delay: Duration | None = None, at: Time | None = None) -> None:
        """As `Handle.reschedule`."""
        self._owner._run_on_loop(self._handle.reschedule(delay=delay, at=at))

    def run_now(self) -> None:
        """As `Handle.run_now`."""
        self._owner._run_on_loop(self._handle.run_now())


class SyncDocuments:
    """The documents of a `SyncClient`; the methods block the calling thread."""

    def __init__(self, owner: SyncClient) -> None:
        self._owner = owner

    def put(
        self, source: Source, *, tenant: str, name: str = "", content_type: str = "", keep: Duration = "7d"
    ) -> Document:
        """As `Documents.put`. Files and iterables are read in another thread."""
        documents = self._owner._opened().documents
        return self._owner._run_on_loop(
            documents.put(source, tenant=tenant, name=name, content_type=content_type, keep=keep)
        )

    def get(self, sha256: str, *, tenant: str) -> Document:
        """As `Documents.get`."""
        return self._owner._run_on_loop(self._owner._opened().documents.get(sha256, tenant=tenant))

    def open(self, document: Document) -> SyncDocumentReader:
        """As `Documents.open`: ``for chunk in documents.open(document)``, or its `read` or `save`."""
        client = self._owner._opened()
        assert self._owner._loop is not None
        return SyncDocumentReader(document, client.documents.read_chunks, self._owner._loop)


class SyncSchedules:
    """The schedules of a `SyncClient`; the methods block the calling thread."""

    def __init__(self, owner: SyncClient) -> None:
        self._owner = owner

    def add(
        self, schedule_id: str, recurrence: Recurrence, message: Message, *, tenant: str,
        **options: Unpack[ScheduleOptions],
    ) -> Added:  # fmt: skip
        """As `ClientSchedules.add`, with the same options."""
        schedules = self._owner._opened().schedules
        return self._owner._run_on_loop(schedules.add(schedule_id, recurrence, message, tenant=tenant, **options))

    def get(self, schedule_id: str, *, tenant: str) -> ScheduleStats:
        """As `ClientSchedules.get`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.get(schedule_id, tenant=tenant))

    def list(self, *, tenant: str | None = None, owner: str | None = None) -> builtins.list[ScheduleStats]:
        """As `ClientSchedules.list`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.list(tenant=tenant, owner=owner))

    def remove(self, schedule_id: str, *, tenant: str, owner: str = "") -> bool:
        """As `ClientSchedules.remove`."""
        schedules = self._owner._opened().schedules
        return self._owner._run_on_loop(schedules.remove(schedule_id, tenant=tenant, owner=owner))

    def find_undeclared(self, owner: str) -> builtins.list[UndeclaredSchedule]:
        """As `ClientSchedules.find_undeclared`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.find_undeclared(owner))

    def prune(self, owner: str) -> builtins.list[UndeclaredSchedule]:
        """As `ClientSchedules.prune`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.prune(owner))

    def pause(self, schedule_id: str, *, tenant: str, reason: str = "", by: str | None = None) -> ScheduleDocument:
        """As `ClientSchedules.pause`."""
        schedules = self._owner._opened().schedules
        return self._owner._run_on_loop(schedules.pause(schedule_id, tenant=tenant, reason=reason, by=by))

    def resume(self, schedule_id: str, *, tenant: str) -> ScheduleDocument:
        """As `ClientSchedules.resume`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.resume(schedule_id, tenant=tenant))

    def run_now(self, schedule_id: str, *, tenant: str) -> AskedJob:
        """As `ClientSchedules.run_now`."""
        return self._owner._run_on_loop(self._owner._opened().schedules.run_now(schedule_id, tenant=tenant))

    def backfill(
        self, schedule_id: str, start: Time, end: Time, *, tenant: str, limit: int = 1_000
    ) -> builtins.list[AskedJob]:
        """As `ClientSchedules.backfill`."""
        schedules = self._owner._opened().schedules
        return self._owner._run_on_loop(schedules.backfill(schedule_id, start, end, tenant=tenant, limit=limit))

    def next_times(
        self, schedule_id: str, count: int = 5, *, tenant: str, after: Time | None = None
    ) -> builtins.list[datetime]:
        """As `ClientSchedules.next_times`."""
        schedules = self._owner._opened().schedules
        return self._owner._run_on_loop(schedules.next_times(schedule_id, count, tenant=tenant, after=after))


class SyncClient:
    """A client for code without an event loop. Its methods block the calling thread; threads may share it.

    It can enqueue and cancel jobs, wait for results, and store and read documents. For everything else use `Client`.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._not_open = _NOT_OPEN

    def open(self) -> Self:
        """Connect. Raises what `Client.open` raises. Safe twice."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run_loop, args=(loop,), name="aiqueue-client", daemon=True)
            self._thread.start()
            self._loop = loop
            close_in_forks(self)
            try:
                self._run_on_loop(self._client.open())
            except BaseException:
                self.close()
                raise
        return self

    def forget_after_fork(self) -> list[Any]:
        """In a forked child process: forget what is open. For aiqueue's own modules."""
        left: list[Any] = [self._loop, self._thread]
        if self._loop is not None:
            self._not_open = NOT_OPEN_AFTER_FORK
        self._loop = self._thread = None
        return left

    def close(self) -> None:
        """Disconnect. Calls in which other threads still wait raise Unavailable. Safe twice and unopened."""
        loop, self._loop = self._loop, None
        self._not_open = _NOT_OPEN
        if loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._client.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            if self._thread is not None:
                self._thread.join()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def enqueue(  # noqa: PLR0913  (as Client.enqueue)
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
    ) -> SyncHandle[R]:
        """As `Client.enqueue`."""
        handle = self._run_on_loop(
            self._client.enqueue(
                message, tenant=tenant, priority=priority, unique=unique, headers=headers, deadline=deadline,
                delay=delay, at=at, on_duplicate=on_duplicate, on_full=on_full, timeout=timeout,
            )
        )  # fmt: skip
        return SyncHandle(self, handle)

    def request(self, message: Message[R], *, tenant: str, **options: Unpack[RequestOptions]) -> R:
        """As `Client.request`, with the same options."""
        return self._run_on_loop(self._client.request(message, tenant=tenant, **options))

    @overload
    def job(
        self, job_id: str, *, model: type[Message[R]], family: str | None = None, tenant: str | None = None
    ) -> SyncHandle[R]: ...
    @overload
    def job(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> SyncHandle: ...
    def job(self, job_id: str, **options: Any) -> SyncHandle:
        """As `Client.job`."""
        return SyncHandle(self, self._run_on_loop(self._client.job(job_id, **options)))

    def cancel(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> bool:
        """As `Client.cancel`."""
        return self._run_on_loop(self._client.cancel(job_id, family=family, tenant=tenant))

    def pause(self, family: str, **options: Unpack[PauseOptions]) -> Pause:
        """As `Client.pause`, with the same options."""
        return self._run_on_loop(self._client.pause(family, **options))

    def resume(
        self, family: str, *, tenant: str | None = None, kind: str | None = None, key: str | None = None
    ) -> bool:
        """As `Client.resume`."""
        return self._run_on_loop(self._client.resume(family, tenant=tenant, kind=kind, key=key))

    def pauses(self) -> list[Pause]:
        """As `Client.pauses`."""
        return self._run_on_loop(self._client.pauses())

    def set_limit(self, family: str, key: str = "*", **options: Unpack[LimitOptions]) -> LimitStats:
        """As `Client.set_limit`, with the same options."""
        return self._run_on_loop(self._client.set_limit(family, key, **options))

    def unset_limit(self, family: str, key: str = "*", *, tenant: str | None = None) -> bool:
        """As `Client.unset_limit`."""
        return self._run_on_loop(self._client.unset_limit(family, key, tenant=tenant))

    def limits(self, family: str | None = None) -> list[LimitStats]:
        """As `Client.limits`."""
        return self._run_on_loop(self._client.limits(family))

    def workers(self, *, family: str | None = None, tenant: str | None = None) -> list[WorkerStats]:
        """As `Client.workers`."""
        return self._run_on_loop(self._client.workers(family=family, tenant=tenant))

    def explain(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Explanation:
        """As `Client.explain`."""
        return self._run_on_loop(self._client.explain(job_id, family=family, tenant=tenant))

    @overload
    def enqueue_many(
        self, items: Iterable[Message[R] | JobSpec[R]], **options: Unpack[ManyOptions]
    ) -> Iterator[SyncHandle[R] | AIQueueError]: ...
    @overload
    def enqueue_many(
        self, items: Iterable[Item], **options: Unpack[ManyOptions]
    ) -> Iterator[SyncHandle | AIQueueError]: ...
    def enqueue_many(
        self, items: Iterable[Item], **options: Unpack[ManyOptions]
    ) -> Iterator[SyncHandle | AIQueueError]:
        """As `Client.enqueue_many`, with the same arguments, for a plain iterable.

        The iterable is read in the calling thread, `window` items at a time; the next batch is read when all outcomes
        of the previous one were yielded. `progress` counts within a batch.
        """
        window = options.setdefault("window", 1_000)
        if type(window) is not int or window < 1:
            raise BadInput(f"window must be a whole number of at least 1, not {window!r}")
        source = iter(items)
        while batch := list(islice(source, window)):
            for outcome in self._run_on_loop(self._enqueue_batch(batch, options)):
                yield outcome if isinstance(outcome, AIQueueError) else SyncHandle(self, outcome)

    @property
    def documents(self) -> SyncDocuments:
        """As `Client.documents`: `put`, `get`, `open`."""
        return SyncDocuments(self)

    @property
    def schedules(self) -> SyncSchedules:
        """As `Client.schedules`, with the same methods."""
        return SyncSchedules(self)

    def _opened(self) -> Client:
        """Return the open client. Raises BadInput if it is not open."""
        if self._loop is None:
            raise BadInput(self._not_open)
        return self._client

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the event loop of the thread, where the client `on_loop` is open; for aiqueue's own
        modules. Raises BadInput if the client is not open.
        """
        if self._loop is None:
            work.close()
            raise BadInput(self._not_open)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def on_loop(self) -> Client:
        """The client that is open on the event loop of the thread. Raises BadInput if it is not open."""
        return self._opened()

    async def _enqueue_batch(self, items: list[Item], options: ManyOptions) -> list[Handle | AIQueueError]:
        return [outcome async for outcome in self._client.enqueue_many(items, **options)]

    def _run_on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the event loop of the thread, and wait for its result.

        Raises BadInput if the client is not open or this is its own thread, Unavailable if it is closed meanwhile.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise BadInput("a sync client cannot be used on its own event loop: use aiqueue.connect() there")
        future = self.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("the client was closed during the call", maybe_stored=True) from None
        except BaseException:  # a signal handler's, while this thread waits; a call that has ended stays as it is
            future.cancel()
            raise


async def _cancel_all_tasks() -> None:
    """Cancel all other tasks of this event loop, and wait until they have ended."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop until it is stopped, then clean it up: the thread's main function."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_all_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def connect_sync(
    url: str | None = None,
    *,
    settings: Settings | None = None,
    headers: MakeHeaders | None = None,
    tracer_provider: Any = None,
    **arguments: Unpack[SettingsOptions],
) -> SyncClient:
    """Return a client that is not open yet: ``with aiqueue.connect_sync() as client:``. Arguments as for `connect`."""
    return SyncClient(connect(url, settings=settings, headers=headers, tracer_provider=tracer_provider, **arguments))
