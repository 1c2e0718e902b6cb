"""Moves a delivered job to another lane of its tenant: that of a lower priority, or that of a limited key."""

from __future__ import annotations

from .. import headers, subjects
from ..attempt import WrongLane
from ..connection import Connection
from ..enqueue import move_to_lane
from ..journal import RETRY, Writer
from ..lanes import Delivery
from .opening import OpenedJob


async def move_job(
    connection: Connection, delivery: Delivery, opened: OpenedJob, writer: Writer | None, wrong: WrongLane
) -> None:
    """Store a job where it belongs. The caller then acknowledges the delivery.

    In the lane of a key the job stays the same run, and its attempts go on. The journal tells those who await the
    result that the job is not gone: by a `retry` of the attempt before, as for a job that is parked.

    Raises Stale, QueueFull, Unavailable.
    """
    to = subjects.Lane(delivery.lane.key.family, delivery.tenant, wrong.priority, wrong.token)
    kept = dict(delivery.message.headers)
    if wrong.token:
        if headers.PARKED not in kept and writer is not None:
            writer.attempt = opened.attempt - 1
            data = {"error": "", "delay_s": 0.0, "history": [], "parked": True, "limit_key": wrong.key}
            await writer.write(RETRY, data)
        kept |= {
            headers.PARKED: headers.parking_id(kept) or headers.moving_id(delivery.seq),
            headers.RUN: str(delivery.run),
            headers.ENQUEUED: f"{delivery.enqueued_at:.6f}",
            headers.ATTEMPT: str(opened.attempt),
        }
    else:
        first_at, seq = headers.first_stored(kept, delivery.seq, delivery.stored_at)
        kept[headers.FIRST_STORED] = headers.first_stored_text(first_at, seq)
    await move_to_lane(connection, to, opened.job_id, delivery.seq, kept, delivery.message.data, key=wrong.key)
