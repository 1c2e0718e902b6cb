"""Stop attempts whose job is cancelled while they run.

The journal decides whether a job is cancelled: the canceller has written it. A worker learns of it in two ways. The
canceller sends a notice to all workers, which then read the journal: anybody could send a notice. The notice may be
lost, so long attempts have their journal read too.
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

log = logging.getLogger(__name__)

ROUND_S = 1.0
LONG_S = 5.0  # the journal of an attempt is read after this time, and each time as long has passed
CHECKS_MAX = 100  # journals read in one round; those that are due longest go first
GRACE_S = 5.0  # what a handler gets to clean up before it is cancelled again, or its child process killed
NOTICES_MAX = 10_000
PAUSE_S = 0.5  # an attempt that streams faster than one can cancel stores nothing for so long after a notice
PAUSE_AGAIN_S = 10.0  # but not more often than this: anybody could send notices


class RunningAttempt(Limit):
    """One attempt, as far as it can be stopped. As a `Limit` it has the timeout of its handler.

    `cancel_requested`: its job was cancelled. `is_over`: the attempt has ended, or was abandoned. `request_stop` is
    a callback that asks the attempt to stop gently. None: there is no gentle way, and the attempt's task is
    cancelled. `is_limited`: before the handler is called, its worker must let it start. `stop_limit` cancels the
    task (again) when the grace period is over. `check_at`: when its journal is read next, `paused_at`: when a
    notice has paused its writer, both in monotonic seconds.
    """

    journaled: bool  # whether it has a writer
    cancel_requested = is_over = False  # defaults of the class: there is an attempt for every job, and few are stopped
    stop_limit: Limit | None = None
    check_at = 0.0
    paused_at = -PAUSE_AGAIN_S
    request_stop: Callable[[], None] | None = None
    is_limited = False  # whether `begin_call` must be asked before the handler is called

    @property
    def writer(self) -> Writer | None:
        raise NotImplementedError

    @property
    def journal_key(self) -> tuple[str, int]:
        """The subject of the job's journal, and the run."""
        raise NotImplementedError


class Cancellations:
    """Watches the running attempts of one worker, and stops those whose job is cancelled."""

    def __init__(self, connection: Connection, families: Iterable[Family], limits: Limits) -> None:
        self._connection = connection
        self._journals = {each.name: each.journal for each in families if each.journal}
        self._limits = limits
        self._watched: dict[RunningAttempt, None] = {}  # in the order in which they started
        self._notices: dict[tuple[str, int], None] = {}  # journal keys; some of these jobs may wait here for a slot
        self._reading: dict[
            RunningAttempt, bool
        ] = {}  # journals read because of a notice; True: another came meanwhile
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._off: Callable[[], None] | None = None
        self._checking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for family in self._journals:
            subscription = await self._connection.subscribe(f"{subjects.CANCEL}.{family}", self._on_notice)
            self._subscriptions.append(subscription)
        self._off = self._connection.on_regained(self._make_all_due)  # notices sent meanwhile are lost
        self._checking = asyncio.create_task(self._check_rounds())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._off is not None:
            self._off()
        tasks = [*self._tasks, *([self._checking] if self._checking is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.unsubscribe()

    @property
    def loop_ends(self) -> bool:
        """Whether all tasks of the event loop were cancelled, as by `asyncio.run` when its main function has ended."""
        return self._checking is not None and (self._checking.done() or self._checking.cancelling() > 0)

    @property
    def watched(self) -> list[RunningAttempt]:
        """The attempts whose handlers run."""
        return list(self._watched)

    async def unsubscribe(self) -> None:
        """Receive no more notices: from now on only the journal shows that a job was cancelled. Safe twice."""
        for subscription in self._subscriptions:
            await subscription.close()

    def watch(self, running: RunningAttempt, now: float) -> bool:
        """Let the attempt be stopped from now on, in monotonic seconds.

        True: there was a notice for its run already, so the caller must read the journal.
        """
        if not running.journaled:
            return False
        running.check_at = now + LONG_S
        self._watched[running] = None
        return bool(self._notices) and running.journal_key in self._notices

    def unwatch(self, running: RunningAttempt) -> None:
        """Let the attempt be stopped no more, and mark it as over."""
        self._watched.pop(running, None)
        running.is_over = True
        if running.stop_limit is not None:
            self._limits.stop(running.stop_limit)

    def _on_notice(self, message: Received) -> None:
        """Note a cancellation, and check the attempts it is for. The message is ``{tenant} {job id} {run}``."""
        try:
            tenant, job_id, run = message.data.decode().split(" ")
            journal = self._journals[message.subject.removeprefix(f"{subjects.CANCEL}.")]
            key = subjects.journal(journal, tenant, job_id), headers.number(run)
        except (ValueError, KeyError):
            log.debug("this is no notice of a cancellation: %.100r", message.data)
            return
        self._notices[key] = self._notices.pop(key, None)
        if len(self._notices) > NOTICES_MAX:
            del self._notices[next(iter(self._notices))]
        for running in self._watched:
            if running.journal_key == key and not running.cancel_requested:
                self._check_soon(running)

    def _check_soon(self, running: RunningAttempt) -> None:
        """Have the journal read now: anybody could have sent the notice. Many notices cause one read at a time."""
        running.check_at = 0.0  # if the read fails, the next round reads
        if running in self._reading:
            self._reading[running] = True
            return
        self._reading[running] = False
        task = asyncio.get_running_loop().create_task(self._check_noticed(running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check_noticed(self, running: RunningAttempt) -> None:
        """Read the journal of an attempt that a notice named; again, if another notice came during the read."""
        try:
            again = True
            while again and running in self._watched and not running.cancel_requested:
                self._reading[running] = False
                await self._check_journal(running)
                again = self._reading[running]
                if not running.cancel_requested and running.writer is not None:
                    self._let_cancel(running, running.writer)
        finally:
            del self._reading[running]

    def _let_cancel(self, running: RunningAttempt, writer: Writer) -> None:
        """Pause what the attempt writes: its entries may come before each try of the canceller to write `cancelled`."""
        now = time.monotonic()
        if now >= running.paused_at + PAUSE_AGAIN_S:
            running.paused_at = now
            writer.pause(PAUSE_S)

    def _stop_attempt(self, running: RunningAttempt) -> None:
        """Ask the attempt to stop, or cancel its task; after GRACE_S cancel the task (again). Safe twice."""
        if running.cancel_requested:
            return
        running.cancel_requested = True
        if running.request_stop is None:
            running.stop_limit = self._limits.cancel(running.task, GRACE_S)
        else:
            running.request_stop()
            running.stop_limit = self._limits.start_task(running.task, GRACE_S)

    def _make_all_due(self) -> None:
        """Have every journal read in the next round."""
        for running in self._watched:
            running.check_at = 0.0

    async def _check_rounds(self) -> None:
        """Read the journals that are due, once every ROUND_S, for ever."""
        while True:
            await asyncio.sleep(ROUND_S)
            now = time.monotonic()
            due_attempts = [each for each in self._watched if each.check_at <= now and not each.cancel_requested]
            if due_attempts and self._connection.connected:
                longest_due = sorted(due_attempts, key=lambda each: each.check_at)[:CHECKS_MAX]
                await asyncio.gather(*(self._check_journal(each) for each in longest_due))

    async def _check_journal(self, running: RunningAttempt) -> None:
        """Stop the attempt if its journal has a final entry. Never raises."""
        writer = running.writer
        assert writer is not None
        try:
            ended = await writer.is_run_ended()
        except AIQueueError as error:
            log.debug("reading the journal %s: %s", writer.subject, error)
        except Exception:
            log.exception("reading the journal %s", writer.subject)
        else:
            running.check_at = time.monotonic() + LONG_S
            if ended and running in self._watched:
                self._stop_attempt(running)
