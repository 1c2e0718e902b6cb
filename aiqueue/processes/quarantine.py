"""Suspects: jobs that may have killed their worker. They are tried in a child process, one at a time.

A job whose third delivery comes, and whose first two had no outcome, is a suspect. Either it killed two workers, or it
was only leased by workers that another job killed, or it was returned to the queue unnoticed. The trial convicts only
the first of these (docs/decisions/quarantine.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .. import attempt, headers, subjects
from ..attempt import DecodedJob, Handler, Interrupted, Outcome, Postponed, Raised, RawJob, Refused, RunningAttempt
from ..connection import Connection, Received, Subscription
from ..errors import AIQueueError, Unavailable
from ..job import Progress
from ..journal import STARTED, TRIAL, Entry, Writer
from ..lanes import Delivery, WarnOnce
from . import protocol
from .pool import ChildDied, ChildNotStarted, ChildSlot, ChildTimedOut, run_in_slot
from .recipe import Recipe

log = logging.getLogger(__name__)

LOST_MIN = 2  # deliveries without an outcome that make a suspect
WAITING_MAX = 4  # suspects that wait here for the trial under way; more return to the queue
RETURN_S = (1.0, 30.0)  # for how long they return: at least, and at most
READ_S = 30.0  # what a child gets to read a body
IDLE_S = 60.0  # a child without requests for so long is ended
TRIALS_MAX = 3  # trials in the worker itself, where there can be no child
REMEMBERED_MAX = 10_000
KILLED = "killed_worker"


@dataclass(frozen=True)
class Suspect:
    """A job to be tried. `newest`: the newest entry of its run in the journal."""

    raw: RawJob
    job_id: str
    attempt: int
    handler: Handler
    writer: Writer | None
    progress: Progress
    newest: Entry | None
    running: RunningAttempt


class Quarantine:
    """The suspects of one worker. `slots`: how many jobs the worker runs at once; suspects wait in a quarter of them.

    `_waiting` counts the suspects that wait for the trial under way, which started at `_trial_started_at` (monotonic).
    The child in `_trial_slot` belongs to whoever holds `_trial_lock`, the one in `_reader_slot` to `_reader_lock`.
    """

    def __init__(
        self,
        connection: Connection,
        recipe: Recipe,
        *,
        slots: int,
        suspect_after: int | None = None,
        reader_recipe: Recipe | None = None,
    ) -> None:
        """`suspect_after`: how many deliveries without an outcome make a suspect; None: LOST_MIN. `reader_recipe`: for
        the child that reads bodies; by default it knows the families and no handlers.
        """
        self._suspect_after = suspect_after
        self._connection = connection
        self._recipe = recipe
        self._name = secrets.token_hex(4)
        self._subscriptions: list[Subscription] = []
        self._waiting_max = min(WAITING_MAX, slots // 4)
        self._waiting = 0
        self._trial_started_at = 0.0
        self._trial_lock = asyncio.Lock()
        self._reader_lock = asyncio.Lock()
        self._trial_slot = ChildSlot(recipe)
        self._reader_slot = ChildSlot(reader_recipe or Recipe(recipe.families, {}))
        self._idle: dict[ChildSlot, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._returns: dict[tuple[str, int], int] = {}  # by stream and sequence: how often the job was returned
        self._warn_once = WarnOnce(log)

    async def __aenter__(self) -> Self:
        for family in self._recipe.families:
            subscription = await self._connection.subscribe(f"{subjects.BACK}.{family}", self._on_return_notice)
            self._subscriptions.append(subscription)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for subscription in self._subscriptions:
            await subscription.close()
        for timer in self._idle.values():
            timer.cancel()
        await asyncio.gather(self._trial_slot.end_child(), self._reader_slot.end_child(), *self._ending)

    # -- which jobs are suspects

    async def note_return(self, delivery: Delivery) -> None:
        """Remember that this delivery ends through no fault of its job, and send a notice to the other workers.

        The last REMEMBERED_MAX jobs are remembered. A worker that misses the notice may try a job needlessly.
        """
        self._remember_return(delivery.lane.stream, delivery.seq)
        notice = f"{self._name} {delivery.lane.stream} {delivery.seq}".encode()
        with contextlib.suppress(AIQueueError):
            await self._connection.publish(f"{subjects.BACK}.{delivery.lane.key.family}", notice)

    def _on_return_notice(self, message: Received) -> None:
        """Remember a return that another worker noted: ``{quarantine} {stream} {sequence}``."""
        name, _, rest = message.data.decode(errors="replace").partition(" ")
        stream, _, seq = rest.partition(" ")
        if name != self._name and (number := headers.number(seq)):
            self._remember_return(stream, number)

    def _remember_return(self, stream: str, seq: int) -> None:
        self._returns[stream, seq] = self._returns.pop((stream, seq), 0) + 1
        if len(self._returns) > REMEMBERED_MAX:
            del self._returns[next(iter(self._returns))]

    def is_suspect(self, delivery: Delivery, attempt: int = 1) -> bool:
        """Return whether too many earlier deliveries had no outcome, given that this is attempt `attempt`.

        An attempt that failed had an outcome, and a return to the queue counts as one. While the number of the attempt
        is not known, 1 answers whether the job may be a suspect.
        """
        lost = delivery.delivery_count - 1 - (attempt - 1)
        lost_min = LOST_MIN if self._suspect_after is None else self._suspect_after
        if lost < lost_min:
            return False
        return lost - self._returns.get((delivery.lane.stream, delivery.seq), 0) >= lost_min

    async def identify(self, raw: RawJob) -> DecodedJob | Refused:
        """Return id and kind of a suspect, without its data. If the headers lack them, a child reads the body.

        Refused: reading the body killed the child, or took longer than READ_S.
        """
        found = attempt.decode_headers_only(raw)
        if found is not None:
            return found
        async with self._reader_lock:
            try:
                answer = await self._ask_reader(["read", protocol.raw_job_to_plain(raw)])
            except (ChildDied, ChildTimedOut) as ended:
                how = str(ended) or f"it took longer than {READ_S:g} s"
                return Refused(KILLED, f"reading its body ended a child process: {how}")
            except ChildNotStarted as error:
                self._warn_once(f"bodies of suspects are read in the worker: {error}", about="read")
                return attempt.decode_body(raw)
            finally:
                self._start_idle_timer(self._reader_slot)
        return DecodedJob(answer[1], answer[2], answer[3], problem=answer[4])

    # -- the trial

    async def run_trial(self, suspect: Suspect, run_here: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Wait for the trial under way, then try a suspect in a child, or by `run_here` where no child can.

        Postponed: too many suspects wait already. Raises Unavailable.
        """
        if self._trial_lock.locked() and self._waiting >= self._waiting_max:
            return Postponed(self._return_delay_s())
        self._waiting += 1
        try:
            await self._trial_lock.acquire()
        finally:
            self._waiting -= 1
        self._trial_started_at = time.monotonic()
        try:
            return await self._choose_trial(suspect, run_here)
        finally:
            self._start_idle_timer(self._trial_slot)
            self._trial_lock.release()

    async def _choose_trial(self, suspect: Suspect, run_here: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Try a suspect in a child, or in this process if no child can be started or none finds the handler."""
        problem = await self._find_problem(suspect.handler)
        if problem:
            return await self._try_in_worker(suspect, run_here, problem)
        log.warning("job %s was redelivered without an outcome: it is tried in a child process", suspect.job_id)
        try:
            return await self._try_in_child(suspect)
        except ChildNotStarted as error:
            return await self._try_in_worker(suspect, run_here, str(error))
        except ChildDied as died:
            if suspect.handler.process:
                return Raised(f"worker process died: {died}", "")
            return Refused(KILLED, f"it ended the child process that it was tried in: {died}")

    async def _find_problem(self, handler: Handler) -> str:
        """Return why no child can run the handler. "": the child, which is started now, has found it."""
        problem = self._recipe.find_problem(handler)
        if problem:
            return problem
        try:
            child = await self._trial_slot.get_child()
        except ChildNotStarted as error:
            return str(error)
        missing = {(family, kind): why for family, kind, why in child.missing}
        return missing.get(handler.key, "")

    async def _try_in_child(self, suspect: Suspect) -> Outcome:
        """Run the handler in the child. If the child dies, run it again in a fresh child, and let that one decide.

        An earlier suspect may have damaged a child that was used before, so only a fresh child convicts.
        Raises ChildDied, ChildNotStarted.
        """
        run = self._trial_slot, suspect.raw, suspect.attempt, suspect.handler, suspect.progress, suspect.running
        try:
            return await run_in_slot(*run)
        except ChildDied as died:
            if died.first or suspect.running.cancel_requested:
                raise
        return await run_in_slot(*run)

    async def _try_in_worker(
        self, suspect: Suspect, run_here: Callable[[], Awaitable[Outcome]], problem: str
    ) -> Outcome:
        """Try a suspect in this process. A `trial` entry is written first, so that the next delivery sees a death.

        Refused: the worker died in TRIALS_MAX trials. Raises Unavailable if the handler must run in a child.
        """
        if suspect.handler.process:
            raise Unavailable(f"no child process: {problem}")
        what = suspect.handler.what
        self._warn_once(f"suspects of {what} are tried in the worker, and may end it: {problem}", about=what)
        trials = _count_trials(suspect.newest)
        if trials >= TRIALS_MAX:
            return Refused(
                KILLED,
                f"the worker died in each of {trials} trials of the job (no child process can run the job: {problem})",
            )
        if suspect.writer is not None:
            await suspect.writer.write(TRIAL, {"trials": trials + 1})
        outcome = await run_here()
        if isinstance(outcome, Interrupted | Postponed) and suspect.writer is not None:  # it did not end
            await suspect.writer.write(TRIAL, {"trials": trials})
        return outcome

    async def _ask_reader(self, request: list[Any]) -> list[Any]:
        """Ask the child that reads bodies. If a used child dies, ask a fresh one. Raises as `ChildSlot.ask`."""
        try:
            return await self._reader_slot.ask(request, timeout_s=READ_S)
        except ChildDied as died:
            if died.first:
                raise
        return await self._reader_slot.ask(request, timeout_s=READ_S)

    def _return_delay_s(self) -> float:
        """Return as many seconds as the trial under way has taken so far, within RETURN_S, and spread by a quarter."""
        least, most = RETURN_S
        elapsed_s = time.monotonic() - self._trial_started_at
        return min(most, max(least, elapsed_s)) * random.uniform(0.75, 1.25)  # noqa: S311

    # -- idle children

    def _start_idle_timer(self, slot: ChildSlot) -> None:
        """End the slot's child in IDLE_S, unless this is called again before."""
        loop = asyncio.get_running_loop()
        if slot in self._idle:
            self._idle.pop(slot).cancel()
        self._idle[slot] = loop.call_later(IDLE_S, self._end_idle_child, slot)

    def _end_idle_child(self, slot: ChildSlot) -> None:
        """End the slot's child in a task, unless the child is in use."""
        lock = self._trial_lock if slot is self._trial_slot else self._reader_lock

        async def end() -> None:
            if not lock.locked():
                async with lock:
                    await slot.end_child()

        task = asyncio.create_task(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _count_trials(newest: Entry | None) -> int:
    """Return how many trials ended with the death of the worker: `trial` and `started` entries keep the count."""
    if newest is None or newest.event not in (TRIAL, STARTED) or not isinstance(newest.data, dict):
        return 0
    trials = newest.data.get("trials")
    return trials if isinstance(trials, int) else 0
