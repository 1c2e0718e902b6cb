"""What scenarios over real servers and worker processes share: the system, faults, findings, the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiqueue
from aiqueue.topology import provision

from .chaos.children import Child, Workers
from .chaos.nemesis import Fault, Nemesis, Plan
from .chaos.places import Disk, Link
from .chaos.servers import Account, Cluster, NatsProcess
from .common import cpu_s

LIMITS_STREAM = "KV_AI_LIMITS"
STEP_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for in all scenarios. `keep`: where logs are kept; `say`: prints a line."""

    seed: int = 1
    keep: Path | None = None
    say: Callable[[str], None] = lambda _: None


class Fleet(Workers):
    """Worker processes that differ: in their arguments and their environment. `program`: the arguments of all."""

    def __init__(
        self, program: Sequence[str], env: Mapping[str, str], log: Path,
        places: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    ) -> None:  # fmt: skip
        super().__init__((), env, log, count=len(places))
        self._program, self._places = program, places
        self._taken: dict[int, int] = {}  # by place: the pid there

    def start(self) -> None:
        """Start those that are missing."""
        for child in [each for each in self.alive if each.code is not None]:
            self.alive.remove(child)
            self.surprises.append(f"worker {child.pid} ended by itself with {child.code}")
        pids = {each.pid for each in self.alive}
        for place, (arguments, env) in enumerate(self._places):
            if self._taken.get(place) not in pids:
                child = Child([*self._program, *arguments], {**self.env, **env}, self._log)
                self._taken[place] = child.pid
                self.alive.append(child)

    def replace(self, place: int, env: Mapping[str, str]) -> None:
        """Have the worker of a place drain, and start one that differs by `env` there."""
        child = next(each for each in self.alive if each.pid == self._taken.get(place))
        if (code := child.end()) != 0:
            self.surprises.append(f"worker {child.pid} ended its drain with {code}")
        self.alive.remove(child)
        arguments, former = self._places[place]
        self._places = [*self._places[:place], (arguments, {**former, **env}), *self._places[place + 1 :]]
        self.start()


class System:
    """A running system in a directory of its own. `harm` and `faults` are those of the nemesis.

    `stream`: of the jobs. `servers`: 3 are a cluster.
    """

    disk: Disk | None = None
    link: Link | None = None

    def __init__(self, directory: Path, stream: str, *, servers: int = 1, seed: int = 1) -> None:
        self.directory, self._jobs_stream = directory, stream
        self._size, self._seed = servers, seed
        self._streams = directory / "streams"
        self._streams.mkdir()
        self.cluster: Cluster | None = None
        self.servers: list[NatsProcess] = []
        self.provider: Child | None = None
        self.nemesis: Nemesis | None = None
        self._nemesis_task: asyncio.Task[None] | None = None
        self._led = itertools.cycle((stream, LIMITS_STREAM))
        self.client: aiqueue.Client
        self.workers: Workers

    @property
    def stream(self) -> str:
        """Whose leader the nemesis harms: the jobs' and the limits' in turn."""
        return next(self._led)

    @property
    def account(self) -> Account:
        return self.cluster.account if self.cluster else self.servers[0].account

    # -- start and end

    def write_files(self) -> None:
        """Write what stands in the directory of the setting `streams`, before the servers start."""

    async def start(self) -> None:
        """Start what belongs to the scenario beside the servers, once the streams are there."""

    def start_servers(self) -> None:
        self.write_files()
        if self._size > 1:
            self.cluster = Cluster(self.directory / "cluster", size=self._size)
            self.servers = self.cluster.nodes
            self.cluster.start()
        else:
            self.servers = [NatsProcess(self.directory / "server")]
            self.servers[0].start()

    def connect(self) -> aiqueue.Client:
        account = self.account
        return aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=self._streams,
            profile="cluster" if self.cluster else "single", connect_timeout=30,
        )  # fmt: skip

    @property
    def env(self) -> dict[str, str]:
        """With which a worker process finds the servers and the files."""
        account = self.account
        return {
            "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
            "AIQUEUE_STREAMS": str(self._streams), "AIQUEUE_PROFILE": "cluster" if self.cluster else "single",
        }  # fmt: skip

    async def declare(self) -> None:
        await provision.apply(self.client.connection, self.client.topology)
        if self.cluster is not None:
            self.cluster.wait_ready([self._jobs_stream, LIMITS_STREAM], current=True)

    def tail(self) -> str:
        """The last words of the workers."""
        log = self.directory / "workers.log"
        return log.read_text(errors="replace")[-1_000:] if log.exists() else ""

    async def end(self) -> None:
        if self._nemesis_task is not None:
            self._nemesis_task.cancel()
            await asyncio.wait([self._nemesis_task])
        if hasattr(self, "workers"):
            self.workers.kill_all()
        if self.provider is not None:
            self.provider.kill()

    def kill_servers(self) -> None:
        for each in self.servers:
            each.kill()

    # -- what happens

    def harm(self, *plans: str) -> None:
        """Let faults happen from now on, such as ``worker-kill:2``."""
        self.nemesis = Nemesis([Plan.parse(each) for each in plans], self, seed=self._seed)
        self._nemesis_task = asyncio.create_task(self._harm(self.nemesis))

    async def _harm(self, nemesis: Nemesis) -> None:
        try:
            while True:
                nemesis.step()
                await asyncio.sleep(STEP_S)
        finally:
            nemesis.calm()

    async def calm(self) -> None:
        """Let no more faults happen; what was taken away is given back."""
        if self._nemesis_task is not None:
            self._nemesis_task.cancel()
            await asyncio.wait([self._nemesis_task])

    @property
    def faults(self) -> list[Fault]:
        return self.nemesis.faults if self.nemesis else []

    # -- what is seen

    async def stored(self, stream: str = "") -> dict[str, int]:
        """How many jobs wait or run, by subject."""
        name = stream or self._jobs_stream
        info = await self.client.connection.api(f"STREAM.INFO.{name}", {"subjects_filter": ">"})
        found: dict[str, int] = info["state"].get("subjects") or {}
        return found

    async def left(self, within_s: float = 30.0) -> int:
        """How many jobs are stored still, once all are gone or so many seconds are over: a call ends after it came."""
        end = time.monotonic() + within_s
        while (left := sum((await self.stored()).values())) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        return left

    async def deliveries(self) -> dict[str, tuple[int, int]]:
        """Of each lane: how many deliveries there have been, and how many jobs are delivered more than once now."""
        found: dict[str, tuple[int, int]] = {}
        while True:
            answer = await self.client.connection.api(f"CONSUMER.LIST.{self._jobs_stream}", {"offset": len(found)})
            for each in answer.get("consumers") or []:
                found[each["name"]] = each["delivered"]["consumer_seq"], each["num_redelivered"]
            if len(found) >= answer["total"] or not answer.get("consumers"):
                return found

    async def writes(self) -> int:
        """How many writes the stream of limits has had."""
        info = await self.client.connection.api(f"STREAM.INFO.{LIMITS_STREAM}")
        return int(info["state"]["last_seq"])

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU that each server and worker has used."""
        found = {f"server {n}": cpu_s(each.pid) for n, each in enumerate(self.servers) if each.pid}
        return found | {f"worker {each.pid}": cpu_s(each.pid) for each in self.workers.alive}


S = TypeVar("S", bound=System)


@asynccontextmanager
async def running(make: Callable[[Path], S], *, keep: Path | None = None) -> AsyncIterator[S]:
    """A system of its own, with nothing left of it afterwards. `keep`: where its logs go."""
    directory = Path(tempfile.mkdtemp(prefix="aiqueue-scenario-"))
    made = make(directory)
    try:
        made.start_servers()
        async with made.connect() as made.client:
            try:
                await made.declare()
                await made.start()
                yield made
            finally:
                await made.end()
    finally:
        made.kill_servers()
        if keep is not None:
            faults = [json.dumps([each.kind, each.at, each.until, each.victim, each.what]) for each in made.faults]
            (directory / "faults.log").write_text("\n".join(faults))
            _keep(directory, keep / f"{int(time.time())}")
        shutil.rmtree(directory, ignore_errors=True)


def _keep(directory: Path, where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    for log in directory.rglob("*.log"):
        shutil.copy(log, where / f"{log.parent.name}-{log.name}")


# -- findings


@dataclass(frozen=True)
class Finding:
    """A figure of a scenario, and what is demanded of it: at most or at least a number; None: it is only told."""

    name: str
    figure: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        return (self.at_most is None or self.figure <= self.at_most) and (
            self.at_least is None or self.figure >= self.at_least
        )

    @property
    def demand(self) -> str:
        demands = [f"at most {self.at_most:,.6g}"] if self.at_most is not None else []
        demands += [f"at least {self.at_least:,.6g}"] if self.at_least is not None else []
        return ", ".join(demands)


def spans(faults: Sequence[Fault], *kinds: str) -> list[tuple[float, float]]:
    """When faults of these kinds began and were over."""
    return [(each.at, each.until or time.monotonic()) for each in faults if each.kind in kinds]


@contextlib.contextmanager
def told(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    begun = time.monotonic()
    yield
    say(f"  {what}: {time.monotonic() - begun:.1f} s")


# -- the command line

A = TypeVar("A")
Scenario = Callable[[A], Awaitable[list[Finding]]]


def make_parser(name: str, about: str | None, scenarios: Mapping[str, Scenario[A]]) -> argparse.ArgumentParser:
    """A parser of scenarios and the options that all have."""
    lines = [f"  {each:20} {_about(scenario)}" for each, scenario in scenarios.items()]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=about, epilog="\n".join(["scenarios:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--seed", type=int, default=1, help="of costs, times and victims")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave the logs there")
    return parser


def parse(
    parser: argparse.ArgumentParser, scenarios: Mapping[str, Scenario[A]], arguments: list[str] | None
) -> argparse.Namespace:
    chosen = parser.parse_args(arguments)
    unknown = [each for each in chosen.scenarios if each not in scenarios]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}: choose from {', '.join(scenarios)}")
    return chosen


def _about(scenario: Scenario[A]) -> str:
    return (scenario.__doc__ or "").splitlines()[0]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _run(scenario: Scenario[A], asked: A) -> list[Finding]:
    return await scenario(asked)


def run_all(chosen: argparse.Namespace, scenarios: Mapping[str, Scenario[A]], asked: A, *, broken: bool = False) -> int:
    """Run the chosen ones, each in a loop in this thread, with which its servers end. Return 1 if a figure is not what
    is demanded; `broken`: if all are.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    wrong = False
    for name in chosen.scenarios or scenarios:
        begun = time.monotonic()
        say(f"{name}: {_about(scenarios[name])}")
        try:
            findings = asyncio.run(_run(scenarios[name], asked))
        except (RuntimeError, TimeoutError, aiqueue.AIQueueError) as error:
            say(f"  {name} failed: {error!r}")
            findings = [Finding(f"it ended: {type(error).__name__}", 1, at_most=0)]
        holds = all(each.holds for each in findings)
        wrong |= holds if broken else not holds
        found[name] = [dataclasses.asdict(each) | {"holds": each.holds} for each in findings]
        if not chosen.json:
            show(name, findings, time.monotonic() - begun)
    if chosen.json:
        print(json.dumps(found, indent=1))
    return int(wrong)


def show(scenario: str, findings: list[Finding], took_s: float) -> None:
    print(f"{scenario} ({took_s:.0f} s)")
    for each in findings:
        mark = "" if not each.demand else "ok" if each.holds else "VIOLATED"
        print(f"  {each.name:58} {each.figure:14,.6g}   {each.demand:34} {mark}".rstrip(), flush=True)
