"""A stream of 2,000 chunks, and a reader that disconnects at random 20 times and goes on by its cursor.

``python -m benchmarks resume [--rounds N]``: nothing else happens; the worker is killed (-9) half-way; one server is
killed and started again; on three, the leader of the journals' stream is killed, the worker with it. Whatever happens,
the reader must have every chunk of the attempt that ended the job once and in order, and never a mix: between two
attempts there is a restart. Exit code 1 where it has not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiqueue
from aiqueue.errors import Unavailable
from aiqueue.journal import StreamItem
from aiqueue.topology import provision

from .chaos.app import FAMILY, declared
from .chaos.servers import Cluster, NatsProcess

CHUNKS, BREAKS = 2_000, 20
RATE = 400
ACK_WAIT_S = 3.0
DOWN_S = 2.0
WITHIN_S = 180.0


class Tell(aiqueue.Message, kind="tell", family=FAMILY):
    chunks: int


worker = aiqueue.Worker()


@worker.handle(Tell, timeout="5m")
async def tell(job: aiqueue.Job[Tell]) -> str:
    voice, begun = secrets.token_hex(4), time.monotonic()
    for number in range(job.message.chunks):
        await job.chunk([voice, number])
        await asyncio.sleep(max(0.0, begun + number / RATE - time.monotonic()))
    return voice


@dataclass
class Reading:
    """What a reader had: each attempt's chunks, and the result."""

    attempts: list[list[StreamItem]] = field(default_factory=lambda: [[]])
    breaks: int = 0
    others: list[str] = field(default_factory=list)
    result: str = ""

    @property
    def count(self) -> int:
        return sum(len(each) for each in self.attempts)

    def take(self, item: StreamItem) -> None:
        if item.event == "chunk":
            self.attempts[-1].append(item)
        elif item.event == "restart":
            self.attempts.append([])
        elif item.final:
            self.result = item.data if item.event == "result" else f"({item.event}: {item.data})"
        elif item.event != "started":
            self.others.append(item.event)

    def faults(self) -> list[str]:
        found = [f"an item {event}" for event in self.others]
        for attempt in self.attempts:
            voices = {each.data[0] for each in attempt}
            if len(voices) > 1:
                found.append(f"a mix of {len(voices)} attempts")
            numbers = [each.data[1] for each in attempt]
            if numbers != list(range(len(numbers))):
                found.append("chunks missing, twice or out of order")
        last = self.attempts[-1]
        if len(last) != CHUNKS or {each.data[0] for each in last} != {self.result}:
            found.append(f"{len(last)} chunks of the attempt that ended the job, whose result is {self.result}")
        return found


class Place:
    """Servers, and one worker process beside them."""

    def __init__(self, servers: NatsProcess | Cluster, directory: Path) -> None:
        self.servers = servers
        self.streams = directory / "streams"
        self._process: asyncio.subprocess.Process | None = None

    def client(self) -> aiqueue.Client:
        account = self.servers.account
        profile: Literal["single", "cluster"] = "cluster" if isinstance(self.servers, Cluster) else "single"
        return aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=self.streams, profile=profile
        )

    async def start_worker(self) -> None:
        account = self.servers.account
        told = {
            **os.environ, "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user,
            "AIQUEUE_PASSWORD": account.password, "AIQUEUE_STREAMS": str(self.streams),
        }  # fmt: skip
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.resume", "work", env=told
        )

    async def kill_worker(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def nothing(place: Place) -> None:
    pass


async def kill_worker(place: Place) -> None:
    await place.kill_worker()
    await place.start_worker()


async def kill_server(place: Place) -> None:
    node = place.servers.leader("AI_RESULTS") if isinstance(place.servers, Cluster) else place.servers
    node.kill()
    await asyncio.sleep(DOWN_S)
    node.start()


async def kill_both(place: Place) -> None:
    await asyncio.gather(kill_server(place), kill_worker(place))


Fault = Callable[[Place], Coroutine[Any, Any, None]]


async def read(place: Place, job_id: str, reading: Reading, chance: random.Random) -> None:
    """Read, leave with the whole connection, come back by the cursor, until the job has ended."""
    cursor: str | None = None
    spots = sorted(chance.sample(range(1, CHUNKS), BREAKS))
    while not reading.result:
        until = next((spot for spot in spots if spot > reading.count), 10 * CHUNKS)
        async with place.client() as client:
            try:
                handle = await client.job(job_id, family=FAMILY)
            except Unavailable:  # a search is asked again; a stream goes on by itself
                continue
            async with contextlib.aclosing(handle.stream(after=cursor, timeout=WITHIN_S)) as items:
                async for item in items:
                    cursor = item.cursor
                    reading.take(item)
                    if item.event == "chunk" and reading.count >= until:
                        reading.breaks += 1
                        break
        await asyncio.sleep(chance.choice((0.0, 0.02, 0.2)))


async def trial(place: Place, fault: Fault, chance: random.Random) -> Reading:
    async with place.client() as client:
        handle = await client.enqueue(Tell(chunks=CHUNKS), tenant="bench")
    reading = Reading()
    async with asyncio.timeout(WITHIN_S):
        reader = asyncio.ensure_future(read(place, handle.id, reading, chance))
        while reading.count < CHUNKS // 2 and not reader.done():
            await asyncio.sleep(0.01)
        await fault(place)
        await reader
    return reading


async def run(servers: int, rounds: int, seed: int) -> bool:
    chance = random.Random(seed)
    sound = True
    faults: tuple[Fault, ...] = {
        1: (nothing, kill_worker, kill_server),
        3: (nothing, kill_server, kill_worker, kill_both),
    }[servers]
    with tempfile.TemporaryDirectory(prefix="aiqueue-resume-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        where = Cluster(directory / "nodes") if servers == 3 else NatsProcess(directory / "server")
        place = Place(where, directory)
        place.streams.mkdir()
        (place.streams / "chaos_jobs.toml").write_text(declared(ACK_WAIT_S, "256MiB"))
        where.start()
        try:
            async with place.client() as client:
                await provision.apply(client.connection, client.topology)
            await place.start_worker()
            for _ in range(rounds):
                for fault in faults:
                    reading = await trial(place, fault, chance)
                    found = reading.faults()
                    sound &= not found
                    said = ", ".join(found) or "every chunk once, in order"
                    had = [len(each) for each in reading.attempts]
                    what = f"{servers} server(s), {fault.__name__}, {reading.breaks} breaks"
                    print(f"{what:44} attempts of {had} chunks: {said}", flush=True)
        finally:
            await place.kill_worker()
            where.kill()
    return sound


async def _work() -> None:
    async with aiqueue.connect() as client, worker.running(client):
        await asyncio.Event().wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks resume", description=__doc__)
    parser.add_argument("--servers", type=int, choices=(1, 3), help="else first one, then three")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    several = (chosen.servers,) if chosen.servers else (1, 3)
    sound = [asyncio.run(run(each, chosen.rounds, chosen.seed)) for each in several]
    return int(not all(sound))


if __name__ == "__main__":
    asyncio.run(_work())
