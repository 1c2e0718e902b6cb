"""What the scenarios stand on: a server, worker processes of this version or a former one, and many tenants' jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiqueue
from aiqueue.errors import Unavailable

from .. import scenarios
from ..common import until
from ..scenarios import Finding, Fleet, System, running
from . import app

HERE = Path(__file__).parent
STREAM = "TENANCY_JOBS"
HEAVY = 3  # the weight of heavy tenants
SLOTS = 100
SLOWEST = 200  # jobs a second, of a run
BEGIN_S = 60.0
FAMILY_FILE = """
[family]
name = "{family}"
default_kind = "tenancy.task"
lane_storage = "{storage}"
tenants = {{ {tenants} }}
[stream]
name = "{stream}"
max_bytes = "16GiB"
max_msgs_per_subject = 1_000_000
[consumer]
ack_wait = "{ack_wait_s:g}s"
"""


@dataclass(frozen=True, kw_only=True)
class Asked(scenarios.Asked):
    """What the command line asked for. `former`: a checkout of a former version. `shapes`: how many tenants, with how
    many jobs each, are drained. `tenants`, `jobs`, `handlers_ms` and `seconds`: of the other scenarios.
    `stored`: where filled servers' directories are kept for the next time.
    """

    former: Path | None = None
    rounds: int = 3
    shapes: Sequence[tuple[int, int]] = ()
    storages: Sequence[str] = ("file", "memory")
    tenants: int = 1_000
    jobs: int = 2_000
    handlers_ms: Sequence[float] = (0.0, 5.0)
    seconds: float = 30.0
    stored: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a scenario needs. `heavy`: so many tenants, the first ones, have the weight HEAVY. `at_once`: the
    `max_ack_pending` of so many. `former`: whether each worker is of the former version, in turn. `ends`: whether the
    ends of runs are written down, too. `stored`: the server's directory of a run before, which is copied.
    """

    storage: str = "file"
    heavy: int = 0
    at_once: tuple[int, int] = (0, 1)
    slots: int = SLOTS
    handler_s: float = 0.0
    ack_wait_s: float = 30.0
    former: Sequence[bool] = (False,)
    ends: bool = False
    stored: Path | None = None

    @property
    def tenants(self) -> str:
        told = [f"t{n} = {{ weight = {HEAVY} }}" for n in range(self.heavy)]
        count, limit = self.at_once
        told += [f"t{n} = {{ max_ack_pending = {limit} }}" for n in range(count)]
        return ", ".join(told)


class Entry(NamedTuple):
    """What a handler wrote down: `what` is START or END of a run of process `pid`; times are monotonic seconds."""

    what: int
    pid: int
    number: int
    sent: float
    at: float


class Ground(System):
    """A system with workers that serve many tenants. The job `number` is of tenant ``t{number % tenants}`` where
    `fill` has stored it.
    """

    workers: Fleet

    def __init__(self, asked: Asked, setting: Setting, directory: Path) -> None:
        super().__init__(directory, STREAM, seed=asked.seed)
        self.asked, self.setting = asked, setting
        self.log_file = directory / "entries"

    # -- start and end

    def write_files(self) -> None:
        text = FAMILY_FILE.format(
            family=app.FAMILY, stream=STREAM, storage=self.setting.storage, tenants=self.setting.tenants,
            ack_wait_s=self.setting.ack_wait_s,
        )  # fmt: skip
        (self._streams / "tenancy_jobs.toml").write_text(text)
        if self.setting.stored is not None:
            shutil.copytree(self.setting.stored, self.directory / "server")
            os.sync()  # that of the copy is not to be measured

    async def start(self) -> None:
        env = {
            **self.env, app.LOG: str(self.log_file), app.HANDLER_S: str(self.setting.handler_s),
            **({app.ENDS: "1"} if self.setting.ends else {}),
        }  # fmt: skip
        places = [self._place(former) for former in self.setting.former]
        self.workers = Fleet([str(HERE / "launch.py")], env, self.directory / "workers.log", places)

    def _place(self, former: bool) -> tuple[list[str], dict[str, str]]:
        version = str(self.asked.former) if former else ""
        return [f"--concurrency={self.setting.slots}", "--log-level=warning"], {"TENANCY_VERSION": version}

    def keep_store(self, where: Path) -> None:
        """Stop the server and copy its directory."""
        self.servers[0].stop()
        shutil.copytree(self.directory / "server", where)

    # -- what happens

    async def fill(self, tenants: int, jobs: int, *, first: int = 0, takes_s: float = 0.0) -> None:
        """Enqueue so many jobs of each tenant, in turn."""
        numbers = range(first, first + tenants * jobs)
        specs = (
            aiqueue.JobSpec(app.Task(number=n, sent=time.monotonic(), takes_s=takes_s), tenant=f"t{n % tenants}")
            for n in numbers
        )
        async for outcome in self.client.enqueue_many(specs, timeout=120):
            if isinstance(outcome, Exception):
                raise outcome

    async def begun(self, count: int, within_s: float = BEGIN_S) -> None:
        """Wait until so many entries are there. Raises RuntimeError, also where a worker has ended."""

        def there() -> bool:
            if any(each.code is not None for each in self.workers.alive):
                raise RuntimeError(f"a worker ended by itself; it said: {self.tail()}")
            return self.entries >= count

        await until(there, lambda: f"{self.entries:,} of {count:,} jobs had begun", within_s=within_s)

    # -- what is seen

    @property
    def entries(self) -> int:
        """How many entries there are."""
        return self.log_file.stat().st_size // app.RECORD.size if self.log_file.exists() else 0

    def read(self) -> Iterator[Entry]:
        data = self.log_file.read_bytes() if self.log_file.exists() else b""
        whole = len(data) // app.RECORD.size * app.RECORD.size
        return (Entry(*each) for each in app.RECORD.iter_unpack(data[:whole]))

    async def messages(self) -> int:
        """How many jobs are stored."""
        return int((await self.client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"])

    async def gone(self, *, patience_s: float = 60.0) -> int:
        """How many jobs are stored, once none is or for so many seconds it was the same number (-1: nobody says)."""
        left, since = -1, time.monotonic()
        while left and time.monotonic() - since < patience_s:
            await asyncio.sleep(0.2)
            with contextlib.suppress(Unavailable):  # a server amid acks may be late
                if (now := await self.messages()) != left:
                    left, since = now, time.monotonic()
        return left


@asynccontextmanager
async def ground(asked: Asked, **setting: Any) -> AsyncIterator[Ground]:
    """A system of its own, with nothing left of it afterwards. No worker runs at first."""
    async with running(lambda path: Ground(asked, Setting(**setting), path), keep=asked.keep) as made:
        yield made


def accounts(begun: Sequence[Entry], jobs: int) -> list[Finding]:
    """All of so many jobs have begun, each once: where nothing was killed."""
    numbers = {each.number for each in begun}
    return [
        Finding("jobs that never began", len(set(range(jobs)) - numbers), at_most=0),
        Finding("jobs that began twice", len(begun) - len(numbers), at_most=0),
    ]
