"""One peer in one round: its server, its producers, its workers, and what they took."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .adapters.verbs import ADDRESS_ENV, OVERRUN, RECORD_ENV
from .catalogue import Peer
from .processes import POLL_S, Child, Failed, Others, cpu_s, last_words, rss_mib
from .records import Ledger, Tally, percentiles
from .servers import SERVERS, Server
from .venvs import ADAPTERS, ROOT

ONE, MANY = "enqueue, one awaited at a time", "enqueue, bulk"
DRAIN, DRAIN_TWO = "drain, one worker", "drain, two workers"
CPU_PRODUCER, CPU_WORKER = "CPU of 10,000 jobs, producer", "CPU of 10,000 jobs, worker"
CPU_SERVER, CPU_ALL = "CPU of 10,000 jobs, server", "CPU of 10,000 jobs, all"
MEMORY = "memory of one worker"
WITH_ONE_WORKER = (ONE, MANY, DRAIN, CPU_PRODUCER, CPU_WORKER, CPU_SERVER, CPU_ALL, MEMORY)
PERCENTILES = (50, 95, 99)

QUIET_CORES = 0.35  # what other programs may use in a clean step
QUIET_WINDOW_S = 0.4
PREPARE_S = 60.0
PRODUCE_S = 60.0
DRAIN_S = 60.0
START_S = 30.0  # until a worker's first job
FIRST_POLL_S = 0.002  # what a worker does before its first job is seen is missing from its CPU
SETTLE_S = 0.2  # for the last acks to come through, before the CPU is read
HELD = 1.1  # a producer held its pace if it took no longer than this many times its seconds
HOPELESS = 0.8  # a worker that drains less than this part of a rate is not tried with it
WARM_UP_S = 1.0
PER = 10_000
FIRST_PACED = 1_000_000  # numbers of the paced jobs, far from the backlog's


def latency(rate: int, percentile: int) -> str:
    return f"latency at {rate}/s, p{percentile}"


@dataclass(frozen=True)
class Plan:
    """How large a comparison is. `quiet_s` is how long each step waits, at most, for other programs to pause."""

    rounds: int = 3
    jobs: int = 10_000
    rates: tuple[int, ...] = (200, 1_000)
    pace_s: float = 6.0
    quiet_s: float = 6.0


@dataclass(frozen=True)
class Figure:
    """One figure of one peer in one round, and how many cores other programs used meanwhile."""

    peer: Peer
    name: str
    value: float
    others: float


@dataclass
class Trial:
    """The steps of one peer. `run` fills `figures` and `notes`; `failures` has what went wrong, by the row's name."""

    peer: Peer
    plan: Plan
    python: Path
    directory: Path
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """All steps. A step that fails is told, and the next ones that can be tried are."""
        with self._failing(*WITH_ONE_WORKER), self._fresh("one") as bench:
            self._with_one_worker(bench)
        with self._failing(DRAIN_TWO), self._fresh("two") as bench:
            self._produce(bench, "many", self.jobs, 0)
            self._quiet()
            others = Others()
            with contextlib.ExitStack() as workers:
                for number in (1, 2):
                    workers.enter_context(bench.working(number))
                tally = self._drained(bench, range(self.jobs), DRAIN_TWO)
                self._keep(DRAIN_TWO, tally.rate(), others)

    @property
    def jobs(self) -> int:
        return max(2, round(self.plan.jobs * self.peer.share))

    @property
    def singles(self) -> int:
        return max(1, self.jobs // 3)

    def _with_one_worker(self, bench: Bench) -> None:
        singles, jobs = self.singles, self.jobs
        self._quiet()
        others = Others()
        told = self._produce(bench, "one", singles, 0)
        self._keep(ONE, singles / told["seconds"], others)
        self._quiet()
        others, before = Others(), cpu_s(*bench.server.pids)
        told = self._produce(bench, "many", jobs, singles)
        storing = (cpu_s(*bench.server.pids) - before) / jobs
        producing = told["cpu_s"] / jobs
        self._keep(MANY, jobs / told["seconds"], others)
        self._keep(CPU_PRODUCER, producing * PER, others)
        self._quiet()
        others = Others()
        with bench.working(1) as worker:
            backlog = range(singles + jobs)
            bench.first()
            working, serving = cpu_s(worker.pid), cpu_s(*bench.server.pids)
            tally = self._drained(bench, backlog, DRAIN)
            time.sleep(SETTLE_S)
            working = (cpu_s(worker.pid) - working) / len(backlog)
            serving = storing + (cpu_s(*bench.server.pids) - serving) / len(backlog)
            rate = tally.rate()
            self._keep(DRAIN, rate, others)
            self._keep(CPU_WORKER, working * PER, others)
            self._keep(CPU_SERVER, serving * PER, others)
            self._keep(CPU_ALL, (producing + working + serving) * PER, others)
            self._keep(MEMORY, rss_mib(worker.pid), others)
            for number, each in enumerate(self.plan.rates, 1):
                with self._failing(*(latency(each, percentile) for percentile in PERCENTILES)):
                    self._paced(bench, each, rate, FIRST_PACED * number)

    def _paced(self, bench: Bench, rate: int, drained: float, first: int) -> None:
        """The same worker under an open loop."""
        if drained < rate * HOPELESS:
            self.notes.append(f"{self.peer.name}: {rate}/s is not tried, one worker drains {drained:,.0f}/s")
            return
        self._quiet()
        others = Others()
        told = self._produce(bench, "pace", rate, self.plan.pace_s, first)
        sent = round(told["count"])
        tally = self._drained(bench, range(first, first + sent), f"{rate}/s")
        if told["seconds"] > self.plan.pace_s * HELD:
            self.notes.append(
                f"{self.peer.name}: at {rate}/s its producer sent {sent:,} jobs in {told['seconds']:.1f} s"
            )
        waits = tally.waits_ms(first + round(rate * WARM_UP_S))
        if len(waits) < 2:
            raise Failed(f"{sent} jobs in {self.plan.pace_s:g} s are too few for percentiles")
        for percentile, value in zip(PERCENTILES, percentiles(waits, *PERCENTILES), strict=True):
            self._keep(latency(rate, percentile), value, others)

    def _produce(self, bench: Bench, verb: str, *numbers: float) -> dict[str, float]:
        within_s = self.plan.pace_s * OVERRUN + PREPARE_S if verb == "pace" else PRODUCE_S
        return bench.told(verb, *map(str, numbers), within_s=within_s)

    def _drained(self, bench: Bench, numbers: range, what: str) -> Tally:
        """Wait for these jobs' runs. Raises Failed where one is missing in the end."""
        tally = bench.drained(numbers)
        if tally.surplus:
            self.notes.append(f"{self.peer.name}: {what}: {tally.surplus}")
        if tally.lacking:
            raise Failed(f"{what}: {tally.lacking} within {DRAIN_S:g} s")
        return tally

    def _keep(self, name: str, value: float, others: Others) -> None:
        self.figures.append(Figure(self.peer, name, value, others.cores()))

    def _quiet(self) -> None:
        """Wait until other programs pause, or time is up: the step's own measure says how it was."""
        deadline = time.monotonic() + self.plan.quiet_s
        while time.monotonic() < deadline:
            others = Others()
            time.sleep(QUIET_WINDOW_S)
            if others.cores() <= QUIET_CORES:
                return

    @contextlib.contextmanager
    def _failing(self, *names: str) -> Iterator[None]:
        """Take down what failed, for those of these rows that have no figure yet."""
        try:
            yield
        except Failed as error:
            had = {figure.name for figure in self.figures}
            self.failures.update({name: str(error) for name in names if name not in had})

    @contextlib.contextmanager
    def _fresh(self, name: str) -> Iterator[Bench]:
        directory = self.directory / name
        directory.mkdir(parents=True)
        directory.chmod(0o711)  # a server that runs as another user passes through it
        server = SERVERS[self.peer.server](directory / "server")
        try:
            server.start()
            bench = Bench(self.peer, self.python, server, directory)
            bench.do("prepare", within_s=PREPARE_S)
            yield bench
        finally:
            server.end()


class Bench:
    """A server with a peer's programs on it."""

    def __init__(self, peer: Peer, python: Path, server: Server, directory: Path) -> None:
        self.peer, self.server = peer, server
        self.ledger = Ledger(directory / "ledger")
        self._python, self._directory = python, directory
        self._workers: list[Child] = []
        self._env = {
            **peer.env,
            ADDRESS_ENV: server.address,
            RECORD_ENV: str(self.ledger.path),
            "PYTHONPATH": f"{ADAPTERS}:{ROOT}" if peer.venv == "aiqueue" else str(ADAPTERS),
            "PYTHONUNBUFFERED": "1",
        }
        if peer.venv == "aiqueue":
            self._env["AIQUEUE_URL"] = server.address

    def do(self, *arguments: str, within_s: float) -> Path:
        """Run a verb of the adapter to its end; its output. Raises Failed."""
        log = self._directory / f"{arguments[0]}.log"
        log.unlink(missing_ok=True)
        child = Child(
            [self._python, ADAPTERS / f"{self.peer.adapter}.py", *arguments], self._env, log, cwd=self._directory
        )
        try:
            child.wait(within_s)
        except Failed as error:
            raise Failed(f"{arguments[0]}: {error}") from error
        finally:
            child.end(0)
        return log

    def told(self, *arguments: str, within_s: float) -> dict[str, float]:
        """What a producer says of itself."""
        log = self.do(*arguments, within_s=within_s)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('{"count"')]
        if not said:
            raise Failed(f"{arguments[0]}: it said nothing of itself: {last_words(log)}")
        told: dict[str, float] = json.loads(said[-1])
        return told

    @contextlib.contextmanager
    def working(self, number: int) -> Iterator[Child]:
        """A worker, until it is left."""
        words = {"bin": self._python.parent, "adapter": ADAPTERS / f"{self.peer.adapter}.py", "number": number}
        arguments = [str(self._python), *(each.format(**words) for each in self.peer.worker)]
        worker = Child(arguments, self._env, self._directory / f"worker{number}.log", cwd=self._directory)
        self._workers.append(worker)
        try:
            yield worker
        finally:
            self._workers.remove(worker)
            worker.end()

    def first(self) -> None:
        """Wait for the first job that a worker takes."""
        deadline = time.monotonic() + START_S
        while not len(self.ledger):
            self._all_alive()
            if time.monotonic() > deadline:
                raise Failed(f"no job was taken within {START_S:g} s: {last_words(self._workers[0].log)}")
            time.sleep(FIRST_POLL_S)

    def _all_alive(self) -> None:
        for worker in self._workers:
            if worker.code is not None:
                raise Failed(f"a worker ended with {worker.code}: {last_words(worker.log)}")

    def drained(self, numbers: range) -> Tally:
        """Wait until all of these jobs have run, DRAIN_S at most."""
        deadline, enough = time.monotonic() + DRAIN_S, 0
        while True:
            over = time.monotonic() > deadline
            if over or len(self.ledger) >= enough:
                try:
                    runs = self.ledger.runs()
                except ValueError as error:
                    raise Failed(str(error)) from error
                tally = Tally.of(runs, numbers)
                if over or not tally.missing:
                    return tally
                enough = len(runs) + tally.missing  # no need to look before so many have begun
            self._all_alive()
            time.sleep(POLL_S)
