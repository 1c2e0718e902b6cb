"""Header names of the wire contract (docs/reference/wire-contract.md), and how header values are read and written."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 7230 tokens: nats-py requires them

MSG_ID: Final = "Nats-Msg-Id"
INCREMENT: Final = "Nats-Incr"  # of a counter (ADR-49)
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
CONTENT_TYPE: Final = "Content-Type"
KIND: Final = "Aiq-Kind"
JOB_ID: Final = "Aiq-Job-Id"
SECRET: Final = "Aiq-Secret"  # noqa: S105  (which fields of the body are secret: see secret_paths)
DEADLINE: Final = "Aiq-Deadline"  # milliseconds since the epoch
PRIORITY: Final = "priority"  # without a prefix: plain publishers of the ai.* subjects set it too

EVENT: Final = "Aiq-Event"
ATTEMPT: Final = "Aiq-Attempt"
EPOCH: Final = "Aiq-Epoch"
RUN: Final = "Aiq-Run"
STARTED_AT: Final = "Aiq-Begun"  # when the handler was called, seconds since the epoch by the worker's clock
LOST: Final = "Aiq-Lost"  # how many chunks before this entry were not stored

READ_KIND: Final = "Aiq-Read-Kind"  # the kind that the worker took a dead letter's body for
REASON: Final = "Aiq-Reason"
ERROR: Final = "Aiq-Error"
HISTORY: Final = "Aiq-History"
WORKER: Final = "Aiq-Worker"
SUBJECT: Final = "Aiq-Subject"
ENQUEUED: Final = "Aiq-Enqueued"
REPLAY: Final = "Aiq-Replay"
FIRST_STORED: Final = "Aiq-First-Stored"  # of a job that was stored anew: when it was stored first, see `first_stored`
RESUMES: Final = "Aiq-Resumes"  # the run whose checkpoints the job goes on from: see subjects.run_key
PARENT: Final = "Aiq-Parent"  # the run that has enqueued this job: see subjects.ParentRun
ROOT: Final = "Aiq-Root"  # family and id of the first of its ancestors
DEPTH: Final = "Aiq-Depth"  # how many ancestors it has
SCHEDULED_BY: Final = "Aiq-Schedule"  # the schedule that has enqueued this job
SCHEDULED_FOR: Final = "Aiq-Scheduled-For"  # its tick, seconds since the epoch
TICK: Final = (SCHEDULED_BY, SCHEDULED_FOR)  # a scheduled job keeps these in every stream, and its children have them
LINEAGE: Final = (PARENT, ROOT, DEPTH)  # a child keeps these in every stream
GATHER: Final = "Aiq-Gather"  # of a job that has waited for its children: the number of its last wait
COUNT: Final = "Aiq-Count"  # how many ends of children a run has been told
UNTIL: Final = "Aiq-Until"  # at which count the run is woken, and where it is parked: see journal/children.py
REST: Final = (
    "Aiq-Rest"  # in a dead letter of two messages: the sequence of the second message; "0" on the second itself
)

SCHEDULE: Final = "Nats-Schedule"
SCHEDULE_TARGET: Final = "Nats-Schedule-Target"
PARKED: Final = "Aiq-Parked"  # the parking id: which parking a job comes from
DUE: Final = "Aiq-Due"  # when the parked job is due, milliseconds since the epoch
UNKNOWN: Final = "Aiq-Unknown"  # when the kind was first unknown (milliseconds since the epoch), and the hops since
UNIQUE: Final = "Aiq-Unique"  # the caller's key that the id is a hash of, see `encode_unique`
FINGERPRINT: Final = "Aiq-Fingerprint"  # on entries of a journal: that of the body, see enqueue/fingerprints.py
LIMIT_KEY: Final = "Aiq-Limit-Key"  # of a job in the lane of a limited key: the value, see `encode_key`
ORIGINAL: Final = "Aiq-Original"  # of a parked copy: which job in its lane it is of, see enqueue/take_out.py
WAITED: Final = "Aiq-Waited"  # how often the job was parked again because its lane did not take it
DOCUMENT: Final = "Aiq-Document"  # the SHA-256 of the document that is this job's body
DOCUMENT_SIZE: Final = "Aiq-Document-Size"
DOCUMENT_REF: Final = "Aiq-Document-Ref"  # the name of the hold that a job has on its documents
DOCUMENTS: Final = (DOCUMENT, DOCUMENT_SIZE, DOCUMENT_REF)  # a job keeps these in every stream
TARGET: Final = "target_agent_id"  # without a prefix, like `priority`: the recipient of a mail
SOURCE: Final = "source_agent_id"  # and its sender
CONVERSATION: Final = "Aiq-Conversation"
CORRELATION: Final = "Aiq-Correlation"  # the id of the mail that this mail answers
BROADCAST: Final = "Aiq-Broadcast"  # sent to all agents of a roster: an agent without a handler for the kind ignores it
COPY: Final = "Aiq-Copy"  # a copy of a stored mail, for subscribers of the bare subject
KV_OPERATION: Final = "KV-Operation"
ROLLUP: Final = "Nats-Rollup"
TTL: Final = "Nats-TTL"

NUMBERS: Final = (
    DEADLINE,
    DOCUMENT_SIZE,
    REPLAY,
    RUN,
    ENQUEUED,
    ATTEMPT,
    DUE,
    WAITED,
    SCHEDULED_FOR,
)  # of a job or mail
_BY_LOWER: Final = {
    name.lower(): name
    for name in list(globals().values())
    if isinstance(name, str) and (name.startswith("Aiq-") or name in (CONTENT_TYPE, PRIORITY, TARGET, SOURCE))
}
OURS: Final = "Aiq-"
SERVERS: Final = "Nats-"

_CARRIED_MAX = 16_384
_UNIQUE_MAX = 1_024  # characters of an encoded key: the rest is cut, and only the hash in the id knows it
_TRACE = (
    rb"(?:traceparent: 00-[0-9a-f]{32}+-[0-9a-f]{16}+-[0-9a-f]{2}+\r\n"
    rb"(?:tracestate: [ -~]{1,512}+\r\n)?+)?+"
)  # aiqueue adds it behind all others; a plain job may have one
_BATCH = rb"(?:Nats-Batch-Id: [!-~]{1,64}+\r\nNats-Batch-Sequence: [0-9]{1,4}+\r\n(?:Nats-Batch-Commit: 1\r\n)?+)?+\r\n"
# the family's own key, such as task_id, has the job id too; a possessive or dot pattern saves a third of the time
_PLAIN: Final = re.compile(
    rb"NATS/1\.0\r\nNats-Msg-Id: .+\r\nContent-Type: application/cbor\r\nAiq-Kind: ([A-Za-z0-9_.:-]{1,128}+)\r\n"
    rb"Aiq-Job-Id: ([A-Za-z0-9_-]{1,64}+)\r\npriority: ([a-z0-9]{1,16}+)\r\n"
    rb"(?:(?!priority:)[a-z_]{1,32}+: \2\r\n)?+(?:Aiq-Limit-Key: [!-~]{1,16384}+\r\n)?+" + _TRACE + _BATCH
).fullmatch
# the same in JSON, or without a kind: as the guide's client writes them
_PLAIN_OTHER: Final = re.compile(
    rb"NATS/1\.0\r\nNats-Msg-Id: .+\r\nContent-Type: (application/(?:json|cbor))\r\n"
    rb"(?:Aiq-Kind: ([A-Za-z0-9_.:-]{1,128}+)\r\n)?+Aiq-Job-Id: ([A-Za-z0-9_-]{1,64}+)\r\n"
    rb"priority: ([a-z0-9]{1,16}+)\r\n(?:(?!priority:)[a-z_]{1,32}+: \3\r\n)?+"
    rb"(?:Aiq-Limit-Key: [!-~]{1,16384}+\r\n)?+" + _TRACE + _BATCH
).fullmatch
_FIRST_STORED = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
_RUN_KEY = re.compile(r"([0-9]{1,18})-([0-9]{1,12})")  # see subjects.run_key
_PARKING_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_MOVED = "lane-"  # how the parking id of a job begins that was moved to the lane of its limited key


def read_plain(block: bytes | None) -> tuple[str, str, str, str] | None:
    """Return kind, job id, priority and content type of an encoded header block that is a plain job's.

    A plain job has no deadline, document, secret or history, was not parked, and states whether its body is CBOR or
    JSON. It may have been stored in an atomic batch. The kind is "" if only the body may name it. None: it has other
    headers.
    """
    if not block:
        return None
    found = _PLAIN(block)
    if found is not None:
        kind, job_id, priority = found.groups()
        return kind.decode(), job_id.decode(), priority.decode(), "application/cbor"
    found = _PLAIN_OTHER(block)
    if found is None:
        return None
    content_type, kind, job_id, priority = found.groups()
    return kind.decode() if kind else "", job_id.decode(), priority.decode(), content_type.decode()


def restore_case(job_headers: dict[str, str]) -> None:
    """Rename headers that differ from ours only in case, as HTTP's tools write them. One that is there stays."""
    for name in list(job_headers):
        ours = _BY_LOWER.get(name.lower())
        if ours is not None and ours not in job_headers:
            job_headers[ours] = job_headers.pop(name)


def find(job_headers: Mapping[str, str], name: str) -> str | None:
    """Return the value of a header whose name may be written in another case, such as a family's key."""
    found = job_headers.get(name)
    if found is not None:
        return found
    lower = name.lower()
    return next((value for each, value in job_headers.items() if each.lower() == lower), None)


def take_fields(job_headers: Mapping[str, str], names: Collection[str], data: dict[str, Any]) -> str:
    """Add to the data of a message those of its fields `names` that only a header states.

    Returns what is wrong if a header and the body do not agree; "" if they do. An empty one says nothing. A field that
    is neither a text nor a whole number agrees with no header.
    """
    for name in names:
        stated = find(job_headers, name)
        if not stated:
            continue
        value = data.get(name)
        if value is None or value == "":
            data[name] = stated
        elif isinstance(value, bool) or not isinstance(value, str | int) or str(value) != stated:
            return (
                f"the header {name} is {stated[:80]!r}, and {name} in the body is {value!r:.80}: publish the message "
                "again with the same value in both, or in one of them"
            )
    return ""


def find_malformed(job_headers: Mapping[str, str]) -> str:
    """Return what is wrong with the first header that must be a number and is none; empty if all are numbers."""
    for name in NUMBERS:
        value = job_headers.get(name)
        if value is not None and decimal(value) is None:
            return f"header {name} must be a number, not {value[:40]!r}: correct it and publish the message again"
    return ""


def milliseconds(text: str) -> float | None:
    """Return the time in a header of milliseconds since the epoch, in seconds; None if it is no number."""
    value = decimal(text)
    return None if value is None else value / 1000


def run(job_headers: Mapping[str, str], seq: int, stored_at: float) -> tuple[int, float]:
    """Return which run of its id a stored job is, and when the run was enqueued (seconds since the epoch).

    1. The job was never parked: its sequence `seq` in the work stream names the run, and `stored_at` is the time.
    2. The job comes from parking: its headers name the run and its time, with `seq` and `stored_at` as fallbacks.
    """
    if PARKED not in job_headers:
        return seq, stored_at
    enqueued_at = decimal(job_headers.get(ENQUEUED, ""))
    return number(job_headers.get(RUN, "")) or seq, stored_at if enqueued_at is None else enqueued_at


def first_stored(job_headers: Mapping[str, str], seq: int, stored_at: float) -> tuple[float, int]:
    """Return when a job was stored first (seconds since the epoch, in whole microseconds), and its sequence then.

    1. A replay, or a move to another lane, names it in FIRST_STORED. A replay by a former version has only its run, to
       the second. 2. The job comes from parking: what names its run. 3. Otherwise: `seq`, at `stored_at`.

    Never later than `stored_at`: a plain publisher may have set any header.
    """
    if FIRST_STORED in job_headers:
        found = _FIRST_STORED.fullmatch(job_headers[FIRST_STORED])
        first_at, first_seq = (int(found[1]) / 1e6, int(found[2])) if found else (math.inf, 0)
    elif REPLAY in job_headers and (resumed := _RUN_KEY.fullmatch(job_headers.get(RESUMES, ""))):
        first_at, first_seq = float(resumed[2]), int(resumed[1])
    else:
        first_seq, first_at = run(job_headers, seq, stored_at)
    if first_at > stored_at:
        first_at, first_seq = stored_at, seq
    return float(f"{first_at:.6f}"), first_seq  # as ENQUEUED has it, so that a replay finds the same microsecond


def first_stored_text(first_at: float, seq: int) -> str:
    """Return the value of FIRST_STORED: microseconds since the epoch, and the sequence."""
    return f"{round(first_at * 1e6)}-{seq}"


def carried(job_headers: Mapping[str, str], *, ours: bool = False) -> dict[str, str]:
    """Return the headers that a job keeps when it moves to another subject: the publisher's, and with `ours` Aiq- ones.

    Plain publishers may set headers that cannot be sent again. Such a value is made printable and cut at 16,384
    characters; a header whose name cannot be sent is dropped.
    """
    dropped = (SERVERS,) if ours else (SERVERS, OURS)
    return {
        name: value if value.isascii() and value.isprintable() else ascii_line(value, _CARRIED_MAX)
        for name, value in job_headers.items()
        if not name.startswith(dropped) and NAME.fullmatch(name)
    }


def parking_id(job_headers: Mapping[str, str]) -> str:
    """Return the id of the parking that a job comes from; empty if it was not parked, or if the header is malformed."""
    found = job_headers.get(PARKED)
    return found if found and _PARKING_ID.fullmatch(found) else ""


def moving_id(seq: int) -> str:
    """Return the parking id of a job that a worker moves to the lane of its limited key from the message `seq`."""
    return f"{_MOVED}{seq}"


def was_moved(job_headers: Mapping[str, str]) -> bool:
    """Return whether a job comes from such a move, which its journal tells."""
    return parking_id(job_headers).startswith(_MOVED)


def encode_unique(key: str) -> str:
    """Return the value of UNIQUE for a caller's key: percent-encoded.

    Above _UNIQUE_MAX characters it is cut, and then the number of the key's characters follows after a space.
    """
    encoded = quote(key, safe="", errors="surrogatepass")
    if len(encoded) <= _UNIQUE_MAX:
        return encoded
    cut = encoded[:_UNIQUE_MAX]
    return f"{cut[: cut.rindex('%')] if '%' in cut[-2:] else cut} {len(key)}"


def encode_key(key: str) -> str:
    """Return the value of LIMIT_KEY for a value of a limited key: percent-encoded."""
    return quote(key, safe="", errors="surrogatepass")


def limit_key(job_headers: Mapping[str, str]) -> str:
    """Return the value of the limited key in LIMIT_KEY; "" without one."""
    return unquote(job_headers.get(LIMIT_KEY, ""), errors="surrogatepass")


def unique_key(job_headers: Mapping[str, str]) -> str:
    """Return the caller's key in UNIQUE, to be shown; "" if the id is the key itself. A cut one says how long it is."""
    encoded, _, length = job_headers.get(UNIQUE, "").partition(" ")
    shown = unquote(encoded, errors="replace")
    return f"{shown.rstrip(chr(0xFFFD))}… ({number(length):,} characters)" if length else shown


def stated_kind(job_headers: Mapping[str, str]) -> str:
    """Return the kind of a stored job as its headers say it, "" if only the body may name it."""
    return job_headers.get(READ_KIND) or job_headers.get(KIND, "")


def carried_unique(job_headers: Mapping[str, str]) -> dict[str, str]:
    """Return UNIQUE for what is stored about a job; empty for a job without it. A plain publisher may have set it."""
    return {UNIQUE: ascii_line(job_headers[UNIQUE], _UNIQUE_MAX + 32)} if UNIQUE in job_headers else {}


def carried_tick(job_headers: Mapping[str, str]) -> dict[str, str]:
    """Return TICK for what is stored about a job; empty for one without. A plain publisher may have set it."""
    return {name: ascii_line(job_headers[name], 256) for name in TICK if name in job_headers}


def ascii_line(text: str, limit: int = 500) -> str:
    """Return `text` as a valid header value: one line of printable ASCII, at most `limit` characters."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    if not line.isprintable():
        line = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def decimal(text: str) -> float | None:
    """Return the number in a header value; None for anything else, because a plain publisher may have set it."""
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def number(text: str) -> int:
    """Return the whole number in a header value, of "5.0" too; 0 for anything else, which a plain publisher may set."""
    if text.isascii() and text.isdigit():
        return int(text) if len(text) <= 18 else 0
    value = decimal(text)
    return int(value) if value is not None and 0 <= value < 1e18 else 0
