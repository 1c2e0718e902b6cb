"""Messages as publishers may have made them: plain jobs, nearly plain ones, and odd ones. Hypothesis draws them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import cbor2
from hypothesis import strategies as st

from aiqueue import codec, headers

TENANT, NUMBER = "TENANT", "NNNNNN"  # stand for the tenant, and for a number that is the message's own
KEYS = {"agent.tasks": "task_id", "both.shared": "ticket", "both.keyless": "", "gateway.requests": "request_id"}
KINDS = ("kept", "unkept", "timed", "choosy", "secret", "thread")

Fields = list[tuple[str, str]]


class Fuzzed(NamedTuple):
    """A message to be stored in a lane of any tenant. `before`: what its journal holds already, an event."""

    family: str
    priority: str
    block: bytes
    body: bytes
    before: str = ""

    def fill(self, tenant: str, number: int) -> tuple[bytes, bytes]:
        """Return header block and body for this tenant."""
        own = f"{number:06}".encode()
        block = self.block.replace(TENANT.encode(), tenant.encode())
        return block.replace(NUMBER.encode(), own), self.body.replace(NUMBER.encode(), own)


def plain_fields(
    family: str, kind: str, priority: str = "normal", job_id: str = f"j-{NUMBER}", content_type: str = codec.CBOR
) -> Fields:
    """The headers of a plain job, in the order in which `enqueue` writes them. Without a kind, the body may name it."""
    fields = [(headers.MSG_ID, f"{TENANT}/{family}/{NUMBER}"), (headers.CONTENT_TYPE, content_type)]
    fields += [(headers.KIND, kind)] if kind else []
    fields += [(headers.JOB_ID, job_id), (headers.PRIORITY, priority)]
    return [*fields, (KEYS[family], job_id)] if KEYS[family] else fields


def render(fields: Fields) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def plain(family: str, kind: str, priority: str = "normal", before: str = "", **fields: Any) -> Fuzzed:
    """A message as `enqueue` stores it."""
    return Fuzzed(family, priority, render(plain_fields(family, kind, priority)), codec.encode(fields), before)


def by_guide(family: str, kind: str, version: str = "1.0", **fields: Any) -> Fuzzed:
    """A message as the integration guide's client stores it: an envelope in JSON, without a kind in the headers."""
    envelope = {"schema_version": version, "message_type": kind, "data": fields}
    return Fuzzed(family, "normal", render(plain_fields(family, "", content_type=codec.JSON)), _json(envelope))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- headers

EXTRA: Fields = [
    (headers.DEADLINE, "1"), (headers.DEADLINE, "99999999999999"), (headers.DEADLINE, "soon"),
    (headers.DOCUMENT, "ab" * 32), (headers.DOCUMENT_SIZE, "1"), (headers.DOCUMENT_SIZE, "x"),
    (headers.DOCUMENT_REF, "ref"), (headers.SECRET, "/n"), (headers.SECRET, "/ /"), (headers.HISTORY, "[]"),
    (headers.HISTORY, '[{"attempt": 1, "error": "x"}]'), (headers.PARKED, "r1-1-a2"), (headers.ATTEMPT, "3"),
    (headers.UNKNOWN, "1 2"), (headers.REASON, "attempts"), (headers.ERROR, "x"), (headers.RUN, "700000"),
    (headers.ENQUEUED, "1.5"), (headers.REPLAY, "1"), (headers.REPLAY, "many"), (headers.PRIORITY, "low"),
    (headers.PRIORITY, f"j-{NUMBER}"), (headers.TARGET, f"j-{NUMBER}"), ("any_name", f"j-{NUMBER}"),
    ("a" * 40, f"j-{NUMBER}"), ("task_id", f"other-{NUMBER}"), ("X-Own", "1"), ("X-Own", "é" * 3),
    (headers.CONTENT_TYPE, codec.JSON), (headers.KIND, "unkept"), (headers.JOB_ID, f"again-{NUMBER}"),
    (headers.DUE, "1"), (headers.WAITED, "1"), (headers.EVENT, "result"), (headers.SUBJECT, "ai.x.y.z"),
]  # fmt: skip
VALUES = {
    headers.KIND: ["", "k" * 128, "k" * 129, "a kind", "kepté", "kept\u0661", "Kept", "kept:1.x_-", " kept"],
    headers.JOB_ID: [
        "", f"no token! {NUMBER}", NUMBER + "x" * 58, NUMBER + "x" * 59, f"é{NUMBER}", f"{NUMBER}.x", f" {NUMBER}",
    ],
    headers.PRIORITY: ["", "low", "high", "normal", "urgent", "p" * 16, "p" * 17, "Normal", "normal "],
    headers.CONTENT_TYPE: [
        "", codec.JSON, "application/CBOR", "application/cbor; x", "text/plain", "image/png", "application/x+cbor",
    ],
    headers.MSG_ID: [f"{TENANT} {NUMBER}", f"{TENANT}{NUMBER}é", f"{TENANT}{NUMBER}" + "m" * 300],
}  # fmt: skip


def _marked(block: bytes) -> set[int]:
    """The positions of placeholders, which nothing may change: two messages would be one otherwise."""
    marked = set()
    for name in (TENANT.encode(), NUMBER.encode()):
        at = block.find(name)
        while at >= 0:
            marked |= set(range(at, at + len(name)))
            at = block.find(name, at + 1)
    return marked


@st.composite
def header_edits(draw: Any, fields: Fields) -> Fields:
    """Headers with one thing changed."""
    at = draw(st.integers(0, len(fields) - 1))
    name, value = fields[at]
    match draw(st.sampled_from(["add", "value", "drop", "repeat", "order", "case", "space"])):
        case "add":
            at = draw(st.sampled_from([0, at, len(fields), len(fields)]))
            return [*fields[:at], draw(st.sampled_from(EXTRA)), *fields[at:]]
        case "value":
            at = draw(st.sampled_from([n for n, (each, _) in enumerate(fields) if each in VALUES] or [0]))
            name = fields[at][0]
            changed = draw(st.sampled_from(VALUES.get(name, ["x"])))
            return [*fields[:at], (name, changed), *fields[at + 1 :]]
        case "drop":
            return [*fields[:at], *fields[at + 1 :]]
        case "repeat":
            return [*fields, (name, draw(st.sampled_from([value, *VALUES.get(name, [])])))]
        case "order":
            return draw(st.permutations(fields))  # type: ignore[no-any-return]
        case "case":
            name = draw(st.sampled_from([name.lower(), name.upper(), name.title(), name.swapcase()]))
        case "space":
            value = draw(st.sampled_from([f" {value}", f"{value} ", f"\t{value}", f"{value}\n", f"{value}\r"]))
    return [*fields[:at], (name, value), *fields[at + 1 :]]


@st.composite
def byte_edits(draw: Any, block: bytes) -> bytes:
    """A header block with one byte changed, added or removed, or with other ends."""
    free = [each for each in range(len(block)) if each not in _marked(block)]
    at = draw(st.sampled_from(free))
    byte = bytes([draw(st.integers(0, 255))])
    match draw(st.sampled_from(["replace", "flip", "insert", "remove", "end", "lines"])):
        case "replace":
            return block[:at] + byte + block[at + 1 :]
        case "flip":
            return block[:at] + bytes([block[at] ^ 0x20]) + block[at + 1 :]
        case "insert" if at == 0 or at - 1 in free:
            return block[:at] + byte + block[at:]
        case "remove":
            return block[:at] + block[at + 1 :]
        case "end":
            return draw(st.sampled_from([block[:-2], block + b"\r\n", block + b"X: 1\r\n\r\n", block[:-2] + b"\n"]))  # type: ignore[no-any-return]
    return block.replace(b"\r\n", b"\n")


@st.composite
def header_blocks(draw: Any, family: str, priority: str, kinds: st.SearchStrategy[str]) -> bytes:
    """Header blocks: plain ones, and those with one or two things changed."""
    job_id = draw(st.sampled_from([f"j-{NUMBER}", f"j-{NUMBER}", f"{NUMBER}_" + "x" * 57, NUMBER]))
    content_type = draw(st.sampled_from([codec.CBOR, codec.CBOR, codec.JSON]))
    fields = plain_fields(family, draw(st.one_of(kinds, kinds, st.just(""))), priority, job_id, content_type)
    edits = draw(st.sampled_from([0] * 5 + [1] * 4 + [2]))
    for _ in range(edits):
        if fields:
            fields = draw(header_edits(fields))
    block = render(fields)
    return draw(byte_edits(block)) if draw(st.sampled_from([False] * 9 + [True])) else block


def nearly_plain_fields(fields: Fields) -> Iterator[Fields]:
    """All headers with one thing changed that `header_edits` draws, one after the other."""
    last = len(fields)
    for extra in EXTRA:
        yield from ([*fields[:at], extra, *fields[at:]] for at in {0, last - 2, last - 1, last})
    for at, (name, value) in enumerate(fields):
        before, after = fields[:at], fields[at + 1 :]
        yield before + after
        yield [*fields, (name, value)]
        for changed in VALUES.get(name, []):
            yield [*before, (name, changed), *after]
            yield [*fields, (name, changed)]
        for other in (name.lower(), name.upper(), name.swapcase()):
            yield [*before, (other, value), *after]
        for odd in (f" {value}", f"{value} ", f"\t{value}", f"{value}\n", f"{value}\r"):
            yield [*before, (name, odd), *after]
        yield [*after, (name, value), *before]


def nearly_plain_blocks(block: bytes) -> Iterator[bytes]:
    """Header blocks with one byte changed, at every place."""
    for at in range(len(block)):
        if at in _marked(block):
            continue
        for byte in (block[at] ^ 0x20, block[at] ^ 1, ord(" "), ord("\n"), 0, 0xE9):
            yield block[:at] + bytes([byte]) + block[at + 1 :]
        yield block[:at] + block[at + 1 :]
        if at == 0 or at - 1 not in _marked(block):
            yield from (block[:at] + each + block[at:] for each in (b" ", b"\r", b"x"))
    yield from (block[:-2], block + b"\r\n", block + b"X: 1\r\n\r\n", block.replace(b"\r\n", b"\n"))


# -- bodies


def _nested(levels: int) -> bytes:
    return b"\xa1\x61n" * levels + b"\x01"


SURROGATE = b"\xa1\x63act\x63\xed\xa0\xbd"  # {"act": "\ud83d"}, as writers of UTF-16 send it
ODD_BODIES = (
    b"", b"\xa0", b"\x80", b"\xf6", b"\xff", b"\x01", b"{}", b"[1]", b"null", b'{"act": "text"}', b'{"n": "x"}',
    codec.encode({"n": "x"}), codec.encode({"act": 5}), codec.encode({"act": "text", "n": 2**63}), SURROGATE,
    b"\xa1\x63act\x61\xff", b"\xa1\x01\x02", b"\xa2\x61n\x01\x61n\x02", b"\xbf\x61n\x01\xff", b"\xa1\x61n\xf7",
    b"\xa1\x61n\xf9\x7e\x00", b"\xa1\x61n\xc1\x00", b"\xa1\x61n\xc2\x49\x01" + b"\x00" * 8, b"\xa1\x61n\xd8\x1d\x00",
    _nested(63), _nested(64), _nested(65), _nested(500), codec.encode({"act": "text", "note": "x" * 100_000}),
    codec.encode({"schema_version": "1.0", "message_type": "kept", "data": {"act": "text"}}),
    codec.encode({"schema_version": "9", "message_type": "unkept", "act": "map"}),
    cbor2.dumps({b"act": "text"}), cbor2.dumps({"n": 1, 2: 3}), cbor2.dumps({"act": "text", "n": 1.0}),
)  # fmt: skip


@st.composite
def bodies(draw: Any, message: dict[str, Any], block: bytes) -> bytes:
    """Bodies: the message in the format that the headers state, or in an envelope, the same with a fault, odd ones."""
    encode = _json if codec.JSON.encode() in block else codec.encode
    if headers.KIND.encode() not in block:
        kind, version = draw(st.sampled_from([*KINDS, "unheard-of"])), draw(st.sampled_from(["1.0", "1", 1]))
        head = {"schema_version": version, "message_type": kind}
        message = draw(st.sampled_from([message, {**head, "data": message}, {**head, **message}, {**head, "data": 1}]))
    body = encode(message)
    match draw(st.sampled_from(["plain"] * 8 + ["odd"] * 3 + ["more", "less", "json", "typed", "byte"])):
        case "odd":
            return draw(st.sampled_from(ODD_BODIES))  # type: ignore[no-any-return]
        case "more":
            return body + draw(st.sampled_from([b"\x00", b"\xf6", b"\xa0", body, b"\n"]))  # type: ignore[no-any-return]
        case "less":
            return body[: draw(st.integers(0, len(body) - 1))]
        case "json":
            return _json(message)
        case "typed":
            return encode({**message, "n": draw(st.sampled_from([-1, "1", 1.5, None, True, [1], {"a": 1}]))})
        case "byte":
            at = draw(st.sampled_from([n for n in range(len(body)) if n not in _marked(body)]))
            return body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :]
    return body


@st.composite
def deliveries(draw: Any, families: tuple[str, ...], acts: tuple[str, ...], kinds: tuple[str, ...] = KINDS) -> Fuzzed:
    """A message whose handler is asked to do one of `acts`."""
    family = draw(st.sampled_from(families))
    priority = draw(st.sampled_from(["normal", "normal", "high", "low"]))
    message = {"act": draw(st.sampled_from(acts)), "n": draw(st.integers(-3, 3))}
    if KEYS[family]:
        message[KEYS[family]] = f"k-{NUMBER}"
    block = draw(header_blocks(family, priority, st.sampled_from(kinds)))
    before = draw(st.sampled_from([""] * 8 + ["result", "cancelled", "retry", "other run"]))
    if before == "cancelled" and "cancel_job" in f"{message['act']}":
        before = ""  # nobody sends a notice of a cancellation that is written, and the journal is read after 5 s
    return Fuzzed(family, priority, block, draw(bodies(message, block)), before)
