"""What goes wrong, and when: a schedule of faults that one seed makes the same every time."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiqueue.errors import BadInput
from aiqueue.units import seconds

from .children import Child, Workers
from .places import Disk, Link
from .servers import Cluster, NatsProcess

JITTER = 0.2  # a fault comes up to so much of its period early or late
HOLD_S = {"server-kill": 1.0, "server-stop": 8.0, "worker-stop": 8.0, "leader-kill": 5.0, "leader-stop": 8.0,
          "disk-full": 3.0, "link-cut": 8.0}  # fmt: skip
KINDS = ("worker-kill", "worker-stop", "server-kill", "server-stop", "leader-kill", "leader-stop", "step-down",
         "disk-full", "link-cut")  # fmt: skip
LETTERS = dict(zip(KINDS, "wszpLPdfc", strict=True))  # how each is marked below a plot


@dataclass(frozen=True)
class Plan:
    """One of `kinds`, chosen anew each time, about every `period_s` seconds; what is taken away is given back after
    `hold_s` (None: what is usual for the kind).
    """

    kinds: tuple[str, ...]
    period_s: float
    hold_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Plan:
        """``KIND[|KIND…]:PERIOD[:HOLD]``, such as ``leader-kill|leader-stop:20s:5s``. Raises BadInput."""
        kinds, _, rest = text.partition(":")
        period, _, hold = rest.partition(":")
        names = tuple(kinds.split("|"))
        unknown = [name for name in names if name not in KINDS]
        if unknown or not period:
            raise BadInput(f"fault {text!r}: write KIND:PERIOD[:HOLD], KIND being one of {', '.join(KINDS)}")
        try:
            return cls(names, seconds(_number(period)), seconds(_number(hold)) if hold else None)
        except ValueError as error:
            raise BadInput(f"fault {text!r}: {error}") from None


def _number(text: str) -> str | float:
    return float(text) if text.replace(".", "", 1).isdigit() else text


@dataclass
class Fault:
    """What was done: `at` and, where something was given back, `until` (for a server: when it was ready again), in
    monotonic seconds. `victim` is the process id of a worker, else 0.
    """

    kind: str
    at: float
    until: float | None = None
    victim: int = 0
    what: str = ""

    def plain(self, begun: float) -> dict[str, Any]:
        until = None if self.until is None else round(self.until - begun, 3)
        return {"kind": self.kind, "at_s": round(self.at - begun, 3), "until_s": until, "what": self.what}


class Field(Protocol):
    """What the nemesis may harm."""

    servers: list[NatsProcess]
    cluster: Cluster | None
    workers: Workers
    disk: Disk | None
    link: Link | None

    @property
    def stream(self) -> str:
        """Whose leader is harmed."""


@dataclass(order=True)
class _Due:
    at: float
    number: int
    do: Callable[[], None] = field(compare=False)


class Nemesis:
    """Call `step` often, in the thread that started the servers, and `calm` at the end."""

    def __init__(self, plans: Sequence[Plan], target: Field, *, seed: int) -> None:
        self._random = random.Random(seed)
        self._target = target
        self._due: list[_Due] = []
        self._count = 0
        self._back: dict[int, Callable[[], None]] = {}  # what is to be given back, by the fault's number
        self.faults: list[Fault] = []
        self.skipped = 0  # faults that found nothing to harm
        for plan in plans:
            self._plan(plan, time.monotonic())

    @property
    def idle(self) -> bool:
        """Whether nothing is planned."""
        return not self._due

    def step(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        while self._due and self._due[0].at <= now:
            heapq.heappop(self._due).do()

    def calm(self) -> None:
        """No more faults; all that was taken away is given back."""
        self._due.clear()
        for number in list(self._back):
            self._give_back(number)

    def _at(self, at: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, _Due(at, self._count, do))

    def _plan(self, plan: Plan, begun: float) -> None:
        moved = plan.period_s * self._random.uniform(-JITTER, JITTER)
        kind = self._random.choice(plan.kinds)
        which = self._random.random()

        def do() -> None:
            self._harm(kind, HOLD_S.get(kind, 0.0) if plan.hold_s is None else plan.hold_s, which)
            self._plan(plan, max(begun + plan.period_s, time.monotonic() - plan.period_s * JITTER))

        self._at(begun + plan.period_s + moved, do)

    def _harm(self, kind: str, hold_s: float, which: float) -> None:
        fault = Fault(kind, time.monotonic())
        harm = {
            "worker-kill": self._kill_worker, "worker-stop": self._stop_worker, "server-kill": self._kill_server,
            "server-stop": self._stop_server, "leader-kill": self._kill_leader, "leader-stop": self._stop_leader,
            "step-down": self._step_down, "disk-full": self._fill_disk, "link-cut": self._cut_link,
        }[kind]  # fmt: skip
        undo = harm(fault, which)
        if not fault.what:
            self.skipped += 1
            return
        self.faults.append(fault)
        if undo is not None:
            number = len(self.faults) - 1
            self._back[number] = undo
            self._at(fault.at + hold_s, lambda: self._give_back(number))

    def _give_back(self, number: int) -> None:
        undo = self._back.pop(number, None)
        if undo is not None:
            undo()
            self.faults[number].until = time.monotonic()

    # -- the faults: each names what it has harmed, or nothing, and returns how to give that back

    def _kill_worker(self, fault: Fault, which: float) -> None:
        child = self._worker(which)
        if child is None:
            return
        fault.victim, fault.what = child.pid, f"worker {child.pid}"
        fault.at = time.monotonic()
        self._target.workers.kill(child)
        self._target.workers.start()

    def _stop_worker(self, fault: Fault, which: float) -> Callable[[], None] | None:
        child = self._worker(which)
        if child is None:
            return None
        fault.victim, fault.what = child.pid, f"worker {child.pid}"
        child.stop()
        return lambda: child.resume() if child.code is None else None

    def _worker(self, which: float) -> Child | None:
        found = [each for each in self._target.workers.alive if not each.stopped and each.code is None]
        return found[int(which * len(found))] if found else None

    def _kill_server(self, fault: Fault, which: float) -> Callable[[], None] | None:
        return self._kill(fault, self._server(which))

    def _stop_server(self, fault: Fault, which: float) -> Callable[[], None] | None:
        return self._stop(fault, self._server(which))

    def _kill_leader(self, fault: Fault, which: float) -> Callable[[], None] | None:
        return self._kill(fault, self._leader())

    def _stop_leader(self, fault: Fault, which: float) -> Callable[[], None] | None:
        return self._stop(fault, self._leader())

    def _kill(self, fault: Fault, server: NatsProcess | None) -> Callable[[], None] | None:
        if server is None:
            return None
        fault.what = f"server {server.directory.name}"
        fault.at = time.monotonic()
        server.kill()
        return server.start

    def _stop(self, fault: Fault, server: NatsProcess | None) -> Callable[[], None] | None:
        if server is None:
            return None
        fault.what = f"server {server.directory.name}"
        server.pause()
        return server.resume

    def _server(self, which: float) -> NatsProcess | None:
        """One at a time: two of three would be no fault that a queue can work through."""
        servers = self._target.servers
        if any(each.pid is None or each.paused for each in servers):
            return None
        return servers[int(which * len(servers))]

    def _leader(self) -> NatsProcess | None:
        cluster = self._target.cluster
        if cluster is None or self._server(0) is None:
            return None
        name = cluster.leader_of(self._target.stream)
        return cluster.node(name) if name else None

    def _step_down(self, fault: Fault, which: float) -> None:
        """Of the stream, or of one of its consumers."""
        cluster, stream = self._target.cluster, self._target.stream
        if cluster is None or self._leader() is None:
            return
        try:
            consumers = cluster.ask(f"CONSUMER.NAMES.{stream}").get("consumers") or []
            chosen = ["", *consumers][int(which * (len(consumers) + 1))]
            fault.at = time.monotonic()
            cluster.step_down(stream, chosen)
        except OSError:
            return
        fault.what = f"leader of {chosen or stream}"

    def _fill_disk(self, fault: Fault, which: float) -> Callable[[], None] | None:
        disk = self._target.disk
        if disk is None:
            return None
        fault.what = "disk"
        disk.fill()

        def free() -> None:
            disk.free()
            for server in self._target.servers:  # nats-server writes no more after ENOSPC, room or not, until then
                server.kill()
                server.start()

        return free

    def _cut_link(self, fault: Fault, which: float) -> Callable[[], None] | None:
        link = self._target.link
        if link is None:
            return None
        fault.what = "link"
        link.cut()
        return link.heal
