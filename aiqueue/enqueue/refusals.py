"""What happens to jobs that a full lane refuses: they are tried again, or their caller is told what is full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from ..errors import LaneFull, QueueFull, StreamFull
from .templates import JobTemplate

FULL_FIRST_S, FULL_CAP_S = 0.05, 2.0  # pauses between tries on a full lane
TRY_MIN_S = 0.05  # the timeout of a try whose caller has less time left
T = TypeVar("T")
OnFull = Literal["raise", "wait"]


async def retry_while_full(
    store: Callable[[float], Awaitable[T]], template: JobTemplate | None, on_full: OnFull, timeout_s: float
) -> T:
    """Call `store` with the seconds that are left, and return its result.

    While it raises QueueFull: with `on_full` "wait", call it again with backoff until `timeout_s` is over.
    Raises QueueFull, which names the lane of the `template`; without one, as `store` has raised it.
    """
    end = time.monotonic() + timeout_s
    wait_s = FULL_FIRST_S
    while True:
        try:
            return await store(max(TRY_MIN_S, end - time.monotonic()))
        except QueueFull as error:
            wait_s = await wait_while_full(error, template, on_full, end, wait_s)


async def wait_while_full(
    error: QueueFull, template: JobTemplate | None, on_full: OnFull, end: float, wait_s: float
) -> float:
    """Sleep before the next try on a full lane, and return how long to sleep before the try after it, in seconds.

    Raises QueueFull if no further try is wanted, or if `end` (monotonic seconds) has passed.
    """
    left_s = end - time.monotonic()
    if on_full == "raise" or left_s <= 0:
        raise error if template is None else queue_full_error(error, template) from None
    await asyncio.sleep(min(wait_s, left_s))
    return min(wait_s * 2, FULL_CAP_S)


def queue_full_error(error: QueueFull, template: JobTemplate) -> QueueFull:
    """Return the server's refusal as an error that names the lane and, where it is declared, the limit reached."""
    if isinstance(error, LaneFull):
        return LaneFull(template.name, "it holds its maximum of jobs", limit=template.family.max_msgs_per_subject)
    if isinstance(error, StreamFull):
        unit = "bytes" if "bytes" in error.reason else "messages"
        return StreamFull(template.name, error.reason, limit=template.limits.get(unit))
    return type(error)(template.name, error.reason)
