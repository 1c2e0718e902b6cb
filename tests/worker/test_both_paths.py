"""The short way of plain first deliveries and the full path: the same deliveries, and what each makes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from aiqueue import attempt, codec
from aiqueue.connection.nats_client import WireMessage
from aiqueue.journal import RETRY
from aiqueue.journal.entries import CANCELLED, CHUNK, RESULT
from aiqueue.lanes import Delivery, LanePull
from aiqueue.subjects import Lane
from aiqueue.topology import Topology
from aiqueue.worker.context import JobContext
from aiqueue.worker.opening import OpenedJob
from aiqueue.worker.runner import Runner

from ..support import Server
from .acting import ACTS, FAMILIES, SYNC_ACTS, Acting
from .both_ways import job_fields, run_both
from .fuzzed_deliveries import (
    KEYS,
    KINDS,
    NUMBER,
    ODD_BODIES,
    Fuzzed,
    bodies,
    by_guide,
    deliveries,
    header_blocks,
    nearly_plain_blocks,
    nearly_plain_fields,
    plain,
    plain_fields,
    render,
)
from .test_runner import runner_without_server

SHARED = """
[family]
name = "both.shared"
default_kind = "kept"
priorities = ["high", "normal", "low"]
journal = "ai.both.results"
journal_ttl = "1h"
chunk_ttl = "10m"
key = "ticket"
lanes = "shared"
[stream]
name = "TEST_SHARED"
storage = "memory"
"""
KEYLESS = """
[family]
name = "both.keyless"
default_kind = "unkept"
priorities = ["high", "normal", "low"]
[stream]
name = "TEST_KEYLESS"
storage = "memory"
"""


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("streams")
    (directory / "shared.toml").write_text(SHARED)
    (directory / "keyless.toml").write_text(KEYLESS)
    return directory


@pytest.fixture(scope="module")
def topology(streams: Path) -> Topology:
    return Topology.load(streams)


# -- opening


HANDLERS = Acting(lambda job: job).worker._handlers


async def open_both_ways(
    runner: Runner, family: str, tenant: str, priority: str, block: bytes, body: bytes, count: int = 1
) -> bool:
    """Open a delivery on both ways, and build its job. Returns whether the short way takes it."""
    pull = LanePull(Lane(family, tenant, priority), "S", "c", 30, created=5.0)
    subject = f"ai.{family}.acme.{priority}".encode()
    delivery = Delivery(pull, WireMessage(subject, b"$JS.ACK.x", body, block), 7, count, 1.7e9, 0.0)
    short = runner.opener.open_first(delivery)
    if short is None:
        return False
    assert count == 1
    assert not short.family.claim
    full = await runner.opener.open(delivery)
    assert runner.gate.find_outcome(delivery, full) is None
    assert (short.plain, full.plain) == (True, False)
    for name in {each.name for each in dataclasses.fields(OpenedJob)} - {"plain"}:
        one, other = getattr(short, name), getattr(full, name)
        assert repr(one or None) == repr(other or None), name
    for handler in (HANDLERS.get((family, full.kind)), None):
        context = JobContext(runner._resources, delivery, short)
        ours = _build(runner, delivery, short, handler, context)
        theirs = _build(runner, delivery, full, handler, context)
        assert job_fields(ours) == job_fields(theirs)
    return True


def _build(runner: Runner, delivery: Delivery, opened: OpenedJob, handler: Any, context: JobContext) -> Any:
    """The job as the runner builds it: `Runner._call_handler` decides so too."""
    if opened.plain and handler is not None:
        return runner._build_plain_job(delivery, opened, handler, context)
    number = opened.attempt
    return attempt.build_job(opened.raw, opened, handler, attempt=number, state=runner._state, progress=context)


@given(data=st.data())
@settings(max_examples=400)
async def test_what_the_short_way_opens_is_what_the_full_path_opens_and_the_handler_gets_the_same_job(
    topology: Topology, data: st.DataObject
) -> None:
    runner = await runner_without_server(topology.families)
    family, tenant = data.draw(st.sampled_from([*KEYS, *FAMILIES])), data.draw(st.sampled_from(["acme", "*"]))
    priority = data.draw(st.sampled_from(["normal", "normal", "high", "low"]))
    block = data.draw(header_blocks(family, priority, st.sampled_from(KINDS)))
    body = data.draw(bodies({"act": "text", "n": data.draw(st.integers()), KEYS[family] or "x": "k"}, block))
    count = data.draw(st.sampled_from([1] * 8 + [2, 3]))
    event(f"short: {await open_both_ways(runner, family, tenant, priority, block, body, count)}")


@pytest.mark.parametrize("family", [*KEYS])
@pytest.mark.parametrize(
    ("job_id", "kind", "content_type", "body"),
    [
        ("j-1", "kept", codec.CBOR, b"\xa1\x61n\x01"), ("low", "kept", codec.CBOR, b"\xa1\x61n\x01"),
        ("9" * 64, "kept", codec.CBOR, b"\xa1\x61n\x01"), ("j-1", "kept", codec.JSON, b'{"n": 1}'),
        ("j-1", "", codec.CBOR, b"\xa1\x61n\x01"), ("low", "", codec.CBOR, b"\xa1\x61n\x01"),
        ("9" * 64, "", codec.JSON, b'{"schema_version": "1.0", "message_type": "kept", "data": {"n": 1}}'),
    ],
)  # fmt: skip
async def test_with_any_one_thing_changed_in_the_headers_of_a_plain_job_the_short_way_opens_it_alike_or_not_at_all(
    topology: Topology, family: str, job_id: str, kind: str, content_type: str, body: bytes
) -> None:
    runner = await runner_without_server(topology.families)
    short = 0
    for priority in ("normal", "high"):
        fields = plain_fields(family, kind, priority, job_id, content_type)
        blocks = [*(render(each) for each in nearly_plain_fields(fields)), *nearly_plain_blocks(render(fields))]
        for block in blocks:
            own = block.replace(NUMBER.encode(), job_id.encode())
            short += await open_both_ways(runner, family, "acme", priority, own, body)
    assert (short > 100) == (family != "gateway.requests")


@pytest.mark.parametrize("version", ["1.0", "1", "9", ""])
async def test_the_short_way_leaves_schema_versions_that_are_not_accepted_to_the_full_path(
    topology: Topology, version: str
) -> None:
    runner = await runner_without_server(topology.families)
    family, priority, block, body, _ = by_guide("agent.tasks", "kept", version, act="text")
    assert await open_both_ways(runner, family, "acme", priority, block, body) == (version in ("1.0", "1"))


# -- running


class Batch(list[Fuzzed]):
    def __repr__(self) -> str:  # a failure shows the deliveries that it is about
        return f"<{len(self)} deliveries>"


@st.composite
def batches(draw: Any) -> Batch:
    return Batch(draw(st.lists(deliveries(FAMILIES, ACTS), min_size=30, max_size=60)))


PLAIN = [
    *(plain("agent.tasks", "kept", act=each) for each in ACTS),
    *(plain("both.shared", "unkept", act=each) for each in ACTS),
    *(plain("both.keyless", kind, act=each) for each in ACTS for kind in ("kept", "unkept")),
    *(plain("both.shared", "timed", act=each) for each in ACTS),
    *(plain("both.shared", "choosy", act=each) for each in SYNC_ACTS),
    *(plain("agent.tasks", "secret", act=each, key="a-hidden-value") for each in ACTS),
    *(plain("both.shared", "thread", act=each) for each in SYNC_ACTS),
    *(plain("agent.tasks", kind, n="no number") for kind in KINDS),
    *(plain("both.shared", "unheard-of", act=each) for each in ("text", "error")),
    *(by_guide("agent.tasks", kind, act=each) for each in ACTS for kind in ("kept", "secret")),
    *(by_guide("both.shared", kind, version, act="text") for kind in KINDS for version in ("1.0", "1")),
    *(
        plain("agent.tasks", kind, before=before, act=each)
        for before in (RESULT, CANCELLED, RETRY, "other run")
        for kind in ("kept", "unkept")
        for each in ("text", "error", "chunks", "progress", "reject", "retry late")
    ),
]


NAK = '-NAK {"delay": 30000000}'
CHUNKS = repr(["a", {"b": 1}, "half ", "\U0001f600", "another half ", "\ufffd"])
EXPECTED = {  # some of what must be left: replies to the server, and the events of the journal
    plain("agent.tasks", kind, before=before, act=act)[2:]: (replies, events)
    for kind, before, act, replies, events in (
        ("kept", "", "text", ["+ACK"], ["result"]),
        ("kept", "", "chunks", ["+ACK"], [CHUNKS, "result"]),
        ("kept", "", "progress", ["+ACK"], ["progress", "result"]),
        ("kept", "", "error", [NAK, "+ACK"], ["retry", "started", "result"]),
        ("kept", "", "retry late", ["+ACK"], ["retry"]),
        ("kept", "", "reject", ["+ACK"], ["failed"]),
        ("kept", "", "too large", ["+ACK"], ["result"]),
        ("kept", "", "lost", [], []),
        ("kept", "", "ended", ["+ACK"], []),
        ("kept", "", "cancel_job_and_return", ["+ACK"], ["cancelled"]),
        ("kept", "other run", "text", ["+ACK"], ["result", "result"]),
        ("kept", "cancelled", "error", ["+ACK"], ["cancelled"]),
        ("unkept", "result", "text", ["+ACK"], ["result"]),
        ("unkept", "other run", "chunks", ["+ACK"], ["result", CHUNKS]),
    )
}
NEARLY_PLAIN = [
    Fuzzed(family, "normal", render(each), codec.encode({"act": act}))
    for family, act in (("agent.tasks", "error"), ("both.shared", "text"))
    for each in nearly_plain_fields(plain_fields(family, "kept"))
] + [
    Fuzzed(family, "normal", render(plain_fields(family, kind)), body)
    for family, kind in (("agent.tasks", "kept"), ("both.keyless", "unkept"))
    for body in (*ODD_BODIES, b"\xa0\x00", b"\xa0\xa0", b"\xa1\x61n\x01\xf6")
]
# The value of the id goes on over a line that ends wrongly, so the id is a hash of what has the tenant in it.
NEARLY_PLAIN += [
    Fuzzed(family, "normal", render([*fields[1:3], *fields[4:], *fields[3::-3]]).replace(b"\r\nNats", b"\nNats"), body)
    for family in FAMILIES
    for fields in (plain_fields(family, "kept"),)
    for body in (codec.encode({"act": "text"}), codec.encode({"act": "error"}), b"\xff")
]


async def test_a_plain_job_ends_on_the_short_way_as_on_the_full_path_whatever_its_handler_does(
    nats_server: Server, streams: Path
) -> None:
    run, left = await run_both(nats_server, streams, PLAIN)
    assert run.opened_short == {*range(len(PLAIN))}
    checked = 0
    for number, each in enumerate(PLAIN):
        expected = EXPECTED.get((each.block, each.body, each.before))
        if expected is not None:
            checked += 1
            entries = left["journal"].get(f"j-{number:06}", [])
            events = [data if name == CHUNK else name for name, _, data in entries]
            assert (left["replies"][f"{number}"], events) == expected, each
    assert checked == len(EXPECTED)


async def test_a_job_that_differs_in_one_thing_from_a_plain_one_ends_as_on_the_full_path(
    nats_server: Server, streams: Path
) -> None:
    run, _ = await run_both(nats_server, streams, NEARLY_PLAIN)
    assert 0 < len(run.opened_short) < len(NEARLY_PLAIN) / 2


@given(batch=batches())
@settings(
    max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
async def test_any_delivery_ends_as_it_does_on_the_full_path(nats_server: Server, streams: Path, batch: Batch) -> None:
    await run_both(nats_server, streams, batch)
