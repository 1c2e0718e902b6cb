"""Where jobs are tried that may have killed their worker: in a child process, one at a time.

A job that comes back for the third time without an outcome is a suspect: its worker died twice, or it was only leased
beside the job that killed it, or it was handed back. Being tried harms none of these but the first
(docs/decisions/quarantine.md).
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
from ..lanes import Delivery
from . import pool, protocol
from .pool import Died, NoChild, Overdue, Recipe, Seat

log = logging.getLogger("aiqueue.quarantine")

LOST_MIN = 2  # deliveries without an outcome that make a suspect
WAITING_MAX = 4  # suspects that wait here for the one that is tried; more go back
BACK_S = (1.0, 30.0)  # for how long they go: at least, and at most
READ_S = 30.0  # what a child gets to read a body
IDLE_S = 60.0  # a child that has had nothing to do for so long is ended
TRIALS_MAX = 3  # trials in the worker itself, where there can be no child
REMEMBERED_MAX = 10_000
KILLED = "killed_worker"


@dataclass(frozen=True)
class Suspect:
    """A job to be tried. `head`: the newest entry of its own run in the journal."""

    raw: RawJob
    job_id: str
    attempt: int
    handler: Handler
    writer: Writer | None
    progress: Progress
    head: Entry | None
    stop: RunningAttempt


class Quarantine:
    """The suspects of one worker. `slots`: how many jobs it runs at once; suspects may wait in a quarter of them."""

    def __init__(self, connection: Connection, recipe: Recipe, *, slots: int) -> None:
        self._connection = connection
        self._recipe = recipe
        self._name = secrets.token_hex(4)
        self._heard: list[Subscription] = []
        self._waiting_max = min(WAITING_MAX, slots // 4)
        self._waiting = 0
        self._begun = 0.0
        self._turn = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._bench = Seat(recipe)
        self._desk = Seat(Recipe(recipe.families, {}))  # reads bodies: it needs nothing of the user's
        self._idle: dict[Seat, asyncio.TimerHandle] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._handed_back: dict[tuple[str, int], int] = {}
        self._warned: set[str] = set()

    async def __aenter__(self) -> Self:
        for family in self._recipe.families:
            self._heard.append(await self._connection.subscribe(f"{subjects.BACK}.{family}", self._on_back))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for subscription in self._heard:
            await subscription.close()
        for timer in self._idle.values():
            timer.cancel()
        await asyncio.gather(self._bench.clear(), self._desk.clear(), *self._ending)

    # -- who is a suspect

    async def handed_back(self, delivery: Delivery) -> None:
        """Remember that this delivery ends here without anybody's fault (of the last 10,000 jobs), and tell the other
        workers. They may miss it: then a job is tried that need not be.
        """
        self._remember(delivery.lane.stream, delivery.seq)
        word = f"{self._name} {delivery.lane.stream} {delivery.seq}".encode()
        with contextlib.suppress(AIQueueError):
            await self._connection.publish(f"{subjects.BACK}.{delivery.lane.key.family}", word)

    def _on_back(self, message: Received) -> None:
        name, _, rest = message.data.decode(errors="replace").partition(" ")
        stream, _, seq = rest.partition(" ")
        if name != self._name and (number := headers.number(seq)):
            self._remember(stream, number)

    def _remember(self, stream: str, seq: int) -> None:
        self._handed_back[stream, seq] = self._handed_back.pop((stream, seq), 0) + 1
        if len(self._handed_back) > REMEMBERED_MAX:
            del self._handed_back[next(iter(self._handed_back))]

    def suspects(self, delivery: Delivery, attempt: int = 1) -> bool:
        """Whether at least LOST_MIN earlier deliveries have no outcome, given the attempt that this one is.

        Without the attempt: whether that is possible.
        """
        lost = delivery.delivered - 1 - (attempt - 1)
        if lost < LOST_MIN:
            return False
        return lost - self._handed_back.get((delivery.lane.stream, delivery.seq), 0) >= LOST_MIN

    async def look(self, raw: RawJob) -> DecodedJob | Refused:
        """Which job this is. Its body is read in a child, and only where the headers do not tell."""
        found = attempt.unread(raw)
        if found is not None:
            return found
        async with self._reading:
            try:
                said = await self._ask_fresh(self._desk, ["read", protocol.plain_parcel(raw)])
            except (Died, Overdue) as ended:
                how = str(ended) or f"it took longer than {READ_S:g} s"
                return Refused(KILLED, f"reading its body ended a child process: {how}")
            except NoChild as error:
                self._warn("read", f"bodies of suspects are read in the worker: {error}")
                return attempt.read(raw)
            finally:
                self._rest(self._desk)
        return DecodedJob(said[1], said[2], problem=said[3])

    # -- the trial

    async def run(self, suspect: Suspect, here: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Try a suspect: in a child, or by calling `here` where its handler cannot be found there."""
        if self._turn.locked() and self._waiting >= self._waiting_max:
            return Postponed(self._back_s())
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        self._begun = time.monotonic()
        try:
            return await self._try(suspect, here)
        finally:
            self._rest(self._bench)
            self._turn.release()

    async def _try(self, suspect: Suspect, here: Callable[[], Awaitable[Outcome]]) -> Outcome:
        problem = self._recipe.problem(suspect.handler)
        if not problem:
            try:
                child = await self._bench.fill()
                model = suspect.handler.model
                missing = {(family, kind): why for family, kind, why in child.missing}
                problem = missing.get((model.aiq_family, model.aiq_kind), "")
            except NoChild as error:
                problem = str(error)
        if problem:
            return await self._try_here(suspect, here, problem)
        log.warning("job %s comes back for want of an outcome: it is tried in a child process", suspect.job_id)
        try:
            return await self._run(suspect)
        except NoChild as error:
            return await self._try_here(suspect, here, str(error))
        except Died as died:
            if suspect.handler.process:
                return Raised(f"worker process died: {died}", "")
            return Refused(KILLED, f"it ended the child process that it was tried in: {died}")

    async def _run(self, suspect: Suspect) -> Outcome:
        """A child that an earlier suspect has used may have died of that one: only a fresh one convicts."""
        try:
            return await pool.run(
                self._bench, suspect.raw, suspect.attempt, suspect.handler, suspect.progress, suspect.stop
            )
        except Died as died:
            if died.first or suspect.stop.asked:
                raise
        return await pool.run(
            self._bench, suspect.raw, suspect.attempt, suspect.handler, suspect.progress, suspect.stop
        )

    async def _try_here(self, suspect: Suspect, here: Callable[[], Awaitable[Outcome]], problem: str) -> Outcome:
        """A trial in the worker, which is told to the journal first: the next delivery sees that it had no end."""
        if suspect.handler.process:
            raise Unavailable(f"no child process: {problem}")
        kind = suspect.handler.model.aiq_kind
        self._warn(kind, f"suspects of kind {kind} are tried in the worker, and may end it: {problem}")
        head = suspect.head
        tells = head is not None and head.event in (TRIAL, STARTED) and isinstance(head.data, dict)
        before = head.data.get("trials") if head is not None and tells else 0
        trials = before if isinstance(before, int) else 0
        if trials >= TRIALS_MAX:
            return Refused(KILLED, f"{trials} trials in a worker had no end (in no child, for {problem})")
        if suspect.writer is not None:
            await suspect.writer.write(TRIAL, {"trials": trials + 1})
        outcome = await here()
        if isinstance(outcome, Interrupted) and suspect.writer is not None:
            await suspect.writer.write(TRIAL, {"trials": trials})
        return outcome

    async def _ask_fresh(self, seat: Seat, request: list[Any]) -> list[Any]:
        try:
            return await seat.ask(request, timeout_s=READ_S)
        except Died as died:
            if died.first:
                raise
        return await seat.ask(request, timeout_s=READ_S)

    # -- the children

    def _back_s(self) -> float:
        """As long as the trial under way has taken so far, within bounds, and not all at once."""
        least, most = BACK_S
        return min(most, max(least, time.monotonic() - self._begun)) * random.uniform(0.75, 1.25)  # noqa: S311

    def _rest(self, seat: Seat) -> None:
        """From now on the seat's child is idle."""
        loop = asyncio.get_running_loop()
        if seat in self._idle:
            self._idle.pop(seat).cancel()
        self._idle[seat] = loop.call_later(IDLE_S, self._end_idle, seat)

    def _end_idle(self, seat: Seat) -> None:
        lock = self._turn if seat is self._bench else self._reading

        async def end() -> None:
            if not lock.locked():
                async with lock:
                    await seat.clear()

        task = asyncio.create_task(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:  # once, not at every trial
            self._warned.add(about)
            log.warning("%s", text)
