"""What travels: headers, their size, status replies, stored messages, the facts in an ack subject."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from ..errors import BadInput, TooLarge, Unavailable
from .faults import from_api

Headers = Mapping[str, str]

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 7230 tokens, as nats-py demands
_names_seen: set[str] = set()  # a process uses a handful of header names, a hundred thousand times each
_NAMES_SEEN_MAX = 1_000
_FIRST_LINE = len("NATS/1.0\r\n")


class Received(Protocol):
    """A message as it came in."""

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> dict[str, str] | None: ...


class Status(NamedTuple):
    """A control reply of the server: 100 heartbeat, 404 empty, 408 expired, 409 ended, 503 nobody there."""

    code: int
    description: str


class Stored(NamedTuple):
    """A message read from a stream. `time` is when the server stored it, seconds since the epoch."""

    subject: str
    seq: int
    data: bytes
    headers: Headers
    time: float


class PubAck(NamedTuple):
    """The server's word that a message is stored; `duplicate`: it was already, under `seq`."""

    stream: str
    seq: int
    duplicate: bool


class AckInfo(NamedTuple):
    """What the reply subject of a delivery tells (the v1 and v2 forms of ``$JS.ACK``, ADR-15)."""

    stream: str
    consumer: str
    delivered: int
    seq: int
    time: float
    pending: int


def ack_info(reply: str) -> AckInfo:
    """The facts in a delivery's ack subject. Raises ValueError for any other subject."""
    parts = reply.split(".")
    if len(parts) < 9 or parts[0] != "$JS" or parts[1] != "ACK":
        raise ValueError(f"not an ack subject: {reply[:120]!r}")
    # v1: $JS.ACK.stream.consumer.delivered.seq.cseq.time.pending; v2 has domain and account before the stream
    at = 2 if len(parts) == 9 else 4
    return AckInfo(
        parts[at], parts[at + 1], int(parts[at + 2]), int(parts[at + 3]), int(parts[at + 5]) / 1e9, int(parts[at + 6])
    )


def check(headers: Headers, body: bytes, max_payload: int) -> None:
    """Refuse a frame that the server or the client would choke on: non-ASCII headers (BadInput), or more bytes
    with headers than `max_payload` (TooLarge; the server would end the connection for it).
    """
    size = len(body)
    if headers:
        size += _FIRST_LINE + 2
        for name, value in headers.items():
            if not isinstance(value, str) or not value.isascii() or not value.isprintable():
                raise BadInput(f"header {name!r}: its value must be printable ASCII on one line")
            if name not in _names_seen:
                _see_name(name)
            size += len(name) + len(value) + 4
    if size > max_payload:
        raise TooLarge(size, max_payload)


def _see_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(f"header name {name!r} must be of A-Z a-z 0-9 and !#$%&'*+-.^_`|~")
    if len(_names_seen) < _NAMES_SEEN_MAX:
        _names_seen.add(name)


def plain_headers(headers: dict[str, Any]) -> None:
    """Make the values that nats-py could not read as ASCII (objects of the email package) text, in place."""
    for name, value in headers.items():
        if type(value) is not str:
            headers[name] = str(value)


def status(message: Received) -> Status | None:
    """The status of a control reply, None for an ordinary message."""
    if message.data or not message.headers:
        return None
    code, description = "", ""
    # nats-py keys some of these with enum members, which hash otherwise than the strings that they equal
    for name, value in message.headers.items():
        if name == "Status":
            code = value
        elif name == "Description":
            description = value
    return Status(int(code), description.strip()) if code.isdigit() else None


def stored(answer: Mapping[str, Any]) -> Stored:
    """The message in an answer of STREAM.MSG.GET."""
    raw = base64.b64decode(answer.get("hdrs") or "")
    return Stored(
        subject=answer["subject"],
        seq=answer["seq"],
        data=base64.b64decode(answer.get("data") or ""),
        headers=_parse_headers(raw),
        time=timestamp(answer["time"]),
    )


def stored_direct(message: Received) -> Stored:
    """The message in an answer of DIRECT.GET, its place told by Nats- headers."""
    headers = dict(message.headers or {})
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


def _parse_headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip(): value.strip() for name, _, value in pairs}


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


def pub_ack(data: bytes, subject: str) -> PubAck:
    """What a stream answered to a publish. Raises as `answer` does."""
    told = answer(data, subject)
    try:
        return PubAck(told["stream"], told["seq"], bool(told.get("duplicate")))
    except KeyError:
        raise Unavailable(f"{subject}: something else than a stream answered", maybe_stored=True) from None


def pending(answer: Received) -> int:
    """How many messages are behind a batch of DIRECT.GET."""
    value = (answer.headers or {}).get("Nats-Num-Pending", "0")
    return int(value) if value.isdigit() else 0
