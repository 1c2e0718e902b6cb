"""What `aiqueue.testing` needs of a worker that it runs: what becomes of each job, and short retries without a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from ..lanes import Delivery
from .opening import OpenedJob


class SettledAttempt(NamedTuple):
    """What became of a job after an attempt. `outcome`: done, retry, failed, cancelled, or waiting for its children.

    `reason`, `error`: of one that failed. `delay_s`: until the next attempt.
    """

    job_id: str
    kind: str
    family: str
    tenant: str
    attempt: int
    outcome: str
    reason: str = ""
    error: str = ""
    delay_s: float | None = None


Rehearsal = Callable[[SettledAttempt], None]


class Noted(Protocol):
    """Called with what became of a job after an attempt: the last four are those of a `SettledAttempt`."""

    def __call__(
        self,
        delivery: Delivery,
        opened: OpenedJob,
        outcome: str,
        reason: str = "",
        error: str = "",
        delay_s: float | None = None,
        /,
    ) -> None: ...


_rehearsal: ContextVar[Rehearsal | None] = ContextVar("aiqueue rehearsal", default=None)


@contextmanager
def rehearsing(settled: Rehearsal) -> Iterator[None]:
    """Have workers that are started within this block call `settled` after each attempt, and return a job that failed
    to its lane at once if it would wait there for its next attempt.
    """
    token = _rehearsal.set(settled)
    try:
        yield
    finally:
        _rehearsal.reset(token)


def current_rehearsal() -> Rehearsal | None:
    """Return what a worker that is started now calls; None: nothing, and retries wait."""
    return _rehearsal.get()
