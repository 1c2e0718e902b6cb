"""One run of the harness: servers, workers and producers as child processes, a nemesis, and the checker's verdict."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.connection import Stored
from aiqueue.errors import NotFound
from aiqueue.journal import entry_from_stored
from aiqueue.topology import provision

from . import app, checker, records
from .checker import Evidence, Recovery, Verdict, Word
from .children import Child, Workers
from .nemesis import Fault, Nemesis, Plan
from .places import Disk, Link
from .records import Run
from .servers import Account, Cluster, NatsProcess

PARKED = "AI_PARKED"
STEP_S = 0.02
BROKEN_S = 2.0  # how long the broken worker may be silent with an empty stream, before it is taken to have ended
STUCK_S = 120.0  # how long after the last fault the jobs may take to be done, without any progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do. `settle_s`: how long the jobs may take, once the producers have ended, without any of them ending."""

    servers: int = 1
    jobs: int = 10_000
    rate: float = 1_000.0
    producers: int = 1
    workers: int = 2
    concurrency: int = 50
    handler_ms: float = 5.0
    ack_wait_s: float = 5.0
    tenants: int = 3
    plans: tuple[Plan, ...] = ()
    seed: int = 1
    broken: bool = False
    enqueue_timeout_s: float = 60.0
    settle_s: float = STUCK_S
    disk_mib: int = 96
    stream_bytes: str = "1GiB"  # what the stream may hold before it refuses jobs
    sync_always: bool = False
    keep: Path | None = None  # where to leave the logs

    @property
    def kinds(self) -> set[str]:
        return {kind for plan in self.plans for kind in plan.kinds}


@dataclass
class Report:
    """What was done and what came of it. Times in `faults` and `runs` are monotonic; `begun` is the first of them."""

    options: Options
    begun: float
    took_s: float
    verdict: Verdict
    recoveries: list[Recovery]
    faults: list[Fault]
    skipped: int
    surprises: list[str]
    runs: list[Run] = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """The figures, without the runs."""
        return {
            "seed": self.options.seed,
            "took_s": round(self.took_s, 1),
            **self.verdict.plain(),
            "recoveries": [each._asdict() for each in self.recoveries],
            "faults": [fault.plain(self.begun) for fault in self.faults],
            "skipped": self.skipped,
            "surprises": self.surprises,
        }


def run(options: Options, say: Callable[[str], None] = lambda _: None) -> Report:
    """Run it, and leave no process and no file behind, whatever happens. Call it in the main thread: the servers end
    with the thread that started them. Raises places.Impossible where this machine lets us make no such fault.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by(signal.SIGTERM))
        directory = Path(tempfile.mkdtemp(prefix="aiqueue-chaos-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        return _Soak(options, directory, stack, say).run()


@contextlib.contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Have a request to end run the clean-up."""

    def end(*_: object) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, former)


class _Soak:
    def __init__(
        self, options: Options, directory: Path, stack: contextlib.ExitStack, say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._directory = directory
        self._say = say
        self.stream = app.STREAM
        self.disk: Disk | None = None
        self.link: Link | None = None
        self.cluster: Cluster | None = None
        if "disk-full" in options.kinds:
            self.disk = stack.enter_context(Disk(directory / "disk", options.disk_mib))
        if "link-cut" in options.kinds:
            self.link = stack.enter_context(Link())
        self.servers = self._servers(stack)
        self._jobs_log, self._said_log = directory / "jobs.log", directory / "enqueued.log"
        (directory / "streams").mkdir()
        (directory / "streams" / "chaos_jobs.toml").write_text(app.declared(options.ack_wait_s, options.stream_bytes))
        under_test = ["aiqueue", "work", f"--concurrency={options.concurrency}", "--log-level=warning"]
        target = ["benchmarks.chaos.app:worker"]
        program = ["-m", "benchmarks.chaos.broken"] if options.broken else ["-m", *under_test, *target]
        self.workers = Workers(
            program,
            self._environment(),
            directory / "workers.log",
            count=options.workers,
            prefix=self.link.prefix if self.link else (),
        )
        self._producers: list[Child] = []
        if options.keep is not None:
            stack.callback(self._keep, options.keep)
        stack.callback(self._kill_children)

    def _servers(self, stack: contextlib.ExitStack) -> list[NatsProcess]:
        place = self.disk.directory if self.disk else self._directory
        storage = "sync_interval: always" if self._options.sync_always else ""
        if self._options.servers > 1:
            self.cluster = Cluster(place / "cluster", size=self._options.servers, storage=storage)
            stack.callback(self.cluster.end)
            servers = self.cluster.nodes
        else:
            single = NatsProcess(place / "server", storage=storage)
            stack.callback(single.kill)
            servers = [single]
        for server in servers:
            server.host = self.link.host if self.link else server.host
        return servers

    @property
    def _account(self) -> Account:
        return self.cluster.account if self.cluster else self.servers[0].account

    def _environment(self) -> dict[str, str]:
        return {
            app.LOG: str(self._jobs_log),
            app.HANDLER_MS: str(self._options.handler_ms),
            "AIQUEUE_STREAMS": str(self._directory / "streams"),
            "AIQUEUE_PROFILE": "cluster" if self._options.servers > 1 else "single",
        }

    # -- the run

    def run(self) -> Report:
        options = self._options
        if self.cluster is not None:
            self.cluster.start()
        else:
            self.servers[0].start()
        account = self._account
        told = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}
        self.workers.env.update(told)
        asyncio.run(self._declare())
        if self.cluster is not None:
            self.cluster.wait_ready([app.STREAM, "AI_RESULTS"], current=True)
        self._say(f"{len(self.servers)} server(s) ready; {options.jobs:,} jobs at {options.rate:,.0f}/s")
        self.workers.start()
        begun = time.monotonic()
        self._produce(told)
        nemesis = self._watch(begun)
        nemesis.calm()
        left = self._settle()
        took_s = time.monotonic() - begun
        if options.broken:
            self.workers.kill_all()  # it knows no drain
        else:
            self.workers.end()
        self._say("reading journals and dead letters")
        journals, dead = asyncio.run(self._read())
        found = Evidence(
            list(records.read(self._said_log)),
            records.runs(self._jobs_log),
            nemesis.faults,
            None if options.broken else journals,
            dead,
            left,
        )
        return Report(
            options, begun, took_s, checker.check(found), checker.recoveries(found.runs, found.faults),
            nemesis.faults, nemesis.skipped, self.workers.surprises, list(found.runs),
        )  # fmt: skip

    def _produce(self, told: dict[str, str]) -> None:
        options, first = self._options, 0
        for place in range(options.producers):
            count = options.jobs // options.producers + (place < options.jobs % options.producers)
            words = [self._said_log, first, count, options.rate / options.producers, options.tenants]
            arguments = ["-m", "benchmarks.chaos.producer", *map(str, words), str(options.enqueue_timeout_s)]
            child = Child(arguments, {**self._environment(), **told}, self._directory / "producers.log")
            self._producers.append(child)
            first += count

    def _watch(self, begun: float) -> Nemesis:
        """Let a nemesis do its work from the first run on, while there are jobs to be enqueued."""
        options = self._options
        longest_s = 3 * options.jobs / options.rate + 2 * options.enqueue_timeout_s
        nemesis = Nemesis((), self, seed=options.seed)
        while any(child.code is None for child in self._producers):
            if time.monotonic() > begun + longest_s:
                self.workers.surprises.append(f"the producers were ended after {longest_s:.0f} s")
                return nemesis
            if nemesis.idle and options.plans and self._jobs_log.exists():
                nemesis = Nemesis(options.plans, self, seed=options.seed)
            nemesis.step()
            self.workers.start()
            time.sleep(STEP_S)
        codes = [child.code for child in self._producers]
        if any(codes):
            raise RuntimeError(f"producers ended with {codes}: {_tail(self._directory / 'producers.log')}")
        return nemesis

    def _settle(self) -> int:
        """Wait until no job is stored any more; how many are, when nothing has moved for `settle_s`."""
        progress, since = (-1, -1), time.monotonic()
        while True:
            self.workers.start()
            left = self._stored()
            size = self._jobs_log.stat().st_size if self._jobs_log.exists() else 0
            if left == 0 and not self._options.broken:
                return 0
            if left is not None and (left, size) != progress:
                progress, since = (left, size), time.monotonic()
            limit_s = BROKEN_S if self._options.broken and left == 0 else self._options.settle_s
            if time.monotonic() - since > limit_s:
                return left or 0
            time.sleep(0.1)

    def _stored(self) -> int | None:
        """How many jobs are stored, parked ones too; None while no server says."""
        node, count = self.cluster or self.servers[0], 0
        for stream in (app.STREAM, PARKED):
            try:
                answer = node.ask(f"STREAM.INFO.{stream}")
            except (OSError, ValueError):
                return None
            if "error" in answer:
                return None
            count += int(answer["state"]["messages"])
        return count

    # -- what the server holds

    def _client(self) -> aiqueue.Client:
        account = self._account
        return aiqueue.connect(
            account.url,
            user=account.user,
            password=account.password,
            streams=self._directory / "streams",
            profile="cluster" if self.cluster else "single",
            connect_timeout=30,
        )

    async def _declare(self) -> None:
        async with self._client() as client:
            await provision.apply(client.connection, client.topology)

    async def _read(self) -> tuple[dict[int, list[Word]], list[int]]:
        """The journals of all jobs, by number, and which jobs are dead letters."""
        journals: dict[int, list[Word]] = {}
        async with self._client() as client:
            with contextlib.suppress(NotFound):
                async for stored in client.connection.read(client.topology.journal_stream.name, f"{app.JOURNAL}.*.*"):
                    journals.setdefault(int(stored.subject.rpartition(".")[2]), []).append(_word(stored))
            dead = [int(letter.job_id) async for letter in client.dead.find()]
        return journals, dead

    # -- the end

    def _kill_children(self) -> None:
        self.workers.kill_all()
        for child in self._producers:
            child.kill()

    def _keep(self, where: Path) -> None:
        where.mkdir(parents=True, exist_ok=True)
        for log in self._directory.glob("*.log"):
            shutil.copy(log, where / log.name)
        for server in self.servers:
            if server.log.exists():
                shutil.copy(server.log, where / f"{server.directory.name}.log")


def _word(stored: Stored) -> Word:
    entry = entry_from_stored(stored)
    mark = entry.data.get("mark", "") if isinstance(entry.data, dict) else ""
    return Word(entry.event, entry.run, mark)


def _tail(path: Path, characters: int = 1_000) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else ""


def ready_made(name: str) -> Sequence[Plan]:
    """The plans that a name of the command line stands for."""
    return [Plan.parse(text) for text in READY_MADE[name]]


READY_MADE = {
    "single": ("worker-kill:2", "server-kill:15"),
    "cluster": ("leader-kill|leader-stop:20",),
    "none": (),
}
