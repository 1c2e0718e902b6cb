"""Runs a worker until nothing is left to do."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from .. import subjects
from ..client import Client
from ..enqueue import ParkedJob
from ..errors import BadInput
from ..subjects import Lane
from ..units import Duration, flag, parse_duration
from ..worker import Session, SettledAttempt, Worker, rehearsing
from .advancing import advance_jobs, is_aside, list_subjects, read_parked, waits_for_children
from .clients import check_test_client
from .leftover import describe_left

POLL_S, POLL_MAX_S = 0.002, 0.02  # soon after an attempt has ended, its ack has reached the stream
SETTLED_S = 0.001
SOON_S = 1.0
_OF_LIFESPAN = object()


class Drained(NamedTuple):
    """What a worker did in `drain`. `attempts`: what became of each attempt, in the order in which they ended."""

    attempts: tuple[SettledAttempt, ...]

    @property
    def done(self) -> int:
        """How many jobs have succeeded."""
        return self._count("done")

    @property
    def failed(self) -> int:
        """How many jobs became dead letters."""
        return self._count("failed")

    @property
    def retried(self) -> int:
        """How many attempts failed and were followed, or are to be followed, by another one."""
        return self._count("retry")

    def _count(self, outcome: str) -> int:
        return sum(each.outcome == outcome for each in self.attempts)

    def __repr__(self) -> str:
        counts = Counter(each.outcome for each in self.attempts)
        return f"<Drained {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items())) or 'nothing'}>"


async def drain(
    client: Client,
    worker: Worker,
    *,
    delayed: bool = False,
    within: Duration = "30s",
    state: Any = _OF_LIFESPAN,
) -> Drained:
    """Run a worker on the server of a test until it has no more jobs, and return what became of them.

    Jobs that handlers enqueue meanwhile are run too. Retries do not wait: a job that would wait in its lane, less than
    5 seconds, is run again at once, with its true attempt number.

    - `delayed`: also run the jobs that wait for a time, such as those with a delay, and retries that are 5 seconds or
      more away: they become due at once, as by `advance`. Schedules do not tick: call `advance` for that.
    - `within`: how long this may take. Limits and pauses hold here, too: a job above a limit waits for the limit's
      window, so give more time than that.
    - `state`: what handlers get as ``job.state``, instead of what the worker's lifespan yields, which is not entered.
      Not for a worker with handlers in child processes, which could not get it.

    A job that waits for children which this worker does not run, or of a kind that it does not know, is left.
    `client` is one that `aiqueue.testing.client` has opened. Raises AssertionError after `within`, which says
    what is left, and what holds it; BadInput for wrong arguments, and what `Worker.running` raises.
    """
    check_test_client(client, what="testing.drain runs every job of a server")
    if not isinstance(worker, Worker):
        raise BadInput(f"testing.drain needs a Worker, not {type(worker).__name__}")
    takes_delayed, within_s = flag("delayed", delayed), parse_duration("within", within)
    if state is not _OF_LIFESPAN:
        worker = _with_state(worker, state)
    attempts: list[SettledAttempt] = []
    changed = asyncio.Event()

    def note(settled: SettledAttempt) -> None:
        attempts.append(settled)
        changed.set()

    async with AsyncExitStack() as stack:
        with rehearsing(note):
            session = await stack.enter_async_context(worker.running(client))
        try:
            await _Drain(client, worker, session, attempts, changed).run(within_s, takes_delayed=takes_delayed)
        except BaseException:  # handlers that still run are cancelled: nobody waits for them any more
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await session.drain()
            raise
    return Drained(tuple(attempts))


def _with_state(worker: Worker, state: Any) -> Worker:
    """Return a worker that is the same, but for its lifespan. Raises BadInput for handlers in child processes."""
    in_process = [each.what for each in worker.handlers if each.process]
    if in_process:
        raise BadInput(f"state: the handler of {in_process[0]} runs in a child process, which enters the lifespan")
    changed = copy.copy(worker)
    changed.lifespan = lambda: contextlib.nullcontext(state)
    changed._lifespan_takes_client = False
    return changed


class _Drain:
    """One call of `drain`, while its worker runs."""

    def __init__(
        self, client: Client, worker: Worker, session: Session, attempts: list[SettledAttempt], changed: asyncio.Event
    ) -> None:
        """`changed` is set when there is another one of `attempts`."""
        self._changed = changed
        self._client = client
        self._session = session
        self._attempts = attempts
        handled = {each.key[0] for each in worker.handlers}
        self._families = [client.topology.family(name) for name in sorted(worker.families or handled)]
        self._tenants = worker.tenants

    async def run(self, within_s: float, *, takes_delayed: bool) -> None:
        """Wait until there is nothing left, and have what is delayed become due. Raises AssertionError."""
        deadline, poll_s = time.monotonic() + within_s, POLL_S
        while True:
            before = len(self._attempts), self._session.done
            left: set[str] = set()
            if not self._session.running:
                left = await self._list_left(is_first=not self._attempts)
                if not left and takes_delayed and await advance_jobs(self._client, self._takes):
                    continue
                if not left and not self._session.running and before == (len(self._attempts), self._session.done):
                    return
            if time.monotonic() > deadline:
                shown = await describe_left(self._client, left) if left else "handlers that still run"
                tried = f"after {len(self._attempts)} attempts (`within` sets the time)"
                raise AssertionError(f"testing.drain: not done within {within_s:g} s, {tried}: {shown}")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await self._changed.wait()
            poll_s = POLL_S if self._changed.is_set() else min(2 * poll_s, POLL_MAX_S)
            await asyncio.sleep(SETTLED_S)  # the slot of the attempt comes free

    def _is_ours(self, lane: Lane) -> bool:
        """Whether this worker runs the jobs of a lane."""
        is_served = self._tenants is None or lane.tenant in self._tenants
        return is_served and any(each.name == lane.family for each in self._families)

    def _takes(self, job: ParkedJob) -> bool:
        """Whether a parked job only waits for its time, before this worker may run it."""
        return self._is_ours(job.subject.lane) and not waits_for_children(job) and not is_aside(job)

    async def _list_left(self, *, is_first: bool) -> set[str]:
        """Return the subjects of what is to be done now or soon. `is_first`: only of lanes, if these hold jobs.

        They are listed in the order in which jobs move: a job that waits for its time becomes due, and then goes into
        its lane.
        """
        if is_first and (left := await self._list_lanes()):
            return left
        parked, ticks = self._client.topology.parked_stream.name, self._client.topology.ticks_stream.name
        waiting, fired = await asyncio.gather(
            list_subjects(self._client, parked, f"{subjects.PARKED}.>"),
            list_subjects(self._client, ticks, f"{subjects.TICKS}.due.>"),
        )
        left = fired | {each for each in waiting if each.startswith(f"{subjects.PARKED}.due.")}
        if len(waiting) > len(left - fired):
            left |= await self._list_soon(waiting - left)
        if left:
            await self._session.timed.start_now()
        return left | await self._list_lanes()

    async def _list_soon(self, waiting: set[str]) -> set[str]:
        """Return which of the subjects of parked jobs are of jobs that become due within SOON_S, such as that of a
        parent that was woken, or have become due meanwhile.
        """
        clock = self._client.connection.clock
        await clock.ensure(self._client.parking.stream)
        soon = clock.now() + SOON_S
        later = {
            job.stored.subject
            async for job in read_parked(self._client)
            if job.due_at >= soon or is_aside(job) or not self._is_ours(job.subject.lane)
        }
        return waiting - later

    async def _list_lanes(self) -> set[str]:
        """Return the subjects of this worker's lanes that hold jobs."""
        lanes = [
            (each.stream, f"ai.{each.name}.{tenant}.>") for each in self._families for tenant in self._tenants or ("*",)
        ]
        return set().union(*await asyncio.gather(*(list_subjects(self._client, *each) for each in lanes)))
