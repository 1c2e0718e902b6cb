"""Bytes on the wire, written and read: headers, publish frames, status replies, ack subjects, PubAcks, API replies."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from ..errors import BadInput, TooLarge, Unavailable
from ..headers import NAME, TTL
from .faults import from_api

Headers = Mapping[str, str]

HEADERS_MAX = 65_535  # bytes of headers that JetStream stores with a message
BATCH_HEADERS_MAX = 160  # bytes that `batch_frames` adds to the headers of a message
_valid_names: set[str] = set()  # a cache: a process uses a handful of header names, a hundred thousand times each
_valid_subjects: set[str] = set()  # likewise
_CACHED_MAX = 1_000
SUBJECT_BYTES_MAX = 1_000  # the server closes a connection that sends a line above 4 KiB
# what the server takes; plain publishers do use odd characters, and UTF-8 has no lone surrogates
_SUBJECT = re.compile(r"[^ \t\r\n.\ud800-\udfff]++(?:\.[^ \t\r\n.\ud800-\udfff]++)*+")

_LIFETIME = re.compile("([0-9]{1,12})s")  # of Nats-TTL, as aiqueue writes it


class Status(NamedTuple):
    """The inline status of a server reply.

    100 idle heartbeat, 404 no messages, 408 request expired, 409 pull ended early, 503 no responders.
    """

    code: int
    description: str


class Received(Protocol):
    """A received message. `status` is set on the server's status replies, which have no body.

    `block` has the encoded headers, if there are any.
    """

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def block(self) -> bytes | None: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def status(self) -> Status | None: ...


class OutgoingMessage(Protocol):
    """A message to be sent. `block` is encoded by the function of that name."""

    @property
    def subject(self) -> str: ...
    @property
    def block(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...


class TokenMessage(OutgoingMessage, Protocol):
    """A message whose reply carries `token`."""

    @property
    def token(self) -> bytes: ...


class Stored(NamedTuple):
    """A message read from a stream. `time` is when the server stored the message, in seconds since the epoch."""

    subject: str
    seq: int
    data: bytes
    headers: Headers
    time: float

    @property
    def expires_at(self) -> float | None:
        """When the message expires, in seconds since the epoch; None: it has no lifetime in whole seconds."""
        found = _LIFETIME.fullmatch(self.headers.get(TTL, ""))
        return None if found is None else self.time + int(found[1])


def ack_info(reply: str) -> tuple[str, str, int, int, float, int]:
    """The facts in a delivery's ack subject (``$JS.ACK``, v1 and v2, ADR-15).

    Returns (stream, consumer, delivery count of the message, its stream sequence, when it was stored in seconds since
    the epoch, messages pending on the consumer). Raises ValueError for any other subject.
    """
    parts = reply.split(".")
    if len(parts) < 9 or parts[0] != "$JS" or parts[1] != "ACK":
        raise ValueError(f"not an ack subject: {reply[:120]!r}")
    # v1: $JS.ACK.stream.consumer.delivered.seq.cseq.time.pending; v2 has domain and account before the stream
    at = 2 if len(parts) == 9 else 4
    return (
        parts[at], parts[at + 1], int(parts[at + 2]), int(parts[at + 3]), int(parts[at + 5]) / 1e9, int(parts[at + 6])
    )  # fmt: skip


def delivery_number(reply: str) -> int:
    """The consumer sequence in a delivery's ack subject: the consumer numbers its deliveries without gaps."""
    parts = reply.split(".")
    return int(parts[6 if len(parts) == 9 else 8])


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInput(f"invalid header name {name!r}: use only A-Z a-z 0-9 and !#$%&'*+-.^_`|~")
    if len(_valid_names) < _CACHED_MAX:
        _valid_names.add(name)


def block(headers: Headers) -> bytes:
    """Encode `headers` for the wire (ADR-4). Raises BadInput for a name or value that could not arrive as given."""
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise BadInput(f"invalid value of header {name!r}: use one line of printable ASCII")
        if name not in _valid_names:
            _check_name(name)
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "\r\n"]).encode()


def publish_frame(subject: str, reply: str, headers: bytes, body: bytes) -> bytes:
    """One HPUB or PUB. `subject` and `reply` consist of checked tokens; `headers` are encoded by `block`, or empty."""
    if headers:
        line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n"
        return b"%b%b%b\r\n" % (line.encode(), headers, body)
    return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(body), body)


def ack_frame(subject: str, reply: str = "") -> bytes:
    """One PUB of ``+ACK``. `reply`: where the server says that it has processed the ack; "": nowhere."""
    return (f"PUB {subject} {reply} 4\r\n+ACK\r\n" if reply else f"PUB {subject} 4\r\n+ACK\r\n").encode()


def stream_publish_frames(messages: Iterable[TokenMessage], inbox: bytes) -> bytes:
    """The HPUBs of these messages, each with `inbox` plus its token as the reply subject. Each must have headers."""
    parts = []
    for message in messages:
        headers, body = message.block, message.body
        size = len(headers)
        parts.append(
            b"HPUB %b %b%b %d %d\r\n%b%b\r\n"
            % (message.subject.encode(), inbox, message.token, size, size + len(body), headers, body)
        )
    return b"".join(parts)


def batch_frames(name: bytes, messages: Sequence[OutgoingMessage], first: int, reply: bytes, *, last: bool) -> bytes:
    """The HPUBs of one part of an atomic batch (ADR-50): messages for one stream, numbered from `first`.

    - `name` identifies the batch, in up to 64 bytes. With `last`, this part completes the batch.
    - The server replies on `reply`: to the first message of this part, with an empty body if it accepts the message,
      and to the last message of the batch.
    """
    parts = []
    end = first + len(messages) - 1 if last else 0
    reply_to = reply
    own = b"Nats-Batch-Id: %b\r\nNats-Batch-Sequence: " % name
    for number, message in enumerate(messages, first):
        tail = b"%d\r\n\r\n" % number
        if number == end:
            tail, reply_to = b"%d\r\nNats-Batch-Commit: 1\r\n\r\n" % number, reply
        headers, body = message.block, message.body
        size = len(headers) - 2 + len(own) + len(tail)
        parts.append(
            b"HPUB %b %b %d %d\r\n%b%b%b%b\r\n"
            % (message.subject.encode(), reply_to, size, size + len(body), headers[:-2], own, tail, body)
        )
        reply_to = b""
    return b"".join(parts)


def check_subject(what: str, value: str) -> None:
    """Raise BadInput for what is no subject or queue group. A space or a line's end in it would be read as protocol."""
    if type(value) is str and value in _valid_subjects:
        return
    fits = isinstance(value, str) and _SUBJECT.fullmatch(value) and len(value.encode()) <= SUBJECT_BYTES_MAX
    if not fits:
        raise BadInput(
            f"{what} must be tokens without spaces, joined by dots, of at most {SUBJECT_BYTES_MAX:,} bytes, not "
            f"{str(value)[:80]!r}"
        )
    if len(_valid_subjects) < _CACHED_MAX:
        _valid_subjects.add(value)


def check_message(subject: str, headers: bytes, body: bytes, max_payload: int, reply: str = "") -> None:
    """Raise BadInput for a subject or reply that is none, and what `check_size` raises."""
    check_subject("subject", subject)
    if reply:
        check_subject("reply", reply)
    check_size(headers, body, max_payload)


def check_size(headers: bytes, body: bytes, max_payload: int) -> None:
    """Raise TooLarge for headers that no stream stores, and for a message above `max_payload`, because the server
    closes the connection of a client that sends one.
    """
    if len(headers) > HEADERS_MAX:
        raise TooLarge(len(headers), HEADERS_MAX, headers=True)
    if len(headers) + len(body) > max_payload:
        raise TooLarge(len(headers) + len(body), max_payload)


def read_headers(raw: bytes) -> tuple[dict[str, str], Status | None]:
    """Decode a header block into its headers and its inline status. Bytes that are not UTF-8 become U+FFFD."""
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    if len(first) < 12:  # "NATS/1.0"
        return headers, None
    code, _, description = first[9:].partition(" ")  # after "NATS/1.0 "
    known = len(code) == 3 and code.isascii() and code.isdigit()  # a publisher may write anything there
    return headers, Status(int(code), description) if known else None


def parse_stored(reply: Mapping[str, Any]) -> Stored:
    """The message in a reply to STREAM.MSG.GET."""
    raw = base64.b64decode(reply.get("hdrs") or "")
    return Stored(
        subject=reply["subject"],
        seq=reply["seq"],
        data=base64.b64decode(reply.get("data") or ""),
        headers=read_headers(raw)[0],
        time=timestamp(reply["time"]),
    )


def parse_direct(message: Received) -> Stored:
    """The message in a reply to DIRECT.GET, which carries the message's subject, sequence and time in Nats- headers."""
    headers = dict(message.headers)
    subject, seq, time = headers.pop("Nats-Subject"), headers.pop("Nats-Sequence"), headers.pop("Nats-Time-Stamp")
    for name in ("Nats-Stream", "Nats-Num-Pending", "Nats-Last-Sequence", "Nats-UpTo-Sequence"):
        headers.pop(name, None)
    return Stored(subject, int(seq), message.data, headers, timestamp(time))


def timestamp(text: str) -> float:
    """Convert an RFC 3339 time, with up to nine decimals, to seconds since the epoch."""
    whole, _, zone = text.partition(".")
    if not zone:
        return datetime.fromisoformat(text).timestamp()
    if text.isascii() and zone[-1] == "Z" and zone[:-1].isdigit():  # as servers write it
        return _whole_seconds(whole) + float(f"0.{zone[:-1]}")
    digits = re.match(r"\d+", zone)
    fraction = digits[0] if digits else "0"
    return datetime.fromisoformat(whole + zone[len(fraction) :]).timestamp() + float(f"0.{fraction}")


@lru_cache(maxsize=64)
def _whole_seconds(utc: str) -> float:
    return datetime.fromisoformat(utc + "Z").timestamp()


class PubAck(NamedTuple):
    """The server's acknowledgement that `stream` holds the message at `seq`. `duplicate`: the stream already held a
    message with this Nats-Msg-Id, at `seq`.
    """

    stream: str
    seq: int
    duplicate: bool

    @classmethod
    def parse(cls, data: bytes, subject: str) -> PubAck | None:
        """Parse a reply to a publish. Returns None if it is not a stream's: any subscriber of the subject can reply.

        Raises the error that an error code stands for.
        """
        reply = parse_stream_reply(data, subject)
        if reply is None:
            return None
        at = data.rfind(b":") + 1
        ack = cls(reply["stream"], reply["seq"], bool(reply.get("duplicate")))
        if [*reply] == ["stream", "seq"] and len(_ack_prefixes) < _ACK_PREFIXES_MAX and data[at:-1].isdigit():
            _ack_prefixes[data[:at]] = ack.stream
        return ack


_ack_prefixes: dict[bytes, str] = {}  # a cache: `{"stream":"X", "seq":` -> X, from PubAcks that were parsed as JSON
_ACK_PREFIXES_MAX = 256
_new_tuple = tuple.__new__  # what a named tuple's constructor calls, without its check of the arguments


def parse_usual_ack(data: bytes) -> PubAck | None:
    """Parse a PubAck that differs from an earlier one only in its number. Returns None if it is any other reply."""
    at = data.rfind(b":") + 1
    stream = _ack_prefixes.get(data[:at])
    if stream is None or data[-1:] != b"}" or not (digits := data[at:-1]).isdigit():
        return None
    return _new_tuple(PubAck, (stream, int(digits), False))


def parse_stream_reply(data: bytes, subject: str) -> dict[str, Any] | None:
    """Parse a stream's reply to a publish: `stream`, `seq` and what else it has. Returns None if the reply is not a
    stream's. Raises the error that an error code stands for.
    """
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict):
        return None
    if problem := reply.get("error"):
        if not isinstance(problem, dict) or type(problem.get("err_code")) is not int:
            return None
        raise from_api(problem.get("code") or 0, problem["err_code"], str(problem.get("description") or ""), subject)
    ours = isinstance(reply.get("stream"), str) and type(reply.get("seq")) is int
    return reply if ours else None


def parse_api_reply(data: bytes, subject: str) -> dict[str, Any]:
    """Parse a reply of the JetStream API. Raises the error that an error code stands for, and Unavailable if the reply
    is not JetStream's.
    """
    try:
        reply: dict[str, Any] = json.loads(data)
        problem = reply.get("error")
        if not problem:
            return reply
        code, err_code, description = (problem.get(key) for key in ("code", "err_code", "description"))
    except (ValueError, AttributeError):
        raise Unavailable(f"{subject}: the reply is not JetStream's", maybe_stored=True) from None
    raise from_api(code or 0, err_code or 0, description or "", subject)
