"""Takes a queued job out of its lane so that it is not lost if this process dies on the way: by a parked copy.

1. A copy is parked for one lease. It is the same run, and names the original (Aiq-Original).
2. The original is deleted.
3. The caller does what the job is taken out for, and deletes the copy.

If the process dies after 1, the forwarder finds the original in its lane, and parks the copy again until it is gone:
then the journal says whether the run has ended. If it dies after 2, the copy comes back to its lane (`to`), and the
forwarder notes that in the journal.

Another process may take the same job out meanwhile, or after the first one has died: then there are several copies. The
one whose deletion of the original succeeds deletes the others. They have one Msg-Id in the lane, where the server takes
one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored, read_last
from ..journal import RETRY, Journal
from ..subjects import Lane
from ..topology import Family
from .parking import Parking

NOTE_TRIES_MAX = 4
COPIES_AT_ONCE = 64  # jobs whose copies are looked for with one request: there is room for three others of each


class ParkedCopy(NamedTuple):
    """The copy of a job that is taken out. `seq`: in the stream of parked jobs."""

    job_id: str
    seq: int
    parking_id: str
    headers: dict[str, str]


async def park_copy(
    connection: Connection, parking: Parking, family: Family, to: Lane, job_id: str, stored: Stored
) -> ParkedCopy:
    """Park a copy of a job in its lane for one lease; then it is stored in the lane `to`.

    It has a parking id of its own: under that of the job, which may have come from parking, the server would take it
    for what it has stored before. Raises TooLarge, QueueFull, Unavailable.
    """
    run, enqueued_at = headers.run(stored.headers, stored.seq, stored.time)
    copied = dict(stored.headers) | {
        headers.RUN: str(run),
        headers.ENQUEUED: f"{enqueued_at:.6f}",
        headers.ORIGINAL: headers.first_stored_text(stored.time, stored.seq),
    }
    lane = subjects.parse_lane(stored.subject)
    if lane is not None and lane.priority != to.priority:
        copied[headers.PRIORITY] = to.priority
    parking_id = subjects.new_id()
    due_at = connection.clock.now() + family.ack_wait_s
    ack = await parking.park(to, job_id, due_at, copied, stored.data, dedup_key=parking_id)
    return ParkedCopy(job_id, ack.seq, parking_id, copied | {headers.PARKED: parking_id})


def copy_msg_id(lane: Lane, job_id: str, copied: Mapping[str, str]) -> str:
    """Return the Msg-Id under which a copy with these headers is stored in its lane: one for all copies of a job."""
    return subjects.msg_id(lane.family, lane.tenant, job_id, f"out-{copied[headers.ORIGINAL]}")


async def delete_other_copies(
    connection: Connection, parking: Parking, family: Family, kept: Sequence[ParkedCopy]
) -> None:
    """Delete the other copies of jobs that were taken out: those of processes that have died on the way.

    Raises Unavailable.
    """
    lane, ours = Lane(family.name, "*", "*"), {each.seq for each in kept}
    for at in range(0, len(kept), COPIES_AT_ONCE):
        some = kept[at : at + COPIES_AT_ONCE]
        originals = {(each.job_id, each.headers[headers.ORIGINAL]) for each in some}
        wanted = [subjects.parked(lane, each.job_id, is_due=False).replace(".at.", ".*.", 1) for each in some]
        for stored in await read_last(connection, parking.stream, wanted):
            subject, original = subjects.parse_parked(stored.subject), stored.headers.get(headers.ORIGINAL, "")
            if subject is not None and stored.seq not in ours and (subject.job_id, original) in originals:
                await connection.delete(parking.stream, stored.seq)


async def note_on_its_way(
    journal: Journal, family: Family, to: Lane, job_id: str, run: int, enqueued_at: float, parking_id: str
) -> None:
    """Write to a journal without an entry of this run that the job is on its way to the lane `to`, as for one that is
    parked: who awaits its result does not take it for gone. Raises Unavailable.
    """
    if family.journal is None:
        return
    subject = subjects.journal(family.journal, to.tenant, job_id)
    data = {"error": "", "delay_s": 0.0, "history": [], "parked": True, "priority": to.priority}
    for _ in range(NOTE_TRIES_MAX):
        record = await journal.read_run(subject, run, enqueued_at, parking_id)
        if record.newest is not None or await journal.append_if_unchanged(
            subject, RETRY, data, run=run, attempt=0, parking_id=parking_id, record=record
        ):
            return


def original_seq(copied: Mapping[str, str]) -> int:
    """Return where the job was stored of which these are a copy's headers; 0: they are none's."""
    return headers.number(copied.get(headers.ORIGINAL, "").partition("-")[2])


async def find_original(connection: Connection, stream: str, copied: Mapping[str, str]) -> Stored | None:
    """Return the job of which these are a copy's headers, if it is still in its lane. Raises Unavailable."""
    original, seq = copied.get(headers.ORIGINAL, ""), original_seq(copied)
    stored = await connection.get(stream, seq) if seq else None
    # a stream that was created again has other jobs under the same sequences
    if stored is None or headers.first_stored_text(stored.time, stored.seq) != original:
        return None
    return stored
