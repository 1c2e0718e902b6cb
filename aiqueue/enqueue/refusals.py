"""What happens to jobs that a full lane refuses: they are tried again, or their caller is told what is full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from ..connection import Connection
from ..errors import AIQueueError, LaneFull, QueueFull, StreamFull
from .templates import JobTemplate

FULL_FIRST_S, FULL_CAP_S = 0.05, 2.0  # pauses between tries on a full lane
TRY_MIN_S = 0.05  # the timeout of a try whose caller has less time left
LEARN_S = 0.25  # how long an error waits for the limits of its stream
LEARNT_S = 1.0  # how long they are kept
T = TypeVar("T")
OnFull = Literal["raise", "wait"]


class StreamLimits:
    """The limits that streams have on the server, for errors: asked once a second at most for each stream."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, tuple[float, dict[str, int]]] = {}  # by stream; when it was asked, monotonic seconds

    async def learn(self, stream: str) -> None:
        """Read a stream's limits, if that is allowed and takes at most LEARN_S. Never raises AIQueueError."""
        now, (at, known) = time.monotonic(), self._known.get(stream, (-LEARNT_S, {}))
        if now - at < LEARNT_S:
            return
        self._known[stream] = now, known
        self._connection.optional += 1  # a user who may not ask gets the declared limits, and no line in the log
        try:
            config = (await self._connection.api(f"STREAM.INFO.{stream}", timeout=LEARN_S))["config"]
        except AIQueueError:
            return
        finally:
            self._connection.optional -= 1
        names = {"bytes": "max_bytes", "messages": "max_msgs", "jobs": "max_msgs_per_subject"}
        self._known[stream] = now, {unit: config[key] for unit, key in names.items() if config.get(key, 0) > 0}

    def find(self, stream: str, unit: str, declared: int | None) -> int | None:
        """Return the limit on the server if it is known, else the declared one. `unit`: bytes, messages, jobs (of a
        lane).
        """
        return self._known.get(stream, (0.0, {}))[1].get(unit, declared)


async def retry_while_full(
    store: Callable[[float], Awaitable[T]], template: JobTemplate | None, on_full: OnFull, timeout_s: float,
    limits: StreamLimits | None = None,
) -> T:  # fmt: skip
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
            wait_s = await wait_while_full(error, template, on_full, end, wait_s, limits)


async def wait_while_full(
    error: QueueFull, template: JobTemplate | None, on_full: OnFull, end: float, wait_s: float,
    limits: StreamLimits | None,
) -> float:  # fmt: skip
    """Sleep before the next try on a full lane, and return how long to sleep before the try after it, in seconds.

    Raises QueueFull if no further try is wanted, or if `end` (monotonic seconds) has passed.
    """
    left_s = end - time.monotonic()
    if on_full == "raise" or left_s <= 0:
        if template is not None and limits is not None:
            await limits.learn(template.family.stream)
        raise queue_full_error(error, template, limits) from None
    await asyncio.sleep(min(wait_s, left_s))
    return min(wait_s * 2, FULL_CAP_S)


def queue_full_error(error: AIQueueError, template: JobTemplate | None, limits: StreamLimits | None) -> AIQueueError:
    """Return the server's refusal as an error that names the lane and the limit reached, as far as it is known.

    `limits`: None: the stream of parked jobs has refused, whose limit is not known. Any other error is returned as it
    is, and so is one without a `template`.
    """
    if template is None or not isinstance(error, QueueFull):
        return error
    family = template.family
    if isinstance(error, LaneFull):
        declared = family.max_msgs_per_subject
        limit = declared if limits is None else limits.find(family.stream, "jobs", declared)
        return LaneFull(template.name, "it holds its maximum of jobs", limit=limit)
    if isinstance(error, StreamFull):
        unit = "bytes" if "bytes" in error.reason else "messages"
        found = None if limits is None else limits.find(family.stream, unit, template.limits.get(unit))
        return StreamFull(template.name, error.reason, limit=found)
    return type(error)(template.name, error.reason)
