"""What travels: headers, their size, status replies, stored messages, the facts in an ack subject."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from ..errors import BadInput, TooLarge, Unavailable
from ..headers import NAME
from .faults import from_api

Headers = Mapping[str, str]

HEADERS_MAX = 65_535  # bytes of headers that JetStream stores with a message
BATCH_HEADERS_MAX = 160  # bytes that `batch` adds to a message's
_names_seen: set[str] = set()  # a process uses a handful of header names, a hundred thousand times each
_NAMES_SEEN_MAX = 1_000


class Status(NamedTuple):
    """A control reply of the server: 100 heartbeat, 404 empty, 408 expired, 409 ended, 503 nobody there."""

    code: int
    description: str


class Received(Protocol):
    """A message as it came in."""

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def status(self) -> Status | None: ...


class Message(Protocol):
    """A message to be sent; `block` is what the function of that name has made."""

    @property
    def subject(self) -> str: ...
    @property
    def block(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...


class Stored(NamedTuple):
    """A message read from a stream. `time` is when the server stored it, seconds since the epoch."""

    subject: str
    seq: int
    data: bytes
    headers: Headers
    time: float


def ack_info(reply: str) -> tuple[str, str, int, int, float, int]:
    """What a delivery's ack subject tells (the v1 and v2 forms of ``$JS.ACK``, ADR-15): stream, consumer, the how
    manyth delivery, sequence, when it was stored (seconds since the epoch), and what the consumer holds beside it.
    Raises ValueError for any other subject.
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
    """The how manyth delivery of its consumer it is, by its ack subject: without gaps, as the consumer makes them."""
    parts = reply.split(".")
    return int(parts[6 if len(parts) == 9 else 8])


def _see_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInput(f"header name {name!r} must be of A-Z a-z 0-9 and !#$%&'*+-.^_`|~")
    if len(_names_seen) < _NAMES_SEEN_MAX:
        _names_seen.add(name)


def block(headers: Headers) -> bytes:
    """The headers as they go over the wire (ADR-4). Raises BadInput for what is not printable ASCII."""
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise BadInput(f"header {name!r}: its value must be printable ASCII on one line")
        if name not in _names_seen:
            _see_name(name)
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "\r\n"]).encode()


def frame(subject: str, reply: str, headers: bytes, body: bytes) -> bytes:
    """A whole HPUB or PUB. `subject` and `reply` are made of checked tokens, `headers` by `block` (or empty)."""
    if headers:
        line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n"
        return b"%b%b%b\r\n" % (line.encode(), headers, body)
    return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(body), body)


def put(subject: str, inbox: bytes, token: bytes, headers: bytes, body: bytes) -> bytes:
    """A whole HPUB that is answered on `inbox` and `token`; `headers` are not empty."""
    size = len(headers)
    return b"HPUB %b %b%b %d %d\r\n%b%b\r\n" % (
        subject.encode(), inbox, token, size, size + len(body), headers, body,
    )  # fmt: skip


def batch(name: bytes, messages: Sequence[Message], first: int, reply: bytes, *, last: bool) -> bytes:
    """HPUBs of an atomic batch (ADR-50), whose `name` has up to 64 bytes: messages for one stream, numbered from
    `first`. `last`: it ends with them. On `reply` comes an empty answer to the first of these, where it is not refused,
    and one to the last of all.
    """
    made = []
    end = first + len(messages) - 1 if last else 0
    answered = reply
    own = b"Nats-Batch-Id: %b\r\nNats-Batch-Sequence: " % name
    for number, message in enumerate(messages, first):
        tail = b"%d\r\n\r\n" % number
        if number == end:
            tail, answered = b"%d\r\nNats-Batch-Commit: 1\r\n\r\n" % number, reply
        headers, body = message.block, message.body
        size = len(headers) - 2 + len(own) + len(tail)
        made.append(
            b"HPUB %b %b %d %d\r\n%b%b%b%b\r\n"
            % (message.subject.encode(), answered, size, size + len(body), headers[:-2], own, tail, body)
        )
        answered = b""
    return b"".join(made)


def measure(headers: bytes, body: bytes, max_payload: int) -> None:
    """Refuse (TooLarge) a frame above `max_payload`, for which the server would end the connection, and headers that
    no stream takes.
    """
    if len(headers) > HEADERS_MAX:
        raise TooLarge(len(headers), HEADERS_MAX, headers=True)
    if len(headers) + len(body) > max_payload:
        raise TooLarge(len(headers) + len(body), max_payload)


def read_headers(raw: bytes) -> tuple[dict[str, str], Status | None]:
    """The headers and the inline status of a header block. What is not UTF-8 in a value becomes U+FFFD."""
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


def stored(answer: Mapping[str, Any]) -> Stored:
    """The message in an answer of STREAM.MSG.GET."""
    raw = base64.b64decode(answer.get("hdrs") or "")
    return Stored(
        subject=answer["subject"],
        seq=answer["seq"],
        data=base64.b64decode(answer.get("data") or ""),
        headers=read_headers(raw)[0],
        time=timestamp(answer["time"]),
    )


def stored_direct(message: Received) -> Stored:
    """The message in an answer of DIRECT.GET, its place told by Nats- headers."""
    headers = dict(message.headers)
    subject, seq, time = headers.pop("Nats-Subject"), headers.pop("Nats-Sequence"), headers.pop("Nats-Time-Stamp")
    for name in ("Nats-Stream", "Nats-Num-Pending", "Nats-Last-Sequence", "Nats-UpTo-Sequence"):
        headers.pop(name, None)
    return Stored(subject, int(seq), message.data, headers, timestamp(time))


def timestamp(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time with up to nine decimals."""
    whole, _, zone = text.partition(".")
    if not zone:
        return datetime.fromisoformat(text).timestamp()
    digits = re.match(r"\d+", zone)
    fraction = digits[0] if digits else "0"
    return datetime.fromisoformat(whole + zone[len(fraction) :]).timestamp() + float(f"0.{fraction}")


class PubAck(NamedTuple):
    """The server's word that a message is stored; `duplicate`: it was already, under `seq`."""

    stream: str
    seq: int
    duplicate: bool

    @classmethod
    def read(cls, data: bytes, subject: str) -> PubAck:
        """What a stream answered to a publish. Raises what an error's code stands for."""
        at = data.rfind(b":") + 1
        stream = _ack_starts.get(data[:at])
        if stream is not None and data[-1:] == b"}" and data[at:-1].isdigit():
            return cls(stream, int(data[at:-1]), False)  # the ordinary form, but for its number read before
        told = answer(data, subject)
        try:
            ack = cls(told["stream"], told["seq"], bool(told.get("duplicate")))
        except KeyError:
            raise Unavailable(f"{subject}: something else than a stream answered", maybe_stored=True) from None
        if [*told] == ["stream", "seq"] and len(_ack_starts) < _ACK_STARTS_MAX and data[at:-1].isdigit():
            _ack_starts[data[:at]] = ack.stream
        return ack


_ack_starts: dict[bytes, str] = {}  # {"stream":"X", "seq": -> X, of answers that were read as JSON
_ACK_STARTS_MAX = 256


def answer(data: bytes, subject: str) -> dict[str, Any]:
    """An answer of the JetStream API. Raises what an error's code stands for, Unavailable if it is none at all."""
    try:
        told: dict[str, Any] = json.loads(data)
        problem = told.get("error")
        if not problem:
            return told
        code, err_code, description = (problem.get(key) for key in ("code", "err_code", "description"))
    except (ValueError, AttributeError):
        raise Unavailable(f"{subject}: something else than JetStream answered", maybe_stored=True) from None
    raise from_api(code or 0, err_code or 0, description or "", subject)
