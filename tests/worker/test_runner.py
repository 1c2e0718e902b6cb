"""The runner without a server: how deliveries are opened, and which of two is the later one."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue import codec, headers
from aiqueue.config import Settings
from aiqueue.connection import Connection
from aiqueue.lanes import Delivery, LanePull
from aiqueue.processes.quarantine import Quarantine
from aiqueue.processes.recipe import Recipe
from aiqueue.subjects import Lane
from aiqueue.topology import Topology
from aiqueue.worker.context import WorkerResources
from aiqueue.worker.runner import Runner
from aiqueue.worker.takeover import DeliveryOrder

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
}


async def runner_without_server() -> Runner:
    families = TOPOLOGY.families
    journal: Any = SimpleNamespace(connection=Connection(Settings()))  # not open: its clock is the local one
    nothing: Any = None
    return Runner(
        SimpleNamespace(journal=journal),  # type: ignore[arg-type]
        WorkerResources(journal, nothing, families),
        nothing,
        handlers={},
        worker="w",
        state=None,
        processes=nothing,
        quarantine=Quarantine(nothing, Recipe({}, {}), slots=1),
        watchdog=nothing,
        ended=lambda delivery, started_at: None,
    )


@given(
    family=st.sampled_from(["agent.tasks", "gateway.requests"]),
    count=st.sampled_from([1, 1, 1, 2, 4]),
    message_headers=st.fixed_dictionaries({}, optional=OPTIONAL),
    body=st.sampled_from(BODIES),
)
async def test_the_fast_path_opens_a_delivery_as_the_slow_one_does_and_skips_no_decision(
    family: str, count: int, message_headers: dict[str, str], body: bytes
) -> None:
    runner = await runner_without_server()
    lane = LanePull(Lane(family, "acme", "normal"), "S", "acme-normal", 30)
    message: Any = SimpleNamespace(subject=f"ai.{family}.acme.normal", headers=message_headers, data=body, reply="")
    delivery = Delivery(lane, message, 7, count, 1.7e9, 0.0)
    fast = runner.opener.open_first(delivery)
    asks = {headers.DEADLINE, headers.HISTORY} & {*message_headers}
    moves = message_headers.get(headers.PRIORITY, "normal") != "normal"
    claims = TOPOLOGY.family(family).claim
    assert (fast is not None) == (count == 1 and not asks and not moves and not claims)
    if fast is None:
        return
    slow = await runner.opener.open(delivery)
    assert fast == dataclasses.replace(slow, plain=True, history=slow.history or None)
    assert runner._outcome_without_run(delivery, slow) is None


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
