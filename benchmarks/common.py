"""What both sides share: the job, the raw client, an empty stream, the pace, the processes beside this one."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import nats
from nats.aio.client import Client as Raw

import aiqueue
from aiqueue import codec, headers, subjects

from .chaos.children import Child
from .raw import TEXT, collect_less_often, loop_factory
from .report import Row

T = TypeVar("T")

STREAM = "AI_AGENT_TASKS"
FAMILY = "agent.tasks"
LATE_S = 0.005  # a call that is later than this counts from its schedule
PERCENTILES = (50, 95, 99)
END_S = 20.0


class Noop(aiqueue.Message, kind="noop"):
    """183 bytes as CBOR, as in the comparison with other queues."""

    i: int
    t: float
    text: str


def message(i: int, t: float = 0.0) -> Noop:
    return Noop(i=i, t=t, text=TEXT)


async def raw_client(client: aiqueue.Client) -> Raw:
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else None
    return await nats.connect(settings.servers, user=settings.user, password=password)


def raw_job(
    i: int, t: float = 0.0, tenant: str = "bench", priority: str = "normal", deadline_s: float | None = None
) -> tuple[str, bytes, dict[str, str]]:
    """Subject, body and headers of the job that the library would have stored."""
    job_id = subjects.new_id()
    told = {
        headers.MSG_ID: subjects.msg_id(FAMILY, tenant, job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: "noop",
        headers.JOB_ID: job_id,
        headers.PRIORITY: priority,
        "task_id": job_id,
    }
    if deadline_s is not None:
        told[headers.DEADLINE] = str(round((time.time() + deadline_s) * 1000))
    return subjects.work(FAMILY, tenant, priority), codec.encode(message(i, t)), told


async def empty(client: aiqueue.Client, stream: str = STREAM) -> None:
    await client.connection.api(f"STREAM.PURGE.{stream}")


async def lane(client: aiqueue.Client, tenant: str = "bench") -> str:
    """A fresh consumer of the lane, as the library would make it."""
    config = client.topology.family(FAMILY).lane_config(tenant, "normal")
    name = config["durable_name"]
    subject = f"CONSUMER.CREATE.{STREAM}.{name}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": STREAM, "config": config})
    return str(name)


# -- time


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` with the event loop and the garbage collector of `aiqueue work`: the same for all sides."""
    collect_less_often()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


async def paced(rate: float, count: int, say: Callable[[int, float], Awaitable[object]]) -> None:
    """An open loop: `say(number, at)` `rate` times a second, at being when it was called, or should have been where
    that is LATE_S ago. Calls overlap, so that a slow one does not hold up the next; all have ended on return.
    """
    async with asyncio.TaskGroup() as calls:
        begun = time.monotonic() + 0.1
        for number in range(count):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            at = time.monotonic()
            calls.create_task(_call(say, number, at if at - due < LATE_S else due))


async def _call(say: Callable[[int, float], Awaitable[object]], number: int, at: float) -> None:
    await say(number, at)


async def until(true: Callable[[], bool], what: Callable[[], str], *, within_s: float = 60.0) -> None:
    """Wait for a fact. Raises RuntimeError that says `what` there is instead after so many seconds."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"{what()} after {within_s:g} s")
        await asyncio.sleep(0.01)


def percentile_rows(question: str, name: str, how: dict[str, str]) -> list[Row]:
    """A row in ms for each of PERCENTILES."""
    return [Row(question, f"{name}, p{each}", "ms", how=dict(how)) for each in PERCENTILES]


def add_percentiles(rows: Sequence[Row], side: str, waits: Sequence[float]) -> None:
    """A figure more for each of the rows that `percentile_rows` made, from one round's waits in ms."""
    cuts = statistics.quantiles(waits, n=100)
    for row, percent in zip(rows, PERCENTILES, strict=True):
        row.add(side, cuts[percent - 1])


# -- processes


class Beside:
    """A Python program beside this one, its output in a file of its own."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self._child = Child(arguments, env, log)

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self) -> None:
        """Raises RuntimeError where it has ended and not well."""
        if self._child.code:
            told = self.log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"a process ended with {self._child.code}: {told[-1] if told else 'it said nothing'}")

    async def ended(self, within_s: float = 60.0) -> None:
        """Wait until it has ended well. Raises RuntimeError."""

        def done() -> bool:
            self.check()
            return self._child.code is not None

        await until(done, lambda: "a process had not ended", within_s=within_s)

    async def end(self) -> None:
        if self._child.code is None:
            await asyncio.to_thread(self._child.end, END_S)


@asynccontextmanager
async def beside(
    client: aiqueue.Client, *programs: Sequence[str], env: dict[str, str] | None = None
) -> AsyncIterator[list[Beside]]:
    """Python programs (their arguments) that find the client's server by their environment; ended with the block."""
    settings = client.connection.settings
    told = {
        "AIQUEUE_URL": settings.url or "",
        "AIQUEUE_USER": settings.user or "",
        "AIQUEUE_PASSWORD": settings.password.get_secret_value() if settings.password else "",
        **(env or {}),
    }
    started: list[Beside] = []
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-") as directory:
        try:
            for number, arguments in enumerate(programs):
                started.append(Beside(arguments, told, Path(directory) / f"{number}.log"))
            yield started
        finally:
            await asyncio.gather(*(each.end() for each in started))


# -- what a process uses, on Linux


def cpu_s(pid: int | str = "self") -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int | str = "self") -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def server_pid(client: aiqueue.Client) -> int:
    """Of the client's embedded server."""
    assert client._embedded is not None
    return client._embedded.pid
