"""Moves jobs into their lanes: the forwarder, of which every worker has one, stores parked jobs when they are due."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable

from .. import headers, subjects
from ..connection import Connection
from ..errors import AIQueueError, Conflict, NotFound, QueueFull
from ..journal import Journal
from ..lanes import Delivery, SharedConsumer, SharedConsumerOptions, WarnOnce
from ..subjects import Lane, ParkedSubject
from ..topology import Topology
from ..units import Backoff
from .key_lanes import KeyLanes
from .parking import scheduled_message
from .producer import Producer
from .take_out import copy_msg_id, find_original, note_on_its_way, original_seq

log = logging.getLogger(__name__)

CONSUMER = "forwarder"
ACK_WAIT_S = 2.5  # after it, the unacknowledged due jobs of a dead forwarder go to another one
ACK_PENDING_MAX = 2_000  # unacknowledged due jobs of all forwarders together
HELD_MAX = 512  # unacknowledged due jobs of one forwarder
STORE_S = 1.0  # below ACK_WAIT_S, because after that another forwarder tries
PAUSED_LANES_MAX = 10_000
FULL_PAUSE_S = 0.2  # how long a full lane gets no due jobs
AWAY_PAUSE_S = 0.5  # the same for a lane whose stream is missing or does not answer
REPARK_BACKOFF = Backoff(first=1, factor=2, cap=60, jitter=0.5)  # how long a job waits when it was not stored
AWAY_WAIT_SHARE = 0.2  # of the time that a job is late: it waits no longer while its stream does not answer
_ACK = b"+ACK"
IsHeld = Callable[[Lane, str, int], Awaitable[bool]]  # of a job: its lane, its id, its sequence


class Forwarder:
    """Moves due jobs into their lanes, from `start` to `stop`, over lost links and while the stream is missing.

    It forwards the due jobs of all families, also of those that this worker does not run: no job is stuck because the
    workers of another service are away. A due job is acknowledged only after its lane has it.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        key_lanes: KeyLanes | None = None,
        *,
        is_held: IsHeld | None = None,
    ) -> None:
        """`key_lanes`: where jobs of limited keys go. None: to the ordinary lanes. `is_held`: whether a worker holds a
        job that was taken out of its lane. None: nobody is asked.
        """
        self._connection = connection
        self._topology = topology
        self._key_lanes = key_lanes
        self._is_held = is_held
        self._stream = topology.parked_stream.name
        self._journal = Journal(connection, topology.journal_stream.name)
        self._producer = Producer(connection, topology)  # its hints tell workers that a lane has jobs
        options = SharedConsumerOptions(
            self._stream, CONSUMER, subjects.parked(is_due=True), ACK_WAIT_S, ACK_PENDING_MAX, HELD_MAX,
            Lane("parked", "*", "due"),
        )  # fmt: skip
        self._consumer = SharedConsumer(connection, options, self._forward, self._on_refused)
        self._paused_until: dict[Lane, float] = {}  # lanes that took no job; monotonic seconds
        self._away: set[Lane] = set()  # of these, the lanes whose stream does not answer or is missing
        self._warn_once = WarnOnce(log)

    async def start(self) -> None:
        """Start forwarding. Raises Unavailable."""
        await self._consumer.start()

    async def stop(self) -> None:
        """Stop pulling, and finish the due jobs in progress, which takes at most twice STORE_S.

        Safe twice and unstarted.
        """
        await self._consumer.stop()

    def _on_refused(self, error: AIQueueError) -> None:
        self._warn_once(f"delayed jobs do not reach their lanes: {error}", about="forwarder")

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
            lane, key = self._find_lane(subject.lane, delivery)
            waits = self._paused_until.get(lane, 0.0) > time.monotonic() or await self._is_copy(subject, delivery)
            if waits or not await self._store_in_lane(subject, lane, key, delivery):
                await self._park_again(subject, lane, delivery)
        except AIQueueError as error:
            log.debug("a due job is not forwarded yet: %s", error)
            self._nak(delivery)
        except Exception:
            log.exception("forwarding the due job on %s failed", delivery.message.subject)
            self._nak(delivery)
        else:
            self._consumer.reply(delivery, _ACK)

    def _find_lane(self, lane: Lane, delivery: Delivery) -> tuple[Lane, str]:
        """Return the lane of a due job: that of its limited key, with the key's value, or the one it is parked for."""
        key = headers.limit_key(delivery.message.headers) if self._key_lanes is not None else ""
        family = self._topology.families.get(lane.family) if key else None
        if family is None or family.limit_key is None or self._key_lanes is None:
            return lane, ""
        token = self._key_lanes.token(family, lane.tenant, key)
        return (lane._replace(key=token), key) if token else (lane, "")

    async def _is_copy(self, subject: ParkedSubject, delivery: Delivery) -> bool:
        """Whether a due job is the copy of one that is still in its lane, as who took it out has died on the way; or of
        one that a worker holds, which got it just when it was taken out.

        Any other copy takes the place of its original, and the journal is told.
        """
        copied = delivery.message.headers
        family = self._topology.families.get(subject.lane.family)
        if headers.ORIGINAL not in copied or family is None:
            return False
        if await find_original(self._connection, family.stream, copied) is not None:
            return True
        if self._is_held is not None and await self._is_held(subject.lane, subject.job_id, original_seq(copied)):
            return True
        run, enqueued_at = headers.run(copied, 0, 0.0)
        await note_on_its_way(
            self._journal, family, subject.lane, subject.job_id, run, enqueued_at, headers.parking_id(copied)
        )
        return False

    async def _store_in_lane(self, subject: ParkedSubject, lane: Lane, key: str, delivery: Delivery) -> bool:
        """Store a due job in its lane. Return False if the lane does not take it now.

        Storing the same due job twice stores one job: a redelivered due message gets the same Msg-Id.
        Raises what `Connection.store` raises if the link is down.
        """
        job_headers = headers.carried(delivery.message.headers, ours=True)
        job_headers.pop(headers.WAITED, None)
        job_headers.pop(headers.ORIGINAL, None)
        job_headers[headers.JOB_ID] = subject.job_id
        job_headers[headers.MSG_ID] = _msg_id(subject, delivery)
        self._producer.hint(lane, key)
        try:
            await self._connection.store(subjects.work(*lane), delivery.message.data, job_headers, timeout_s=STORE_S)
        except AIQueueError as error:
            if not self._connection.connected:
                raise
            if isinstance(error, NotFound) and lane.key and self._key_lanes is not None:
                self._key_lanes.distrust(self._topology.family(lane.family))
                return await self._store_in_lane(subject, lane.without_key, "", delivery)
            self._pause_lane(lane, error)
            return False
        self._paused_until.pop(lane, None)
        self._away.discard(lane)
        self._warn_once.forget(str(lane))
        return True

    async def _park_again(self, subject: ParkedSubject, lane: Lane, delivery: Delivery) -> None:
        """Park a due job that its lane did not take, under the same parking id, for longer each time.

        A newer parking under the same key is not replaced: the message expects an empty subject, and the server refuses
        it with a Conflict.
        """
        job_headers = headers.carried(delivery.message.headers, ours=True)
        parking_id = _parking_id(subject, delivery)
        waited = headers.number(job_headers.get(headers.WAITED, "")) + 1
        now = self._connection.clock.now()
        delay_s = _away_delay_s(delivery, waited, now) if lane in self._away else REPARK_BACKOFF.delay_s(waited)
        message = scheduled_message(
            subject.lane,
            subject.job_id,
            now + delay_s,
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
            self._away.clear()
        if isinstance(error, QueueFull):
            self._away.discard(lane)
        else:
            self._away.add(lane)
        self._paused_until[lane] = time.monotonic() + (AWAY_PAUSE_S if lane in self._away else FULL_PAUSE_S)
        self._warn_once(f"{lane}: due jobs of this lane have to wait: {error}", about=str(lane))

    def _nak(self, delivery: Delivery) -> None:
        """Have the server deliver a due job again, later each time."""
        delay_s = _away_delay_s(delivery, delivery.delivery_count, self._connection.clock.now())
        self._consumer.reply(delivery, b'-NAK {"delay": %d}' % round(delay_s * 1e9))


def _away_delay_s(delivery: Delivery, tries: int, now: float) -> float:
    """Return how long a due job waits for a stream that does not answer, at most a share of the time that it is late.

    `now` is in seconds since the epoch.
    """
    due_ms = headers.number(delivery.message.headers.get(headers.DUE, ""))
    late_s = now - due_ms / 1000 if due_ms else math.inf
    return min(REPARK_BACKOFF.delay_s(tries), max(REPARK_BACKOFF.first_s, AWAY_WAIT_SHARE * late_s))


def _msg_id(subject: ParkedSubject, delivery: Delivery) -> str:
    """Return the Msg-Id of a due job in its lane."""
    if headers.ORIGINAL in delivery.message.headers:
        return copy_msg_id(subject.lane, subject.job_id, delivery.message.headers)
    lane, parking_id = subject.lane, _parking_id(subject, delivery)
    return subjects.msg_id(lane.family, lane.tenant, subject.job_id, f"due-{parking_id}")


def _parking_id(subject: ParkedSubject, delivery: Delivery) -> str:
    """Return the parking id of a due job. A plain publisher may have left out its header: then it is made up."""
    return headers.parking_id(delivery.message.headers) or f"{subject.dedup_key}-{delivery.seq}"
