"""Pulls: from which lanes a worker requests jobs, and how many.

There are two kinds of pull requests on a lane's consumer:

- A *standing pull*, for a lane without jobs on the server: it stays open, so that the next job starts at once.
- *Grants*, for a lane with jobs on the server: pulls that the server answers at once with what it has (no_wait).
  There are as many as the worker has capacity; `fairness` shares them among the lanes.

A credit is a delivery that was requested and has not arrived yet. The puller counts credits, and corrects the count by
the server's status messages (404, 408, 409) and by missing heartbeats (ADR-37).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable

from ..connection import Connection, Received, Status, Subscription, ack_info
from ..errors import AIQueueError
from .ack_window import AckWindow
from .delivery import Delivery, LanePull
from .fairness import StrideClock, share_budget
from .key_turns import share_with_keys
from .refusals import SHORT_EXPIRES_S

log = logging.getLogger(__name__)

HEARTBEATS_LOST = 2.5  # without a message for so many heartbeats, a standing pull is taken as lost
GRANT_LOST_AFTER_S = 2.5  # the same for a grant, which the server answers at once
PREFETCH_S = 0.02  # hold about as many waiting jobs as the slots finish in this time
STEP_MAX = 8  # jobs that a lane gets at a time; while lanes stand in line, one of weight 1
STANDING_MAX = 16  # credits of one standing pull
STANDING_LANES_MAX = 512  # lanes with a standing pull at a time; the poll finds jobs of the other lanes


def prefetch(concurrency: int, handler_s: float | None) -> int:
    """Return how many jobs to hold beyond the slots: what the slots finish in PREFETCH_S, at most one for each slot.

    `handler_s` is how long a job takes. None (no job has ended yet) gives 0, because a job must not wait here while
    another worker is idle.
    """
    if handler_s is None:
        return 0
    return min(concurrency, int(concurrency * PREFETCH_S / max(handler_s, 1e-6)))


class Puller:
    """The open pulls of one worker.

    `has_keys`: some lanes belong to a turn, see `key_turns`.

    Callbacks: `deliver` gets each delivery. `gone` gets a lane whose consumer no longer exists. `changed` is called
    when `refill` may have something to do. `drained` gets an empty lane with `remove_when_drained`; it returns True if
    the lane is to get no pull, because it is about to be removed.

    `busy`: the lanes that get grants, because they hold jobs.

    Counters: `granted` is the sum of the credits in all `grants`, the jobs that open grants may still bring;
    `_standing_count` is the number of lanes with a standing pull. Every method that changes a lane's `grants` or
    `standing_request` changes them too. `asked`: the jobs of all grants so far.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        deliver: Callable[[Delivery], None],
        gone: Callable[[LanePull], None],
        changed: Callable[[], None],
        drained: Callable[[LanePull], bool] | None = None,
    ) -> None:
        self._connection = connection
        self._drained = drained
        self._deliver = deliver
        self._gone = gone
        self._changed = changed
        self._lanes: dict[str, LanePull] = {}  # by token
        self._by_consumer: dict[str, LanePull] = {}  # by `_consumer_key`
        self.busy: set[LanePull] = set()
        self._without_pull: dict[LanePull, None] = {}  # empty lanes that are to get a standing pull, in order
        self._standing_count = 0
        self.granted, self.asked, self.step_per_weight = 0, 0, 0.0
        self._clock = StrideClock()
        self.acks = AckWindow()
        self._numbers = itertools.count(1)
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulling = False
        self._stopped = False
        self.has_keys = False
        self._off: Callable[[], None] | None = None  # ends the watch for a regained link
        self._restarting: asyncio.Task[None] | None = None
        self._refusals_logged: set[str] = set()

    @property
    def lanes(self) -> Iterable[LanePull]:
        """The lanes that are pulled on."""
        return self._by_consumer.values()

    async def open(self) -> None:
        """Start pulling. Raises Unavailable."""
        await self._subscribe_new_inbox()
        self._off = self._connection.on_regained(self.restart_pulls)
        self._pulling = True

    async def _subscribe_new_inbox(self) -> None:
        """Let deliveries and status messages of later pulls come to a new inbox."""
        inbox = self._connection.new_inbox() + "."
        self._subscription = await self._connection.subscribe(inbox + "*.*", self._on_message)
        self._inbox = inbox
        self.acks.restart(inbox)

    def stop(self) -> None:
        """Send no more pulls. What the open pulls still bring is delivered."""
        self._pulling = False
        self._stopped = True

    async def close(self) -> None:
        """Unsubscribe from the inbox. The server then drops the open pulls; what it sent before is still delivered.

        Safe twice and unopened.
        """
        self.stop()
        if self._off is not None:
            self._off()
            self._off = None
        if self._restarting is not None:
            await asyncio.wait([self._restarting])
        if self._subscription is not None:
            await self._subscription.drain()
            self._subscription = None

    def add(self, lane: LanePull) -> None:
        """Start to pull on a lane."""
        lane.token = f"{next(self._numbers):x}"
        lane.acks = self.acks
        lane.last_delivery_at = lane.last_heard_at = time.monotonic()
        self._lanes[lane.token] = lane
        self._by_consumer[_consumer_key(lane.stream, lane.consumer)] = lane
        self._set_pending(lane, lane.pending)

    def remove(self, lane: LanePull) -> None:
        """Stop pulling on a lane. Jobs of its open pulls are ignored: after the lease others get them."""
        self._forget_pulls(lane)
        self.busy.discard(lane)
        self._without_pull.pop(lane, None)
        self._lanes.pop(lane.token, None)
        key = _consumer_key(lane.stream, lane.consumer)
        if self._by_consumer.get(key) is lane:
            del self._by_consumer[key]

    def note_jobs(self, lane: LanePull, jobs: int) -> None:
        """A poll or hint reports `jobs` in a lane. An open pull knows better, so this counts only without one."""
        lane.retiring = False
        if jobs > 0 and lane.idle:
            self._set_pending(lane, max(lane.pending, jobs))

    def set_paused(self, lanes: Iterable[LanePull], *, paused: bool) -> None:
        """Open no pull on these lanes and drop the open ones, or pull on them again."""
        dropped = False
        for lane in lanes:
            lane.paused = paused
            dropped = dropped or bool(lane.standing_request or lane.grants)
            self._set_pending(lane, lane.pending if paused else max(lane.pending, 1))
        if paused and dropped:  # the server drops single pulls only with the inbox of all
            self.restart_pulls()

    def end_turn(self, lane: LanePull) -> None:
        """Open no pull on a lane that stands in line now. What its open ones still bring is delivered."""
        lane.in_line = True
        self._set_pending(lane, lane.pending)

    def begin_turn(self, lane: LanePull, jobs: int) -> None:
        """Pull again on a lane that stood in line, and holds about `jobs` jobs."""
        lane.in_line, given_at = False, lane.given_at
        self._set_pending(lane, max(1, jobs))
        (lane.turn or lane).served_at = given_at  # it has aged in line

    def note_return(self, lane: LanePull) -> None:
        """A job went back to a lane whose key has no credit: the lane gets grants only, once there is one."""
        self._set_pending(lane, max(lane.pending, 1))

    def note_room(self, lane: LanePull) -> None:
        """A lane that was full may have more deliveries."""
        lane.is_full = False
        if self._lanes.get(lane.token) is lane:
            self._set_pending(lane, lane.pending)

    def pull_again(self, lane: LanePull) -> None:
        """Give a drained lane a pull after all: it is not removed."""
        self._set_pending(lane, lane.pending)

    def refill(self, free: int, extra: int) -> None:
        """Open grants and standing pulls for `free` slots, and for `extra` jobs to hold beyond the slots."""
        if not self._pulling or not self._connection.connected:
            return
        budget = min(free + extra - self.granted, self.acks.room())
        # a small part of `extra` alone is not worth a request: wait until half of it is missing
        if self.busy and budget > 0 and budget * 2 >= min(extra, self.acks.unconfirmed_max):
            step = min(STEP_MAX, max(1, extra // 16))  # a large `extra` means short jobs: fewer requests
            wanting, now = [lane for lane in self.busy if lane.wanted > 0], time.monotonic()
            share: Callable[..., list[tuple[LanePull, int]]] = share_with_keys if self.has_keys else share_budget
            shares = share(self._clock, wanting, budget, now, step=step, step_per_weight=self.step_per_weight)
            for lane, jobs in shares:
                self._open_grant(lane, jobs)
            if shares:
                self._connection.push()
        if free > 0 and self._without_pull:
            batch = min(STANDING_MAX, 1 + extra // max(1, len(self._by_consumer)))
            while self._without_pull and self._standing_count < STANDING_LANES_MAX:
                lane = next(iter(self._without_pull))
                del self._without_pull[lane]
                self._open_standing_pull(lane, 1 if lane.key.key else batch)

    def drop_lost_pulls(self) -> None:
        """Forget pulls whose replies or heartbeats are missing, so that they are opened again. Call once a second."""
        self.acks.drop_lost()
        now = time.monotonic()
        for lane in list(self._by_consumer.values()):
            quiet_s = now - lane.last_heard_at
            if (lane.grants and quiet_s > GRANT_LOST_AFTER_S) or (
                lane.standing_request and quiet_s > HEARTBEATS_LOST * lane.limits.heartbeat_s
            ):
                log.info("lane %s: no reply to a pull request for %.0f s; pulling again", lane.key, quiet_s)
                lane.may_be_silent |= bool(lane.grants) and lane.turn is None
                self._forget_pulls(lane)
                self._set_pending(lane, max(lane.pending, 1))

    def _set_pending(self, lane: LanePull, pending: int) -> None:
        """Store how many jobs the server holds for a lane, and decide which kind of pull the lane gets next.

        1. Jobs on the server: grants, unless the worker has as many of the lane as may be in flight.
        2. None, and a pull is open, or the lane is to be released: nothing now.
        3. None, and no pull is open: a standing pull, unless `drained` takes the lane.
        A kind of pull that is paused is not chosen. A lane that is paused, or in line, gets none.
        """
        lane.pending = pending
        if lane.paused or lane.in_line:
            self.busy.discard(lane)
            self._without_pull.pop(lane, None)
            return
        if pending > 0:
            lane.is_full = lane.room <= 0
            if lane.is_full or lane.limits.grants_paused:
                self.busy.discard(lane)
            elif lane not in self.busy:
                if lane.turn is None or not any(each in self.busy for each in lane.turn.lanes):
                    self._clock.join(lane.turn or lane, time.monotonic())
                lane.turn_at, lane.turn_pass = time.monotonic(), (lane.turn or lane).pass_value
                self.busy.add(lane)
            self._without_pull.pop(lane, None)
            return
        self.busy.discard(lane)
        if lane.standing_request or lane.grants or lane.retiring or lane.limits.standing_paused:
            return
        if not (lane.remove_when_drained and self._drained is not None and self._drained(lane)):
            self._without_pull[lane] = None

    def _open_grant(self, lane: LanePull, jobs: int) -> None:
        """Open a grant for `jobs`, or several where the server allows smaller ones only."""
        while jobs > 0:
            batch = min(jobs, lane.limits.batch_max)
            number = self._send_pull(lane, lane.limits.grant_request(batch, expires=lane.may_be_silent))
            if not number:
                return
            lane.grants[number] = batch
            self.granted += batch
            self.asked += batch
            jobs -= batch
        if lane.room <= 0:
            self._set_pending(lane, lane.pending)

    def _open_standing_pull(self, lane: LanePull, batch: int) -> None:
        batch = min(batch, lane.limits.batch_max)
        if number := self._send_pull(lane, lane.limits.standing_request(batch)):
            lane.standing_request, lane.standing_credits = number, batch
            self._standing_count += 1

    def _send_pull(self, lane: LanePull, request: dict[str, int | bool]) -> int:
        """Send a pull request, and return its number; 0 if the link is down."""
        number = next(self._numbers)
        try:
            self._connection.tell(
                f"$JS.API.CONSUMER.MSG.NEXT.{lane.stream}.{lane.consumer}",
                json.dumps(request).encode(),
                reply=f"{self._inbox}{lane.token}.{number:x}",
            )
        except AIQueueError as error:
            log.debug("pull on %s: %s", lane.key, error)
            return 0
        lane.last_heard_at = time.monotonic()
        return number

    def _on_message(self, message: Received) -> None:
        """Deliver a job, or handle a status message of the server."""
        if not message.reply:  # only jobs have an ack subject; a job may carry a status that its publisher set
            # a status of the former inbox is about pulls that are forgotten
            if message.subject.startswith(self._inbox):
                if message.status is not None:
                    self._on_status(message, message.status)
                elif self.acks.confirm(message.subject.rpartition(".")[2]):
                    self._changed()
            return
        try:  # as `ack_info`, for the usual form: these five numbers, after what all deliveries of a consumer share
            key, count, stream_seq, _, stored_ns, left = message.reply.rsplit(".", 5)
            lane = self._by_consumer[key]
            delivery_count = 1 if count == "1" else int(count)
            seq, stored_at, pending = int(stream_seq), int(stored_ns) / 1e9, int(left)
        except (KeyError, ValueError):
            stream, consumer, delivery_count, seq, stored_at, pending = ack_info(message.reply)
            found = self._by_consumer.get(_consumer_key(stream, consumer))
            if found is None:
                return  # the lane was removed while its pull was open: after the lease another worker gets the job
            lane = found
        now = time.monotonic()
        lane.last_heard_at = lane.last_delivery_at = now
        lane.retiring = False
        lane.limits.refusals = 0
        self._use_credit(lane)
        if pending > 0 and lane in self.busy:
            lane.pending = pending
        else:
            self._set_pending(lane, pending)
        self._deliver(Delivery(lane, message, seq, delivery_count, stored_at, now))

    def _use_credit(self, lane: LanePull) -> None:
        """Count off the credit of a delivery: the standing pull goes first, as it is older than any grant."""
        if lane.standing_request:
            lane.standing_credits -= 1
            if not lane.standing_credits:
                lane.standing_request = 0
                self._standing_count -= 1
            return
        for number, left in lane.grants.items():
            self.granted -= 1
            if left > 1:
                lane.grants[number] = left - 1
            else:
                del lane.grants[number]
            return

    def _on_status(self, message: Received, status: Status) -> None:
        """Handle the server's status message about a pull.

        1. 100: a heartbeat. 2. 503, or 409 "Consumer Deleted": the consumer no longer exists. 3. 404, 408, or 409
        because of MaxAckPending: no more jobs now. 4. Anything else: the pull was refused, or has ended early.
        """
        token, _, number = message.subject[len(self._inbox) :].partition(".")
        lane = self._lanes.get(token)
        if lane is None:
            return
        lane.last_heard_at = time.monotonic()
        if status.code in (100, 408):
            lane.limits.refusals = 0
        if status.code == 100:
            return
        ended = int(number, 16)
        was_grant = ended in lane.grants
        if was_grant:
            self.granted -= lane.grants.pop(ended)
        elif ended == lane.standing_request:
            lane.standing_request = lane.standing_credits = 0
            self._standing_count -= 1
        if status.code == 503 or (status.code == 409 and "Deleted" in status.description):
            self.acks.forget(lane.token)
            self._gone(lane)
        elif status.code in (404, 408) or "MaxAckPending" in status.description:
            if status.code == 408 and not was_grant and lane.limits.expires_s < SHORT_EXPIRES_S:
                self._pause(lane, SHORT_EXPIRES_S, grants=False)
            if was_grant or lane.pending <= 0:  # a standing pull brings what comes later
                self._set_pending(lane, 0)
        else:
            self._on_refusal(lane, status.description, was_grant=was_grant)
        self._changed()

    def _on_refusal(self, lane: LanePull, description: str, *, was_grant: bool) -> None:
        """Pull again after a refusal: at once, with a smaller request if the server names its limit, or after a pause.

        A pull that a change of the stream's leader has ended is opened again at once too. While only standing pulls
        are refused, grants go on: the poll finds the lane's jobs.
        """
        log.debug("pull on %s ended: %s", lane.key, description)
        if allowed := lane.limits.learn_limit(description):
            self._log_once(description, f"pull requests ask for at most {allowed} from now on")
        elif pause_s := lane.limits.note_refusal():
            self._log_once(description, "pull requests are repeated with pauses until the server takes them")
            self._pause(lane, pause_s, grants=was_grant)
        self._set_pending(lane, max(lane.pending, 1))

    def _log_once(self, description: str, consequence: str) -> None:
        if description not in self._refusals_logged:
            self._refusals_logged.add(description)
            log.warning("the server refuses pull requests (%s): %s", description, consequence)

    def _pause(self, lane: LanePull, pause_s: float, *, grants: bool) -> None:
        """Open no standing pull on the lane for `pause_s` seconds, and with `grants` no pull at all."""
        lane.limits.standing_paused = True
        lane.limits.grants_paused = lane.limits.grants_paused or grants
        asyncio.get_running_loop().call_later(pause_s, self._end_pause, lane)

    def _end_pause(self, lane: LanePull) -> None:
        lane.limits.standing_paused = lane.limits.grants_paused = False
        if self._lanes.get(lane.token) is lane:
            self._set_pending(lane, max(lane.pending, 1))
            self._changed()

    def _forget_pulls(self, lane: LanePull) -> None:
        """Count the open pulls of a lane as ended."""
        self.granted -= lane.granted
        lane.grants.clear()
        if lane.standing_request:
            lane.standing_request = lane.standing_credits = 0
            self._standing_count -= 1

    def restart_pulls(self) -> None:
        """Take all open pulls as lost, as after a lost link, and open new ones on a new inbox.

        The inbox must be new: the server drops the former pulls when nobody listens to their inbox. On the same inbox
        it would keep them beside the new ones.
        """
        self._pulling, was_pulling = False, self._pulling
        for lane in list(self._by_consumer.values()):
            self._forget_pulls(lane)
            self._set_pending(lane, max(lane.pending, 1))
        if was_pulling:
            self._restarting = asyncio.create_task(self._change_inbox())

    async def _change_inbox(self) -> None:
        """Subscribe to a new inbox, resume pulling, and unsubscribe from the former inbox."""
        former = self._subscription
        try:
            await self._subscribe_new_inbox()
        except AIQueueError as error:
            log.debug("pulls: %s", error)  # the link is lost again; when it is back, the pulls restart again
        finally:
            self._pulling = not self._stopped
            self._changed()
        if former is not None and former is not self._subscription:
            await former.drain()


def _consumer_key(stream: str, consumer: str) -> str:
    """Return what the ack subjects of a consumer's deliveries start with, where they name no domain and account."""
    return f"$JS.ACK.{stream}.{consumer}"
