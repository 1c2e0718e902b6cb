"""Frames through a live worker: each must be run, handed back or become a dead letter, and the worker go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiqueue
from aiqueue import headers, subjects
from aiqueue.enqueue import ASIDE_KEY
from aiqueue.errors import AIQueueError
from aiqueue.inspect import lookup
from aiqueue.subjects import foreign_id
from aiqueue.topology import provision
from aiqueue.worker import unknown_kinds

from ..chaos.servers import Account
from .frames import Frame
from .readers import LANE, Fuzz, Plain, sample
from .wire import Publisher

STREAM = "AI_AGENT_TASKS"
DUE = f"ai.parked.due.{LANE.family}.>"
STUCK_S = 60.0  # without any progress
BYTES_MAX = 900_000  # of a frame: the worker adds headers of its own to what it moves
LOOKED_UP = 50
ELSEWHERE = (
    "ai.agent.results.t0.f{}", "ai.dead.agent.tasks.t0.f{}", "aiq.hint.agent.tasks.t0.normal",
    "aiq.hint.agent.tasks.t{}.normal", "aiq.back.agent.tasks", "aiq.cancel.agent.tasks",
    "aiq.live.ai.agent.results.t0.f{}", "ai.parked.due.no.such.t0.normal.p{}.w",
    "ai.parked.at.agent.tasks.t0.normal.p{}.w",
)  # fmt: skip
WORDS = (
    b"x AI_AGENT_TASKS 7",
    b"t0 f7 7",
    b"t0 f7 " + b"9" * 5_000,
    b"x AI_AGENT_TASKS " + b"9" * 5_000,
    b"\xff \xc2\xb2 \xd9\xa3",
    b"",
)


@dataclass
class Outcome:
    """What became of the frames. `claimed`: those that claim to be a run of an earlier time, which may have ended
    already. `faults`: what the worker logged as faults of its own, or readers raised.
    """

    sent: int = 0
    claimed: int = 0
    said: Counter[str] = field(default_factory=Counter)
    ran: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    left: int = 0
    serves: bool = False
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def stored(self) -> int:
        return self.said["stored"]

    @property
    def ended(self) -> int:
        """Those that were acknowledged unrun: they claimed to be runs that had ended."""
        return self.stored - self.ran - self.dead.total()

    @property
    def sound(self) -> bool:
        """Every stored frame has run or is a dead letter with a reason, and the worker still serves."""
        return (
            0 <= self.ended <= self.claimed and not self.dead[""] and self.left == 0 and self.serves and not self.faults
        )

    def plain(self) -> dict[str, Any]:
        return {
            **vars(self),
            "said": dict(self.said),
            "dead": dict(self.dead),
            "ended": self.ended,
            "sound": self.sound,
        }


class _Faults(logging.Handler):
    """Keeps what is logged as an error, or with a traceback of our own."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self._outcome = outcome

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            trace = f" {record.exc_info[1]!r}" if record.exc_info else ""
            self._outcome.faults.append(f"{record.name}: {record.getMessage()[:300]}{trace[:300]}")


@contextlib.contextmanager
def _watched(outcome: Outcome) -> Iterator[None]:
    """Log records kept, and a short patience with unknown kinds, which is a day otherwise."""
    logger, handler = logging.getLogger("aiqueue"), _Faults(outcome)
    logger.addHandler(handler)
    usual = unknown_kinds.PATIENCE_S
    unknown_kinds.PATIENCE_S = 0.5
    try:
        yield
    finally:
        unknown_kinds.PATIENCE_S = usual
        logger.removeHandler(handler)


def _worker(outcome: Outcome) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=50)

    retry = aiqueue.Backoff(attempts=2, first=0.05)

    @worker.handle(Plain, retry=retry)
    @worker.handle(Fuzz, retry=retry)
    async def fuzz(job: aiqueue.Job[Fuzz]) -> Any:
        if job.message.number % 7 == 1:
            raise ValueError(job.message.text)
        if job.message.number % 7 == 2:
            raise aiqueue.Reject(job.message.text)
        outcome.ran += 1
        return {"text": job.message.text[:10], "id": job.id}

    return worker


async def run(account: Account, *, seed: int, count: int) -> Outcome:
    """`count` frames to the worker, and some to every other subject that something listens on."""
    outcome = Outcome()
    begun = time.monotonic()
    subject = f"ai.{LANE.family}.{LANE.tenant}"
    with _watched(outcome):
        async with (
            aiqueue.connect(account.url, user=account.user, password=account.password) as client,
            Publisher(account) as publisher,
        ):
            await provision.apply(client.connection, client.topology)
            async with _worker(outcome).running(client):
                for number, frame in enumerate(sample(seed, count)):
                    if len(frame.block) + len(frame.body) > BYTES_MAX:
                        continue
                    due = subjects.parked(LANE, f"d{number}", "w", is_due=True)
                    await publisher.send(due if number % 10 == 9 else subject, frame)
                    outcome.sent += 1
                    outcome.claimed += headers.RUN.encode() in frame.block and headers.ENQUEUED.encode() in frame.block
                    if number % 20 == 0:
                        await _elsewhere(publisher, frame, number)
                await publisher.answered()
                outcome.said += publisher.said
                outcome.left = await _settled(client)
                outcome.serves = await _serves(client)
            await _read_all(client, outcome)
    outcome.took_s = time.monotonic() - begun
    return outcome


async def _elsewhere(publisher: Publisher, frame: Frame, number: int) -> None:
    """The same to a subject that holds no jobs; hints of other tenants make them lanes, so only of a few."""
    subject = ELSEWHERE[number // 20 % len(ELSEWHERE)]
    where = subject.format(number % 5 if "hint" in subject else number)
    noise = random.Random(number).choice(WORDS)
    await publisher.shout(where, Frame(frame.block, noise) if where.startswith(("aiq.back", "aiq.cancel")) else frame)


async def _settled(client: aiqueue.Client) -> int:
    """Wait until the stream is empty; how many are left when nothing has moved for STUCK_S."""
    before, since = -1, time.monotonic()
    while True:
        info = await client.connection.api(f"STREAM.INFO.{STREAM}")
        left = int(info["state"]["messages"])
        for waiting in (DUE, subjects.parked(LANE, dedup_key=ASIDE_KEY, is_due=False)):
            parked = await client.connection.api("STREAM.INFO.AI_PARKED", {"subjects_filter": waiting})
            left += sum((parked["state"].get("subjects") or {}).values())
        if left == 0:
            return 0
        if left != before:
            before, since = left, time.monotonic()
        if time.monotonic() - since > STUCK_S:
            return left
        await asyncio.sleep(0.1)


async def _serves(client: aiqueue.Client) -> bool:
    handle = await client.enqueue(Fuzz(number=0, text="after all"), tenant=LANE.tenant)
    return bool(await handle.result(timeout=30))


async def _read_all(client: aiqueue.Client, outcome: Outcome) -> None:
    """Every reader over what is there now, foreign journal entries and dead letters among it."""
    outcome.ran -= 1  # the one that was to show that it serves
    topology, connection = client.topology, client.connection
    ids = []
    async for letter in client.dead.find():
        json.dumps(letter.summary())
        if letter.worker and letter.reason and letter.headers.get("Nats-Msg-Id", "").startswith(LANE.tenant):
            outcome.dead[letter.reason] += 1
        ids.append(letter.job_id)
    ids += [f"f{number}" for number in range(0, 200 * 20, 20)]
    for job_id in random.Random(1).sample(ids, min(len(ids), LOOKED_UP)):
        try:
            await lookup.job(connection, topology, foreign_id(job_id), family=LANE.family, tenant=LANE.tenant)
        except AIQueueError:
            continue
        except Exception as error:  # noqa: BLE001  (it is what is looked for)
            outcome.faults.append(f"lookup of {job_id}: {error!r}")
