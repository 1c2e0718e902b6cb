"""What all jobs of one kind in one lane have in common on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .. import subjects
from ..connection import ServerClock
from ..job import Message
from ..topology import Family


class JobTemplate(NamedTuple):
    """What all jobs of one kind in one lane have in common on the wire. `key`: the value of the limited key whose lane
    it is.
    """

    family: Family
    lane: subjects.Lane
    subject: str
    header_template: bytes  # the header block with placeholders: %b for the job id, %d for the deadline
    id_count: int  # how often the job id occurs in it
    deadline_s: float | None
    limits: Mapping[str, int]  # of the stream, which all its lanes share: bytes, messages
    batch_stream: str  # the stream, if it takes atomic batches; else empty
    model: type[Message] | None  # the class of the messages, if it declares the type of their results
    key: str = ""

    @property
    def name(self) -> str:
        """The lane's name for people, such as "llm.calls acme/normal, model gpt-4o"."""
        if not self.lane.key:
            return str(self.lane)
        shown = "(others)" if self.lane.key == subjects.REST else self.key
        return f"{self.lane.without_key}, {self.family.limit_key} {shown}"

    def header_block(self, job_id: str, clock: ServerClock) -> bytes:
        """Return the encoded headers of one job. A deadline counts from now, by the server's clock."""
        ids = (job_id.encode(),) * self.id_count
        if self.deadline_s is None:
            return self.header_template % ids
        return self.header_template % (*ids, round((clock.now() + self.deadline_s) * 1000))
