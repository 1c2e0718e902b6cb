"""Claims: in a family that claims its job ids, of several messages with one id only one is run.

The claim itself is in the journal: `started`, written with an expected last sequence before the handler is called.
This module finds out whether another message of the id has that claim. All cases are in docs/decisions/claims.md.
"""

from __future__ import annotations

import contextlib

from .. import headers, subjects
from ..connection import Stored
from ..enqueue import Parking, is_other_body
from ..errors import Unavailable
from ..journal import RESULT, RETRY, STARTED, Entry, Journal, entry_from_stored
from ..topology import Family

READS_MAX = 8  # of a journal that others write to meanwhile
RETURN_MAX_S = 600.0  # after it is due, a parked job must have started in its lane; otherwise it counts as lost
CHECK_AGAIN_S = 5.0
KEY_LANE_JOBS_MAX = 5_000  # jobs of limited keys, stored around the time of another one, that are read to find that one
KEY_LANE_SPAN_S = 60.0


class Claims:
    """Looks for other runs of a job id."""

    def __init__(self, journal: Journal, parking: Parking) -> None:
        self.journal = journal
        self._parking = parking

    async def is_taken_by_other_run(self, family: Family, subject: str, run: int, enqueued_at: float) -> bool | None:
        """Whether another run of a job id than `run` has produced its outcome, or is going to.

        `subject` is the id's journal; `run` was enqueued at `enqueued_at` (seconds since the epoch).

        1. Another run has a result, or has another final entry since `enqueued_at`: True.
        2. Another run has started, and its message still exists, in its lane or parked: True.
        3. Another run was parked, and its message is not found: it may be on its way back. None; check again in
           CHECK_AGAIN_S.
        4. Otherwise, also if a run's message is gone without a final entry (such as purged): False.

        Raises Unavailable.
        """
        for _ in range(READS_MAX):
            head_seq = 0
            unfinished: dict[int, _UnfinishedRun] = {}
            async for stored in self.journal.connection.read(self.journal.stream, subject):
                entry = entry_from_stored(stored)
                head_seq = entry.seq
                if entry.run == run and entry.time >= enqueued_at:
                    continue
                if entry.event == RESULT or (entry.final and entry.time >= enqueued_at):
                    return True
                if entry.final:
                    unfinished.pop(entry.run, None)
                else:
                    unfinished.setdefault(entry.run, _UnfinishedRun(entry.run)).apply(entry)
            found = [await self._has_message(family, subject, other) for other in unfinished.values()]
            if True in found:
                return True
            head = await self.journal.head(subject)
            if head is None or head.seq <= head_seq:  # else something was written while the messages were looked for
                now = self.journal.connection.clock.now()
                return None if any(other.may_return(now) for other in unfinished.values()) else False
        raise Unavailable(f"{subject}: the journal has changed during each of {READS_MAX} reads")

    async def has_other_body(self, family: Family, subject: str, run: int, fingerprint: str) -> bool:
        """Whether the newest run of a job id besides `run` has another body than that of this fingerprint.

        False also if that is not known. Raises Unavailable.
        """
        if family.fingerprint is None or not fingerprint:
            return False
        known = ""
        async for stored in self.journal.connection.read(self.journal.stream, subject):
            if headers.number(stored.headers.get(headers.RUN, "")) != run:
                known = stored.headers.get(headers.FINGERPRINT, known)
        return is_other_body(known, fingerprint)

    async def is_alive(self, family: Family, subject: str, head: Entry) -> bool:
        """Whether the run that wrote `head`, the newest entry on `subject` and not a final one, may still end.

        Its message is stored or parked, or was parked and may be on its way back; or it has ended meanwhile. False: it
        was purged, or its handler keeps no result and it has ended. Raises Unavailable.
        """
        record = await self.journal.read_run(subject, head.run, 0.0, head.parking_id)
        other = _UnfinishedRun(head.run)
        if record.recap is not None:
            other.apply(record.recap)
        if record.ended or await self._has_message(family, subject, other):
            return True
        return other.may_return(self.journal.connection.clock.now())

    async def _has_message(self, family: Family, subject: str, other: _UnfinishedRun) -> bool:
        """Whether the message of a run is still in its lane, or parked."""
        tenant, job_id = subjects.parse_journal(subject)
        stored = await self.journal.connection.get(family.stream, other.seq)
        if stored is not None and _run_of(stored) == other.run and subjects.tenant_of(stored.subject) == tenant:
            return True
        lane = subjects.Lane(family.name, tenant, "*")
        if any(parked.run == other.run for parked in await self._parking.find_all(lane, job_id)):
            return True
        return family.limit_key is not None and await self._waits_for_limit(family, tenant, job_id, other)

    async def _waits_for_limit(self, family: Family, tenant: str, job_id: str, other: _UnfinishedRun) -> bool:
        """Whether the message of a run is in the lane of a limited key, which may be long after it was due there."""
        if not other.due_at:
            return False
        subject, count = subjects.lane(family.name, tenant, "*", "*"), 0
        read = self.journal.connection.read(family.stream, subject, since=max(0.0, other.due_at - 1.0))
        async with contextlib.aclosing(read) as found:
            async for stored in found:
                if stored.headers.get(headers.JOB_ID) == job_id and _run_of(stored) == other.run:
                    return True
                count += 1
                if count >= KEY_LANE_JOBS_MAX or stored.time > other.due_at + KEY_LANE_SPAN_S:
                    break
        return False


class _UnfinishedRun:
    """A run that has started, or was moved to the lane of its limited key, and has no final entry. `seq`: where its
    message was when it last started. `due_at`: when it was due, if it was parked or moved since then, in seconds since
    the epoch; 0: it was not.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self.seq = run
        self.due_at = 0.0

    def apply(self, entry: Entry) -> None:
        """Take over what an entry of this run states about where its message is."""
        data = entry.data if isinstance(entry.data, dict) else {}
        if entry.event == STARTED:
            seq = data.get("seq")
            self.seq, self.due_at = seq if isinstance(seq, int) else entry.run, 0.0
        elif entry.event == RETRY and data.get("parked"):
            delay_s = data.get("delay_s")
            self.due_at = entry.time + delay_s if isinstance(delay_s, int | float) else entry.time

    def may_return(self, now: float) -> bool:
        """Whether its message may be back in the lane, at a sequence that no entry states yet."""
        return now < self.due_at + RETURN_MAX_S


def _run_of(stored: Stored) -> int:
    return headers.run(stored.headers, stored.seq, stored.time)[0]
