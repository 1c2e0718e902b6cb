"""What the scenarios stand on: servers, the stand-in provider and worker processes, all of them real."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiqueue import subjects

from .. import scenarios
from ..chaos.children import Child
from ..common import until
from ..scenarios import Fleet, System, running
from . import app, judge

HERE = Path(__file__).parent
STREAM, PLAIN_STREAM = "PROVIDER_CALLS", "PLAIN_CALLS"
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
READY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Asked(scenarios.Asked):
    """What the command line asked for. `window_s`: of the limits; `seconds`: of a run. `limits`: False leaves all rules
    out, and the judges must then find violations. `former`: a checkout of a former version.
    """

    window_s: float = 60.0
    seconds: float = 300.0
    workers: int = 4
    limits: bool = True
    estimate: float = 1.0
    jobs: int = 10_000
    pause_s: float = 720.0
    rounds: int = 3
    former: Path | None = None


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


class Ground(System):
    """A system with the stand-in provider and workers that call it."""

    def __init__(self, asked: Asked, setting: Setting, directory: Path, *, working: bool = True) -> None:
        super().__init__(directory, STREAM, servers=setting.servers, seed=asked.seed)
        self.asked, self.setting, self._working = asked, setting, working
        self.log_file, self.drain_log = directory / "provider.log", directory / "drain.log"
        self._random = random.Random(asked.seed)
        self._next = 0

    # -- start and end

    def write_files(self) -> None:
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

    async def start(self) -> None:
        port = self.directory / "port"
        arguments = ["-m", "benchmarks.limiting.standin", str(self.log_file), str(port)]
        self.provider = Child(arguments, {}, self.directory / "standin.log")
        await until(port.exists, lambda: "the provider did not start")
        env = {
            **self.env, app.PORT: port.read_text(), app.DRAIN_LOG: str(self.drain_log),
            **({app.HAS_COST: "1"} if self.setting.has_cost else {}),
        }  # fmt: skip
        places = [self._place(number) for number in range(self.asked.workers)]
        self.workers = Fleet([str(HERE / "launch.py")], env, self.directory / "workers.log", places)
        if self._working:
            await self.start_workers()

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
            lambda: f"the workers were not ready; they said: {self.tail()}", within_s=READY_S,
        )  # fmt: skip

    # -- what happens

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

    async def in_key_lanes(self, key: str) -> int:
        """How many jobs wait in the lanes of a key."""
        token = subjects.hashed(key)
        return sum(count for subject, count in (await self.stored()).items() if subject.endswith(f".{token}"))


@asynccontextmanager
async def ground(asked: Asked, setting: Setting, *, working: bool = True) -> AsyncIterator[Ground]:
    """A system of its own, with nothing left of it afterwards. `working`: with workers that are ready."""
    async with running(lambda path: Ground(asked, setting, path, working=working), keep=asked.keep) as made:
        yield made
