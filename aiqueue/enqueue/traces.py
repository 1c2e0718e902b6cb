"""The traces of jobs that are enqueued: the span of one that is sent, and what many that are sent at once have."""

from __future__ import annotations

from ..logs import running_job
from ..tracing import NOT_SENT, Sending, Tracing, names
from .templates import JobTemplate


def start_send(tracing: Tracing | None, template: JobTemplate, job_id: str, block: bytes = b"") -> Sending:
    """Start the span of a job that is sent; see `Tracing.start_send`. `block`: its encoded headers."""
    if tracing is None:
        return NOT_SENT
    lane = template.lane
    destination = names.destination(lane.family)
    return tracing.start_send(destination, lane.tenant, job_id, of=running_job.get(), block=block) or NOT_SENT


class ManySent:
    """The trace of one call of `enqueue_many`.

    If it continues a trace, all its jobs continue its one span: a call may be of a million jobs. Otherwise each job
    that is chosen by its id begins a trace of its own, with a span of no length.
    """

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._is_named = False  # by the first job: nearly always all are of its family
        self._whole = tracing.start_many(running_job.get())

    @classmethod
    def start(cls, tracing: Tracing | None) -> ManySent | None:
        """Start the span of a call. None: nothing is traced."""
        return None if tracing is None else cls(tracing)

    def add_to(self, block: bytes, template: JobTemplate, job_id: str) -> bytes:
        """Return a job's encoded header block, with the headers of its trace."""
        if self._whole is None and not self._tracing.begins_trace(job_id):
            return block
        lane = template.lane
        if self._whole is None:
            sending = self._tracing.start_send(
                names.destination(lane.family), lane.tenant, job_id, operation=names.CREATE, block=block
            )
            if sending is None:
                return block
            sending.end()
            return sending.add_to(block)
        if not self._is_named:
            self._is_named = True
            self._whole.name(names.destination(lane.family), lane.tenant)
        return self._whole.add_unless_given(block)

    @staticmethod
    def end(sent: ManySent | None, jobs: int) -> None:
        """The call has ended, after so many of its jobs were stored or refused."""
        if sent is not None and sent._whole is not None:
            sent._whole.set(names.BATCH_COUNT, jobs)
            sent._whole.end()
