"""Carries out a plan: acts on each of its jobs, or says why that is no longer possible."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..connection import Connection, Stored
from ..enqueue import SOON_S, DeadLetter, DeadLetters, ParkedJob, Parking, parse_parked_job
from ..errors import AIQueueError, BadInput, Conflict, NotFound, NotParked
from ..inspect import JobStats, Source, read_sequences, stats
from ..journal import Journal
from ..topology import Topology
from .cancel import ALREADY_CANCELLED, TOO_LARGE, Canceller
from .cancel_many import CancelMany, Chunk, where_enqueued
from .job_plans import ACTS_ON, Act, JobPlan, Target
from .move_many import MoveMany
from .reschedule import reschedule

CHUNK = 256  # jobs that are read, and acted on, together
AT_ONCE = 32
LETTER_GONE = "its dead letter is gone: replayed or purged"
Outcomes = dict[Target, str | AIQueueError]  # "": done; else what the job does instead


@dataclass(slots=True)
class ActOutcome:
    """What an act has done. `matched` is the count of its plan: the sum of the others once the act is over.

    `ended`: jobs that were no longer what the act is for, by id, each with what has become of it. `failed`: jobs that
    are as they were, each with its error. `unaudited`: why the audit has no line about an operator's act; "" if it has.
    """

    act: Act
    matched: int
    done: int = 0
    ended: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    unaudited: str = ""

    @property
    def left(self) -> int:
        """How many jobs were not looked at, because the act was interrupted."""
        return self.matched - self.done - len(self.ended) - len(self.failed)


class ActMany:
    """Acts on the jobs of a plan."""

    def __init__(
        self, connection: Connection, topology: Topology, canceller: Canceller, dead: DeadLetters, plan: JobPlan
    ) -> None:
        self.outcome = ActOutcome(plan.act, plan.count)
        self._connection = connection
        self._topology = topology
        self._canceller = canceller
        self._dead = dead
        self._plan = plan
        self._parking = Parking(connection, topology)
        self._journal = Journal(connection, topology.journal_stream.name)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def run(self, on_done: Callable[[int], None]) -> ActOutcome:
        """Act on all jobs, chunk by chunk. `on_done` gets how many more are settled. Raises AccessDenied, Unavailable;
        then `outcome` says what was done, and the rest is as it was.
        """
        act_on_chunk = self._choose()
        for source, targets in self._plan.targets.items():
            async for chunk in self._chunks(source, targets):
                outcomes = await act_on_chunk(source, chunk)
                for target, _ in chunk:
                    self._note(target, outcomes[target])
                on_done(len(chunk))
        return self.outcome

    def _choose(self) -> Callable[[Source, Chunk], Coroutine[Any, Any, Outcomes]]:
        match self._plan.act:
            case "cancel":
                return self._cancel
            case "move":
                return MoveMany(self._connection, self._topology, self._parking, self._plan.to).run
            case "run_now":
                return self._run_now
            case "replay":
                return lambda _, chunk: self._each_letter(chunk, self._dead.replay)
            case "purge":
                return lambda _, chunk: self._each_letter(chunk, self._dead.purge)

    async def _chunks(self, source: Source, targets: tuple[Target, ...]) -> AsyncIterator[Chunk]:
        by_seq = {each.seq: each for each in targets}
        chunk: list[tuple[Target, Stored | None]] = []
        async with aclosing(read_sequences(self._connection, source.stream, source.subject, list(by_seq))) as read:
            async for seq, stored in read:
                chunk.append((by_seq[seq], stored))
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _note(self, target: Target, outcome: str | AIQueueError) -> None:
        if isinstance(outcome, AIQueueError):
            self.outcome.failed.append((target.job_id, str(outcome)))
        elif outcome:
            self.outcome.ended.append((target.job_id, outcome))
        else:
            self.outcome.done += 1

    # -- the acts

    async def _cancel(self, source: Source, chunk: Chunk) -> Outcomes:
        verdicts = await CancelMany(self._connection, self._canceller, self._plan.filter).run(source, chunk)
        outcomes: Outcomes = {}
        for target, verdict in verdicts.items():
            if isinstance(verdict, AIQueueError):
                outcomes[target] = verdict
            elif verdict is TOO_LARGE:
                outcomes[target] = BadInput(verdict.detail)
            else:
                outcomes[target] = "" if verdict.cancelled and verdict is not ALREADY_CANCELLED else verdict.detail
        return outcomes

    async def _run_now(self, _: Source, chunk: Chunk) -> Outcomes:
        outcomes: Outcomes = {}

        async def run_one(target: Target, stored: Stored | None) -> None:
            async with self._gate:
                try:
                    outcomes[target] = await self._run_one_now(target, parse_parked_job(stored) if stored else None)
                except NotParked as error:
                    outcomes[target] = f"it is no longer parked: {error.state.replace('_', ' ')}"
                except AIQueueError as error:
                    outcomes[target] = error

        await asyncio.gather(*(run_one(*each) for each in chunk))
        return outcomes

    async def _run_one_now(self, target: Target, parked: ParkedJob | None) -> str:
        now = self._connection.clock.now()
        if parked is None and not self._plan.filter.states >= set(ACTS_ON["run_now"]):
            return "it is no longer parked as it was"  # it may be again, in a state that the filter does not name
        if parked is not None and not parked.subject.is_due and parked.fires_at - now > SOON_S:
            try:
                await self._parking.move(parked, now, timeout_s=min(parked.fires_at - now, 30.0))
            except Conflict:
                pass  # somebody else has moved it, or it is due now
            else:
                return ""
        family = self._topology.family(target.lane.family)
        job = where_enqueued(target, family, self._parking.stream)

        async def status() -> JobStats:
            lane = target.lane
            return await stats.job(
                self._connection, self._topology, target.job_id, family=lane.family, tenant=lane.tenant
            )

        await reschedule(self._parking, self._journal, self._connection.clock, family, job, None, status)
        return ""

    async def _each_letter(self, chunk: Chunk, act: Callable[[DeadLetter], Coroutine[Any, Any, bool]]) -> Outcomes:
        outcomes: Outcomes = {}

        async def act_on(target: Target, stored: Stored | None) -> None:
            async with self._gate:
                try:
                    letter = await self._dead.complete(stored) if stored is not None else None
                    if letter is None:
                        letter = await self._dead.get(target.seq)  # this server may be behind
                    outcomes[target] = "" if await act(letter) else LETTER_GONE
                except NotFound as error:
                    outcomes[target] = LETTER_GONE if "there is no dead letter" in str(error) else error
                except AIQueueError as error:
                    outcomes[target] = error

        await asyncio.gather(*(act_on(*each) for each in chunk))
        return outcomes
