"""Several processes that share one limit, as plain values: no server, and a log of its own judges."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiqueue.errors import AboveLimit
from aiqueue.limits.bucket import Bucket, Draft
from aiqueue.limits.credit import Credit
from aiqueue.limits.rules import Rule, RuleId
from aiqueue.limits.sharing import Sharing, Waiter
from aiqueue.limits.stored_use import StoredUse, Timing

from .provider import worst

WIDE, NARROW = RuleId("f.f", "*", None), RuleId("f.f", "*", "*")
T0 = 1_000_000.0


class Server:
    """The stored documents, and the time that is the same for all."""

    def __init__(self) -> None:
        self.now = T0
        self.seq = 0
        self.stored: dict[str, tuple[int, bytes]] = {}

    def write(self, name: str, expected: int, body: bytes) -> int | None:
        if self.stored.get(name, (0, b""))[0] != expected:
            return None
        self.seq += 1
        self.stored[name] = self.seq, body
        return self.seq


class Process:
    """One process: its reservations, its calls, and a clock that differs from the server's by `skew`."""

    def __init__(self, name: str, server: Server, judge: Judge, wide: Rule | None, narrow: Rule | None, skew: float):
        self.server, self.judge, self.skew = server, judge, skew
        self.sharing = Sharing(name, "key", lambda: server.now + skew)
        self.wide, self.narrow = wide, narrow
        self.credits: deque[Credit] = deque()
        self.running: deque[Credit] = deque()
        self.errors: list[Exception] = []
        self.entries: dict[Credit, int] = {}
        self.writes: list[tuple[str, Bucket, Draft, bytes]] = []

    def buckets(self) -> dict[str, Bucket]:
        return {"wide": self.sharing.wide, **{f"narrow {t}": each for t, each in self.sharing.narrow.items()}}

    def hear(self, name: str) -> None:
        bucket, stored = self.buckets().get(name), self.server.stored.get(name)
        if bucket is not None and stored is not None and stored[0] > bucket.seq:
            bucket.see(stored[0], StoredUse.parse(stored[1]))

    def reserve(self, tenant: str, cost: float, weight: float = 1.0) -> Waiter:
        self.sharing.wide.use_rule(self.wide)
        if self.narrow is not None:
            self.sharing.narrow_bucket(tenant).use_rule(self.narrow)

        def done(outcome: Credit | Exception) -> None:
            (self.credits if isinstance(outcome, Credit) else self.errors).append(outcome)  # type: ignore[arg-type]

        waiter = Waiter(tenant, 1, cost, weight, done)
        credit = self.sharing.try_acquire(self.server.now + self.skew, waiter)
        if credit is not None:
            self.credits.append(credit)
        else:
            self.sharing.add(waiter)
        return waiter

    def plan(self) -> None:
        assert not self.writes
        for draft in self.sharing.plan(self.server.now + self.skew):
            name = next(each for each, bucket in self.buckets().items() if bucket is draft.bucket)
            draft.bucket.begin(draft)
            self.writes.append((name, draft.bucket, draft, draft.document.encode()))

    def settle_writes(self, outcomes: Sequence[str]) -> None:
        for (name, bucket, draft, body), outcome in zip(self.writes, outcomes, strict=False):
            seq = self.server.write(name, draft.seq, body) if outcome != "never arrived" else None
            if outcome != "answered":
                bucket.lost(draft)
                bucket.seq = -1  # unknown: what is stored must be read
            elif seq is None:
                bucket.rejected(draft)
            else:
                bucket.stored(draft, seq)
            self.hear(name)
            if bucket.seq < 0:
                bucket.see(0, StoredUse("key"))
        self.writes = []
        self.sharing.serve(self.server.now + self.skew)

    def go(self) -> None:
        """Plan and write until nothing is left to write now."""
        for _ in range(20):
            for name in self.server.stored:
                self.hear(name)
            self.plan()
            if not self.writes:
                return
            self.settle_writes(["answered"] * len(self.writes))

    def start(self, way_s: float = 0.0) -> bool:
        """Start a call that reaches the provider `way_s` later. Return whether there was one."""
        credit = self.credits.popleft()
        if not credit.begin():
            return False
        self.judge.calls.append((self.server.now + way_s, credit.tenant, credit.cost))
        self.running.append(credit)
        self.entries[credit] = len(self.judge.calls) - 1
        self.judge.open += 1
        return True

    def end(self, cost: float | None = None) -> None:
        credit = self.running.popleft()
        credit.settle(cost)
        number = self.entries.pop(credit)
        at, tenant, reserved = self.judge.calls[number]
        self.judge.calls[number] = at, tenant, reserved if cost is None else cost
        self.judge.open -= 1


class Judge:
    """The provider's log."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, float]] = []
        self.open = 0

    def worst(self, window_s: float, tenant: str | None = None) -> tuple[int, float]:
        """The most requests, and the most cost, in any window."""
        return worst(sorted(each for each in self.calls if tenant in (None, each[1])), window_s)


def step(rnd: random.Random, processes: list[Process], server: Server, timing: Timing) -> None:
    """Something that can happen next to one of the processes."""
    process = rnd.choice(processes)
    process.sharing.lead_s = rnd.choice([0.0, 0.0, 0.5, 4.0]) * timing.slot_s
    for name in server.stored:
        if rnd.random() < 0.8:
            process.hear(name)
    for _ in range(rnd.choice([0, 0, 1, 6])):
        process.reserve(rnd.choice("abc"), float(rnd.randint(0, 40)), rnd.choice([0.5, 1.0, 3.0]))
    if process.writes and rnd.random() < 0.8:
        outcomes = ["answered"] * 20 + ["never arrived", "answer lost"]
        process.settle_writes([rnd.choice(outcomes) for _ in process.writes])
    elif not process.writes:
        process.plan()
    late = rnd.random() < 0.05
    while process.credits and rnd.random() < 0.9:
        if late:
            server.now = max(server.now, process.credits[0].start_by - process.skew)
        process.start(timing.guard_s * 0.4 if late else rnd.uniform(0, timing.guard_s * 0.4))
    while process.running and rnd.random() < 0.4:
        process.end(None if rnd.random() < 0.5 else rnd.uniform(0, process.running[0].cost))
    if process.credits and rnd.random() < 0.2:
        process.credits.popleft().release()
    if rnd.random() < 0.01:
        fresh = Process(f"p{rnd.random()}", server, process.judge, process.wide, process.narrow, process.skew)
        processes[processes.index(process)] = fresh
    slots = [slot for name in server.stored for slot in StoredUse.parse(server.stored[name][1]).slots]
    if slots and rnd.random() < 0.05:  # to the moment at which the first slot is a window ago
        server.now = max(server.now, min(slots) / 1000 + timing.window_s + rnd.choice([0.001, timing.guard_s]))
    server.now += rnd.choice([0, 0.001, 0.001, 0.1 * timing.slot_s, 0.3 * timing.slot_s, timing.slot_s])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    window_s=st.sampled_from([2.0, 6.0, 60.0, 3600.0]),
    requests=st.sampled_from([None, 3, 20, 100]),
    cost=st.sampled_from([None, 45.0, 400.0]),
    narrow=st.sampled_from([None, 2, 12]),
)
def test_no_window_is_above_a_limit_whatever_processes_do(
    seed: int, window_s: float, requests: int | None, cost: float | None, narrow: int | None
) -> None:
    rnd = random.Random(seed)
    server, judge, timing = Server(), Judge(), Timing.of(window_s)
    wide = Rule(WIDE, requests, cost, 50, window_s)
    rule = Rule(NARROW, narrow, None, None, window_s) if narrow else None
    processes = [
        Process(f"p{i}", server, judge, wide, rule, rnd.uniform(-0.04, 0.04) * timing.guard_s) for i in range(3)
    ]
    for _ in range(250):
        step(rnd, processes, server, timing)
    most, highest = judge.worst(window_s)
    assert requests is None or most <= requests
    assert cost is None or highest <= cost + 1e-6
    for tenant in "abc":
        assert narrow is None or judge.worst(window_s, tenant)[0] <= narrow


def run(
    processes: list[Process], server: Server, seconds: float, work: Any, *, step_s: float, latency_s: float = 0.05
) -> None:
    """Let time pass: each process asks for `work(process)`, and its calls end after up to `latency_s`."""
    rnd = random.Random(1)
    ends: list[tuple[float, Process, Credit]] = []
    end = server.now + seconds
    while server.now < end:
        order = list(processes)
        rnd.shuffle(order)
        for process in order:
            work(process)
            process.go()
            while process.credits:
                if process.start():
                    ends.append((server.now + rnd.uniform(0, latency_s), process, process.running.pop()))
        due = [each for each in ends if each[0] <= server.now]
        ends = [each for each in ends if each[0] > server.now]
        for _, process, credit in due:
            credit.settle()
            process.judge.open -= 1
        server.now += step_s


def backlog(process: Process, tenants: dict[str, float], cost: Any) -> None:
    for tenant, weight in tenants.items():
        for _ in range(10 - len(process.sharing.queues.get(tenant, ()))):
            process.reserve(tenant, cost(), weight)


@pytest.mark.parametrize(("low", "high"), [(20, 180), (50, 1500)])
def test_what_binds_is_used(low: int, high: int) -> None:
    rnd = random.Random(2)
    server, judge = Server(), Judge()
    rule = Rule(WIDE, 100, 10_000, None, 6.0)
    processes = [Process(f"p{i}", server, judge, rule, None, 0.0) for i in range(4)]
    run(processes, server, 20, lambda p: backlog(p, {"a": 1}, lambda: rnd.randint(low, high)), step_s=0.04)
    most, highest = judge.worst(6)
    assert most <= 100
    assert highest <= 10_000
    later = [each for each in judge.calls if each[0] > T0 + 6.2]
    used = max(len(later) / (13.8 / 6 * 100), sum(each[2] for each in later) / (13.8 / 6 * 10_000))
    assert used >= (0.95 if high == 180 else 0.9)


@pytest.mark.parametrize("spread", ["even", "uneven"])
def test_tenants_share_by_weight_however_they_are_spread_over_processes(spread: str) -> None:
    rnd = random.Random(3)
    server, judge = Server(), Judge()
    rule = Rule(WIDE, 100, 10_000, None, 6.0)
    processes = [Process(f"p{i}", server, judge, rule, None, 0.0) for i in range(4)]

    def work(process: Process) -> None:
        tenants = {"a": 2.0, "b": 1.0}
        if spread == "uneven":
            tenants = {"a": 2.0} if process is processes[0] else {"b": 1.0}
        backlog(process, tenants, lambda: rnd.randint(20, 180))

    run(processes, server, 20, work, step_s=0.04)
    cost = {t: sum(each[2] for each in judge.calls if each[1] == t and each[0] > T0 + 6.2) for t in "ab"}
    assert judge.worst(6)[0] <= 100
    assert cost["a"] / (cost["a"] + cost["b"]) == pytest.approx(2 / 3, rel=0.1)


class Pair:
    """Two processes with a backlog of one tenant each: "a", of twice the weight, was alone and has taken a window."""

    def __init__(self) -> None:
        self.server, judge = Server(), Judge()
        rule = Rule(WIDE, 1_000, None, None, 60.0)
        self.first, self.second = (Process(name, self.server, judge, rule, None, 0.0) for name in ("p0", "p1"))
        while len(self.first.credits) < 1_000:
            self.pass_time(0.0, self.first)
        self.first.credits.clear()

    def pass_time(self, seconds: float, *alive: Process) -> None:
        self.server.now += seconds
        for process in [each for each in (self.second, self.first) if each in alive] * 20:
            tenant, weight = ("a", 2.0) if process is self.first else ("b", 1.0)
            for _ in range(100 - len(process.sharing.queues.get(tenant, ()))):
                process.reserve(tenant, 0.0, weight)
            process.go()

    def begin(self) -> None:
        """Both wait until what "a" has taken is about to be free; b's process will look first."""
        for _ in range(61):
            self.pass_time(1.0, self.first, self.second)
        self.first.credits.clear()
        self.second.credits.clear()


def test_after_a_burst_little_lies_idle_and_the_first_process_that_writes_does_not_take_it_for_its_tenants() -> None:
    pair = Pair()
    pair.begin()
    for _ in range(10):
        pair.pass_time(1.0, pair.first, pair.second)
    assert len(pair.first.credits) + len(pair.second.credits) >= 900
    for _ in range(62 * 3):
        pair.pass_time(1.0, pair.first, pair.second)
    taken = len(pair.first.credits), len(pair.second.credits)
    assert taken[0] / sum(taken) == pytest.approx(2 / 3, abs=0.03)


def test_a_process_that_died_while_it_waited_holds_the_others_up_for_a_moment_only() -> None:
    pair = Pair()
    pair.begin()
    pair.pass_time(1.0)
    for _ in range(6):
        pair.pass_time(0.1, pair.first)  # the other one has died
    assert len(pair.first.credits) >= 250


def test_a_narrow_limit_leaves_no_wide_budget_idle() -> None:
    server, judge = Server(), Judge()
    processes = [Process(f"p{i}", server, judge, Rule(WIDE, 100, None, None, 6.0), None, 0.0) for i in range(4)]
    for process in processes:
        process.sharing.narrow_bucket("a").use_rule(Rule(NARROW, 20, None, None, 6.0))
    run(processes, server, 20, lambda p: backlog(p, {"a": 1, "b": 1}, lambda: 1.0), step_s=0.04)
    calls = {t: sum(each[1] == t and each[0] > T0 + 6.2 for each in judge.calls) / (13.8 / 6) for t in "ab"}
    assert judge.worst(6)[0] <= 100
    assert judge.worst(6, "a")[0] <= 20
    assert calls["a"] >= 0.9 * 20
    assert calls["a"] + calls["b"] >= 0.9 * 100


def test_calls_in_flight_are_at_most_the_limit_and_move_to_who_waits() -> None:
    server, judge = Server(), Judge()
    rule = Rule(WIDE, None, None, 10, 60.0)
    processes = [Process(f"p{i}", server, judge, rule, None, 0.0) for i in range(4)]
    most: list[int] = []
    unfair = dict.fromkeys(processes, 0.0)

    def work(process: Process) -> None:
        if process is processes[0] or server.now > T0 + 3:  # the others come when the first has taken all
            backlog(process, {"a": 1}, lambda: 1.0)
        most.append(judge.open)
        if server.now > T0 + 5:
            unfair[process] = unfair[process] + 0.02 if process.sharing.wide.running > 5 else 0.0
            assert unfair[process] <= 2

    run(processes, server, 20, work, step_s=0.02, latency_s=0.8)
    assert max(most) <= 10
    assert len(judge.calls) >= 0.8 * 20 / 0.4 * 10


def test_the_places_of_a_process_that_died_are_free_after_its_lease() -> None:
    server, judge = Server(), Judge()
    dead, other = (Process(name, server, judge, Rule(WIDE, None, None, 2, 60.0), None, 0.0) for name in "do")
    for _ in range(2):
        dead.reserve("a", 1.0)
    dead.go()
    assert dead.start()
    assert dead.start()
    other.reserve("a", 1.0)
    other.go()
    assert not other.credits
    server.now += 9.9
    other.go()
    assert not other.credits
    server.now += 0.2
    other.go()
    assert len(other.credits) == 1


def test_a_reservation_above_the_limit_is_refused_at_once_and_when_the_limit_is_lowered() -> None:
    process = Process("p", Server(), Judge(), Rule(WIDE, 10, 100.0), None, 0.0)
    with pytest.raises(AboveLimit, match=r"cost 101 is above the limit of 100 itself .* for the key 'key'"):
        process.reserve("a", 101.0)
    process.reserve("a", 90.0)
    process.reserve("a", 90.0)
    process.go()
    process.sharing.wide.use_rule(Rule(WIDE, 10, 50.0))
    process.sharing.check_all()
    assert [type(each) for each in process.errors] == [AboveLimit]
    assert not process.sharing.queues


def test_use_above_a_reservation_is_reported_and_taken_from_later_slots() -> None:
    server, judge = Server(), Judge()
    reports: list[float] = []
    process = Process("p", server, judge, Rule(WIDE, None, 100.0), None, 0.0)
    process.sharing.report = lambda _credit, above: reports.append(above)
    process.reserve("a", 10.0)
    process.go()
    assert process.start()
    server.now += 30
    process.end(80.0)
    assert reports == [70.0]
    process.reserve("a", 40.0)
    process.go()
    assert not process.credits  # 80 of 100 are used
    server.now += 32.5  # the call itself does not count any more, but what it used above its reservation does
    process.go()
    assert not process.credits
    server.now += 30
    process.go()
    assert len(process.credits) == 1


def test_a_call_that_waited_too_long_may_not_start_and_gives_back_its_reservation() -> None:
    server, judge = Server(), Judge()
    process = Process("p", server, judge, Rule(WIDE, 1), None, 0.0)
    process.reserve("a", 1.0)
    process.go()
    server.now += 3
    assert not process.start()
    process.reserve("a", 1.0)
    process.go()
    assert process.start()


@pytest.mark.parametrize("lead_s", [0.0, 0.5])
def test_a_credit_can_be_used_although_its_write_takes_longer_than_a_slot_if_that_is_known(lead_s: float) -> None:
    server, judge = Server(), Judge()
    process = Process("p", server, judge, Rule(WIDE, 1, window_s=6.0), None, 0.0)
    process.sharing.lead_s = lead_s
    process.reserve("a", 1.0)
    process.plan()
    server.now += 0.5  # five slots
    process.settle_writes(["answered"])
    assert (bool(process.credits) and process.start()) == (lead_s > 0)


def test_a_call_that_starts_as_late_as_it_may_is_in_no_window_with_the_next_one() -> None:
    server, judge, timing = Server(), Judge(), Timing.of(6.0)
    first, second = (Process(each, server, judge, Rule(WIDE, 1, None, None, 6.0), None, 0.0) for each in "ab")
    first.reserve("a", 1.0)
    first.go()
    server.now = first.credits[0].start_by
    assert first.start(way_s=timing.guard_s * 0.49)
    second.reserve("a", 1.0)
    while not second.credits:
        server.now += timing.guard_s / 100
        second.go()
    assert second.start()
    assert judge.worst(6.0)[0] == 1
    assert server.now < T0 + 6.0 + 2 * timing.slot_s + timing.guard_s


def test_what_a_lost_write_reserved_is_not_granted_and_what_it_gave_back_not_given_twice() -> None:
    server, judge = Server(), Judge()
    process = Process("p", server, judge, Rule(WIDE, 3), None, 0.0)
    for _ in range(3):
        process.reserve("a", 1.0)
    process.plan()
    process.settle_writes(["answer lost"])
    process.go()
    assert not process.credits
    server.now += 62.1
    process.go()
    assert len(process.credits) == 3
    process.credits.pop().release()
    server.now += 0.3
    process.plan()
    process.settle_writes(["answer lost"])
    for _ in range(2):
        process.reserve("a", 1.0)
    process.go()
    assert len(process.credits) == 3


def test_documents_come_back_as_they_were_stored() -> None:
    server, judge = Server(), Judge()
    processes = [Process(f"p{i}", server, judge, Rule(WIDE, 5, 1000.0, 3), None, 0.0) for i in range(2)]
    for process in processes:
        for _ in range(4):
            process.reserve("a/ü\n", 12.5)
        process.go()
    body = server.stored["wide"][1]
    document = StoredUse.parse(body)
    assert document.encode() == body
    assert document.flights
    assert document.times
    with pytest.raises(ValueError, match="version 2"):
        StoredUse.parse(body.replace(b'"v":1', b'"v":2'))
    with pytest.raises(ValueError, match="no document of limits"):
        StoredUse.parse(b"[]")
