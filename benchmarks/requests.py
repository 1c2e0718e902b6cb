"""The integration guide's sequence, publish and then request with the same payload: does each id run once?

``python -m benchmarks requests [--ids N] [--calm]``: a plain nats-py client publishes each id (every other one without
asking for a PubAck, none with a Nats-Msg-Id), requests its answer, and asks again where none comes, while two workers
and two responders are killed (-9) in turn. A run that its worker's death cut off is not a double: handlers run at least
once. Exit code 1 where an id ran twice otherwise, got two answers that differ, or none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats

import aiqueue
from aiqueue.topology import provision

from .chaos.children import Child
from .chaos.servers import NatsProcess

AT_ONCE = 20
HANDLER_S = 0.02
ASK_S, PATIENCE_S = 2.0, 120.0
KILL_EVERY_S = 0.8
WRITTEN_S = 0.1  # after a handler's end its result is written within so long, on a busy machine
TENANT = "acme"


class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str
    request_id: str


worker = aiqueue.Worker(concurrency=10)


@worker.handle(Request)
async def handle(job: aiqueue.Job[Request]) -> dict[str, str]:
    place = os.environ["AIQUEUE_REQUESTS_LOG"]
    note(place, f"begun {job.id} {os.getpid()} {time.monotonic()}")
    await asyncio.sleep(HANDLER_S)
    note(place, f"ended {job.id} {os.getpid()} {time.monotonic()}")
    return {"answer": f"{job.message.prompt} by {os.getpid()}"}


def note(place: str, line: str) -> None:
    file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{line}\n".encode())
    os.close(file)


@dataclass
class Told:
    """What the requesters saw."""

    answers: dict[str, set[str]] = field(default_factory=dict)
    asked: int = 0
    waits_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


async def one(nc: Nats, number: int, told: Told) -> None:
    """The guide's two snippets for one id, then asking until there is an answer."""
    request_id = f"req-{number}"
    body = json.dumps({"request_id": request_id, "prompt": f"p{number}"}).encode()
    headers = {"request_id": request_id, "model": "small", "priority": "normal"}
    subject = f"ai.gateway.requests.{TENANT}"
    if number % 2:
        await nc.publish(subject, body, headers=headers)
    else:
        await nc.jetstream().publish(subject, body, headers=headers)
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        told.asked += 1
        try:
            answer = await nc.request(f"ai.gateway.responses.{TENANT}", body, timeout=ASK_S)
        except (nats.errors.TimeoutError, nats.errors.NoRespondersError) as error:
            told.errors[type(error).__name__] += 1
            await asyncio.sleep(0.05)
            continue
        if code := (answer.headers or {}).get("Nats-Service-Error-Code"):
            told.errors[code] += 1
            await asyncio.sleep(0.05)
            continue
        told.answers.setdefault(request_id, set()).add(answer.data.decode())
        if len(told.answers[request_id]) == 1 and random.random() < 0.1:  # asked once more: the same answer
            continue
        told.waits_ms.append((time.monotonic() - begun) * 1000)
        return


class Places:
    """Two workers and two responders, of which one is killed now and then."""

    def __init__(self, env: dict[str, str], directory: Path) -> None:
        self._env = env
        self._log = directory / "children.log"
        self._children: list[tuple[list[str], Child]] = []
        self.killed: dict[int, float] = {}  # when, by pid
        self.kills: Counter[str] = Counter()
        work = ["-m", "aiqueue", "work", "benchmarks.requests:worker", "--log-level", "error"]
        for arguments in (work, work, ["-m", "aiqueue", "respond"], ["-m", "aiqueue", "respond"]):
            self._children.append((arguments, Child(arguments, env, self._log)))

    async def kill_now_and_then(self, chance: random.Random) -> None:
        while True:
            await asyncio.sleep(KILL_EVERY_S * (0.5 + chance.random()))
            at = chance.randrange(len(self._children))
            arguments, child = self._children[at]
            self.killed[child.pid] = time.monotonic()
            await asyncio.to_thread(child.kill)
            self.kills[arguments[2]] += 1
            self._children[at] = arguments, Child(arguments, self._env, self._log)

    def end(self) -> None:
        for _, child in self._children:
            child.kill()


def doubles(lines: list[str], killed: dict[int, float]) -> tuple[Counter[str], int]:
    """How often each id was run to its end, and how many runs a death has cut off: before the handler's end, or so soon
    after it that the result may not have been written.
    """
    ended: dict[tuple[str, int], float] = {}
    for line in lines:
        word, job_id, pid, at = line.split()
        if word == "ended":
            ended[job_id, int(pid)] = float(at)
    whole: Counter[str] = Counter()
    cut = 0
    for line in lines:
        word, job_id, pid, _ = line.split()
        if word == "begun":
            died = killed.get(int(pid), math.inf)
            if ended.get((job_id, int(pid)), math.inf if died < math.inf else 0.0) > died - WRITTEN_S:
                cut += 1
            else:
                whole[job_id] += 1
    return whole, cut


async def run(ids: int, *, calm: bool, seed: int) -> bool:
    """Whether each id was answered, and none run twice."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as directory:
        server = NatsProcess(Path(directory) / "server")
        server.start()
        account, log = server.account, Path(directory) / "runs"
        log.touch()
        try:
            async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
                await provision.apply(client.connection, client.topology)
            env = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
                   "AIQUEUE_REQUESTS_LOG": str(log)}  # fmt: skip
            places, told = Places(env, Path(directory)), Told()
            nc = await nats.connect(account.url, user=account.user, password=account.password)
            killing = None if calm else asyncio.create_task(places.kill_now_and_then(random.Random(seed)))
            numbers = iter(range(ids))

            async def requester() -> None:
                for number in numbers:
                    await one(nc, number, told)

            begun = time.monotonic()
            try:
                await asyncio.gather(*(requester() for _ in range(AT_ONCE)))
            finally:
                if killing is not None:
                    killing.cancel()
                places.end()
                await nc.close()
            return report(told, log.read_text().splitlines(), places, ids, time.monotonic() - begun)
        finally:
            server.kill()


def report(told: Told, lines: list[str], places: Places, ids: int, took_s: float) -> bool:
    whole, cut = doubles(lines, places.killed)
    twice = [job_id for job_id, count in whole.items() if count > 1]
    differ = [job_id for job_id, answers in told.answers.items() if len(answers) > 1]
    waits = sorted(told.waits_ms)
    p50, p95 = statistics.median(waits), waits[int(len(waits) * 0.95)]
    kills = ", ".join(f"{count} {what}" for what, count in sorted(places.kills.items())) or "none"
    print(f"{ids:,} ids in {took_s:.0f} s; asked {told.asked:,} times ({dict(told.errors)}); killed -9: {kills}")
    print(f"answered {len(told.answers):,}, differently {len(differ)}; run twice {len(twice)}; runs cut off {cut}")
    print(f"publish to answer: p50 {p50:.0f} ms, p95 {p95:.0f} ms, longest {waits[-1]:.0f} ms")
    for job_id in twice[:5]:
        print(f"  twice: {job_id}: {[line for line in lines if line.split()[1] == job_id]}")
    return len(told.answers) == ids and not twice and not differ


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks requests", description=__doc__)
    parser.add_argument("--ids", type=int, default=1_000)
    parser.add_argument("--calm", action="store_true", help="kill nobody")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}")
    return 0 if asyncio.run(run(chosen.ids, calm=chosen.calm, seed=chosen.seed)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
