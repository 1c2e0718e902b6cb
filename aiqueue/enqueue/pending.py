"""The options of `Client.enqueue_many`, and an item on its way from the caller's iterable to its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from ..connection import PubAck, Publish
from ..errors import BadInput
from ..job import JobSpec, Message
from ..units import Duration
from .producer import AttachedJob, JobTemplate, OnFull

Item = Message | JobSpec
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class BulkOptions:
    """The arguments of `Client.enqueue_many` that apply to all items. Raises BadInput."""

    tenant: str | None
    priority: str
    headers: Mapping[str, str] | None
    deadline: Duration | None
    delay: Duration | None
    at: datetime | float | None
    on_full: OnFull
    window: int
    timeout_s: float
    progress: ProgressCallback | None

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise BadInput(f"window must be a whole number of at least 1, not {self.window!r}")
        if self.on_full not in ("raise", "wait"):
            raise BadInput(f'on_full must be "raise" or "wait", not {self.on_full!r}')


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
