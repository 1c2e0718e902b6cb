"""Who holds a job id, in families that claim it: of the messages that carry one id, one is run.

The claim is the journal's: `started`, written with the expected sequence before the handler runs. What else is there
under the id is looked at here. All cases are in docs/decisions/claims.md.
"""

from __future__ import annotations

from . import headers, subjects
from .connection import Stored
from .errors import Unavailable
from .journal import RESULT, STARTED, Entry, Journal, entry_of
from .parking import Parking
from .topology import Family

LOOKS_MAX = 8  # at a journal that others write to meanwhile


class Claims:
    """Looks at the other runs of a job id."""

    def __init__(self, journal: Journal, parking: Parking) -> None:
        self.journal = journal
        self._parking = parking

    async def taken(self, family: Family, subject: str, run: int, born: float) -> bool:
        """Whether another run than `run`, stored at `born` (seconds since the epoch), has answered this id, or is to:
        it has a result, or has failed since `born`, or has begun and its message is still there, queued or parked.
        One whose message is gone without a last word (purged, say) does not count. Raises Unavailable.
        """
        for _ in range(LOOKS_MAX):
            head_seq = 0
            begun: dict[int, Entry] = {}
            async for stored in self.journal.connection.read(self.journal.stream, subject):
                entry = entry_of(stored)
                head_seq = entry.seq
                if entry.run == run and entry.time >= born:
                    continue
                if entry.event == RESULT or (entry.final and entry.time >= born):
                    return True
                if entry.final:
                    begun.pop(entry.run, None)
                elif entry.run not in begun or entry.event == STARTED:
                    begun[entry.run] = entry
            for entry in begun.values():
                if await self._there(family, subject, entry):
                    return True
            head = await self.journal.head(subject)
            if head is None or head.seq <= head_seq:
                return False  # nothing was said while the queue was looked at: they are gone
        raise Unavailable(f"{subject}: {LOOKS_MAX} looks were overtaken")

    async def _there(self, family: Family, subject: str, begun: Entry) -> bool:
        """Whether the message of a run that has begun is still in its lane, or parked."""
        _, _, _, tenant, job_id = subject.split(".")
        told = begun.data.get("seq") if isinstance(begun.data, dict) else None
        stored = await self.journal.connection.get(family.stream, told if isinstance(told, int) else begun.run)
        if stored is not None and _run(stored) == begun.run and stored.subject.split(".")[3] == tenant:
            return True
        lane = subjects.Lane(family.name, tenant, "*")
        return any(each.run == begun.run for each in await self._parking.of(lane, job_id))


def _run(stored: Stored) -> int:
    return headers.run(stored.headers, stored.seq, stored.time)[0]
