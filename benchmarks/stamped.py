"""A worker in a process of its own, ours or a plain client's, seen from outside: its handlers' times, its memory."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiqueue
from aiqueue.server.supervisor import last_log_line, tail

from .chaos.children import Child
from .common import STREAM, lane
from .raw import FETCH
from .report import OURS, RAW
from .stamping import STAMP, STAMPS

POLL_S = 0.005
ACKS_S = 60.0  # for the acks of what has run
HOW = {OURS: "aiqueue work, 100 slots, typed handler without a result", RAW: FETCH}
OUR_PROGRAM = ("-m", "aiqueue", "work", "--log-level=warning", "benchmarks.stamping:worker")


class Stamped:
    """One run of such a process. `begun` is when it was started, monotonic seconds."""

    def __init__(self, client: aiqueue.Client, program: Sequence[str], directory: Path) -> None:
        self._log = directory / "worker.log"
        self._file = directory / "stamps"
        self._file.touch()
        self.begun = time.monotonic()
        self._child = Child(program, {**where(client), STAMPS: str(self._file)}, self._log)
        self.stop, self.resume, self.kill = self._child.stop, self._child.resume, self._child.kill

    @property
    def done(self) -> int:
        """How many handlers have begun."""
        return self._file.stat().st_size // STAMP.size

    def stamps(self, first: int, beyond: int) -> list[tuple[float, int]]:
        """Of the handlers that began as `first` to before `beyond`: when, and the job's number."""
        with self._file.open("rb") as file:
            file.seek(first * STAMP.size)
            data = file.read((beyond - first) * STAMP.size)
        return [(at, number) for at, number in STAMP.iter_unpack(data)]

    def span_s(self, first: int, beyond: int) -> float:
        """Seconds from one handler's begin to the last one's before `beyond`. Raises RuntimeError where a job of the
        span ran twice.
        """
        stamps = self.stamps(first, beyond)
        numbers = {number for _, number in stamps}
        if len(numbers) != beyond - first:
            raise RuntimeError(f"{beyond - first:,} handlers ran {len(numbers):,} jobs")
        return stamps[-1][0] - stamps[0][0]

    def peak_mib(self) -> float:
        """The most memory that it has had so far, from /proc (Linux)."""
        return _memory_mib(self._child.pid, "VmHWM")

    def now_mib(self) -> float:
        return _memory_mib(self._child.pid, "VmRSS")

    async def wait(self, count: int, *, within_s: float = 120.0) -> None:
        """Until so many handlers have begun. Raises RuntimeError where they do not in time, or the process ends."""
        deadline = time.monotonic() + within_s
        while self.done < count:
            if time.monotonic() > deadline or (self._child.code is not None and self.done < count):
                said = last_log_line(tail(self._log))
                raise RuntimeError(f"the worker ran {self.done:,} of {count:,} jobs: {said or 'it said nothing'}")
            await asyncio.sleep(POLL_S)

    def said(self) -> str:
        """What it wrote to stdout and stderr, as text."""
        return self._log.read_text(errors="replace")

    async def end(self) -> None:
        """Have it finish what it runs, and wait for its end."""
        await asyncio.to_thread(self._child.end)


def where(client: aiqueue.Client) -> dict[str, str]:
    """The environment by which a child finds the server of `client`."""
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else ""
    return {
        "AIQUEUE_URL": settings.url or "",
        "AIQUEUE_USER": settings.user or "",
        "AIQUEUE_PASSWORD": password,
        "AIQUEUE_PROFILE": settings.profile,
    }


@asynccontextmanager
async def running(
    client: aiqueue.Client, side: str, count: int, *, program: Sequence[str] = OUR_PROGRAM
) -> AsyncIterator[Stamped]:
    """A worker process of a side, ended on leaving. The plain one takes `count` jobs of the bench tenant's lane."""
    if side != OURS:
        program = ("-m", "benchmarks.stamping_raw", STREAM, await lane(client), str(count))
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-") as directory:
        stamped = Stamped(client, program, Path(directory))
        try:
            yield stamped
        finally:
            await stamped.end()


async def stored(client: aiqueue.Client) -> int:
    """How many jobs the stream holds."""
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    return int(info["state"]["messages"])


def skipped(count: int) -> int:
    """How many of so many jobs are not counted: the plain side's first batch. The time of the rest begins with the last
    of these.
    """
    return min(100, max(1, count // 10))


async def all_ran(client: aiqueue.Client, worker: Stamped, given: int) -> None:
    """Raises RuntimeError unless, of so many jobs given, those that the worker ran are gone and no others.

    The worker has ended; the server may still be at its last acks.
    """
    deadline = time.monotonic() + ACKS_S
    while (gone := given - await stored(client)) != worker.done:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    else:
        return
    raise RuntimeError(f"{gone:,} of {given:,} jobs are gone, and {worker.done:,} have run")


async def drained(client: aiqueue.Client, side: str, count: int) -> float:
    """Jobs a second of one worker process over a stored backlog of `count`, its first jobs (`skipped`) left out.

    It ends when the server has taken the last ack: handlers may be ahead of that by max_ack_pending. Raises
    RuntimeError where a job ran twice, or is left.
    """
    skip = skipped(count)
    async with running(client, side, count) as worker:
        await worker.wait(count)
        deadline = time.monotonic() + ACKS_S
        while (left := await stored(client)) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        took_s = time.monotonic() - worker.stamps(skip - 1, skip)[0][0]
        if left:
            raise RuntimeError(f"{left:,} of {count:,} jobs are left")
        await worker.end()
        worker.span_s(0, worker.done)
    return (count - skip) / took_s


def _memory_mib(pid: int, what: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))
