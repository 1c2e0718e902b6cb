"""Jobs whose kind or schema version has no handler here, or is paused: parked aside, so that they fill no lane.

Such a job leaves its lane for a time that doubles with each hop, and comes back uncounted, for a worker that knows its
kind, or when the pause ends. See docs/decisions/unknown-kinds.md and docs/decisions/pausing.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, PubAck
from ..enqueue import ASIDE_KEY, ParkedJob, Parking, parse_parked_job
from ..errors import AccessDenied, AIQueueError, NotFound, QueueFull, TooLarge, Unavailable
from ..lanes import Delivery
from ..subjects import Lane
from ..topology import Family

log = logging.getLogger(__name__)

HOP_FIRST_S, HOP_MAX_S = 0.25, 30.0  # the first hop; the longest one
PAUSED_FIRST_S, PAUSED_MAX_S = 30.0, 300.0  # the same while the kind is paused; the end of the pause ends the hop
PATIENCE_S = 86_400.0  # after it, a job that no worker knows becomes a dead letter
COUNTS_VALID_S = 1.0
COUNTED_LANES_MAX = 1_000
WARN_EVERY_S = 60.0
FORWARDED_AT_ONCE = 256
SOON_S = 2.0  # hops that end within this time are not cut short
_PARKING_ID = re.compile(r"u\d+-\d+-h(\d+)")


Wanted = Callable[[str, str, str], bool]  # of family, kind and tenant


class Hops(NamedTuple):
    """How often a job was parked aside. `first_seen_at`: when a worker first did not know the kind, epoch seconds."""

    first_seen_at: float
    number: int

    @classmethod
    def of(cls, delivery: Delivery, now: float) -> Hops:
        """Read the hops from a job's headers. None so far, or a malformed header: it is first seen now."""
        first_ms, _, count = delivery.message.headers.get(headers.UNKNOWN, "").partition(" ")
        seen_at = headers.number(first_ms) / 1000
        return cls(min(seen_at, now), headers.number(count)) if seen_at else cls(now, 0)

    @property
    def delay_s(self) -> float:
        """How long the next hop takes."""
        return min(HOP_MAX_S, HOP_FIRST_S * 2.0 ** min(self.number, 16))

    def paused_delay_s(self, left_s: float) -> float:
        """How long the next hop takes because of a pause that ends by itself in `left_s` seconds."""
        return max(HOP_FIRST_S, min(left_s, PAUSED_MAX_S, PAUSED_FIRST_S * 2.0 ** min(self.number, 16)))

    def header(self) -> str:
        """Return the header's value for the next hop."""
        return f"{round(self.first_seen_at * 1000)} {self.number + 1}"

    def header_of_pause(self, due_at: float) -> str:
        """As `header`, for a job that no worker may start: the time of a pause does not count as unknown."""
        return f"{round(due_at * 1000)} {self.number + 1}"

    def header_after_run(self, due_at: float) -> str:
        """Return the header's value for a job that a worker knew, and that comes back at `due_at`, epoch seconds."""
        return f"{round(due_at * 1000)} {self.number}"


def hop_of(parking_id: str) -> int:
    """Return which hop a parking id is of, from 1; 0 if the job was not parked aside."""
    found = _PARKING_ID.fullmatch(parking_id)
    return headers.number(found[1]) if found else 0


class UnknownKinds:
    """Parks the jobs aside that one worker does not know."""

    def __init__(self, connection: Connection, parking: Parking) -> None:
        self._connection = connection
        self._parking = parking
        self._counted: dict[Lane, tuple[float, int]] = {}  # when the lane was counted, monotonic; jobs since then
        self._warned_at: dict[tuple[str, str], float] = {}

    def is_given_up(self, delivery: Delivery) -> bool:
        """Return whether no worker has known the job's kind for PATIENCE_S."""
        now = self._connection.clock.now()
        return now - Hops.of(delivery, now).first_seen_at >= PATIENCE_S

    async def park_aside(
        self, delivery: Delivery, family: Family, job_id: str, kind: str, number: int, *, pause_s: float | None = None
    ) -> bool:
        """Park a job until its next hop, for the same attempt `number`. False: it has to wait in its lane.

        `pause_s`: the job is paused, for so long at most; infinite if that is not known. It has to wait where the lane
        and the jobs parked aside from it have reached the lane's limit together, and where parking refuses it.
        Raises Unavailable.
        """
        lane = Lane(family.name, delivery.tenant, delivery.lane.key.priority)
        hops = Hops.of(delivery, self._connection.clock.now())
        delay_s = hops.delay_s if pause_s is None else hops.paused_delay_s(pause_s)
        due_at = self._connection.clock.now() + delay_s
        job_headers = dict(delivery.message.headers) | {
            headers.RUN: str(delivery.run),
            headers.ENQUEUED: f"{delivery.enqueued_at:.6f}",
            headers.ATTEMPT: str(number),
            headers.UNKNOWN: hops.header() if pause_s is None else hops.header_of_pause(due_at),
            headers.READ_KIND: headers.ascii_line(kind, 128),
        }
        parking_id = f"u{delivery.run}-{int(delivery.enqueued_at)}-h{hops.number + 1}"  # read by `hop_of`
        try:
            if not hops.number and await self._is_full(lane._replace(key=delivery.lane.key.key), family):
                return False
            await self._parking.park(
                lane, job_id, due_at, job_headers, delivery.message.data, dedup_key=ASIDE_KEY, parking_id=parking_id
            )
        except (TooLarge, QueueFull, NotFound, AccessDenied) as error:
            log.debug("job %s is not parked aside: %s", job_id, error)
            return False
        return True

    async def bring_forward(self, families: Iterable[str], wanted: Wanted) -> int:
        """End the hops of the jobs for which `wanted` is true of family, kind and tenant. Returns how many.

        A hop that ends within SOON_S is left as it is. When a schedule fires, the server purges the schedule's subject:
        the message that replaces the hop, or the job's next hop, would be lost. A hop whose job was cancelled or
        brought forward by another worker meanwhile is left as well: the message expects the sequence of the hop.
        Raises Unavailable, NotFound.
        """
        moved = 0
        for family in sorted(families):
            filter_subject = subjects.parked(Lane(family, "*", "*"), dedup_key=ASIDE_KEY, is_due=False)
            found: list[ParkedJob] = []
            async for stored in self._connection.read(self._parking.stream, filter_subject):
                job = parse_parked_job(stored)
                if job is None or not wanted(family, job.kind, job.subject.lane.tenant):
                    continue
                if job.due_at > self._connection.clock.now() + SOON_S:
                    found.append(job)
                if len(found) == FORWARDED_AT_ONCE:
                    moved += await self._end_hops(found)
                    found.clear()
            moved += await self._end_hops(found)
        if moved:
            log.info("%d jobs were parked aside because of their kind, and are due now", moved)
        return moved

    async def _end_hops(self, jobs: Collection[ParkedJob]) -> int:
        """Make parked jobs due now. Returns how many."""
        now = self._connection.clock.now()
        ended = await asyncio.gather(*(self._parking.move(each, now) for each in jobs), return_exceptions=True)
        for result in ended:
            if isinstance(result, Unavailable) or not isinstance(result, AIQueueError | PubAck):
                raise result  # any other error is that of one job, whose hop goes on
        return sum(isinstance(result, PubAck) for result in ended)

    def warn(self, family: str, kind: str, error: str) -> None:
        """Log that jobs of a kind are parked aside, once every WARN_EVERY_S for each kind."""
        now = time.monotonic()
        if now - self._warned_at.get((family, kind), -WARN_EVERY_S) >= WARN_EVERY_S:
            if len(self._warned_at) >= COUNTED_LANES_MAX:
                self._warned_at.clear()
            self._warned_at[family, kind] = now
            log.warning("jobs of kind %s in %s wait for a worker that knows the kind: %s", kind, family, error)

    async def _is_full(self, lane: Lane, family: Family) -> bool:
        """Return whether the lane and the jobs parked aside from it have reached the lane's limit together.

        The lane may be that of a limited key. What is parked aside has no key, and returns to the ordinary lane.
        """
        limit = family.max_msgs_per_subject
        if limit is None or limit <= 0:
            return False
        counted_at, jobs = self._counted.get(lane, (0.0, 0))
        if time.monotonic() - counted_at > COUNTS_VALID_S:
            jobs = await self._count(family.stream, subjects.lane(*lane))
            for is_due in (False, True):
                subject = subjects.parked(lane, dedup_key=ASIDE_KEY, is_due=is_due)
                jobs += await self._count(self._parking.stream, subject)
            counted_at = time.monotonic()
            if len(self._counted) >= COUNTED_LANES_MAX:
                self._counted.clear()
        self._counted[lane] = counted_at, jobs + 1
        return jobs >= limit

    async def _count(self, stream: str, subject: str) -> int:
        """Return how many messages a stream has on a subject, which may be a filter."""
        info = await self._connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
        return sum((info["state"].get("subjects") or {}).values())
