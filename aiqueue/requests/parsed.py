"""A request for a job's result, as a responder has read it."""

from __future__ import annotations

from typing import NamedTuple

from ..enqueue import id_reused, is_other_body
from ..journal import CANCELLED, FAILED, Entry


class ParsedRequest(NamedTuple):
    """A parsed request. `can_enqueue`: it contains more than an id, so it can be enqueued as a job."""

    tenant: str
    job_id: str
    can_enqueue: bool
    deadline: float | None  # seconds since the epoch
    fingerprint: str = ""  # of a whole message, in a family that has them

    def check_body(self, entry: Entry | None) -> None:
        """Raise IdReused if the entry is of a job with another body that has not failed."""
        if entry is None or entry.event in (FAILED, CANCELLED):
            return
        if is_other_body(entry.fingerprint, self.fingerprint):
            raise id_reused(self.job_id)
