"""The runner without a server: how deliveries are opened, and which of two is the later one."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue import codec, headers
from aiqueue.attempt import Handlers
from aiqueue.config import Settings
from aiqueue.connection import Connection, block
from aiqueue.connection.frames import batch_frames
from aiqueue.connection.nats_client import WireMessage
from aiqueue.enqueue import headers_of_job, with_header
from aiqueue.job import untyped
from aiqueue.lanes import Delivery, LanePull
from aiqueue.processes.quarantine import KILLED, Quarantine
from aiqueue.processes.recipe import Recipe
from aiqueue.subjects import Lane
from aiqueue.topology import Family, Topology
from aiqueue.worker.context import WorkerResources
from aiqueue.worker.opening import REASONS
from aiqueue.worker.runner import Runner
from aiqueue.worker.takeover import DeliveryOrder

from ..support import ROOT

TOPOLOGY = Topology.load()
BODIES = (codec.encode({"goal": "x", "task_id": "t-1"}), b'{"goal": "x", "task_id": 7}', b"[1]", b"\xff", b"")
OPTIONAL = {
    headers.KIND: st.sampled_from(["task", "", "k" * 200]),
    headers.JOB_ID: st.sampled_from(["j-1", "not a token!"]),
    headers.CONTENT_TYPE: st.sampled_from([codec.CBOR, codec.JSON, "text/plain"]),
    headers.PRIORITY: st.sampled_from(["normal", "low", "urgent"]),
    headers.DEADLINE: st.sampled_from(["1", "99999999999999", "soon"]),
    headers.HISTORY: st.sampled_from(['[{"attempt": 1}]', "[]"]),
    headers.REASON: st.sampled_from(["attempts", "x"]),
    "task_id": st.sampled_from(["own", ""]),
    "X-Own": st.just("kept"),
    "Nats-Batch-Id": st.just("b-1"),
    "Nats-Batch-Sequence": st.sampled_from(["1", "x"]),
    "Nats-Batch-Commit": st.just("1"),
}


async def runner_without_server(families: Mapping[str, Family] = TOPOLOGY.families) -> Runner:
    journal: Any = SimpleNamespace(connection=Connection(Settings()))  # not open: its clock is the local one
    nothing: Any = None
    documents: Any = SimpleNamespace(inline_max=256 * 1024)
    return Runner(
        SimpleNamespace(journal=journal),  # type: ignore[arg-type]
        WorkerResources(journal, documents, families, "AI_CHECKPOINTS", nothing),
        nothing,
        handlers=Handlers(),
        worker="w",
        state=None,
        processes=nothing,
        quarantine=Quarantine(nothing, Recipe({}, {}), slots=1),
        watchdog=nothing,
        ended=lambda delivery, started_at: None,
    )


def library_headers(**changed: str) -> dict[str, str]:
    """The headers of a plain job, in the order in which `enqueue` writes them."""
    fields = {
        headers.MSG_ID: "agent.tasks/acme/j-1", headers.CONTENT_TYPE: codec.CBOR, headers.KIND: "task",
        headers.JOB_ID: "j-1", headers.PRIORITY: "normal", "task_id": "j-1",
    }  # fmt: skip
    return {**fields, **changed}


@given(
    family=st.sampled_from(["agent.tasks", "gateway.requests"]),
    lane=st.sampled_from(["acme", "*"]),
    count=st.sampled_from([1, 1, 1, 2, 4]),
    message_headers=st.one_of(
        st.fixed_dictionaries({}, optional=OPTIONAL),
        st.fixed_dictionaries({}, optional=OPTIONAL).map(lambda some: library_headers(**some)),
        st.permutations([*library_headers().items()]).map(dict),
        st.just(library_headers()),
    ),
    body=st.sampled_from(BODIES),
)
async def test_the_fast_path_opens_a_delivery_as_the_slow_one_does_and_skips_no_decision(
    family: str, lane: str, count: int, message_headers: dict[str, str], body: bytes
) -> None:
    runner = await runner_without_server()
    pull = LanePull(Lane(family, lane, "normal"), "S", f"{lane}-normal", 30)
    encoded = block(message_headers) if message_headers else None
    delivery = Delivery(
        pull, WireMessage(f"ai.{family}.acme.normal".encode(), b"", body, encoded), 7, count, 1.7e9, 0.0
    )
    fast = runner.opener.open_first(delivery)
    claims, is_map = TOPOLOGY.family(family).claim, body == BODIES[0]
    if message_headers == library_headers() and [*message_headers] == [*library_headers()]:
        assert (fast is not None) == (count == 1 and not claims and is_map)
    if fast is None:
        return
    assert count == 1
    assert not claims
    slow = await runner.opener.open(delivery)
    assert runner.gate.find_outcome(delivery, slow) is None
    slow.plain, slow.history = True, slow.history or None
    names = [each.name for each in dataclasses.fields(slow)]
    assert {name: getattr(fast, name) for name in names} == {name: getattr(slow, name) for name in names}
    assert (fast.family, delivery.own_lane) == (slow.family, Lane(family, "acme", "normal"))
    assert (delivery.run, delivery.enqueued_at) == (7, 1.7e9)


def test_the_headers_of_every_plain_job_that_enqueue_writes_are_read_as_such() -> None:
    for family in TOPOLOGY.families.values():
        if not family.priorities:
            continue
        message = untyped("a-kind", family.name)()
        lane = Lane(family.name, "acme", family.priorities[0])
        written = headers_of_job(family, message, lane, "j-1")
        assert headers.read_plain(block(written)) == ("a-kind", "j-1", lane.priority, "application/cbor")
        assert headers.read_plain(block({**written, "X-Own": "1"})) is None
        assert headers.read_plain(block({**written, headers.DEADLINE: "123"})) is None
        assert headers.read_plain(with_header(block(written), headers.UNIQUE, "a%20b")) is None


@pytest.mark.parametrize("content_type", ["application/cbor", "application/json"])
@pytest.mark.parametrize("last", [True, False])
def test_the_headers_of_a_job_that_was_stored_in_an_atomic_batch_are_those_of_a_plain_job(
    last: bool, content_type: str
) -> None:
    written = library_headers() | {headers.CONTENT_TYPE: content_type}
    plain = headers.read_plain(block(written))
    sent = [SimpleNamespace(subject="ai.agent.tasks.acme.normal", block=block(written), body=b"")] * 1_000
    frames = batch_frames(b"n" * 64, sent, 1, b"_INBOX.1", last=last)
    stored = [each.partition(b"\r\n")[2].removesuffix(b"\r\n") for each in re.split(rb"(?m)^(?=HPUB )", frames) if each]
    assert plain is not None
    assert [headers.read_plain(each) for each in stored] == [plain] * 1_000


@pytest.mark.parametrize(
    "data",
    [None, 1, {}, {"delivery": None}, {"delivery": [1, 2]}, {"delivery": [1, "x", 2]}, {"delivery": [1, 2, 3, 4]}],
)
def test_a_started_entry_of_another_form_has_no_delivery_order(data: Any) -> None:
    assert DeliveryOrder.of_entry(data) is None


def test_deliveries_are_ordered_by_message_then_consumer_then_count() -> None:
    orders = [DeliveryOrder(*each) for each in ((1, 5.0, 1), (1, 5.0, 2), (1, 6.0, 1), (2, 0, 1))]
    assert all(earlier < later for earlier, later in itertools.pairwise(orders))
    for each in orders:
        assert DeliveryOrder.of_entry(codec.decode(codec.encode({"delivery": list(each)}), codec.CBOR)) == each


def reasons_in_code() -> set[str]:
    """The reasons with which jobs become dead letters, where they are written as texts. Mail has reasons of its own."""
    found = set()
    for room in ("attempt", "processes", "worker"):
        for file in (ROOT / "aiqueue" / room).glob("*.py"):
            calls = [each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.Call)]
            for call in calls:
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                given = call.args[:1] if name == "Refused" else call.args if name == "_dead_letter" else []
                texts = [each.value for each in given if isinstance(each, ast.Constant)]
                found |= {each for each in texts if isinstance(each, str)}
    return found


def test_a_job_that_waits_for_space_for_its_dead_letter_keeps_any_reason_that_it_may_have() -> None:
    """A reason that is not known then counts as somebody else's header, and the job would run again."""
    written = reasons_in_code()
    assert {"attempts", "cost", "rejected"} <= written
    assert written | {KILLED} == REASONS


def test_the_wire_contract_names_each_reason_of_a_dead_letter() -> None:
    text = (ROOT / "docs/reference/wire/parked.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `Aiq-Reason` |")]
    assert {each for each in REASONS if f"`{each}`" not in row} == set()
