"""The keyword arguments of calls of `Client` that have many, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from ..enqueue import OnFull, ProgressCallback
from ..subjects import OnDuplicate
from ..units import Deadline, Duration, Time

if TYPE_CHECKING:
    from ..schedules import Misfire, Overlap


class EnqueueOptions(TypedDict, total=False):
    """Those of `Client.enqueue` but the tenant."""

    priority: str
    unique: str | None
    headers: Mapping[str, str] | None
    deadline: Deadline | None
    delay: Duration | None
    at: Time | None
    on_duplicate: OnDuplicate
    on_full: OnFull
    timeout: Duration


class RequestOptions(TypedDict, total=False):
    """Those of `Client.request` but the tenant."""

    priority: str
    unique: str | None
    headers: Mapping[str, str] | None
    timeout: Duration | None


class PauseOptions(TypedDict, total=False):
    """Those of `Client.pause` but the family."""

    tenant: str | None
    kind: str | None
    key: str | None
    duration: Duration | None
    reason: str
    now: bool
    by: str | None


class LimitOptions(TypedDict, total=False):
    """Those of `Client.set_limit` but the family and the key."""

    tenant: str | None
    requests: int | None
    cost: float | None
    window: Duration | None
    in_flight: int | None
    unlimited: bool
    duration: Duration | None
    by: str | None


class ScheduleOptions(TypedDict, total=False):
    """Those of `ClientSchedules.add` but the tenant."""

    priority: str
    deadline: Duration | None
    headers: Mapping[str, str] | None
    misfire: Misfire
    bound: int
    grace: Duration
    overlap: Overlap


class ManyOptions(TypedDict, total=False):
    """Those of `Client.enqueue_many`."""

    tenant: str | None
    priority: str
    headers: Mapping[str, str] | None
    deadline: Deadline | None
    delay: Duration | None
    at: Time | None
    on_duplicate: OnDuplicate
    on_full: OnFull
    window: int
    timeout: Duration
    progress: ProgressCallback | None
