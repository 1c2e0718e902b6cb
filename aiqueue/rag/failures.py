"""What follows a failed attempt. The job's own notes count: a death of its worker says nothing of it.

1. An attempt that failed by itself is tried again, ATTEMPTS times in all.
2. What waits for a disk, a store or another worker (`waits` of the error) is tried again for an hour.
A replay of the dead letter counts both anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from ..errors import AIQueueError, BadInput, SettingsError, Stale
from ..job import Job, Reject, Retry
from ..units import Backoff

ATTEMPTS: Final = 8  # that fail by themselves; those whose worker has died are not counted
DELAYS: Final = Backoff(attempts=ATTEMPTS)
WAIT_S: Final = 3600.0  # for what an operator or another worker has to do
WAIT_FIRST_S, WAIT_LONGEST_S = 2.0, 300.0  # between two attempts meanwhile
RETRY: Final = Backoff(attempts=10_000)  # of handlers that count by themselves
_FAILED, _WAITS_SINCE, _GIVEN_UP = "failed", "waits_since", "given_up"


def is_waited_for(error: BaseException) -> bool:
    """Whether an operator or another worker has to act before the job can go on."""
    return bool(getattr(error, "waits", False))


async def next_attempt(
    job: Job[Any], reason: str, *, after_s: float | None = None, waits: bool = False, delays: Backoff | None = None
) -> Retry | Reject:
    """Note that this attempt has failed, and return what to raise. `after_s`: the wait that is asked for. Raises Stale.

    Reject: it was the last one. `waits`: see `is_waited_for`.
    """
    delays = delays or DELAYS
    try:
        return await (_next_wait(job, reason) if waits else _next_failure(job, reason, after_s, delays))
    except Stale:
        raise
    except AIQueueError:  # the queue is away: a failure that is not counted only means one attempt more
        return Retry(reason, after=delays.delay_s(1) if after_s is None else after_s)


async def _next_failure(job: Job[Any], reason: str, after_s: float | None, delays: Backoff) -> Retry | Reject:
    failures = sum(_FAILED in each for each in await _notes(job)) + 1
    note: dict[str, Any] = {_FAILED: reason[:200]}
    if failures < ATTEMPTS:
        await job.called(note)
        return Retry(reason, after=delays.delay_s(failures) if after_s is None else after_s)
    await job.called(note | {_GIVEN_UP: True})
    return Reject(f"it has failed {failures} times, last with: {reason}")


async def _next_wait(job: Job[Any], reason: str) -> Retry | Reject:
    now, since = time.time(), 0.0
    for each in await _notes(job):
        since = since or each.get(_WAITS_SINCE, 0.0)
    if not since:
        since = now
        await job.called({_WAITS_SINCE: now})
    if now - since >= WAIT_S:
        await job.called({_GIVEN_UP: True})
        return Reject(f"it has waited for {WAIT_S / 60:.0f} min, last for: {reason}")
    waited_s = max(0.0, now - since)
    return Retry(reason, after=min(max(WAIT_FIRST_S, waited_s), WAIT_LONGEST_S, max(WAIT_FIRST_S, WAIT_S - waited_s)))


async def _notes(job: Job[Any]) -> list[dict[str, Any]]:
    """Return what earlier attempts have noted, since the job was given up last."""
    notes: list[dict[str, Any]] = []
    for each in await job.calls():
        if isinstance(each, dict):
            notes = [] if _GIVEN_UP in each else [*notes, each]
    return notes


@contextlib.asynccontextmanager
async def counting_failures(job: Job[Any], *, delays: Backoff | None = None) -> AsyncIterator[None]:
    """Retry the job if the block fails, until it has failed ATTEMPTS times; deaths of workers are not counted."""
    try:
        yield
    except (Reject, Stale):
        raise
    except Exception as error:
        if isinstance(error, BadInput) and not isinstance(error, SettingsError) and not is_waited_for(error):
            raise Reject(str(error)) from None
        reason = error.reason if isinstance(error, Retry) else reason_of(error)
        after_s = error.after_s if isinstance(error, Retry) else None
        raise await next_attempt(
            job, reason, after_s=after_s, waits=is_waited_for(error), delays=delays
        ) from error  # fmt: skip


def reason_of(error: Exception) -> str:
    """Return an error as the reason of a failure. Ours say enough without the name of their class."""
    return str(error) if is_waited_for(error) else f"{type(error).__name__}: {error}"
