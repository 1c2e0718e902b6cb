"""Jobs that wait for a time away from the work stream, and the way back into their lanes.

A parked job is a message with a schedule of the server (ADR-51) on ``ai.parked.at…``. At its time the server moves it
to ``ai.parked.due…``, from where a forwarder, of which every worker has one, stores it in its lane. The orders of
writes, and what a crash between two of them does, are in docs/decisions/parking.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from . import headers, subjects
from .backoff import Backoff
from .connection import Connection, PubAck
from .errors import AIQueueError, BadInput, Conflict, QueueFull, Unavailable
from .lanes import REMAKE_AFTER_S
from .producer import Producer
from .puller import Delivery, LanePull, Puller
from .subjects import Lane, Parked
from .topology import Topology

log = logging.getLogger("aiqueue.parking")

CONSUMER = "forwarder"
ACK_WAIT_S = 10.0  # how long the due jobs of a forwarder that died wait for another one
ACK_PENDING_MAX = 2_000  # due jobs in the hands of all forwarders
HELD_MAX = 512  # due jobs in the hands of one
STANDING = 16  # of which so many may come in unasked
STORE_S = 5.0  # below ACK_WAIT_S: after it another forwarder tries
TEND_S = 1.0
AWAY_S = 2.0  # a due job whose stream is away comes again after this
STUCK_S = 600.0  # one that cannot be stored at all: somebody must change something
FULL_LANES_MAX = 10_000
FULL_FOR_S = 0.2  # a lane that refused a job is not asked again for so long
FULL = Backoff(first=1, factor=2, cap=60, jitter=0.5)  # how long a job stays away from a full lane
REPORTED_MAX = 1_000


class Scheduled(NamedTuple):
    """What is stored for a parked job."""

    subject: str
    headers: dict[str, str]


def scheduled(lane: Lane, job_id: str, due: float, told: Mapping[str, str], *, hop: str, word: str) -> Scheduled:
    """The message that brings a job back at `due`, seconds since the epoch. `told` are the headers it shall carry in
    its lane; `word` tells this parking from every other one. Raises BadInput for a time that the server cannot keep.
    """
    due = math.ceil(due * 1000) / 1000  # never early
    try:
        at = datetime.fromtimestamp(due, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (OverflowError, ValueError, OSError):
        raise BadInput(f"{due!r} seconds since the epoch is no time that a job can wait for") from None
    kept = headers.carried(told)
    kept.pop(headers.WAITED, None)
    kept |= {
        headers.MSG_ID: subjects.msg_id(lane.family, lane.tenant, job_id, f"park-{word}"),
        headers.JOB_ID: job_id,
        headers.PARKED: word,
        headers.DUE: str(round(due * 1000)),
        headers.SCHEDULE: f"@at {at}",
        headers.SCHEDULE_TARGET: subjects.parked(lane, job_id, hop, due=True),
    }
    return Scheduled(subjects.parked(lane, job_id, hop, due=False), kept)


class Parking:
    """The stream of parked jobs."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.parked_stream.name

    async def park(
        self,
        lane: Lane,
        job_id: str,
        due: float,
        told: Mapping[str, str],
        body: bytes,
        *,
        hop: str,
        timeout_s: float = 30.0,
    ) -> PubAck:
        """Have a job come back to its lane at `due` (seconds since the epoch; past: at once), with the headers `told`
        and Aiq-Parked, whose word is `hop`. Parked twice under one hop, it is stored once: a hop is a word that no
        other parking of this job id has, such as one made of its run and attempt.

        Raises BadInput (InvalidToken, TooLarge), QueueFull, Unavailable, NotFound (the stream is not there).
        """
        hop = subjects.token("hop", hop)
        message = scheduled(lane, subjects.token("job id", job_id), due, told, hop=hop, word=hop)
        return await self._connection.store(message.subject, body, message.headers, timeout_s=timeout_s)


class Forwarder:
    """Moves due jobs into their lanes: those of all families, whatever this worker runs, so that a job is not stuck
    because another service's workers are away. A due job is acknowledged only when its lane has it.

    It runs from `start` to `stop`, through lost links and a stream that is not there yet.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._stream = topology.parked_stream.name
        self._producer = Producer(connection, topology)  # for its hints
        self._wake = asyncio.Event()
        self._puller = Puller(connection, deliver=self._on_due, gone=self._on_gone, changed=self._wake.set)
        self._pull: LanePull | None = None
        self._join_at = 0.0
        self._held: set[asyncio.Task[None]] = set()
        self._full: dict[Lane, float] = {}  # lanes that refused a job, and until when they are not asked
        self._reported: set[str] = set()
        self._engine: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Begin. Raises Unavailable."""
        if self._engine is None:
            await self._puller.open()
            self._engine = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take no more due jobs, and end those in hand: at most STORE_S. Safe twice and unstarted."""
        self._stopped = True
        self._puller.stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel()
            await asyncio.wait([engine])
        await asyncio.gather(*self._held, return_exceptions=True)
        await self._puller.close()

    async def _run(self) -> None:
        """Keep pulling, whenever something has changed, and look once a second whether all is well."""
        tended = 0.0
        while True:
            try:
                now = time.monotonic()
                if self._pull is None and now >= self._join_at:
                    await self._join()
                if now - tended >= TEND_S:
                    tended = now
                    self._puller.tend()
                self._puller.refill(HELD_MAX - len(self._held), STANDING)
            except Exception:
                log.exception("forwarding due jobs")  # and again in a second
            try:
                async with asyncio.timeout(TEND_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _join(self) -> None:
        """Make sure of the consumer, which all workers share, and pull on it."""
        self._join_at = time.monotonic() + TEND_S
        config = {
            "durable_name": CONSUMER,
            "filter_subject": subjects.parked(due=True),
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_S * 1e9),
            "max_ack_pending": ACK_PENDING_MAX,
            "max_deliver": -1,  # a due job is never given up
        }
        request = {"stream_name": self._stream, "config": config}
        try:
            await self._connection.api(f"CONSUMER.CREATE.{self._stream}.{CONSUMER}", request)
        except Unavailable as error:
            log.debug("forwarder: %s", error)
            if "no such file" in str(error):  # as for a lane's consumer: left alone, it can never be made again
                await self._connection.api(f"CONSUMER.DELETE.{self._stream}.{CONSUMER}")
        except AIQueueError as error:
            self._report("forwarder", f"delayed jobs are not brought back to their lanes: {error}")
        else:
            lane = Lane("parked", "*", "due")
            self._pull = LanePull(lane, self._stream, CONSUMER, ACK_WAIT_S, pending=1)
            self._puller.add(self._pull)

    def _on_gone(self, pull: LanePull) -> None:
        """The consumer is no more; its unacknowledged jobs are delivered again by the next one."""
        self._puller.remove(pull)
        self._pull = None
        self._join_at = time.monotonic() + REMAKE_AFTER_S
        asyncio.get_running_loop().call_later(REMAKE_AFTER_S, self._wake.set)

    def _on_due(self, due: Delivery) -> None:
        if self._stopped:
            self._say(due, b"-NAK")
            return
        task = asyncio.create_task(self._forward(due))
        self._held.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[None]) -> None:
        self._held.discard(task)
        self._wake.set()

    # -- one due job

    async def _forward(self, due: Delivery) -> None:
        """Store a due job in its lane, then acknowledge it. It stays, and comes again, where that cannot be done."""
        place = subjects.parse_parked(due.message.subject)
        if place is None:  # the stream's subjects do not allow it
            self._nak(due, STUCK_S)
            return
        try:
            if self._full.get(place.lane, 0.0) > time.monotonic() or not await self._store(place, due):
                await self._wait_again(place, due)
        except Unavailable as error:
            log.debug("due job %s of %s: %s", place.job_id, place.lane, error)
            self._nak(due, AWAY_S)
        except (QueueFull, Conflict) as error:
            log.debug("due job %s of %s: %s", place.job_id, place.lane, error)
            self._nak(due, FULL.cap_s)
        except AIQueueError as error:
            self._report(
                str(place.lane), f"a due job cannot be stored, and is tried again every {STUCK_S:g} s: {error}"
            )
            self._nak(due, STUCK_S)
        except Exception:
            log.exception("forwarding a due job of %s", place.lane)
            self._nak(due, STUCK_S)
        else:
            self._say(due, b"+ACK")

    async def _store(self, place: Parked, due: Delivery) -> bool:
        """False if the lane is full. Done twice, it stores one job: a due message that is delivered again has the same
        Msg-Id.
        """
        told = headers.carried(due.message.headers)
        word = told.get(headers.PARKED) or f"{place.hop}-{due.seq}"
        told.pop(headers.WAITED, None)
        told[headers.JOB_ID] = place.job_id
        told[headers.MSG_ID] = subjects.msg_id(place.lane.family, place.lane.tenant, place.job_id, f"due-{word}")
        self._producer.hint(place.lane)
        try:
            await self._connection.store(subjects.work(*place.lane), due.message.data, told, timeout_s=STORE_S)
        except QueueFull as error:
            self._found_full(place.lane, error)
            return False
        self._full.pop(place.lane, None)
        return True

    async def _wait_again(self, place: Parked, due: Delivery) -> None:
        """Park a job whose lane is full once more, longer each time: as a message in hand it would take one of the
        ACK_PENDING_MAX places, and a full lane's jobs would keep those of all others from coming in.
        """
        told = headers.carried(due.message.headers)
        word = told.get(headers.PARKED) or f"{place.hop}-{due.seq}"
        waited = headers.number(told.get(headers.WAITED, "")) + 1
        again = time.time() + FULL.delay_s(waited)
        message = scheduled(place.lane, place.job_id, again, told, hop=place.hop, word=word)
        message.headers[headers.DUE] = told.get(headers.DUE, message.headers[headers.DUE])
        message.headers[headers.WAITED] = str(waited)
        message.headers[headers.MSG_ID] += f"-{waited}"
        message.headers[headers.EXPECTED] = "0"  # a newer parking of this id may be there: it is not to be replaced
        try:
            await self._connection.store(message.subject, due.message.data, message.headers, timeout_s=STORE_S)
        except Conflict:
            there = await self._connection.last(self._stream, message.subject)
            if there is None or there.headers.get(headers.PARKED) != word:
                raise

    def _found_full(self, lane: Lane, error: QueueFull) -> None:
        now = time.monotonic()
        if len(self._full) >= FULL_LANES_MAX:
            self._full.clear()
        if lane not in self._full:
            log.warning("due jobs of %s wait: %s", lane, error.reason)
        self._full[lane] = now + FULL_FOR_S

    def _nak(self, due: Delivery, delay_s: float) -> None:
        self._say(due, b'-NAK {"delay": %d}' % round(delay_s * 1e9))

    def _say(self, due: Delivery, word: bytes) -> None:
        """Without a link it is not said, and the job comes again after ACK_WAIT_S: to be stored once, all the same."""
        try:
            self._connection.tell(due.reply, word)
        except AIQueueError as error:
            log.debug("%s of a due job: %s", word[:4].decode(), error)

    def _report(self, what: str, problem: str) -> None:
        if len(self._reported) >= REPORTED_MAX:
            self._reported.clear()
        if what not in self._reported:  # once, not with every job
            self._reported.add(what)
            log.error("%s: %s", what, problem)
