"""What a `traceparent` of any publisher says, and that a plain job may have one."""

from __future__ import annotations

import pytest

from aiqueue import headers
from aiqueue.tracing import is_sampled, read_parent
from aiqueue.tracing.trace_context import Parent, has_trace, read_tracestate, trace_headers

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PLAIN = (
    b"NATS/1.0\r\nNats-Msg-Id: acme/agent.tasks/7\r\nContent-Type: application/cbor\r\nAiq-Kind: page\r\n"
    b"Aiq-Job-Id: 7\r\npriority: normal\r\ntask_id: 7\r\n"
)


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("ff", True)])
def test_the_lowest_bit_of_the_flags_says_whether_a_trace_is_sampled(flags: str, sampled: bool) -> None:
    assert is_sampled(f"00-{TRACE}-{SPAN}-{flags}") is sampled
    assert is_sampled(f" 00-{TRACE}-{SPAN}-{flags}") is sampled
    assert is_sampled(f"cc-{TRACE}-{SPAN}-{flags}-what-is-new") is sampled


@pytest.mark.parametrize(
    "malformed",
    [
        "", "1", f"00-{TRACE}-{SPAN}", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-zz", "x" * 10_000,
    ],
)  # fmt: skip
def test_what_is_malformed_names_no_trace(malformed: str) -> None:
    assert read_parent(malformed) is None


def test_headers_are_read_as_they_are_written() -> None:
    parent = Parent(int(TRACE, 16), int(SPAN, 16), 1)
    assert trace_headers(parent, "vendor=1") == {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
    assert read_parent(trace_headers(parent)["traceparent"]) == parent
    for dropped in ("", "x" * 513, "a=1\r\nNats-Msg-Id: x", "ä=1"):
        assert "tracestate" not in trace_headers(parent, dropped)


@pytest.mark.parametrize("state", ["a=1", " a=1 ,\tb@c=2 3,,", ",".join(f"k{n}=v" for n in range(32))])
def test_a_state_of_the_recommendation_is_kept_as_it_is(state: str) -> None:
    assert read_tracestate(state) == state
    api = pytest.importorskip("opentelemetry.trace")
    assert len(api.TraceState.from_header([state])) == sum("=" in each for each in state.split(","))


@pytest.mark.parametrize(
    "state",
    [
        "x", "a=", "=1", "A=1", "a=1,a=2", "a=1,b", "a=\x1b[31m", "a=ä", "a=1=2", "a@@b=1", "a" * 257 + "=1",
        "a=1," * 200, ",".join(f"k{n}=v" for n in range(33)), "a=" + "x" * 100_000, " " * 100_000,
    ],
)  # fmt: skip
def test_any_other_state_is_dropped_whole_without_a_word(state: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read_tracestate(state) == ""
    assert not caplog.records


@pytest.mark.parametrize("state", [b"", b"tracestate: a=1,b=2\r\n"])
@pytest.mark.parametrize("batch", [b"", b"Nats-Batch-Id: x\r\nNats-Batch-Sequence: 2\r\n"])
def test_a_job_that_is_plain_but_for_its_trace_is_plain(state: bytes, batch: bytes) -> None:
    line = f"traceparent: 00-{TRACE}-{SPAN}-01\r\n".encode()
    traced = PLAIN + line + state + batch + b"\r\n"
    assert (
        headers.read_plain(traced) == headers.read_plain(PLAIN + b"\r\n") == ("page", "7", "normal", "application/cbor")
    )
    assert has_trace(traced)
    assert not has_trace(PLAIN)
    assert headers.read_plain(PLAIN + state + line + b"\r\n") is None or not state  # in another order
    assert headers.read_plain(PLAIN + line + b"x-other: 1\r\n\r\n") is None
    assert headers.read_plain(PLAIN + line + line + b"\r\n") is None
