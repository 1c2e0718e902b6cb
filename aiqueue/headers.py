"""Names of the headers of the wire contract (docs/wire-contract.md)."""

import math
import re
from collections.abc import Mapping
from typing import Final

NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 7230 tokens, as nats-py demands

MSG_ID: Final = "Nats-Msg-Id"
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
CONTENT_TYPE: Final = "Content-Type"
KIND: Final = "Aiq-Kind"
JOB_ID: Final = "Aiq-Job-Id"
DEADLINE: Final = "Aiq-Deadline"  # milliseconds since the epoch
PRIORITY: Final = "priority"  # the guide's own

EVENT: Final = "Aiq-Event"
ATTEMPT: Final = "Aiq-Attempt"
EPOCH: Final = "Aiq-Epoch"
RUN: Final = "Aiq-Run"
STARTED_AT: Final = "Aiq-Begun"  # when the handler was called, seconds since the epoch, by its worker's clock
LOST: Final = "Aiq-Lost"  # how many chunks before this entry were not kept

READ_KIND: Final = "Aiq-Read-Kind"  # what a dead letter's body was taken for
REASON: Final = "Aiq-Reason"
ERROR: Final = "Aiq-Error"
HISTORY: Final = "Aiq-History"
WORKER: Final = "Aiq-Worker"
SUBJECT: Final = "Aiq-Subject"
ENQUEUED: Final = "Aiq-Enqueued"
REPLAY: Final = "Aiq-Replay"
REST: Final = "Aiq-Rest"  # of a dead letter in two parts: the sequence of the second, "0" on the second itself

SCHEDULE: Final = "Nats-Schedule"
SCHEDULE_TARGET: Final = "Nats-Schedule-Target"
PARKED: Final = "Aiq-Parked"  # which parking a job comes from: no other one has this word
DUE: Final = "Aiq-Due"  # when it was to come back, milliseconds since the epoch
WAITED: Final = "Aiq-Waited"  # how often it was parked again because its lane was full
DOCUMENT: Final = "Aiq-Document"  # the SHA-256 of the document that is this job's body
DOCUMENT_SIZE: Final = "Aiq-Document-Size"
DOCUMENT_REF: Final = "Aiq-Document-Ref"  # the name under which a job holds its documents
DOCUMENTS: Final = (DOCUMENT, DOCUMENT_SIZE, DOCUMENT_REF)  # a job keeps these wherever it goes
TARGET: Final = "target_agent_id"  # the guide's own: whom a mail is for, and from whom
SOURCE: Final = "source_agent_id"
CONVERSATION: Final = "Aiq-Conversation"
CORRELATION: Final = "Aiq-Correlation"  # the id of the mail that this one answers
BROADCAST: Final = "Aiq-Broadcast"  # sent to a whole roster: who does not know its kind lets it be
COPY: Final = "Aiq-Copy"  # stored already: this is for those who listen to the bare subject
KV_OPERATION: Final = "KV-Operation"
ROLLUP: Final = "Nats-Rollup"
TTL: Final = "Nats-TTL"

OURS: Final = "Aiq-"
SERVERS: Final = "Nats-"


_CARRIED_MAX = 16_384
_WORD = re.compile(r"[A-Za-z0-9_-]{1,128}")


def run(told: Mapping[str, str], seq: int, stored_at: float) -> tuple[int, float]:
    """Which run of its id a stored job is, and when that was first stored (seconds since the epoch): its place in the
    work stream, or its first one, where it has been parked since.
    """
    if PARKED not in told:
        return seq, stored_at
    enqueued_at = decimal(told.get(ENQUEUED, ""))
    return number(told.get(RUN, "")) or seq, stored_at if enqueued_at is None else enqueued_at


def carried(told: Mapping[str, str], *, ours: bool = False) -> dict[str, str]:
    """The headers that go on with a job that moves: the publisher's own, and `ours` as well. What a plain publisher set
    and cannot be sent again is made printable and cut at 16,384 characters, or left out where its name cannot be sent.
    """
    left = (SERVERS,) if ours else (SERVERS, OURS)
    return {
        name: value if value.isascii() and value.isprintable() else ascii_line(value, _CARRIED_MAX)
        for name, value in told.items()
        if not name.startswith(left) and NAME.fullmatch(name)
    }


def word(told: Mapping[str, str]) -> str:
    """Of which parking a message says to come; empty for none, and for what is no such word."""
    found = told.get(PARKED)
    return found if found and _WORD.fullmatch(found) else ""


def ascii_line(text: str, limit: int = 500) -> str:
    """`text` as a header value can carry it: one line of printable ASCII, at most `limit` characters."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    if not line.isprintable():
        line = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def decimal(text: str) -> float | None:
    """The number in a header of ours, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def number(text: str) -> int:
    """The whole number in a header of ours, 0 for anything else: a plain publisher may have set it."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else 0
