"""Stopping attempts whose job was cancelled while they ran. What decides is the journal, which the canceller has
written; here a worker learns of it: by a message to all workers, or by looking, for the message may be lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .. import headers, subjects
from ..errors import AIQueueError
from ..topology import Family
from .timeouts import Limit, Limits

if TYPE_CHECKING:
    from ..connection import Connection, Received, Subscription
    from ..journal import Writer

log = logging.getLogger("aiqueue.stops")

ROUND_S = 1.0
LONG_S = 5.0  # an attempt that has run for so long has its journal looked at, again each time as long has passed
LOOKS_MAX = 100  # of one round, the attempts that began first before the others
GRACE_S = 5.0  # what a handler gets to clean up before it is cancelled again, or its child process killed
HEARD_MAX = 10_000


class RunningAttempt:
    """How one attempt is stopped. `asked`: its job was cancelled. `over`: it has ended, or was given up. `tell`: the
    gentle way, where there is one; else its task is cancelled.
    """

    task: asyncio.Task[None]
    journaled: bool  # whether it has a writer
    asked = over = False  # of the class: an attempt is made for every job, and few are stopped
    limit: Limit | None = None
    look_at = 0.0
    tell: Callable[[], None] | None = None

    @property
    def writer(self) -> Writer | None:
        raise NotImplementedError

    @property
    def key(self) -> tuple[str, int]:
        """The subject of its journal, and its run."""
        raise NotImplementedError


class Cancellations:
    """The attempts of one worker that may be stopped."""

    def __init__(self, connection: Connection, families: Iterable[Family], limits: Limits) -> None:
        self._connection = connection
        self._journals = {each.name: each.journal for each in families if each.journal}
        self._limits = limits
        self._live: dict[RunningAttempt, None] = {}  # in the order of their beginning
        self._heard: dict[tuple[str, int], None] = {}  # of jobs that wait here for a slot, perhaps
        self._subscriptions: list[Subscription] = []
        self._off: Callable[[], None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for family in self._journals:
            heard = await self._connection.subscribe(f"{subjects.CANCEL}.{family}", self._on_cancel)
            self._subscriptions.append(heard)
        self._off = self._connection.on_regained(self._look_at_all)  # what was said meanwhile is lost
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._off is not None:
            self._off()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for subscription in self._subscriptions:
            await subscription.close()

    def begin(self, stop: RunningAttempt) -> bool:
        """From now on it can be stopped. True: its job may have been cancelled before; the journal knows."""
        if not stop.journaled:
            return False
        stop.look_at = time.monotonic() + LONG_S
        self._live[stop] = None
        return bool(self._heard) and stop.key in self._heard

    def end(self, stop: RunningAttempt) -> bool:
        """It can be stopped no more. Whether its task was cancelled by somebody else."""
        self._live.pop(stop, None)
        stop.over = True
        if stop.limit is None:
            return False
        self._limits.stop(stop.limit)
        return stop.limit.absolve()

    # -- how it is learnt

    def _on_cancel(self, message: Received) -> None:
        """``{tenant} {job id} {run}``."""
        try:
            tenant, job_id, run = message.data.decode().split(" ")
            journal = self._journals[message.subject.removeprefix(f"{subjects.CANCEL}.")]
            key = subjects.journal(journal, tenant, job_id), headers.number(run)
        except (ValueError, KeyError):
            log.debug("no word of a cancellation: %.100r", message.data)
            return
        self._heard[key] = self._heard.pop(key, None)
        if len(self._heard) > HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        for stop in self._live:
            if stop.key == key:
                self._stop(stop)

    def _stop(self, stop: RunningAttempt) -> None:
        if stop.asked:
            return
        stop.asked = True
        if stop.tell is None:
            stop.limit = self._limits.cancel(stop.task, GRACE_S)
        else:
            stop.tell()
            stop.limit = self._limits.start(stop.task, GRACE_S)

    def _look_at_all(self) -> None:
        for stop in self._live:
            stop.look_at = 0.0

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(ROUND_S)
            now = time.monotonic()
            due = [stop for stop in self._live if stop.look_at <= now and not stop.asked]
            if due and self._connection.connected:
                await asyncio.gather(*(self._look(stop) for stop in due[:LOOKS_MAX]))

    async def _look(self, stop: RunningAttempt) -> None:
        writer = stop.writer
        assert writer is not None
        try:
            ended = await writer.ended()
        except AIQueueError as error:
            log.debug("looking at %s: %s", writer.subject, error)
        except Exception:
            log.exception("looking at %s", writer.subject)
        else:
            stop.look_at = time.monotonic() + LONG_S
            if ended and stop in self._live:
                self._stop(stop)
