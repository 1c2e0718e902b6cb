"""The headers `traceparent` and `tracestate` of W3C Trace Context, read from any publisher and written."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
TRACESTATE_MAX: Final = 512  # characters: a longer one is dropped, as the recommendation allows
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.{0,400})?")
_VALUE: Final = r"[ !-+\--<>-~]{0,255}[!-+\--<>-~]"
_MEMBER: Final = re.compile(
    rf"(?P<key>[a-z][a-z0-9_*/-]{{0,255}}|[a-z0-9][a-z0-9_*/-]{{0,240}}@[a-z][a-z0-9_*/-]{{0,13}})={_VALUE}"
)
_MEMBERS_MAX: Final = 32
_IS_SET: Final = frozenset("13579bdf")  # the last digit of flags whose lowest bit, "sampled", is set
_IN_BLOCK: Final = re.compile(rb"\r\ntraceparent:", re.IGNORECASE)


class Parent(NamedTuple):
    """What a `traceparent` says. `flags`: bit 0 is "sampled"."""

    trace_id: int
    span_id: int
    flags: int


def is_sampled(traceparent: str) -> bool:
    """Return whether the flags of a `traceparent`, which may be malformed, say that its trace is sampled."""
    if len(traceparent) == 55:
        return traceparent[-1] in _IS_SET
    parent = read_parent(traceparent)  # of a later version, or with spaces around it
    return parent is not None and bool(parent.flags & 1)


def read_parent(traceparent: str) -> Parent | None:
    """Return what a `traceparent` says; None for what is none. A later version may say more, at its end."""
    found = _FORM.fullmatch(traceparent.strip(" \t"))
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    parent = Parent(int(found[2], 16), int(found[3], 16), int(found[4], 16))
    return parent if parent.trace_id and parent.span_id else None


def read_tracestate(tracestate: str) -> str:
    """Return a `tracestate` as it is; "" for one that is too long or malformed, which the recommendation drops whole.

    Any publisher may write one. OpenTelemetry's parser logs all of a malformed one, however long.
    """
    if not tracestate or len(tracestate) > TRACESTATE_MAX:
        return ""
    found = [_MEMBER.fullmatch(each) for member in tracestate.split(",") if (each := member.strip(" \t"))]
    keys = {each["key"] for each in found if each is not None}
    return tracestate if len(keys) == len(found) <= _MEMBERS_MAX else ""


def trace_headers(parent: Parent, tracestate: str = "") -> dict[str, str]:
    """Return the headers that continue a trace."""
    found = {TRACEPARENT: f"00-{parent.trace_id:032x}-{parent.span_id:016x}-{parent.flags & 0xFF:02x}"}
    if state := read_tracestate(tracestate):
        found[TRACESTATE] = state
    return found


def has_trace(block: bytes) -> bool:
    """Return whether an encoded header block has a `traceparent`, in whatever case."""
    return _IN_BLOCK.search(block) is not None
