"""Frames: a header block and a body. Valid ones, mutations of them, and noise; a seed makes the same ones again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cbor2

from aiqueue import codec, headers

NOISE_MAX = 200
MUTATIONS_MAX = 4
KINDS = ("fuzz", "fuzz", "fuzz", "agent.task", "agent_task", "unheard.of", "")

# What stands in a header instead of what belongs there. Latin-1, each character a byte.
NONSENSE = (
    "", " ", "0", "-1", "1", "2", "7", "00000000000000000001", "9" * 18, "9" * 19, "9" * 5_000, "1e309", "-1e309",
    "nan", "inf", "1.5", "0x10", "1_000", "+5", "\x1b[31m", "true", "null", "None", "\xc2\xb2", "\xd9\xa3", "\xff\xfe",
    "\xed\xa0\x80", "\x00", "\x01\x02\x7f", "a\tb", "x" * 10_000, "[" * 5_000, "[" * 200_000, '{"a":' * 3_000, "[]",
    "[1, null, {}]", '[{"attempt": "x", "at": [], "worker": null, "error": {}, "traceback": 7}]',
    "[" + "9" * 4_300 + "]",
    '[{"error": "\\ud800"}]', '[{"error": ' + "[" * 70 + "]" * 70 + "}]", '[{"at": NaN}]', '[{"at": Infinity}]',
    '[{"at": 1' + "0" * 4_250 + "}]", '{"attempt": 1}', '"text"', "application/cbor", "application/json", "text/html",
    "application/x+cbor; charset=utf-8", "a.b", "*", ">", "$JS.API", "../../etc", "job-1", "high", "low", "normal",
    "ai.agent.tasks.t0.normal", "s1-1", "  padded  ", "a: b", "NATS/1.0",
)  # fmt: skip
# Names a publisher may use; those of the server's that would keep a frame out of its stream are not among them.
NAMES = (
    headers.CONTENT_TYPE, headers.KIND, headers.JOB_ID, headers.DEADLINE, headers.PRIORITY, headers.EVENT,
    headers.ATTEMPT, headers.EPOCH, headers.RUN, headers.READ_KIND, headers.REASON, headers.ERROR, headers.HISTORY,
    headers.WORKER, headers.SUBJECT, headers.ENQUEUED, headers.REPLAY, headers.REST, headers.PARKED, headers.DUE,
    headers.WAITED, headers.DOCUMENT, headers.DOCUMENT_SIZE, headers.DOCUMENT_REF,
    "task_id", "request_id", "traceparent", "model", "Status", "Nats-Sequence", "Nats-Subject",
    "Nats-Time-Stamp", "Nats-Last-Sequence",
)  # fmt: skip
FIRST_LINES = ("NATS/1.0", "NATS/1.0 100 Idle Heartbeat", "NATS/1.0 404 No Messages", "NATS/1.0 503",
               "NATS/1.0 \xc2\xb2", "NATS/1.0 409 Consumer Deleted", "NATS/1.0 " + "9" * 5_000)  # fmt: skip


class Frame(NamedTuple):
    """`block` is a header block as it goes over the wire, empty for a frame without headers."""

    block: bytes
    body: bytes


def frames(seed: int, count: int, *, first: int = 0) -> Iterator[Frame]:
    """Frame `first` of this seed and those behind it: each depends on its number alone."""
    for number in range(first, first + count):
        yield _frame(random.Random(f"{seed}/{number}"), number)


def _frame(rng: random.Random, number: int) -> Frame:
    told, body = _valid(rng, number)
    if rng.random() < 0.06:
        body = rng.randbytes(rng.randrange(NOISE_MAX))
    elif rng.random() < 0.4:
        for _ in range(rng.randint(1, MUTATIONS_MAX)):
            body = rng.choice(_BODY_MUTATIONS)(rng, body)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 6))):
        name = rng.choice(NAMES)
        told[name] = rng.choice(NONSENSE) if rng.random() < 0.9 else rng.randbytes(rng.randrange(40)).decode("latin-1")
    block = _block(rng, told) if told else b""
    return Frame(block, body)


def _valid(rng: random.Random, number: int) -> tuple[dict[str, str], bytes]:
    """A job that a worker takes, in one of the forms of the wire contract."""
    data: dict[str, Any] = {
        "number": number,
        "text": rng.choice(("", "hello", "gr\u00fc\u00df", "x" * rng.randrange(300))),
        "tags": [rng.random() for _ in range(rng.randrange(5))],
        "meta": {"key": rng.choice((None, True, -1, 2**63, 1e300, "v"))},
    }
    told: dict[str, str] = {}
    form = rng.randrange(4)
    if form == 0:
        told[headers.KIND] = rng.choice(KINDS)
        told[headers.JOB_ID] = f"job-{rng.randrange(50)}" if rng.random() < 0.2 else f"f{number}"
        if rng.random() < 0.1:  # of a run that another frame may have claimed, too
            told |= {
                headers.RUN: str(rng.randrange(1, 40)),
                headers.ENQUEUED: rng.choice(("1.5", "1700000000.000001", "9e99")),
                headers.ATTEMPT: str(rng.randrange(4)),
                headers.PARKED: rng.choice(("w1", "w2")),
            }
    elif form == 1:
        version = rng.choice(("1.0", "1", "1.0", "9.9", 1.0, None))
        data = {"schema_version": version, "message_type": rng.choice(KINDS), "data": data}
    elif form == 2:
        data = {"schema_version": "1.0", "message_type": rng.choice(KINDS), **data}
    elif rng.random() < 0.5:
        data["task_id"] = rng.choice((f"t{number}", number, "", None, 1.5, "a b", "\u00fc", ["x"]))
    if rng.random() < 0.5:
        body = cbor2.dumps(data)
        media = codec.CBOR
    else:
        body = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode()
        media = codec.JSON
    if rng.random() < 0.5:
        told[headers.CONTENT_TYPE] = media
    return told, body


def _block(rng: random.Random, told: dict[str, str]) -> bytes:
    lines = [f"{name}: {value}" for name, value in told.items()]
    if rng.random() < 0.03:
        lines.append(rng.choice(lines))
    if rng.random() < 0.02:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(("no colon", ":", ": v", "n:", " folded: x", "\xff: y")))
    first = rng.choice(FIRST_LINES[1:]) if rng.random() < 0.02 else FIRST_LINES[0]
    return "\r\n".join([first, *lines, "\r\n"]).encode("latin-1", "replace")


# -- mutations of a body


def _flip(rng: random.Random, body: bytes) -> bytes:
    if not body:
        return body
    at = rng.randrange(len(body))
    return body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[at + 1 :]


def _cut(rng: random.Random, body: bytes) -> bytes:
    return body[: rng.randrange(len(body) + 1)]


def _insert(rng: random.Random, body: bytes) -> bytes:
    at = rng.randrange(len(body) + 1)
    return body[:at] + rng.choice(_PIECES) + body[at:]


def _noise(rng: random.Random, body: bytes) -> bytes:
    at = rng.randrange(len(body) + 1)
    return body[:at] + rng.randbytes(rng.randrange(9)) + body[at + rng.randrange(9) :]


def _twice(rng: random.Random, body: bytes) -> bytes:
    first, last = sorted(rng.randrange(len(body) + 1) for _ in range(2))
    return body[:last] + body[first:]


def _replace(rng: random.Random, body: bytes) -> bytes:
    return rng.choice(_PIECES)


def _value(rng: random.Random, body: bytes) -> bytes:
    """Put something else where the field `number` has its value, JSON or CBOR."""
    for field in (b'"number": ', b"fnumber"):
        at = body.find(field)
        if at >= 0:
            at += len(field)
            return body[:at] + rng.choice(_PIECES) + body[at + rng.randrange(6) :]
    return body


_BODY_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _flip, _cut, _insert, _noise, _twice, _value, _replace,
)  # fmt: skip
_PIECES = (
    b"", b"{}", b"[]", b"null", b'{"number": NaN}', b'{"number": 1e999}', b'{"number": ' + b"9" * 5_000 + b"}",
    b"[" * 100, b"[" * 100_000, b'{"a":' * 100, b"\x81" * 100, b"\xa1\x61a" * 100, b"\x9f" * 1_000, b"\xbf",
    b"\x1b\xff\xff\xff\xff\xff\xff\xff\xff", b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\x9b\x00\x00\x00\xff\xff\xff\xff\xff",
    b"\xc2\x59\x20\x00" + b"\xff" * 8_192, b"\xc4\x82\x1a\x3b\x9a\xca\x00\x01", b"\xc5\x82\x1a\x3b\x9a\xca\x00\x01",
    b"\xd8\x1c\x81\xd8\x1d\x00", b"\xd8\x23\x67(a+)+$!", b"\xc0\x61x", b"\xc1\xfb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\xf9\x7e\x00", b"\xfb\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\xed\xa0\x80", b'"\\ud800"', b'{"task_id": "\\ud800"}',
    b'{"message_type": "\\udfff", "schema_version": {}}', b"\xa1\x67task_id\x1b\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xa1\x67task_id\xc2\x49\x01" + b"\x00" * 8, b'{"task_id": 1' + b"0" * 4_200 + b"}", b"\xef\xbb\xbf{}",
    '{"number": 1}'.encode("utf-16"), b"\xff\xfe\x00", b"\x00" * 64,
)  # fmt: skip
