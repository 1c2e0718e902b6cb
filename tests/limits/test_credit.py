"""What is owed for the calls of a batch, as plain values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiqueue.limits import BatchCall, Credit, CreditBatch
from aiqueue.limits.bucket import Bucket

NOW, SLOT = 1_000_000.0, 1_000_000_000
WAYS = [
    "begin",
    "price",
    "price and settle",
    "price and settle twice",
    "price and release",
    "give back",
    "single",
    "late",
]


class Owner:
    """Grants credits whose calls are never late, unless `rules_version` changes."""

    def __init__(self) -> None:
        self.rules_version = 0
        self.reported = 0.0

    def clock(self) -> float:
        return NOW

    def paused_until(self, tenant: str) -> float:
        return 0.0

    def changed(self) -> None:
        """Nobody waits."""

    def report(self, credit: Credit | BatchCall, above: float) -> None:
        assert above > 0
        self.reported += above


def use_call(batch: CreditBatch, way: str, cost: float, used: float) -> tuple[int, float]:
    """Take a call and do something with it. Return how many calls began, and what they have used."""
    batch.take()
    if way == "give back":
        batch.give_back()
        return 0, 0.0
    if way == "begin":
        return int(batch.begin()), 0.0
    call = None if way == "single" else batch.price(cost)
    if call is None or way == "late":
        single = call.single() if call is not None else batch.single()
        assert single.begin()
        single.settle(used)
        return 1, used
    if way == "price and release":
        call.release()
        return 0, 0.0
    if not call.begin():
        return 0, 0.0
    for each in {"price and settle": [used], "price and settle twice": [cost, used]}.get(way, []):
        call.settle(each)
    call.release()  # has begun: no more
    return 1, cost if way == "price" else used


@given(
    calls=st.integers(2, 6),
    total=st.floats(0, 100),
    steps=st.lists(st.tuples(st.sampled_from(WAYS), st.floats(0, 60), st.floats(0, 60)), max_size=6),
    expires=st.booleans(),
)
def test_a_batch_keeps_what_its_calls_have_used_and_gives_back_all_else(
    calls: int, total: float, steps: list[tuple[str, float, float]], expires: bool
) -> None:
    owner, bucket = Owner(), Bucket("p", "key")
    bucket.running = 1
    batch = CreditBatch(Credit(owner, "acme", calls, total, [(bucket, SLOT)]))
    begun, used = 0, 0.0
    for number, (way, cost, each) in enumerate(steps[:calls]):
        if expires and number == 3:
            owner.rules_version += 1  # no call that is taken from now on may begin
        more, costs = use_call(batch, way, cost, each) if owner.rules_version == 0 else _use_late(batch, cost)
        begun, used = begun + more, used + costs
    if batch.left:
        batch.release()
    assert calls + sum(requests for requests, _ in bucket.owed.values()) == begun
    kept = total + sum(cost for _, cost in bucket.owed.values()) + bucket.extra[1]
    assert abs(kept - used) < 1e-6
    assert bucket.running == 0


def _use_late(batch: CreditBatch, cost: float) -> tuple[int, float]:
    batch.take()
    call = batch.price(cost)
    if call is None:
        batch.give_back()
    else:
        assert not call.begin()
    return 0, 0.0


def test_what_a_call_uses_above_its_part_is_reported_once() -> None:
    owner, bucket = Owner(), Bucket("p", "key")
    batch = CreditBatch(Credit(owner, "acme", 2, 20.0, [(bucket, SLOT)]))
    batch.take()
    call = batch.price(10.0)
    assert call is not None
    assert call.begin()
    call.settle(25.0)
    call.settle(25.0)
    assert owner.reported == 15.0
    assert bucket.extra[1] == 15.0
