"""The version of a document: when the stream has first stored its job. No producer's clock decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ..job import Job

SEQUENCES: Final = 256  # of one microsecond


def version_of(job: Job[Any]) -> int:
    """Return the version that a job makes of its document.

    Microseconds since the epoch at which the job was first stored, times 256, plus its sequence modulo 256. A retry, a
    parked job and a replayed dead letter keep it: see `Job.first_stored`.
    """
    time_s, seq = job.first_stored
    return version_at(time_s, seq)


def version_at(time_s: float, seq: int) -> int:
    """Return the version of a job that was first stored at a time (seconds since the epoch) with a sequence."""
    return round(time_s * 1e6) * SEQUENCES + seq % SEQUENCES


def time_of(version: int) -> float:
    """Return when a version was first stored, in seconds since the epoch."""
    return version // SEQUENCES / 1e6
