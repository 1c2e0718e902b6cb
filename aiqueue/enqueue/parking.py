"""Parked jobs: jobs that wait for a time outside of the work stream, and the forwarder that brings them back.

A parked job is a scheduled message of the server (ADR-51) on ``ai.parked.at…``. At its time the server moves the
message to ``ai.parked.due…``. A forwarder, of which every worker has one, then stores the job in its lane. The orders
of writes, and what a crash between two of them does, are in docs/decisions/parking.md.
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
from ..lanes import RECREATE_AFTER_S, Delivery, LanePull, Puller
from ..subjects import Lane, ParkedSubject
from ..topology import Topology
from .producer import Enqueued, JobTemplate, Producer

log = logging.getLogger(__name__)

CONSUMER = "forwarder"
ACK_WAIT_S = 5.0  # after it, the unacknowledged due jobs of a dead forwarder go to another one
ACK_PENDING_MAX = 2_000  # unacknowledged due jobs of all forwarders together
HELD_MAX = 512  # unacknowledged due jobs of one forwarder
STANDING_MAX = 16  # of HELD_MAX, due jobs that may arrive by the standing pull
ASIDE_KEY = "aside"  # of jobs that are parked aside, because a worker does not know their kind: one for each job id
NEW_JOB_KEY = "new"  # the dedup key of a job enqueued with a delay: at most one is parked for each job id
DELAY_TRIES_MAX = 8
MOVE_S = 1.0
STORE_S = 2.0  # below ACK_WAIT_S, because after that another forwarder tries
CHECK_EVERY_S = 1.0
FORBIDDEN_S = 60.0
PAUSED_LANES_MAX = 10_000
FULL_PAUSE_S = 0.2  # how long a full lane gets no due jobs
AWAY_PAUSE_S = 2.0  # the same for a lane whose stream is missing or does not answer
REPARK_BACKOFF = Backoff(first=1, factor=2, cap=60, jitter=0.5)  # how long a job waits when it was not stored
WARNED_MAX = 1_000
_ACK = b"+ACK"
_NAK = b"-NAK"


class ScheduledMessage(NamedTuple):
    """The message that is stored for a parked job."""

    subject: str
    headers: dict[str, str]


def scheduled_message(
    lane: Lane, job_id: str, due_at: float, job_headers: Mapping[str, str], *, dedup_key: str, parking_id: str
) -> ScheduledMessage:
    """Return the message that brings a job back to its lane at `due_at`, seconds since the epoch.

    `job_headers` are the headers that the job gets in its lane. `dedup_key` ends the subject: parked twice under one
    key, a job is stored once. `parking_id` distinguishes this parking from all others of the job id, also under the
    same key. Raises BadInput for a time that the server cannot represent.
    """
    due_at = math.ceil(due_at * 1000) / 1000  # rounded up, so that no job is early
    try:
        at = datetime.fromtimestamp(due_at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (OverflowError, ValueError, OSError):
        raise BadInput(f"a job cannot wait until {due_at!r} seconds since the epoch") from None
    kept = headers.carried(job_headers, ours=True)
    kept.pop(headers.WAITED, None)
    kept |= {
        headers.MSG_ID: subjects.msg_id(lane.family, lane.tenant, job_id, f"park-{parking_id}"),
        headers.JOB_ID: job_id,
        headers.PARKED: parking_id,
        headers.DUE: str(round(due_at * 1000)),
        headers.SCHEDULE: f"@at {at}",
        headers.SCHEDULE_TARGET: subjects.parked(lane, job_id, dedup_key, is_due=True),
    }
    return ScheduledMessage(subjects.parked(lane, job_id, dedup_key, is_due=False), kept)


def delayed_job_message(
    template: JobTemplate, headers_block: bytes, job_id: str, due_at: float, *, by_caller: bool
) -> ScheduledMessage:
    """Return the message that stores a new job to start at `due_at`, seconds since the epoch.

    `by_caller`: the caller chose the job id. The message then expects an empty subject, and the server refuses it with
    a Conflict if a job of this id is parked already.
    """
    job_headers, _ = read_headers(headers_block)
    message = scheduled_message(
        template.lane, job_id, due_at, job_headers, dedup_key=NEW_JOB_KEY, parking_id=subjects.new_id()
    )
    if by_caller:
        message.headers[headers.EXPECTED] = "0"
    return message


class ParkedJob(NamedTuple):
    """A parked job as it is stored. `due_at` is in seconds since the epoch. `kind`: empty if the headers do not say."""

    subject: ParkedSubject
    parking_id: str
    due_at: float
    kind: str
    run: int  # its run's sequence in the work stream, 0 for a job that was not there yet
    stored: Stored


def parse_parked_job(stored: Stored) -> ParkedJob | None:
    """Return the parked job in a stored message; None if the subject is not that of a parked job."""
    subject = subjects.parse_parked(stored.subject)
    if subject is None:
        return None
    parking_id = headers.parking_id(stored.headers) or subject.dedup_key
    due_at = headers.number(stored.headers.get(headers.DUE, "")) / 1000
    kind = stored.headers.get(headers.READ_KIND) or stored.headers.get(headers.KIND, "")
    return ParkedJob(subject, parking_id, due_at, kind, headers.number(stored.headers.get(headers.RUN, "")), stored)


class Parking:
    """Stores and finds parked jobs, in the stream of parked jobs."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.parked_stream.name

    async def park(
        self,
        lane: Lane,
        job_id: str,
        due_at: float,
        job_headers: Mapping[str, str],
        body: bytes,
        *,
        dedup_key: str,
        parking_id: str = "",
        timeout_s: float = 30.0,
    ) -> PubAck:
        """Store a job that comes back to its lane at `due_at`, seconds since the epoch; a past time means at once.

        Parked twice under the same `dedup_key`, for example one made of run and attempt, the job is stored once. In its
        lane the job has the headers `job_headers` and the `parking_id` (Aiq-Parked; default: the `dedup_key`).

        Raises BadInput (InvalidToken, TooLarge), QueueFull, Unavailable, NotFound (the stream is missing).
        """
        dedup_key = subjects.token("dedup key", dedup_key)
        job_id = subjects.token("job id", job_id)
        message = scheduled_message(
            lane, job_id, due_at, job_headers, dedup_key=dedup_key, parking_id=parking_id or dedup_key
        )
        return await self._connection.store(message.subject, body, message.headers, timeout_s=timeout_s)

    async def move(self, job: ParkedJob, due_at: float) -> None:
        """Have a parked job become due at `due_at`, instead of its own time. Raises Conflict if it has left parking."""
        subject, stored = job.subject, job.stored
        message = scheduled_message(
            subject.lane, subject.job_id, due_at, stored.headers, dedup_key=subject.dedup_key,
            parking_id=job.parking_id,
        )  # fmt: skip
        message.headers[headers.MSG_ID] += f"-{stored.seq}"  # the stream remembers the id of the first one
        message.headers[headers.EXPECTED] = str(stored.seq)
        await self._connection.store(message.subject, stored.data, message.headers, timeout_s=MOVE_S)

    async def store_delayed(
        self,
        template: JobTemplate,
        job_id: str,
        due_at: float,
        headers_block: bytes,
        body: bytes,
        *,
        by_caller: bool,
        timeout_s: float,
    ) -> Enqueued:
        """Store a new job that starts at `due_at`, seconds since the epoch.

        With `by_caller` (the caller chose the id), a job of the same id that is parked already is returned as a
        duplicate, and nothing is stored. Raises what `park` raises.
        """
        message = delayed_job_message(template, headers_block, job_id, due_at, by_caller=by_caller)
        parking_id = message.headers[headers.PARKED]
        message_block = block(message.headers)
        end = time.monotonic() + timeout_s
        for _ in range(DELAY_TRIES_MAX):
            try:
                ack = await self._connection.store_block(
                    message.subject,
                    message_block,
                    body,
                    fenced=by_caller,
                    timeout_s=max(0.05, end - time.monotonic()),
                )
            except Conflict:
                found = await self.find_delayed(template.lane, job_id)
                if found is not None:
                    duplicate = found.parking_id != parking_id  # else an earlier try, whose PubAck was lost
                    seq = found.stored.seq
                    return Enqueued(job_id, template.lane, self.stream, seq, duplicate, found.due_at, found.parking_id)
            else:
                due_at = headers.number(message.headers[headers.DUE]) / 1000
                return Enqueued(job_id, template.lane, ack.stream, ack.seq, False, due_at, parking_id)
        raise Unavailable(
            f"{message.subject}: other programs wrote to this subject before each of {DELAY_TRIES_MAX} tries",
            maybe_stored=True,
        )

    async def find_delayed(self, lane: Lane, job_id: str) -> ParkedJob | None:
        """Return the job of this id that was enqueued with a delay and is not due yet; None if there is none."""
        stored = await self._connection.last(self.stream, subjects.parked(lane, job_id, NEW_JOB_KEY, is_due=False))
        return parse_parked_job(stored) if stored else None

    async def find_all(self, lane: Lane, job_id: str) -> list[ParkedJob]:
        """Return all parked jobs of an id, due ones too. Tokens of the lane may be ``*``."""
        found: list[ParkedJob | None] = []
        for is_due in (False, True):  # in this order, so that a job that becomes due meanwhile is found
            read = self._connection.read(self.stream, subjects.parked(lane, job_id, is_due=is_due))
            found += [parse_parked_job(stored) async for stored in read]
        return [each for each in found if each is not None]


class Forwarder:
    """Moves due jobs into their lanes, from `start` to `stop`, over lost links and while the stream is missing.

    It forwards the due jobs of all families, also of those that this worker does not run: no job is stuck because the
    workers of another service are away. A due job is acknowledged only after its lane has it.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._stream = topology.parked_stream.name
        self._producer = Producer(connection, topology)  # its hints tell workers that a lane has jobs
        self._wake = asyncio.Event()
        self._puller = Puller(connection, deliver=self._on_due, gone=self._on_consumer_gone, changed=self._wake.set)
        self._pull: LanePull | None = None
        self._create_at = 0.0  # when the consumer is created or checked next, monotonic seconds
        self._tasks: set[asyncio.Task[None]] = set()  # one for each due job that is being forwarded
        self._paused_until: dict[Lane, float] = {}  # lanes that took no job; monotonic seconds
        self._warned: set[str] = set()
        self._engine: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Start forwarding. Raises Unavailable."""
        if self._engine is None:
            await self._puller.open()
            self._engine = asyncio.create_task(self._pull_due_jobs())

    async def stop(self) -> None:
        """Stop pulling, and finish the due jobs in progress, which takes at most twice STORE_S.

        Safe twice and unstarted.
        """
        self._stopped = True
        self._puller.stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel()
            await asyncio.wait([engine])
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._puller.close()

    async def _pull_due_jobs(self) -> None:
        """Keep pulls open for free capacity. Runs whenever something changes, and at least every CHECK_EVERY_S."""
        checked_at = 0.0
        while True:
            try:
                now = time.monotonic()
                if self._pull is None and now >= self._create_at:
                    await self._create_consumer()
                if now - checked_at >= CHECK_EVERY_S:
                    checked_at = now
                    self._puller.drop_lost_pulls()
                self._puller.refill(HELD_MAX - len(self._tasks), STANDING_MAX)
            except Exception:
                log.exception("pulling due jobs failed; the next try is in %g s", CHECK_EVERY_S)
            try:
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _create_consumer(self) -> None:
        """Create the consumer over due jobs, which all workers share, and pull on it. An existing one is used."""
        self._create_at = time.monotonic() + CHECK_EVERY_S
        config = {
            "durable_name": CONSUMER,
            "filter_subject": subjects.parked(is_due=True),
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_S * 1e9),
            "max_ack_pending": ACK_PENDING_MAX,
            "max_deliver": -1,  # without limit: a due job must reach its lane
        }
        request = {"stream_name": self._stream, "config": config}
        try:
            await self._connection.api(f"CONSUMER.CREATE.{self._stream}.{CONSUMER}", request)
        except Unavailable as error:
            log.debug("creating the forwarder's consumer: %s", error)
            if "no such file" in str(error):  # its files are gone: until it is deleted, creating it fails every time
                await self._connection.api(f"CONSUMER.DELETE.{self._stream}.{CONSUMER}")
        except AIQueueError as error:
            self._warn_once("forwarder", f"delayed jobs do not reach their lanes: {error}")
            if not isinstance(error, NotFound):
                self._create_at += FORBIDDEN_S
        else:
            lane = Lane("parked", "*", "due")
            self._pull = LanePull(lane, self._stream, CONSUMER, ACK_WAIT_S, pending=1)
            self._puller.add(self._pull)

    def _on_consumer_gone(self, pull: LanePull) -> None:
        """Recreate the consumer soon. The new one delivers all unacknowledged due jobs again."""
        self._puller.remove(pull)
        self._pull = None
        self._create_at = time.monotonic() + RECREATE_AFTER_S
        asyncio.get_running_loop().call_later(RECREATE_AFTER_S, self._wake.set)

    def _on_due(self, delivery: Delivery) -> None:
        """Start a task that forwards a due job; once stopped, return the job to the server."""
        if self._stopped:
            self._reply(delivery, _NAK)
            return
        task = asyncio.create_task(self._forward(delivery))
        self._tasks.add(task)
        task.add_done_callback(self._on_forwarded)

    def _on_forwarded(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()

    # -- one due job

    async def _forward(self, delivery: Delivery) -> None:
        """Store a due job in its lane, or else park it again; then acknowledge it.

        1. The lane takes the job: acknowledge.
        2. The lane does not take it: park the job again, longer each time, and acknowledge. An unacknowledged job
           would use up ACK_PENDING_MAX, and the jobs of one full lane would block those of all others.
        3. Parking fails too, as while neither stream has a leader: nak, and the server delivers the due job again after
           a second, and later each time.
        """
        subject = subjects.parse_parked(delivery.message.subject)
        try:
            assert subject is not None  # the stream takes no other subjects
            paused = self._paused_until.get(subject.lane, 0.0) > time.monotonic()
            if paused or not await self._store_in_lane(subject, delivery):
                await self._park_again(subject, delivery)
        except AIQueueError as error:
            log.debug("a due job is not forwarded yet: %s", error)
            self._reply(delivery, _nak_for_longer(delivery))
        except Exception:
            log.exception("forwarding the due job on %s failed", delivery.message.subject)
            self._reply(delivery, _nak_for_longer(delivery))
        else:
            self._reply(delivery, _ACK)

    async def _store_in_lane(self, subject: ParkedSubject, delivery: Delivery) -> bool:
        """Store a due job in its lane. Return False if the lane does not take it now.

        Storing the same due job twice stores one job: a redelivered due message gets the same Msg-Id.
        Raises what `Connection.store` raises if the link is down.
        """
        job_headers = headers.carried(delivery.message.headers, ours=True)
        job_headers.pop(headers.WAITED, None)
        job_headers[headers.JOB_ID] = subject.job_id
        job_headers[headers.MSG_ID] = subjects.msg_id(
            subject.lane.family, subject.lane.tenant, subject.job_id, f"due-{_parking_id(subject, delivery)}"
        )
        self._producer.hint(subject.lane)
        try:
            await self._connection.store(
                subjects.work(*subject.lane), delivery.message.data, job_headers, timeout_s=STORE_S
            )
        except AIQueueError as error:
            if not self._connection.connected:
                raise
            self._pause_lane(subject.lane, error)
            return False
        self._paused_until.pop(subject.lane, None)
        self._warned.discard(str(subject.lane))
        return True

    async def _park_again(self, subject: ParkedSubject, delivery: Delivery) -> None:
        """Park a due job that its lane did not take, under the same parking id, for longer each time.

        A newer parking under the same key is not replaced: the message expects an empty subject, and the server refuses
        it with a Conflict.
        """
        job_headers = headers.carried(delivery.message.headers, ours=True)
        parking_id = _parking_id(subject, delivery)
        waited = headers.number(job_headers.get(headers.WAITED, "")) + 1
        message = scheduled_message(
            subject.lane,
            subject.job_id,
            self._connection.clock.now() + REPARK_BACKOFF.delay_s(waited),
            job_headers,
            dedup_key=subject.dedup_key,
            parking_id=parking_id,
        )
        message.headers[headers.DUE] = job_headers.get(headers.DUE, message.headers[headers.DUE])
        message.headers[headers.WAITED] = str(waited)
        message.headers[headers.MSG_ID] += f"-{waited}"
        message.headers[headers.EXPECTED] = "0"
        try:
            await self._connection.store(message.subject, delivery.message.data, message.headers, timeout_s=STORE_S)
        except Conflict:
            stored = await self._connection.last(self._stream, message.subject)
            if stored is None or headers.parking_id(stored.headers) != parking_id:  # else an earlier try stored it
                raise

    def _pause_lane(self, lane: Lane, error: AIQueueError) -> None:
        """Send no due jobs to this lane for a moment, because they would fail in the same way."""
        if len(self._paused_until) >= PAUSED_LANES_MAX:
            self._paused_until.clear()
        self._paused_until[lane] = time.monotonic() + (FULL_PAUSE_S if isinstance(error, QueueFull) else AWAY_PAUSE_S)
        self._warn_once(str(lane), f"due jobs of this lane have to wait: {error}")

    def _reply(self, delivery: Delivery, reply: bytes) -> None:
        """Send an ack or nak. If the link is down, the server delivers the due job again after ACK_WAIT_S.

        That is harmless: the job is stored once.
        """
        try:
            self._connection.tell(delivery.reply, reply)
        except AIQueueError as error:
            log.debug("%s of a due job was not sent: %s", reply[:4].decode(), error)

    def _warn_once(self, about: str, problem: str) -> None:
        """Log a problem the first time that it occurs for `about` (a lane, or the forwarder itself)."""
        if len(self._warned) >= WARNED_MAX:
            self._warned.clear()
        if about not in self._warned:
            self._warned.add(about)
            log.warning("%s: %s", about, problem)


def _nak_for_longer(delivery: Delivery) -> bytes:
    """Return a nak whose delay grows with the number of deliveries."""
    return b'-NAK {"delay": %d}' % round(REPARK_BACKOFF.delay_s(delivery.delivery_count) * 1e9)


def _parking_id(subject: ParkedSubject, delivery: Delivery) -> str:
    """Return the parking id of a due job. A plain publisher may have left out its header: then it is made up."""
    return headers.parking_id(delivery.message.headers) or f"{subject.dedup_key}-{delivery.seq}"
