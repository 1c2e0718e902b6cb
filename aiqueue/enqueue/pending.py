"""The options of `Client.enqueue_many`, and an item on its way from the caller's iterable to its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..connection import PubAck, Publish
from ..errors import BadInput
from ..job import JobSpec, Message
from ..subjects import OnDuplicate
from ..units import Deadline, Duration, Time
from .ids import check_on_duplicate
from .producer import AttachedJob, Enqueued, Producer
from .refusals import OnFull
from .templates import JobTemplate

Item = Message | JobSpec
ProgressCallback = Callable[[int, int], None]
PROGRESS_EVERY_S = 0.1


class ProgressReport:
    """Calls a caller's progress callback, at most once in PROGRESS_EVERY_S."""

    def __init__(self, callback: ProgressCallback) -> None:
        self._callback = callback
        self._next_at = 0.0

    def give(self, stored: int, failed: int, *, is_last: bool = False) -> None:
        """Report how many items were stored and refused so far. The last report is always given."""
        now = asyncio.get_running_loop().time()
        if is_last or now >= self._next_at:
            self._next_at = now + PROGRESS_EVERY_S
            self._callback(stored, failed)


class StoreAlone(Protocol):
    """Stores one item that has an `on_duplicate`; `client.storing.Storing.enqueue` is the implementation."""

    async def __call__(
        self,
        message: Message,
        template: JobTemplate,
        unique: str | None,
        *,
        due_at: float | None,
        on_duplicate: OnDuplicate,
        on_full: OnFull,
        timeout_s: float,
    ) -> Enqueued: ...


@dataclass(frozen=True)
class BulkOptions:
    """The arguments of `Client.enqueue_many` that apply to all items. Raises BadInput."""

    tenant: str | None
    priority: str
    headers: Mapping[str, str] | None
    deadline: Deadline | None
    delay: Duration | None
    at: Time | None
    on_duplicate: OnDuplicate
    on_full: OnFull
    window: int
    timeout_s: float
    progress: ProgressCallback | None

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise BadInput(f"window must be a whole number of at least 1, not {self.window!r}")
        if self.on_full not in ("raise", "wait"):
            raise BadInput(f'on_full must be "raise" or "wait", not {self.on_full!r}')
        check_on_duplicate(self.on_duplicate)


class SettledListener(Protocol):
    """What a pending item needs of `bulk.Bulk`."""

    def on_settled(self, pending: PendingItem) -> None: ...


class PendingItem(Publish):
    """An item that was taken and not yet yielded. It is the only object that is created for each item.

    `done`: the outcome is final. `found_parked`: a job of its id was parked already.
    """

    subject = stream = ""
    block = body = b""
    fenced = False
    done = False
    template: JobTemplate | None = None
    attached: AttachedJob | None = None
    job_id = ""
    by_caller = False
    due_at: float | None = None
    parking_id = ""
    found_parked = False

    def __init__(self, bulk: SettledListener, item: Item, number: int) -> None:
        self.bulk = bulk
        self.item = item
        self.number = number

    @property
    def is_duplicate(self) -> bool:
        """Whether an earlier call has stored the job. The server may also say so of an earlier try of this same item.

        A parked item has a new parking id: it is a duplicate only if the job was found parked.
        """
        acked = isinstance(self.outcome, PubAck) and self.outcome.duplicate
        return acked and self.by_caller and (not self.parking_id or self.found_parked)

    def settled(self) -> None:
        self.bulk.on_settled(self)


def start_task(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine as a task that stays in `tasks` until it ends."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def is_common(template: JobTemplate, kind: type[Message], options: BulkOptions, producer: Producer) -> bool:
    """Return whether a template fits all messages of its class, and none needs more than a fresh id."""
    if producer.make_headers is not None:
        return False
    if options.headers or template.deadline_s is not None or template.family.limit_key is not None:
        return False
    key = template.family.key
    takes_extra = kind.model_config.get("extra") == "allow"
    return key is None or not (hasattr(kind, key) or key in kind.model_fields or takes_extra)


def wake(future: asyncio.Future[None]) -> None:
    """Have a waiting task go on. Safe twice."""
    if not future.done():
        future.set_result(None)
