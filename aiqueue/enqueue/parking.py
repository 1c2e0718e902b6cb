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

from .. import headers, subjects
from ..backoff import Backoff
from ..connection import Connection, PubAck, Stored, block, read_headers
from ..errors import AIQueueError, BadInput, Conflict, NotFound, QueueFull, Unavailable
from ..lanes import REMAKE_AFTER_S, Delivery, LanePull, Puller
from ..subjects import Lane, Parked
from ..topology import Topology
from .producer import Enqueued, Form, Producer

log = logging.getLogger("aiqueue.parking")

CONSUMER = "forwarder"
ACK_WAIT_S = 5.0  # how long the due jobs of a forwarder that died wait for another one
ACK_PENDING_MAX = 2_000  # due jobs in the hands of all forwarders
HELD_MAX = 512  # due jobs in the hands of one
STANDING = 16  # of which so many may come in unasked
NEW = "new"  # the hop of a job that is enqueued with a delay: one at a time of each id
DELAY_TRIES_MAX = 8
STORE_S = 2.0  # below ACK_WAIT_S: after it another forwarder tries
TEND_S = 1.0
FORBIDDEN_S = 60.0
REFUSED_MAX = 10_000
FULL_FOR_S = 0.2  # a lane that was full is not asked again for so long
AWAY_FOR_S = 2.0  # one whose stream is away, or missing
AGAIN = Backoff(first=1, factor=2, cap=60, jitter=0.5)  # how long a job stays away from a lane that did not take it
REPORTED_MAX = 1_000
_NAK = b'-NAK {"delay": 60000000000}'


class Scheduled(NamedTuple):
    """What is stored for a parked job."""

    subject: str
    headers: dict[str, str]


def scheduled(lane: Lane, job_id: str, due: float, told: Mapping[str, str], *, move: str, word: str) -> Scheduled:
    """The message that brings a job back at `due`, seconds since the epoch. `told` are the headers it shall carry in
    its lane; `word` tells this parking from every other one. Raises BadInput for a time that the server cannot keep.
    """
    due = math.ceil(due * 1000) / 1000  # never early
    try:
        at = datetime.fromtimestamp(due, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (OverflowError, ValueError, OSError):
        raise BadInput(f"{due!r} seconds since the epoch is no time that a job can wait for") from None
    kept = headers.carried(told, ours=True)
    kept.pop(headers.WAITED, None)
    kept |= {
        headers.MSG_ID: subjects.msg_id(lane.family, lane.tenant, job_id, f"park-{word}"),
        headers.JOB_ID: job_id,
        headers.PARKED: word,
        headers.DUE: str(round(due * 1000)),
        headers.SCHEDULE: f"@at {at}",
        headers.SCHEDULE_TARGET: subjects.parked(lane, job_id, move, due=True),
    }
    return Scheduled(subjects.parked(lane, job_id, move, due=False), kept)


def delayed(form: Form, headers_block: bytes, job_id: str, due: float, *, by_caller: bool) -> Scheduled:
    """What is stored for a new job that is to begin at `due`. Where its id is the caller's word, only if none of that
    id is parked already: the server is told to expect an empty subject, and answers with a Conflict.
    """
    told, _ = read_headers(headers_block)
    message = scheduled(form.lane, job_id, due, told, move=NEW, word=subjects.new_id())
    if by_caller:
        message.headers[headers.EXPECTED] = "0"
    return message


class Waiting(NamedTuple):
    """A parked job as it was found. `due` is the time for which the server keeps it."""

    place: Parked
    word: str
    due: float
    run: int  # of the work stream, 0 for a job that has not been there yet
    stored: Stored


def waiting(stored: Stored) -> Waiting | None:
    """What a stored message says of the parked job that it is, None if it is none."""
    place = subjects.parse_parked(stored.subject)
    if place is None:
        return None
    told = stored.headers
    word = headers.word(told) or place.move
    due = headers.number(told.get(headers.DUE, "")) / 1000
    return Waiting(place, word, due, headers.number(told.get(headers.RUN, "")), stored)


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
        move: str,
        timeout_s: float = 30.0,
    ) -> PubAck:
        """Have a job come back to its lane at `due` (seconds since the epoch; past: at once), with the headers `told`
        and Aiq-Parked, whose word is `move`. Parked twice under one hop, it is stored once: a hop is a word that no
        other parking of this job id has, such as one made of its run and attempt.

        Raises BadInput (InvalidToken, TooLarge), QueueFull, Unavailable, NotFound (the stream is not there).
        """
        move = subjects.token("hop", move)
        message = scheduled(lane, subjects.token("job id", job_id), due, told, move=move, word=move)
        return await self._connection.store(message.subject, body, message.headers, timeout_s=timeout_s)

    async def delay(
        self, form: Form, job_id: str, due: float, told: bytes, body: bytes, *, by_caller: bool, timeout_s: float
    ) -> Enqueued:
        """Store a new job, with the headers `told`, that is to begin at `due`. One of its id that is parked already
        makes it a duplicate.

        Raises as `park`.
        """
        message = delayed(form, told, job_id, due, by_caller=by_caller)
        told = block(message.headers)
        end = time.monotonic() + timeout_s
        for _ in range(DELAY_TRIES_MAX):
            try:
                ack = await self._connection.store_block(
                    message.subject, told, body, fenced=by_caller, timeout_s=max(0.05, end - time.monotonic())
                )
            except Conflict:
                there = await self.first(form.lane, job_id)
                if there is not None:
                    mine = there.word == message.headers[headers.PARKED]  # an earlier try, whose answer was lost
                    seq = there.stored.seq
                    return Enqueued(job_id, form.lane, self.stream, seq, not mine, there.due, there.word)
            else:
                at = headers.number(message.headers[headers.DUE]) / 1000
                return Enqueued(job_id, form.lane, ack.stream, ack.seq, False, at, message.headers[headers.PARKED])
        raise Unavailable(f"{message.subject}: {DELAY_TRIES_MAX} tries were overtaken", maybe_stored=True)

    async def first(self, lane: Lane, job_id: str) -> Waiting | None:
        """The job of this id that was enqueued with a delay and waits for its time."""
        stored = await self._connection.last(self.stream, subjects.parked(lane, job_id, NEW, due=False))
        return waiting(stored) if stored else None

    async def of(self, lane: Lane, job_id: str) -> list[Waiting]:
        """All parkings of a job id, those that are due too; words of the lane may be ``*``."""
        found: list[Waiting | None] = []
        for due in (False, True):  # in this order: a job that becomes due meanwhile is found all the same
            read = self._connection.read(self.stream, subjects.parked(lane, job_id, due=due))
            found += [waiting(stored) async for stored in read]
        return [each for each in found if each is not None]


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
        self._refused: dict[Lane, float] = {}  # lanes that took no job, and until when they are not asked
        self._reported: set[str] = set()
        self._engine: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Begin. Raises Unavailable."""
        if self._engine is None:
            await self._puller.open()
            self._engine = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take no more due jobs, and end those in hand: at most twice STORE_S. Safe twice and unstarted."""
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
            self._report("forwarder", f"delayed jobs are not brought to their lanes: {error}")
            if not isinstance(error, NotFound):
                self._join_at += FORBIDDEN_S
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
        """Store a due job in its lane, then acknowledge it. Whatever keeps it out of its lane, it is parked again,
        longer each time: as a message in hand it would take one of the ACK_PENDING_MAX places, and the jobs of one
        lane would keep those of all others from coming in. Where that fails too it stays, and comes again.
        """
        place = subjects.parse_parked(due.message.subject)
        try:
            assert place is not None  # the stream takes no other subject
            if self._refused.get(place.lane, 0.0) > time.monotonic() or not await self._store(place, due):
                await self._park_again(place, due)
        except AIQueueError as error:
            log.debug("a due job stays: %s", error)
            self._say(due, _NAK)
        except Exception:
            log.exception("forwarding a due job on %s", due.message.subject)
            self._say(due, _NAK)
        else:
            self._say(due, b"+ACK")

    async def _store(self, place: Parked, due: Delivery) -> bool:
        """False if it cannot be stored now. Done twice, it stores one job: a due message that is delivered again has
        the same Msg-Id.
        """
        told = headers.carried(due.message.headers, ours=True)
        told.pop(headers.WAITED, None)
        told[headers.JOB_ID] = place.job_id
        told[headers.MSG_ID] = subjects.msg_id(
            place.lane.family, place.lane.tenant, place.job_id, f"due-{_word(place, due)}"
        )
        self._producer.hint(place.lane)
        try:
            await self._connection.store(subjects.work(*place.lane), due.message.data, told, timeout_s=STORE_S)
        except AIQueueError as error:
            if not self._connection.connected:
                raise
            self._refuse(place.lane, error)
            return False
        self._refused.pop(place.lane, None)
        self._reported.discard(str(place.lane))
        return True

    async def _park_again(self, place: Parked, due: Delivery) -> None:
        told, word = headers.carried(due.message.headers, ours=True), _word(place, due)
        waited = headers.number(told.get(headers.WAITED, "")) + 1
        message = scheduled(
            place.lane, place.job_id, time.time() + AGAIN.delay_s(waited), told, move=place.move, word=word
        )
        message.headers[headers.DUE] = told.get(headers.DUE, message.headers[headers.DUE])
        message.headers[headers.WAITED] = str(waited)
        message.headers[headers.MSG_ID] += f"-{waited}"
        message.headers[headers.EXPECTED] = "0"  # a newer parking of this id may be there: it is not to be replaced
        try:
            await self._connection.store(message.subject, due.message.data, message.headers, timeout_s=STORE_S)
        except Conflict:
            there = await self._connection.last(self._stream, message.subject)
            if there is None or headers.word(there.headers) != word:
                raise

    def _refuse(self, lane: Lane, error: AIQueueError) -> None:
        """Do not ask this lane for a moment: its other due jobs would fare no better."""
        if len(self._refused) >= REFUSED_MAX:
            self._refused.clear()
        self._refused[lane] = time.monotonic() + (FULL_FOR_S if isinstance(error, QueueFull) else AWAY_FOR_S)
        self._report(str(lane), f"its due jobs wait: {error}")

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
            log.warning("%s: %s", what, problem)


def _word(place: Parked, due: Delivery) -> str:
    """Which parking it is; who parks without the library may leave it out."""
    return headers.word(due.message.headers) or f"{place.move}-{due.seq}"
