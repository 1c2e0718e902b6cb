"""What every worker does for work whose time comes: delayed jobs go to their lanes, and schedules fire."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from ..client import Client
from ..enqueue import Forwarder
from ..errors import AccessDenied, NotFound
from ..inspect import ask_holder, read_workers
from ..schedules import Declared, Declarer, Ticker
from ..subjects import Lane

LATE_S = 0.1
HOLDER_S = 1.0  # how long the workers may take to say that they hold a job; below the lease of a due job


class TimedWork:
    """The forwarder and the ticker of one worker, and its declared schedules, from `start` to `stop`."""

    def __init__(self, client: Client, declared: Declared) -> None:
        connection, topology, key_lanes = client.connection, client.topology, client.key_lanes
        self._forwarder = Forwarder(connection, topology, key_lanes, is_held=partial(is_held, client))
        self._ticker = Ticker(
            connection, topology, key_lanes, owner=declared.owner, makers=declared.makers,
            make_headers=client.make_headers,
        )  # fmt: skip
        self._declarer = Declarer(connection, topology, declared)
        self._wanted = asyncio.Event()
        self._late: asyncio.Task[None] | None = None

    async def start(self, *, late: bool = False) -> None:
        """`late`: begin to forward and to fire LATE_S later, or at `start_now`. Raises Unavailable."""
        if late:
            self._late = asyncio.create_task(self._start_late())
        else:
            await self._start_consumers()
        await self._declarer.start()

    async def start_now(self) -> None:
        """Something is due: forward and fire from now on. Safe twice, and after a start that was not late. Raises
        Unavailable.
        """
        self._wanted.set()
        if self._late is not None:
            await self._late

    async def _start_late(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_S):
                await self._wanted.wait()
        await self._start_consumers()

    async def _start_consumers(self) -> None:
        await self._forwarder.start()
        await self._ticker.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        if self._late is not None:
            self._late.cancel()
            await asyncio.gather(self._late, return_exceptions=True)
        await self._declarer.stop()
        await self._ticker.stop()
        await self._forwarder.stop()


async def is_held(client: Client, lane: Lane, job_id: str, seq: int) -> bool:
    """Return whether a worker holds the job of this sequence: it says so, or its record does, as of one whose event
    loop is blocked. False if this worker may not ask.
    """
    connection = client.connection
    connection.optional += 1
    try:
        holder = await ask_holder(connection, lane.family, lane.tenant, job_id, within_s=HOLDER_S)
        if holder is not None:
            return holder.seq == seq or holder.state == "result"  # of a result, only the job is said
        workers = await read_workers(connection, client.topology, family=lane.family, with_pauses=False)
    except (AccessDenied, NotFound):
        return False
    finally:
        connection.optional -= 1
    running = [(job.tenant, job.seq) for each in workers for job in each.jobs if job.family == lane.family]
    return (lane.tenant, seq) in running
