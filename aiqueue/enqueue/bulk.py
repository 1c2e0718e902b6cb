"""Many jobs through one window: what `Client.enqueue_many` does."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from .. import codec
from .. import headers as names
from ..connection import PubAck, Publish, block
from ..errors import AIQueueError, BadInput, Conflict, EncodeError, QueueFull, Unavailable
from ..job import JobSpec, Message
from .parking import Parking, delayed
from .producer import FULL_CAP_S, FULL_FIRST_S, Attached, Enqueued, Form, OnFull, Producer, due_time, full, identity

T = TypeVar("T")
Item = Message | JobSpec
Items = Iterable[Item] | AsyncIterable[Item]
Progress = Callable[[int, int], None]

TURN = 64  # items that are sent, or told, before the event loop has its turn
TURN_BYTES = 128 * 1024  # of bodies, likewise: the server stores them while the next ones are made
BYTES_MAX = 32 * 1024 * 1024  # of bodies that wait for their acknowledgement
PROGRESS_EVERY_S = 0.1
LANE_TURN_MAX = 64
ATTACH_MAX = 4  # items at a time whose documents are stored
ANSWER_S = 0.05  # a full lane is not asked again with less time than this for its answer


@dataclass(frozen=True)
class Options:
    """The arguments of `Client.enqueue_many` that hold for all items. Raises BadInput."""

    tenant: str | None
    priority: str
    headers: Mapping[str, str] | None
    deadline: str | float | None
    delay: str | float | None
    at: datetime | float | None
    on_full: OnFull
    window: int
    timeout_s: float
    progress: Progress | None

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise BadInput(f"window: a whole number from 1 up, not {self.window!r}")
        if self.on_full not in ("raise", "wait"):
            raise BadInput(f'on_full: "raise" or "wait", not {self.on_full!r}')


class _Slot(Publish):
    """An item on its way: the only thing that is made for each."""

    __slots__ = (
        "attached", "begins", "bulk", "by_caller", "done", "form", "item", "job_id", "limit", "looked", "number",
        "word",
    )  # fmt: skip

    def __init__(self, bulk: Bulk[Any], item: Item, number: int) -> None:
        super().__init__("", b"", b"")
        self.bulk = bulk
        self.item = item
        self.number = number
        self.done = False
        self.form: Form | None = None
        self.attached: Attached | None = None
        self.job_id = ""
        self.by_caller = False
        self.limit = 0.0
        self.begins: float | None = None
        self.word = ""
        self.looked = False  # at what is parked under its id

    def settled(self) -> None:
        self.bulk.on_settled(self)


class _FullLane:
    """A lane that was refused, whatever is full, and who waits for it: asked again with backoff, in small and then
    larger lots.
    """

    def __init__(self, refusal: QueueFull) -> None:
        self.refusal = refusal
        self.waiting: list[tuple[int, _Slot]] = []  # a heap: the earlier item goes first
        self.wait_s = FULL_FIRST_S
        self.lot = 1
        self.timer: asyncio.Handle | None = None


class Bulk(Generic[T]):
    """One call of `enqueue_many`. `make` turns what was stored into what the caller gets."""

    def __init__(
        self, producer: Producer, parking: Parking, options: Options, make: Callable[[Enqueued, Form], T]
    ) -> None:
        self._producer = producer
        self._parking = parking
        self._looking: set[asyncio.Task[None]] = set()
        self._connection = producer.connection
        self._body_max = producer.body_max
        self._options = options
        self._make = make
        self._slots: deque[_Slot] = deque()
        self._count = 0
        self._bytes = 0
        self._stored = self._failed = 0
        self._say_at = 0.0
        self._ended = False
        self._broken: Exception | None = None  # what the items' own code raised
        self._told: asyncio.Future[None] | None = None  # wakes `run`
        self._roomy: asyncio.Future[None] | None = None  # wakes `_feed`
        self._full: dict[str, _FullLane] = {}
        self._attaching: set[asyncio.Task[None]] = set()
        self._detaching: set[asyncio.Task[None]] = set()
        self._attach_room = asyncio.Semaphore(ATTACH_MAX)

    async def run(self, items: Items) -> AsyncGenerator[T | AIQueueError, None]:
        """See `Client.enqueue_many`."""
        slots = self._slots
        feeding: asyncio.Task[None] | None = None
        source: Iterator[Item] | None = None
        try:
            if isinstance(items, AsyncIterable):
                feeding = asyncio.get_running_loop().create_task(self._feed(items))
            else:
                source = iter(items)
            while slots or not self._ended:
                if source is not None and self._pull(source):
                    await self._turn()
                told = 0
                while told < TURN and slots and slots[0].done:
                    told += 1
                    yield self._outcome(slots.popleft())
                if self._roomy is not None and self._room():
                    _wake(self._roomy)
                if not told and (source is None or self._ended or not self._room()):
                    await self._wait()
            self._say_at = 0.0
            self._say()
            if self._broken is not None:
                raise self._broken
        finally:
            self._let_go()
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait([feeding])
            for task in self._attaching:
                task.cancel()
            if self._attaching or self._detaching:
                await asyncio.wait({*self._attaching, *self._detaching})

    def on_settled(self, slot: _Slot) -> None:
        """The connection's word on an item, or the end of its time."""
        if type(slot.outcome) is Conflict and slot.word:
            _keep(self._looking, self._look(slot))
            return
        refused = isinstance(slot.outcome, QueueFull)
        if self._full or refused:
            lane = self._full.get(slot.subject)
            if refused:
                if self._options.on_full == "wait" and asyncio.get_running_loop().time() < slot.limit:
                    self._refused(slot, lane)
                    return
            elif lane is not None and type(slot.outcome) is PubAck:
                self._accepted(slot.subject, lane)
        self._end(slot)

    def _end(self, slot: _Slot) -> None:
        slot.done = True
        if self._told is not None and self._slots and self._slots[0] is slot:
            _wake(self._told)

    async def _look(self, slot: _Slot) -> None:
        """A job of this id is parked already, or was a moment ago: then it is tried again."""
        assert slot.form is not None
        left = slot.limit - asyncio.get_running_loop().time()
        try:
            there = await self._parking.first(slot.form.lane, slot.job_id)
            if there is not None:
                slot.outcome = PubAck(self._parking.stream, there.stored.seq, there.word != slot.word)
                slot.begins, slot.word, slot.looked = there.due, there.word, True
            elif left > 0:
                slot.outcome = None
                self._connection.add(slot, left)
                return
            else:
                slot.outcome = Unavailable(f"{slot.subject}: it was overtaken by others", maybe_stored=True)
        except AIQueueError as error:
            slot.outcome = error
        self._end(slot)

    # -- taking items in

    def _room(self) -> bool:
        return len(self._slots) < self._options.window and self._bytes < BYTES_MAX

    def _pull(self, source: Iterator[Item]) -> int:
        """Take and send some items. Returns how many."""
        pulled, bytes_max = 0, self._bytes + TURN_BYTES
        while pulled < TURN and self._bytes < bytes_max and not self._ended and self._room():
            try:
                item = next(source)
            except StopIteration:
                self._ended = True
            except Exception as error:  # noqa: BLE001  (the items' own; what came before it is told first)
                self._ended, self._broken = True, error
            else:
                self._begin(item)
                pulled += 1
        return pulled

    async def _feed(self, items: AsyncIterable[Item]) -> None:
        """The same for items that may let themselves be waited for."""
        try:
            async for item in items:
                self._begin(item)
                if len(self._slots) == 1 and self._told is not None:
                    _wake(self._told)
                if self._count % TURN == 0:
                    await self._turn()
                while not self._room():
                    self._roomy = asyncio.get_running_loop().create_future()
                    try:
                        await self._roomy
                    finally:
                        self._roomy = None
        except Exception as error:  # noqa: BLE001
            self._broken = error
        self._ended = True
        if self._told is not None:
            _wake(self._told)

    def _begin(self, item: Item) -> None:
        slot = _Slot(self, item, self._count)
        self._count += 1
        self._slots.append(slot)
        try:
            message = self._prepare(slot, item)
            self._bytes += len(slot.body)
            if message.aiq_documents or len(slot.body) > self._body_max:
                _keep(self._attaching, self._attach(slot, message))
            else:
                self._send(slot, self._options.timeout_s)
        except AIQueueError as error:
            self._fail(slot, error)
        except Exception as error:  # noqa: BLE001  (a model's own serialiser: its item's fault and no other's)
            self._fail(slot, EncodeError(f"cannot be written: {type(error).__name__}: {error}"))

    async def _attach(self, slot: _Slot, message: Message) -> None:
        """Send an item when its documents are stored. Items behind it may pass it meanwhile."""
        assert slot.form is not None
        end = time.monotonic() + self._options.timeout_s
        try:
            async with self._attach_room:
                attached = slot.attached = await self._producer.attach(
                    message, slot.form, slot.block, slot.body, end=end, by_caller=slot.by_caller
                )
            self._bytes -= len(slot.body) - len(attached.body)
            slot.block, slot.body = attached.block, attached.body
            self._send(slot, max(ANSWER_S, end - time.monotonic()))
        except AIQueueError as error:
            slot.outcome = error
            self.on_settled(slot)
        if self._roomy is not None and self._room():
            _wake(self._roomy)

    def _send(self, slot: _Slot, timeout_s: float) -> None:
        """Hand an item to the connection, or to those that wait for its lane. Raises TooLarge, Unavailable."""
        lane = self._full.get(slot.subject) if self._full else None
        if lane is not None and lane.waiting:
            slot.limit = asyncio.get_running_loop().time() + timeout_s
            heapq.heappush(lane.waiting, (slot.number, slot))
        else:
            self._connection.add(slot, timeout_s)
            slot.limit = slot.deadline

    def _prepare(self, slot: _Slot, item: Item) -> Message:
        options = self._options
        tenant, priority, unique = options.tenant, options.priority, None
        extra, deadline = options.headers, options.deadline
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
        if Message not in type(message).__mro__:
            raise BadInput(f"an item is a Message or a JobSpec of one, not a {type(message).__name__}")
        assert isinstance(message, Message)
        if tenant is None:
            raise BadInput("tenant: give one to enqueue_many, or to the item by a JobSpec")
        form = slot.form = self._producer.form(message, tenant, priority, extra, deadline)
        slot.job_id, slot.by_caller = identity(form.family, message, unique)
        slot.body = codec.encode(message)
        due = None if delay is None and at is None else due_time(delay, at)
        if due is not None:
            parked = delayed(form, form.block(slot.job_id), slot.job_id, due, by_caller=slot.by_caller)
            slot.subject, slot.block, slot.fenced = parked.subject, block(parked.headers), slot.by_caller
            slot.begins, slot.word = names.number(parked.headers[names.DUE]) / 1000, parked.headers[names.PARKED]
            return message
        slot.subject, slot.stream = form.subject, form.batched
        slot.block = form.block(slot.job_id)
        self._producer.hint(form.lane)
        return message

    def _fail(self, slot: _Slot, error: AIQueueError) -> None:
        slot.outcome = error
        slot.done = True

    # -- telling what came of them

    def _outcome(self, slot: _Slot) -> T | AIQueueError:
        self._bytes -= len(slot.body)
        outcome, form = slot.outcome, slot.form
        if slot.attached is not None and outcome is not None:
            _keep(self._detaching, self._producer.detach(slot.attached, outcome))
        if type(outcome) is PubAck and form is not None:
            self._stored += 1
            self._say()
            # a parking's own word is new: the server can know it only from an earlier try
            duplicate = outcome.duplicate and slot.by_caller and (not slot.word or slot.looked)
            told = Enqueued(slot.job_id, form.lane, outcome.stream, outcome.seq, duplicate, slot.begins, slot.word)
            return self._make(told, form)
        assert isinstance(outcome, AIQueueError)
        error = full(outcome, form) if isinstance(outcome, QueueFull) and form is not None else outcome
        error.item = slot.item
        self._failed += 1
        self._say()
        return error

    def _say(self) -> None:
        if self._options.progress is not None:
            now = asyncio.get_running_loop().time()
            if now >= self._say_at:
                self._say_at = now + PROGRESS_EVERY_S
                self._options.progress(self._stored, self._failed)

    async def _turn(self) -> None:
        """Let the event loop send and read; wait where the socket does not keep up."""
        await self._connection.relieve()
        await asyncio.sleep(0)

    async def _wait(self) -> None:
        """Return when the first item is done, or when there is a first item at all, or no more."""
        if (self._slots and self._slots[0].done) or (self._ended and not self._slots):
            return
        self._told = asyncio.get_running_loop().create_future()
        try:
            await self._told
        finally:
            self._told = None

    def _let_go(self) -> None:
        """What the caller does not want to hear of any more."""
        for lane in self._full.values():
            if lane.timer is not None:
                lane.timer.cancel()
        self._full.clear()
        for task in self._looking:
            task.cancel()
        if left := [slot for slot in self._slots if not slot.done]:
            self._connection.window.abandon(left)
            for slot in left:
                if slot.attached is not None and not slot.token:  # it was never sent: its lane is full
                    _keep(
                        self._detaching, self._producer.documents.release(slot.attached.lane.tenant, slot.attached.held)
                    )
        self._slots.clear()

    # -- full lanes

    def _refused(self, slot: _Slot, lane: _FullLane | None) -> None:
        assert isinstance(slot.outcome, QueueFull)
        if lane is None:
            lane = self._full[slot.subject] = _FullLane(slot.outcome)
        lane.refusal = slot.outcome
        heapq.heappush(lane.waiting, (slot.number, slot))
        lane.lot = 1
        self._ask_later(slot.subject, lane)

    def _accepted(self, subject: str, lane: _FullLane) -> None:
        if not lane.waiting:
            if lane.timer is not None:
                lane.timer.cancel()
            del self._full[subject]
            return
        lane.wait_s, lane.lot = FULL_FIRST_S, min(lane.lot * 2, LANE_TURN_MAX)
        if lane.timer is not None:
            lane.timer.cancel()
        lane.timer = asyncio.get_running_loop().call_soon(self._ask_again, subject, lane)

    def _ask_later(self, subject: str, lane: _FullLane) -> None:
        if lane.timer is None:
            loop = asyncio.get_running_loop()
            when = min(loop.time() + lane.wait_s, lane.waiting[0][1].limit)
            lane.timer = loop.call_at(when, self._ask_again, subject, lane)
            lane.wait_s = min(lane.wait_s * 2, FULL_CAP_S)

    def _ask_again(self, subject: str, lane: _FullLane) -> None:
        """Send the first of those that wait, and end those whose time is over."""
        lane.timer = None
        now = asyncio.get_running_loop().time() + 0.001
        sent = 0
        while lane.waiting and (sent < lane.lot or lane.waiting[0][1].limit <= now):
            slot = lane.waiting[0][1]
            if now < slot.limit < now + ANSWER_S:
                break
            heapq.heappop(lane.waiting)
            if slot.limit <= now:
                slot.outcome = slot.outcome or lane.refusal
                self.on_settled(slot)
                continue
            slot.outcome = None
            sent += 1
            try:
                self._connection.add(slot, slot.limit - now)
            except AIQueueError as error:
                slot.outcome = error
                self.on_settled(slot)
        if lane.waiting:
            self._ask_later(subject, lane)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
