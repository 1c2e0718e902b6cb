"""What all jobs of one kind in one lane have in common on the wire, and the headers of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .. import codec, headers, subjects
from ..connection import ServerClock
from ..errors import BadInput
from ..job import Message, secret_headers
from ..topology import Family
from .key_lanes import key_headers, key_of_message

RESERVED = ("nats-", "aiq-", "content-type")  # how names begin that callers may not give, in lower case


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


def checked_lane(family: Family, tenant: str, priority: str) -> subjects.Lane:
    """Return the lane of a tenant and priority. Raises BadInput (InvalidToken)."""
    subjects.token("tenant", tenant)
    if not family.priorities:
        raise BadInput(f"family {family.name} takes no jobs (it has no priorities)")
    if priority not in family.priorities:
        raise BadInput(f"family {family.name} has no priority {priority!r}: use one of {', '.join(family.priorities)}")
    return subjects.Lane(family.name, tenant, priority)


def headers_of_job(family: Family, message: Message, lane: subjects.Lane, job_id: str, key: str = "") -> dict[str, str]:
    """Return the headers that the library sets on a job."""
    job_headers = {
        headers.MSG_ID: subjects.msg_id(family.name, lane.tenant, job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: message.aiq_kind,
        headers.JOB_ID: job_id,
        headers.PRIORITY: lane.priority,
    }
    if family.key:
        job_headers[family.key] = job_id
    return {**job_headers, **key_headers(key), **secret_headers(message)}


def checked_headers(
    family: Family, extra: Mapping[str, str] | None, message: Message | None = None
) -> Mapping[str, str]:
    """Return the caller's headers. Raises BadInput for no mapping, for names that the library sets itself, and for one
    that contradicts the message.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise BadInput(f'headers must be a mapping of names to texts, such as {{"trace": "7"}}, not {extra!r}')
    for name, value in (extra or {}).items():
        if isinstance(value, str) and value != value.strip(" "):
            raise BadInput(f"header {name!r} must not begin or end with a space, which the wire drops: {value[:80]!r}")
        lower = str(name).lower()
        if lower.startswith(RESERVED):
            raise BadInput(f"header {name!r} is reserved for aiqueue")
        if lower in (headers.PRIORITY, family.key):
            argument = "priority" if lower == headers.PRIORITY else "unique"
            raise BadInput(f"header {name!r} is reserved for aiqueue: use the argument `{argument}`")
    if extra and message is not None:
        said = {name: key_of_message(message, name) for name in family.header_fields}
        if problem := headers.take_fields(extra, family.header_fields, said):
            raise BadInput(problem)
    return extra or {}


def headers_of_caller(family: Family, stored: Mapping[str, str]) -> dict[str, str]:
    """Return those of a stored job's headers that `checked_headers` lets a caller give."""
    return {name: value for name, value in stored.items() if not _is_reserved(family, name.lower())}


def _is_reserved(family: Family, lower: str) -> bool:
    return lower.startswith(RESERVED) or lower in (headers.PRIORITY, family.key)
