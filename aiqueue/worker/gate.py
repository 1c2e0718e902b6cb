"""Which deliveries may run. The others have an outcome without their handler being called."""

from __future__ import annotations

from .. import attempt, headers
from ..attempt import AlreadyEnded, Interrupted, KindPaused, Outcome
from ..connection import HEADERS_MAX, Connection
from ..lanes import ActivePauses, Delivery
from .opening import OpenedJob
from .takeover import find_pending_retry

MOVE_BYTES = 512  # header bytes that a move to another lane adds, at most


class Gate:
    """Lets the deliveries of one worker pass. `pauses`: which jobs are paused; None: no job is."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.pauses: ActivePauses | None = None

    def find_outcome(self, delivery: Delivery, opened: OpenedJob) -> Outcome | None:
        """Return the outcome of a delivery that must not run: ended, refused, early, late, misplaced or paused.

        None: it may run.
        """
        if opened.record.ended:
            return AlreadyEnded()
        if opened.refusal is not None:
            return opened.refusal
        now = self._connection.clock.now()
        if (pending := find_pending_retry(delivery, opened, now)) is not None:
            return pending
        if (wrong_lane := attempt.find_wrong_lane(opened.raw)) is not None and self.can_be_moved(delivery):
            return wrong_lane
        has_waited = headers.GATHER in opened.raw.headers  # for its children: it has started in time
        if not has_waited and attempt.is_past_deadline(opened.raw, now):
            return attempt.DEADLINE_PASSED
        return self.find_pause(delivery, opened)

    def find_pause(self, delivery: Delivery, opened: OpenedJob) -> Outcome | None:
        """Return the outcome of a job that is paused. None: it is not.

        1. All jobs of its lane are: it returns to its lane, on which nobody pulls.
        2. Its kind is, or its tenant in a lane that all tenants share: it is parked aside.
        """
        if self.pauses is None:
            return None
        lane = delivery.lane.key
        pause = self.pauses.of_job(lane.family, delivery.tenant, opened.kind)
        if pause is None:
            return None
        return Interrupted() if self.pauses.of_lane(lane) else KindPaused(str(pause), pause.until)

    def can_be_moved(self, delivery: Delivery, key: str = "") -> bool:
        """Return whether the message still fits with the headers that a move adds. If not, it runs in this lane."""
        message = delivery.message
        header_bytes = sum(len(name) + len(value) + 4 for name, value in message.headers.items()) + MOVE_BYTES
        header_bytes += len(headers.encode_key(key))
        return header_bytes <= HEADERS_MAX and header_bytes + len(message.data) <= self._connection.max_payload
