"""Enqueueing many jobs at once: the implementation of `Client.enqueue_many`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from .. import headers, subjects
from ..connection import HEADERS_MAX, PubAck, block, check_size
from ..errors import AIQueueError, BadInput, Conflict, EncodeError, NotFound, QueueFull, Unavailable
from ..job import JobSpec, Message
from ..payload import encode_message
from ..subjects import OnDuplicate
from .full_lanes import ANSWER_S, FullLanes
from .ids import check_on_duplicate, resolve_job_id, with_header
from .parking import Parking, delayed_job_message, resolve_due_at
from .pending import BulkOptions, Item, PendingItem, ProgressReport, StoreAlone, is_common, start_task, wake
from .producer import AttachedJob, Enqueued, Producer
from .refusals import queue_full_error
from .templates import JobTemplate
from .traces import ManySent

T = TypeVar("T")
Items = Iterable[Item] | AsyncIterable[Item]

TURN_ITEMS = 64  # items that are sent, or yielded, before other tasks of the event loop get a turn
TURN_BYTES = 512 * 1024  # of bodies, likewise: fewer writes of large bodies, and the server stores some meanwhile
BYTES_MAX = 32 * 1024 * 1024  # of bodies that are not acknowledged yet
ATTACH_MAX, ALONE_MAX = 4, 32  # at the same time: items whose documents are stored, items that are stored singly


class Bulk(Generic[T]):
    """One call of `enqueue_many`. `make_result` turns a stored job into what the caller gets. `store_alone` stores an
    item with an `on_duplicate`.

    Items move through these steps: taken from the source, (documents stored,) sent or waiting for a full lane, done,
    yielded in the order of the source. `_pending` holds them from the first step to the last, `_bytes` counts their
    bodies.
    """

    def __init__(
        self,
        producer: Producer,
        parking: Parking,
        options: BulkOptions,
        make_result: Callable[[Enqueued, JobTemplate], T],
        store_alone: StoreAlone,
    ) -> None:
        self._producer, self._parking = producer, parking
        self._traces: ManySent | None = None
        self._lookups: set[asyncio.Task[None]] = set()
        self._connection = producer.connection
        self._body_max = producer.body_max
        self._options = options
        self._make_result = make_result
        self._store_alone = store_alone
        self._pending: deque[PendingItem] = deque()
        self._taken: list[PendingItem] | None = None  # by `_take_items`, and not handed to the connection yet
        self._max_payload = 0  # bytes, of this turn; 0: not known, so `_send` asks
        self._common_templates: dict[type, JobTemplate] = {}  # by class, see `is_common`
        self._hinted: JobTemplate | None = None  # of the lane that was hinted last in this turn of the event loop
        self._count = self._bytes = 0
        self._stored = self._failed = 0
        self._report = None if options.progress is None else ProgressReport(options.progress)
        self._source_ended = False
        self._source_error: BaseException | None = None  # raised by the caller's iterable
        self._first_done: asyncio.Future[None] | None = None  # wakes `run`
        self._has_capacity: asyncio.Future[None] | None = None  # wakes `_take_async`
        self._full_lanes = FullLanes(self._connection.add, self.on_settled)
        self._attaching: set[asyncio.Task[None]] = set()
        self._releasing: set[asyncio.Task[None]] = set()
        self._attach_limit = asyncio.Semaphore(ATTACH_MAX)
        self._alone_limit = asyncio.Semaphore(ALONE_MAX)
        self._alone_ids: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # items of one id, in order

    async def run(self, items: Items) -> AsyncGenerator[T | AIQueueError, None]:
        """Yield for each item, in order, its result or the error that kept it out; see `Client.enqueue_many`."""
        pending = self._pending
        taking: asyncio.Task[None] | None = None
        source: Iterator[Item] | None = None
        await self._connection.clock.ensure(self._parking.stream)  # items may have delays and deadlines
        self._traces = ManySent.start(self._producer.tracing)
        try:
            if isinstance(items, AsyncIterable):
                taking = asyncio.get_running_loop().create_task(self._take_async(items))
            else:
                source = iter(items)
            while pending or not self._source_ended:
                if source is not None and self._take_items(source):
                    await self._let_loop_run()
                yielded = 0
                while yielded < TURN_ITEMS and pending and pending[0].done:
                    yielded += 1
                    if isinstance(pending[0].outcome, QueueFull) and (refused := pending[0].template):
                        await self._producer.limits.learn(refused.family.stream)
                    yield self._result(pending.popleft())
                if self._has_capacity is not None and self._may_take():
                    wake(self._has_capacity)
                if not yielded and (source is None or self._source_ended or not self._may_take()):
                    await self._wait_for_first()
            if self._report is not None:
                self._report.give(self._stored, self._failed, is_last=True)
            if self._source_error is not None:
                raise self._source_error
        finally:
            self._abandon_pending()
            ManySent.end(self._traces, self._stored + self._failed)
            if taking is not None:
                taking.cancel()
                await asyncio.wait([taking])
            for task in self._attaching:
                task.cancel()
            if self._attaching or self._releasing:
                await asyncio.wait({*self._attaching, *self._releasing})

    def on_settled(self, pending: PendingItem) -> None:
        """An item has an outcome: retry it if a full lane refused it and there is time, else mark it as done."""
        if type(pending.outcome) is PubAck and not self._full_lanes.lanes:
            self._mark_done(pending)
            return
        if type(pending.outcome) is Conflict and pending.parking_id:
            start_task(self._lookups, self._resolve_conflict(pending))
            return
        if type(pending.outcome) is NotFound and self._send_to_ordinary_lane(pending):
            return
        if isinstance(pending.outcome, QueueFull):
            if self._options.on_full == "wait" and asyncio.get_running_loop().time() < pending.deadline:
                self._full_lanes.refused(pending)
                return
        elif type(pending.outcome) is PubAck:
            self._full_lanes.accepted(pending.subject)
        self._mark_done(pending)

    def _send_to_ordinary_lane(self, pending: PendingItem) -> bool:
        """Send an item again that was refused because its stream has no lanes of limited keys any more."""
        template, left_s = pending.template, pending.deadline - asyncio.get_running_loop().time()
        if template is None or not template.lane.key or pending.parking_id or left_s <= 0:
            return False
        pending.template = template = self._producer.ordinary(template)
        pending.subject, pending.outcome = template.subject, None
        self._connection.add(pending, left_s)
        return True

    def _mark_done(self, pending: PendingItem) -> None:
        pending.done = True
        if self._first_done is not None and self._pending and self._pending[0] is pending:
            wake(self._first_done)

    async def _resolve_conflict(self, pending: PendingItem) -> None:
        """Find out why the server refused to park a delayed item: a job of its id is parked.

        1. That job is still there: the item is its duplicate, or an earlier try of the item itself.
        2. It is gone meanwhile: try the item again until its time is over.
        """
        assert pending.template is not None
        left_s = pending.deadline - asyncio.get_running_loop().time()
        try:
            found = await self._parking.find_delayed(pending.template.lane, pending.job_id)
            if found is not None:
                duplicate = found.parking_id != pending.parking_id
                pending.outcome = PubAck(self._parking.stream, found.stored.seq, duplicate)
                pending.due_at, pending.parking_id, pending.found_parked = found.due_at, found.parking_id, True
            elif left_s > 0:
                pending.outcome = None
                self._connection.add(pending, left_s)
                return
            else:
                pending.outcome = Unavailable(
                    f"{pending.subject}: other programs wrote to this subject first, again and again", maybe_stored=True
                )
        except AIQueueError as error:
            pending.outcome = error
        self._mark_done(pending)

    # -- taking items

    def _may_take(self) -> bool:
        """Whether the window and BYTES_MAX have capacity for another item."""
        return len(self._pending) < self._options.window and self._bytes < BYTES_MAX

    def _take_items(self, source: Iterator[Item]) -> int:
        """Take and send some items of a plain iterable. Return how many."""
        taken, bytes_max = 0, self._bytes + TURN_BYTES
        self._taken = []
        self._max_payload = self._connection.max_payload if self._connection.connected else 0
        while taken < TURN_ITEMS and self._bytes < bytes_max and not self._source_ended and self._may_take():
            try:
                item = next(source)
            except StopIteration:
                self._source_ended = True
            except Exception as error:  # noqa: BLE001  (the caller's own; raised after the earlier items' outcomes)
                self._source_ended, self._source_error = True, error
            else:
                self._start_item(item)
                taken += 1
        self._send_taken()
        return taken

    def _send_taken(self) -> None:
        """Hand the items that `_take_items` took to the connection, those of one stream together."""
        items, self._taken = self._taken or [], None
        for _, same in groupby(items, key=attrgetter("stream")):
            together = list(same)
            try:
                self._connection.add_all(together, self._options.timeout_s)
            except AIQueueError as error:
                for each in together:
                    self._fail(each, error)

    async def _take_async(self, items: AsyncIterable[Item]) -> None:
        """Take and send all items of an async iterable, as fast as the window allows."""
        try:
            async for item in items:
                self._hinted = None
                self._start_item(item)
                if len(self._pending) == 1 and self._first_done is not None:
                    wake(self._first_done)
                if self._count % TURN_ITEMS == 0:
                    await self._let_loop_run()
                while not self._may_take():
                    self._has_capacity = asyncio.get_running_loop().create_future()
                    try:
                        await self._has_capacity
                    finally:
                        self._has_capacity = None
        except BaseException as error:  # also a CancelledError, as of a task that the source awaits
            self._source_error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._source_ended = True
            if self._first_done is not None:
                wake(self._first_done)

    def _start_item(self, item: Item) -> None:
        """Encode an item and send it, or first store its documents. An error becomes the item's outcome."""
        pending = PendingItem(self, item, self._count)
        self._count += 1
        self._pending.append(pending)
        try:
            template = self._common_templates.get(type(item))
            if template is None or template.family.key in item.__dict__:  # a key that the model has set by itself
                prepared = self._prepare(pending, item)
                if prepared is None:
                    return  # it is stored by itself
                message = prepared
            else:
                message = self._prepare_common(pending, item, template)
            self._bytes += len(pending.body)
            if message.aiq_documents or len(pending.body) > self._body_max:
                start_task(self._attaching, self._attach_and_send(pending, message))
            else:
                self._send(pending, self._options.timeout_s)
        except AIQueueError as error:
            self._fail(pending, error)
        except Exception as error:  # noqa: BLE001  (from a serialiser of the item's model: no other item fails by it)
            self._fail(pending, EncodeError(f"cannot be encoded: {type(error).__name__}: {error}"))

    async def _attach_and_send(self, pending: PendingItem, message: Message) -> None:
        """Store an item's documents, then send it. Later items may be sent before it."""
        assert pending.template is not None
        end = time.monotonic() + self._options.timeout_s
        try:
            async with self._attach_limit:
                attached = pending.attached = await self._producer.attach_documents(
                    message, pending.template, pending.block, pending.body, end=end, by_caller=pending.by_caller
                )
            self._bytes -= len(pending.body) - len(attached.body)
            pending.block, pending.body = attached.block, attached.body
            self._send(pending, max(ANSWER_S, end - time.monotonic()))
        except AIQueueError as error:
            pending.outcome = error
            self.on_settled(pending)
        if self._has_capacity is not None and self._may_take():
            wake(self._has_capacity)

    def _send(self, pending: PendingItem, timeout_s: float) -> None:
        """Hand an item to the connection, or queue it behind others of a full lane. Raises TooLarge, Unavailable."""
        if self._full_lanes.lanes:
            pending.deadline = asyncio.get_running_loop().time() + timeout_s
            if self._full_lanes.hold(pending):
                return
        if self._taken is not None:
            if len(pending.block) > HEADERS_MAX or len(pending.block) + len(pending.body) > self._max_payload:
                check_size(pending.block, pending.body, self._connection.max_payload)
            self._taken.append(pending)
        else:
            self._connection.add(pending, timeout_s)

    async def _send_alone(
        self,
        pending: PendingItem,
        message: Message,
        unique: str | None,
        due_at: float | None,
        on_duplicate: OnDuplicate,
    ) -> None:
        """Store an item that has an `on_duplicate`. Later items of other ids may be sent before it."""
        assert pending.template is not None
        try:
            async with self._alone_ids.setdefault(pending.job_id, asyncio.Lock()), self._alone_limit:
                found = await self._store_alone(
                    message, pending.template, unique, due_at=due_at, on_duplicate=on_duplicate,
                    on_full=self._options.on_full, timeout_s=self._options.timeout_s,
                )  # fmt: skip
            pending.outcome = PubAck(found.stream, found.seq, found.duplicate)
            pending.job_id, pending.due_at, pending.parking_id = found.job_id, found.due_at, found.parking_id
            pending.by_caller = pending.found_parked = True
        except AIQueueError as error:
            pending.outcome = error
        except Exception as error:  # noqa: BLE001  (from a serialiser of the item's model, as in `_start_item`)
            pending.outcome = EncodeError(f"cannot be encoded: {type(error).__name__}: {error}")
        self._mark_done(pending)
        if self._has_capacity is not None and self._may_take():
            wake(self._has_capacity)

    def _prepare(self, pending: PendingItem, item: Item) -> Message | None:
        """Set subject, headers and body of an item, and return its message. None: a task stores it by itself.

        Raises BadInput.
        """
        options, unique = self._options, None
        tenant, priority = options.tenant, options.priority
        extra, deadline, on_duplicate = options.headers, options.deadline, options.on_duplicate
        delay, at = options.delay, options.at
        message = item
        if type(item) is JobSpec:
            message, unique = item.message, item.unique
            tenant = tenant if item.tenant is None else item.tenant
            priority = priority if item.priority is None else item.priority
            extra = extra if not item.headers else {**(extra or {}), **item.headers}
            deadline = deadline if item.deadline is None else item.deadline
            if item.delay is not None or item.at is not None:
                delay, at = item.delay, item.at
            on_duplicate = check_on_duplicate(item.on_duplicate) if item.on_duplicate is not None else on_duplicate
        if Message not in type(message).__mro__:
            raise BadInput(f"an item must be a Message or a JobSpec of a Message, not a {type(message).__name__}")
        assert isinstance(message, Message)
        if tenant is None:
            raise BadInput("the item has no tenant: pass tenant= to enqueue_many, or to the item's JobSpec")
        template = pending.template = self._producer.template(message, tenant, priority, extra, deadline)
        due_at = None if delay is None and at is None else resolve_due_at(delay, at, self._producer.clock)
        pending.job_id, pending.by_caller, shown = resolve_job_id(
            template.family, message, unique, self._producer.clock
        )
        if on_duplicate != "first" or (pending.by_caller and template.family.fingerprint is not None):
            start_task(self._attaching, self._send_alone(pending, message, unique, due_at, on_duplicate))
            return None
        pending.body = encode_message(message)
        header_block = template.header_block(pending.job_id, self._producer.clock)
        if shown:
            header_block = with_header(header_block, headers.UNIQUE, shown)
        if self._traces is not None:
            header_block = self._traces.add_to(header_block, template, pending.job_id)
        if due_at is not None:
            parked = delayed_job_message(template, header_block, pending.job_id, due_at, by_caller=pending.by_caller)
            pending.subject, pending.block, pending.fenced = parked.subject, block(parked.headers), pending.by_caller
            pending.due_at = headers.number(parked.headers[headers.DUE]) / 1000
            pending.parking_id = parked.headers[headers.PARKED]
            return message
        pending.subject, pending.stream, pending.block = template.subject, template.batch_stream, header_block
        self._producer.hint(template.lane, template.key)
        if message is item and is_common(template, type(message), options, self._producer):
            self._common_templates[type(message)] = template
        return message

    def _prepare_common(self, pending: PendingItem, item: Any, template: JobTemplate) -> Message:
        """As `_prepare`, for a message of a class in `_common_templates`."""
        pending.template = template
        pending.job_id = job_id = subjects.new_id(self._producer.clock.offset_ms)
        pending.body = encode_message(item)
        pending.subject, pending.stream = template.subject, template.batch_stream
        pending.block = template.header_block(job_id, self._producer.clock)
        if self._traces is not None:
            pending.block = self._traces.add_to(pending.block, template, job_id)
        if template is not self._hinted:
            self._producer.hint(template.lane)
            self._hinted = template
        return item  # type: ignore[no-any-return]

    def _fail(self, pending: PendingItem, error: AIQueueError) -> None:
        pending.outcome = error
        pending.done = True

    # -- yielding outcomes

    def _result(self, pending: PendingItem) -> T | AIQueueError:
        """Return what the caller gets for a done item, and count it."""
        self._bytes -= len(pending.body)
        outcome, template = pending.outcome, pending.template
        if pending.attached is not None and outcome is not None:
            if type(outcome) is not PubAck or not pending.parking_id:
                start_task(self._releasing, self._producer.release_unless_stored(pending.attached, outcome))
            elif pending.is_duplicate:
                self._end_holds(pending.attached)
        if type(outcome) is PubAck and template is not None:
            self._stored += 1
            if self._report is not None:
                self._report.give(self._stored, self._failed)
            fields = (
                pending.job_id, template.lane, outcome.stream, outcome.seq,
                outcome.duplicate and pending.is_duplicate, pending.due_at, pending.parking_id, "",
            )  # fmt: skip
            enqueued = tuple.__new__(Enqueued, fields)  # the class itself takes twice as long
            return self._make_result(enqueued, template)
        assert isinstance(outcome, AIQueueError)
        error = queue_full_error(outcome, template, self._producer.limits)
        error.item = pending.item
        self._failed += 1
        if self._report is not None:
            self._report.give(self._stored, self._failed)
        return error

    def _end_holds(self, job: AttachedJob) -> None:
        """Start to release the documents of an item whose job is not stored."""
        start_task(self._releasing, self._producer.documents.end_holds(job.lane.tenant, job.document_headers))

    async def _let_loop_run(self) -> None:
        """Let the event loop send and read; if the socket is behind, wait for it."""
        self._hinted = None
        await self._connection.relieve()
        await asyncio.sleep(0)

    async def _wait_for_first(self) -> None:
        """Wait until the first pending item is done. Without one: until there is an item, or the source has ended."""
        if (self._pending and self._pending[0].done) or (self._source_ended and not self._pending):
            return
        self._first_done = asyncio.get_running_loop().create_future()
        try:
            await self._first_done
        finally:
            self._first_done = None

    def _abandon_pending(self) -> None:
        """The caller has left: drop the items that are not done, and release documents of those never sent."""
        self._full_lanes.close()
        for task in self._lookups:
            task.cancel()
        if left := [pending for pending in self._pending if not pending.done]:
            self._connection.window.abandon(left)
            for pending in left:
                if pending.attached is not None and not pending.token:  # never sent, because its lane is full
                    self._end_holds(pending.attached)
        self._pending.clear()
