"""Takes a queued job out of its lane so that it is not lost if this process dies on the way: by a parked copy.

1. A copy is parked for one lease. It is the same run, and names the original (Aiq-Original).
2. The original is deleted.
3. The caller does what the job is taken out for, and deletes the copy.

If the process dies after 1, the forwarder finds the original in its lane, and parks the copy again until it is gone:
then the journal says whether the run has ended. If it dies after 2, the copy comes back to its lane (`to`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..subjects import Lane
from ..topology import Family
from .parking import Parking


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


async def is_original_stored(connection: Connection, stream: str, copied: Mapping[str, str]) -> bool:
    """Return whether the job of which these are a copy's headers is still in its lane. Raises Unavailable."""
    original = copied.get(headers.ORIGINAL, "")
    seq = headers.number(original.partition("-")[2])
    stored = await connection.get(stream, seq) if seq else None
    # a stream that was created again has other jobs under the same sequences
    return stored is not None and headers.first_stored_text(stored.time, stored.seq) == original
