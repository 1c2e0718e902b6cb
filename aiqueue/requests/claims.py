"""Who holds a job id, in families that claim it: of the messages that carry one id, one is run.

The claim is the journal's: `started`, written with the expected sequence before the handler runs. What else is there
under the id is looked at here. All cases are in docs/decisions/claims.md.
"""

from __future__ import annotations

import time

from .. import headers, subjects
from ..connection import Stored
from ..enqueue import Parking
from ..errors import Unavailable
from ..journal import RESULT, RETRY, STARTED, Entry, Journal, entry_of
from ..topology import Family

LOOKS_MAX = 8  # at a journal that others write to meanwhile
RETURNS_S = 600.0  # after its time a parked job has begun in its lane, or is taken for lost
AGAIN_S = 5.0


class Claims:
    """Looks at the other runs of a job id."""

    def __init__(self, journal: Journal, parking: Parking) -> None:
        self.journal = journal
        self._parking = parking

    async def taken(self, family: Family, subject: str, run: int, enqueued_at: float) -> bool | None:
        """Whether another run than `run`, stored at `enqueued_at` (seconds since the epoch), has answered this id, or is
        to: it has a result, or has failed since `enqueued_at`, or has begun and its message is still there, queued or
        parked.
        One whose message is gone without a last word (purged, say) does not count. None: that cannot be told now, for
        one that was parked is on its way back; ask again in AGAIN_S. Raises Unavailable.
        """
        for _ in range(LOOKS_MAX):
            head_seq = 0
            begun: dict[int, _Begun] = {}
            async for stored in self.journal.connection.read(self.journal.stream, subject):
                entry = entry_of(stored)
                head_seq = entry.seq
                if entry.run == run and entry.time >= enqueued_at:
                    continue
                if entry.event == RESULT or (entry.final and entry.time >= enqueued_at):
                    return True
                if entry.final:
                    begun.pop(entry.run, None)
                else:
                    begun.setdefault(entry.run, _Begun(entry.run)).heed(entry)
            found = [await self._there(family, subject, each) for each in begun.values()]
            if True in found:
                return True
            head = await self.journal.head(subject)
            if head is None or head.seq <= head_seq:  # nothing was said while the queue was looked at
                return None if any(each.returns(time.time()) for each in begun.values()) else False
        raise Unavailable(f"{subject}: {LOOKS_MAX} looks were overtaken")

    async def _there(self, family: Family, subject: str, begun: _Begun) -> bool:
        """Whether the message of a run that has begun is still in its lane, or parked."""
        _, _, _, tenant, job_id = subject.split(".")
        stored = await self.journal.connection.get(family.stream, begun.place)
        if stored is not None and _run(stored) == begun.run and stored.subject.split(".")[3] == tenant:
            return True
        lane = subjects.Lane(family.name, tenant, "*")
        return any(each.run == begun.run for each in await self._parking.of(lane, job_id))


class _Begun:
    """A run that has begun and not ended: where its message was when it last began, and whether it was parked since."""

    def __init__(self, run: int) -> None:
        self.run = run
        self.place = run
        self._due = 0.0

    def heed(self, entry: Entry) -> None:
        told = entry.data if isinstance(entry.data, dict) else {}
        if entry.event == STARTED:
            seq = told.get("seq")
            self.place, self._due = seq if isinstance(seq, int) else entry.run, 0.0
        elif entry.event == RETRY and told.get("parked"):
            delay_s = told.get("delay_s")
            self._due = entry.time + delay_s if isinstance(delay_s, int | float) else entry.time

    def returns(self, now: float) -> bool:
        """Whether it may be in its lane again, in a place that nobody has told yet."""
        return now < self._due + RETURNS_S


def _run(stored: Stored) -> int:
    return headers.run(stored.headers, stored.seq, stored.time)[0]
