"""What the scenarios stand on: servers, the stand-in provider and worker processes, all of them real."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiqueue
from aiqueue import subjects
from aiqueue.topology import provision

from ..chaos.children import Child, Workers
from ..chaos.nemesis import Fault, Nemesis, Plan
from ..chaos.places import Disk, Link
from ..chaos.servers import Cluster, NatsProcess
from ..common import cpu_s, until
from . import app, judge

HERE = Path(__file__).parent
STREAM, PLAIN_STREAM, LIMITS_STREAM = "PROVIDER_CALLS", "PLAIN_CALLS", "KV_AI_LIMITS"
FAMILY_FILE = """
[family]
name = "{family}"
{more}
[stream]
name = "{stream}"
max_bytes = "1GiB"
max_msgs_per_subject = 100_000
[consumer]
ack_wait = "5s"
inactive_threshold = "{inactive_s:g}s"
[profile.cluster]
stream.num_replicas = 3
"""
STEP_S = 0.02
READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asked for. `window_s`: of the limits; `seconds`: of a run. `limits`: False leaves all rules
    out, and the judges must then find violations. `former`: a checkout of a former version.
    """

    window_s: float = 60.0
    seconds: float = 300.0
    workers: int = 4
    seed: int = 1
    limits: bool = True
    estimate: float = 1.0
    jobs: int = 10_000
    pause_s: float = 720.0
    rounds: int = 3
    former: Path | None = None
    keep: Path | None = None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a scenario needs. `tables`: of limits.toml, without their family. `skews_s` and `tenants`: of each worker in
    turn. `former`: how many of the workers are of the former version.
    """

    tables: Sequence[str] = ()
    servers: int = 1
    slots: int = 10
    has_cost: bool = True
    weights: Mapping[str, float] | None = None
    skews_s: Sequence[float] = (0.0,)
    tenants: Sequence[str] = ("",)
    inactive_s: float = 300.0
    former: int = 0


class Fleet(Workers):
    """Worker processes that differ: by their environment and the tenants that they serve."""

    def __init__(self, log: Path, env: Mapping[str, str], places: Sequence[tuple[Sequence[str], Mapping[str, str]]]):
        super().__init__((), env, log, count=len(places))
        self._places = places
        self._taken: dict[int, int] = {}  # by place: the pid there

    def start(self) -> None:
        """Start those that are missing."""
        for child in [each for each in self.alive if each.code is not None]:
            self.alive.remove(child)
            self.surprises.append(f"worker {child.pid} ended by itself with {child.code}")
        pids = {each.pid for each in self.alive}
        for place, (arguments, env) in enumerate(self._places):
            if self._taken.get(place) not in pids:
                child = Child([str(HERE / "launch.py"), *arguments], {**self.env, **env}, self._log)
                self._taken[place] = child.pid
                self.alive.append(child)


class Ground:
    """A running system. `harm` and `faults` are those of the nemesis."""

    disk: Disk | None = None
    link: Link | None = None

    def __init__(self, asked: Asked, setting: Setting, directory: Path) -> None:
        self.asked, self.setting, self.directory = asked, setting, directory
        self.log_file, self.drain_log = directory / "provider.log", directory / "drain.log"
        self._streams = directory / "streams"
        self._streams.mkdir()
        self.cluster: Cluster | None = None
        self.servers: list[NatsProcess] = []
        self.provider: Child | None = None
        self.nemesis: Nemesis | None = None
        self._nemesis_task: asyncio.Task[None] | None = None
        self._led = itertools.cycle((STREAM, LIMITS_STREAM))
        self.client: aiqueue.Client
        self._random = random.Random(asked.seed)
        self._next = 0
        self.workers: Workers

    @property
    def stream(self) -> str:
        """Whose leader the nemesis harms: the jobs' and the limits' in turn."""
        return next(self._led)

    # -- start and end

    def start_servers(self) -> None:
        self._write_streams()
        if self.setting.servers > 1:
            self.cluster = Cluster(self.directory / "cluster", size=self.setting.servers)
            self.servers = self.cluster.nodes
            self.cluster.start()
        else:
            self.servers = [NatsProcess(self.directory / "server")]
            self.servers[0].start()

    def _write_streams(self) -> None:
        weights = ", ".join(f"{name} = {{ weight = {each:g} }}" for name, each in (self.setting.weights or {}).items())
        more = [
            'default_kind = "provider.call"',
            'limit_key = "model"',
            f"tenants = {{ {weights} }}" if weights else "",
        ]
        for family, stream, lines in (
            (app.FAMILY, STREAM, more),
            (app.PLAIN, PLAIN_STREAM, ['default_kind = "plain.noop"']),
        ):
            text = FAMILY_FILE.format(
                family=family, stream=stream, more="\n".join(lines), inactive_s=self.setting.inactive_s
            )
            (self._streams / f"{stream.lower()}.toml").write_text(text)
        if self.asked.limits and self.setting.tables:
            tables = "".join(f'[[limit]]\nfamily = "{app.FAMILY}"\n{each}\n' for each in self.setting.tables)
            (self._streams / "limits.toml").write_text(tables)

    def connect(self) -> aiqueue.Client:
        account = self.cluster.account if self.cluster else self.servers[0].account
        return aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=self._streams,
            profile="cluster" if self.cluster else "single", connect_timeout=30,
        )  # fmt: skip

    async def declare(self) -> None:
        await provision.apply(self.client.connection, self.client.topology)
        if self.cluster is not None:
            self.cluster.wait_ready([STREAM, LIMITS_STREAM], current=True)

    async def start_provider(self) -> None:
        port = self.directory / "port"
        arguments = ["-m", "benchmarks.limiting.standin", str(self.log_file), str(port)]
        self.provider = Child(arguments, {}, self.directory / "standin.log")
        await until(port.exists, lambda: "the provider did not start")
        account = self.cluster.account if self.cluster else self.servers[0].account
        env = {
            "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
            "AIQUEUE_STREAMS": str(self._streams), "AIQUEUE_PROFILE": "cluster" if self.cluster else "single",
            app.PORT: port.read_text(), app.DRAIN_LOG: str(self.drain_log),
            **({app.HAS_COST: "1"} if self.setting.has_cost else {}),
        }  # fmt: skip
        self.workers = Fleet(self.directory / "workers.log", env, [self._place(n) for n in range(self.asked.workers)])

    def _place(self, number: int) -> tuple[list[str], dict[str, str]]:
        setting = self.setting
        arguments = [f"--concurrency={setting.slots}", "--log-level=warning"]
        if tenants := setting.tenants[number % len(setting.tenants)]:
            arguments.append(f"--tenants={tenants}")
        env = {"PROVIDER_SKEW_S": str(setting.skews_s[number % len(setting.skews_s)])}
        if number < setting.former and self.asked.former is not None:
            env |= {"PROVIDER_VERSION": str(self.asked.former)}
        return arguments, env

    async def start_workers(self) -> None:
        """Start them, and wait until all are connected to the provider."""
        self.workers.start()
        pids = {each.pid for each in self.workers.alive}
        await until(
            lambda: pids <= {each.pid for each in self.log().lives},
            lambda: f"the workers were not ready; they said: {self._tail()}", within_s=READY_S,
        )  # fmt: skip

    def _tail(self) -> str:
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
        self.nemesis = Nemesis([Plan.parse(each) for each in plans], self, seed=self.asked.seed)
        self._nemesis_task = asyncio.create_task(self._harm(self.nemesis))

    async def _harm(self, nemesis: Nemesis) -> None:
        try:
            while True:
                nemesis.step()
                await asyncio.sleep(STEP_S)
        finally:
            nemesis.calm()

    @property
    def faults(self) -> list[Fault]:
        return self.nemesis.faults if self.nemesis else []

    async def fill(
        self, count: int, *, key: str | Sequence[str] = "m", tenant: str = "a",
        cost: tuple[float, float] = (1, 1), takes_s: tuple[float, float] = (0.0, 0.0),
    ) -> range:  # fmt: skip
        """Enqueue so many calls, of the keys in turn. Return their numbers."""
        numbers = self._take(count)
        keys = [key] if isinstance(key, str) else key
        messages = (self.message(n, keys[place % len(keys)], cost, takes_s) for place, n in enumerate(numbers))
        async for outcome in self.client.enqueue_many(messages, tenant=tenant, on_full="wait", timeout=120):
            if isinstance(outcome, Exception):
                raise outcome
        return numbers

    def _take(self, count: int) -> range:
        """Numbers that no call has yet."""
        numbers = range(self._next, self._next + count)
        self._next += count
        return numbers

    def message(
        self, number: int, key: str, cost: tuple[float, float] = (1, 1), takes_s: tuple[float, float] = (0.0, 0.0)
    ) -> app.Call:
        used = round(self._random.uniform(*cost), 1)
        return app.Call(
            number=number, model=key, used=used, cost=round(used * self.asked.estimate, 1),
            takes_s=self._random.uniform(*takes_s), sent=time.monotonic(),
        )  # fmt: skip

    async def pace(self, rate: float, seconds: float, *, key: str, tenant: str = "a") -> range:
        """Enqueue calls at a rate. Return their numbers."""
        numbers = self._take(int(rate * seconds))
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for place, number in enumerate(numbers):
                await asyncio.sleep(max(0.0, begun + place / rate - time.monotonic()))
                group.create_task(self._enqueue(self.message(number, key), tenant))
        return numbers

    async def _enqueue(self, message: app.Call, tenant: str) -> None:
        await self.client.enqueue(message, tenant=tenant)

    async def refuse(self, key: str, for_s: float) -> None:
        """Have the provider answer the next call of a key, and all others for so long, with a 429."""
        port = int((self.directory / "port").read_text())
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(json.dumps({"refuse": key, "for_s": for_s}).encode() + b"\n")
        await writer.drain()
        writer.close()

    # -- what is seen

    def log(self) -> judge.Log:
        return judge.read(self.log_file)

    async def called(self, numbers: range, within_s: float) -> None:
        """Wait until calls of all these numbers have come. Raises RuntimeError."""
        wanted = set(numbers)
        missing = wanted
        end = time.monotonic() + within_s
        while missing := wanted - {each.number for each in self.log().of()}:
            if time.monotonic() > end:
                raise RuntimeError(f"{len(missing):,} of {len(wanted):,} calls had not come after {within_s:g} s")
            await asyncio.sleep(0.25)

    async def stored(self, stream: str = STREAM) -> dict[str, int]:
        """How many jobs wait or run, by subject."""
        info = await self.client.connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        found: dict[str, int] = info["state"].get("subjects") or {}
        return found

    async def left(self, within_s: float = 30.0) -> int:
        """How many jobs are stored still, once all are gone or so many seconds are over: a call ends after it came."""
        end = time.monotonic() + within_s
        while (left := sum((await self.stored()).values())) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        return left

    async def in_key_lanes(self, key: str) -> int:
        """How many jobs wait in the lanes of a key."""
        token = subjects.hashed(key)
        return sum(count for subject, count in (await self.stored()).items() if subject.endswith(f".{token}"))

    async def deliveries(self) -> dict[str, tuple[int, int]]:
        """Of each lane: how many deliveries there have been, and how many jobs are delivered more than once now."""
        found: dict[str, tuple[int, int]] = {}
        while True:
            answer = await self.client.connection.api(f"CONSUMER.LIST.{STREAM}", {"offset": len(found)})
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


@asynccontextmanager
async def ground(asked: Asked, setting: Setting, *, working: bool = True) -> AsyncIterator[Ground]:
    """A system of its own, with nothing left of it afterwards. `working`: with workers that are ready."""
    directory = Path(tempfile.mkdtemp(prefix="aiqueue-provider-"))
    made = Ground(asked, setting, directory)
    try:
        made.start_servers()
        async with made.connect() as made.client:
            await made.declare()
            await made.start_provider()
            if working:
                await made.start_workers()
            try:
                yield made
            finally:
                await made.end()
    finally:
        made.kill_servers()
        if asked.keep is not None:
            faults = [json.dumps([each.kind, each.at, each.until, each.victim, each.what]) for each in made.faults]
            (directory / "faults.log").write_text("\n".join(faults))
            _keep(directory, asked.keep / f"{int(time.time())}")
        shutil.rmtree(directory, ignore_errors=True)


def _keep(directory: Path, where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    for log in directory.rglob("*.log"):
        shutil.copy(log, where / f"{log.parent.name}-{log.name}")


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
