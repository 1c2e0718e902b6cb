"""What the scenarios stand on: servers, workers, schedules, and the jobs that there are in the end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aiqueue import headers, subjects
from aiqueue.journal import entry_from_stored
from aiqueue.payload import encode_message
from aiqueue.schedules import Every, Schedules, ScheduleSpec, list_ticks, tick_job_id

from .. import scenarios
from ..chaos.nemesis import Fault
from ..common import until
from ..scenarios import Finding, Fleet, System, running
from .app import AIM, DONE, KEPT, Tick

HERE = Path(__file__).parent
FAMILY, STREAM = Tick.aiq_family, "AI_AGENT_TASKS"
TICKS, BUCKET = "AI_TICKS", "KV_AI_SCHEDULES"
START_S = 5.0  # after which the first tick comes
SETTLE_S = 60.0  # within which what was due has a job
READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Asked(scenarios.Asked):
    """What the command line asked for. `seconds`: of a run; `away_s`: in which no worker runs."""

    seconds: float = 180.0
    away_s: float = 120.0
    workers: int = 3
    schedules: int = 20
    stored: int = 10_000
    say: Callable[[str], None] = lambda _: None


class Fired(NamedTuple):
    """A job: its schedule, its tick, when it was stored, and which message of the stream it is."""

    schedule: str
    tick: float
    stored_at: float
    seq: int
    started_at: float = 0.0

    @property
    def late_s(self) -> float:
        return self.stored_at - self.tick


class Ground(System):
    """A system with workers that fire schedules. `skews_s`: how wrong the clock of each worker is."""

    workers: Fleet

    def __init__(
        self,
        asked: Asked,
        directory: Path,
        *,
        servers: int = 1,
        skews_s: Sequence[float] = (),
        workers: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, STREAM, servers=servers, seed=asked.seed)
        self._harmed = itertools.cycle((TICKS, BUCKET, STREAM))
        self.asked, self._skews_s, self._worker_env = asked, skews_s, env or {}
        self._count = asked.workers if workers is None else workers
        self.aims = directory / "aims"
        self.aims.mkdir()
        self.added: list[tuple[str, str, Every]] = []

    def write_files(self) -> None:
        (self._streams / "limits.toml").write_text("")  # a directory without files is refused

    @property
    def stream(self) -> str:
        return next(self._harmed)

    async def declare(self) -> None:
        await super().declare()
        if self.cluster is not None:
            self.cluster.wait_ready([TICKS, BUCKET], current=True)

    async def start(self) -> None:
        self.schedules = Schedules(self.client.connection, self.client.topology, self.client.key_lanes)
        places = [
            (["--log-level=info"], {"SCHEDULES_SKEW_S": str(skew_s)})
            for skew_s, _ in zip(
                itertools.chain(self._skews_s, itertools.repeat(0.0)), range(self._count), strict=False
            )
        ]
        env = {**self.env, **self._worker_env, AIM: str(self.aims)}
        self.workers = Fleet([str(HERE / "launch.py")], env, self.directory / "workers.log", places)
        await self.start_workers()

    @property
    def ready(self) -> int:
        """How many workers have said that they are ready."""
        log = self.directory / "workers.log"
        return log.read_text().count("slots, families") if log.exists() else 0

    async def start_workers(self) -> None:
        """Start those that are missing, and wait until they are ready."""
        before = self.ready
        missing = self._count - len(self.workers.alive)
        self.workers.start()
        await until(
            lambda: self.ready >= before + missing,
            lambda: f"the workers were not ready; they said: {self.tail()}", within_s=READY_S,
        )  # fmt: skip

    async def replace(self, place: int, env: Mapping[str, str]) -> None:
        """End the worker of a place, and start one with another environment there. Wait until it is ready."""
        before = self.ready
        await asyncio.to_thread(self.workers.replace, place, env)
        await until(lambda: self.ready > before, lambda: f"no worker was ready: {self.tail()}", within_s=READY_S)

    async def add(self, schedule_id: str, recurrence: Every, *, tenant: str = KEPT, **more: Any) -> None:
        body = encode_message(Tick(number=len(self.added)))
        spec = ScheduleSpec(
            tenant=tenant, id=schedule_id, recurrence=recurrence, family=FAMILY, kind=Tick.aiq_kind, body=body, **more
        )
        await self.schedules.add(spec)
        self.added.append((tenant, schedule_id, recurrence))

    async def add_many(self, seconds: float, **more: Any) -> float:
        """Add the schedules of a run, which tick each second at phases of their own, for so many seconds. Return when
        they end. Every second one is of the tenant whose jobs are run.
        """
        count = self.asked.schedules
        start = int(time.time()) + START_S
        for n in range(count):
            recurrence = Every("1s", starting=start + n / count, end=start + seconds + n / count)
            await self.add(f"s{n}", recurrence, tenant=DONE if n % 2 else KEPT, **more)
        return start + seconds + 1

    async def ended(self, end: float) -> None:
        """Wait until a time, and then until no schedule has a tick left."""
        await asyncio.sleep(max(0.0, end - time.time()))
        patience = time.monotonic() + SETTLE_S
        while time.monotonic() < patience:
            if all(each.next_ms is None for each in await self.schedules.list()):
                return
            await asyncio.sleep(0.2)

    async def fired(self) -> list[Fired]:
        """All jobs: those whose runs are in the journal, and the others that are stored."""
        stored = [
            Fired(each.headers[headers.SCHEDULED_BY], float(each.headers[headers.SCHEDULED_FOR]), each.time, each.seq)
            async for each in self.client.connection.read(STREAM, f"ai.{FAMILY}.*.>")
        ]
        ticks = {}
        for tenant, schedule_id, recurrence in self.added:
            for tick_ms in list_ticks(recurrence, 0.0, time.time() + 1, 100_000):
                ticks[tenant, tick_job_id(schedule_id, tick_ms)] = schedule_id, tick_ms / 1000
        root = self.client.topology.family(FAMILY).journal or ""
        runs: dict[tuple[str, int], Fired] = {}
        async for each in self.client.connection.read(self.client.topology.journal_stream.name, f"{root}.*.*"):
            entry, name = entry_from_stored(each), subjects.parse_journal(each.subject)
            schedule_id, tick = ticks[name]
            fired = Fired(schedule_id, tick, entry.enqueued_at or each.time, entry.run, entry.started_at or 0.0)
            runs[each.subject, entry.run] = fired
        known = {each.seq for each in runs.values()}
        return [each for each in stored if each.seq not in known] + list(runs.values())

    def expected(self) -> list[tuple[str, float]]:
        return [
            (schedule_id, tick_ms / 1000)
            for _, schedule_id, recurrence in self.added
            for tick_ms in list_ticks(recurrence, 0.0, time.time() + 1, 100_000)
        ]


@asynccontextmanager
async def ground(asked: Asked, **more: Any) -> AsyncIterator[Ground]:
    """A system of its own, with nothing left of it afterwards."""
    async with running(lambda path: Ground(asked, path, **more), keep=asked.keep) as made:
        yield made


def judge(here: Ground, fired: Sequence[Fired]) -> list[Finding]:
    """Each tick has one job."""
    expected = set(here.expected())
    found = [(each.schedule, each.tick) for each in fired]
    return [
        Finding("ticks", len(expected), at_least=1),
        Finding("ticks without a job", len(expected - set(found)), at_most=0),
        Finding("jobs beside the first of a tick", len(found) - len(set(found)), at_most=0),
        Finding("jobs of no tick", len(set(found) - expected), at_most=0),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]


def judge_lateness(
    fired: Sequence[Fired],
    faults: Sequence[Fault],
    *,
    at_most_ms: float,
    margin_s: float = 0.0,
    kinds: Sequence[str] = (),
) -> list[Finding]:
    """How late jobs were stored: all, and those of ticks outside of outages, which end `margin_s` after their fault."""
    offset = time.time() - time.monotonic()
    away = [
        (each.at + offset - margin_s, (each.until or each.at) + offset + margin_s)
        for each in faults
        if each.kind in kinds
    ]
    all_ms = sorted(1000 * each.late_s for each in fired)
    rest = sorted(1000 * each.late_s for each in fired if not any(since <= each.tick <= end for since, end in away))
    found = percentiles("", all_ms)
    if away:
        found += percentiles(" outside of outages", rest)
    demanded = rest if away else all_ms
    found.append(Finding("latest outside of outages, ms", demanded[-1] if demanded else 0.0, at_most=at_most_ms))
    return found


def percentiles(where: str, sorted_ms: Sequence[float], *, p99: float | None = None) -> list[Finding]:
    if not sorted_ms:
        return [Finding(f"ticks{where}", 0)]
    return [
        Finding(f"late{where}, p50, ms", sorted_ms[len(sorted_ms) // 2]),
        Finding(f"late{where}, p99, ms", sorted_ms[int(len(sorted_ms) * 0.99)], at_most=p99),
        Finding(f"late{where}, max, ms", sorted_ms[-1]),
        Finding(f"early{where}, max, ms", max(0.0, -sorted_ms[0]), at_most=50),
    ]
