"""What one process does for the mail of all agents: the router's duty.

1. It moves mail from the bare subject to inboxes.
2. It returns expired mail from the inboxes of offline agents to its senders.

The process that holds the presence key ``duty`` does this. The others try to acquire that key every two seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Mapping

from .. import headers, subjects
from ..connection import timestamp
from ..enqueue import DeadLetters, FailedJob
from ..errors import AIQueueError, BadInput, ConfigMismatch, InboxFull, InvalidToken, NotFound, QueueFull, ServerError
from ..lanes import Delivery, LanePull, Puller
from ..mailbox import BOUNCE, Envelope, Inboxes, Unread, parse_envelope
from ..subjects import Lane

log = logging.getLogger(__name__)

CONSUMER = "router"
DUTY = "duty"
LOCK_TTL_S = 10.0
RENEW_EVERY_S = 3.0
ACQUIRE_EVERY_S = 2.0
ACK_WAIT_S = 30.0
HELD_MAX = 64
SWEEP_EVERY_S = 15.0
SWEPT_MAILS_MAX = 5_000  # mails that one sweep reads
SWEPT_BYTES_MAX = 16 * 1024 * 1024
OLD_PART = 0.9  # mail older than this part of the stream's max_age is removed before the server deletes it
ROUTE_RETRY_S = 5.0


class MailRouter:
    """The router's duty; see the module. It runs from `start` to `stop`, also while the link to the server is lost."""

    def __init__(self, inboxes: Inboxes, dead: DeadLetters, puller: Puller) -> None:
        self._inboxes = inboxes
        self._dead = dead
        self._puller = puller
        self._connection = inboxes.connection
        self._family = inboxes.family
        self._lock = inboxes.presence.duty_lock(DUTY, LOCK_TTL_S)
        self._queue: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._consumer_lost = asyncio.Event()
        self._sweep_from = ("", "", 0)  # the inbox at which the next sweep starts, and the last mail read there
        self._tasks: list[asyncio.Task[None]] = []
        self._duty_tasks: list[asyncio.Task[None]] = []
        self.pull: LanePull | None = None

    @property
    def held(self) -> int:
        """How many mails wait here to be routed."""
        return len(self._queue)

    def start(self) -> None:
        """Start to compete for the duty."""
        self._tasks.append(asyncio.create_task(self._hold_duty()))

    async def stop(self) -> None:
        """Stop, and let another process take the duty. Safe twice and unstarted."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_duty()
        await self._lock.release()

    def on_delivery(self, delivery: Delivery) -> None:
        self._queue.append(delivery)
        self._arrived.set()

    def on_consumer_gone(self, pull: LanePull) -> None:
        """Drop the queued mail, because a recreated consumer redelivers it."""
        self._puller.remove(pull)
        if pull is self.pull:
            self.pull = None
            self._queue.clear()
            self._consumer_lost.set()

    async def _hold_duty(self) -> None:
        """Acquire and renew the lock. Start the duty with the lock, and stop it without."""
        error_logged = False
        while True:
            try:
                on_duty = await (self._lock.renew() if self._lock.held else self._lock.acquire())
                if on_duty and self.pull is None:
                    await self._start_duty()
                elif not on_duty:
                    await self._stop_duty()
                error_logged = False
            except AIQueueError as error:
                if not error_logged:  # once, not every two seconds
                    log.warning("mail on the bare subject is not moved to inboxes; retrying: %s", error)
                error_logged = True
            except Exception:
                log.exception("could not start or stop routing mail; retrying")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY_S if self._lock.held else ACQUIRE_EVERY_S):
                    await self._consumer_lost.wait()
            self._consumer_lost.clear()

    async def _start_duty(self) -> None:
        """Recreate the consumer: mail that the last process on duty held is redelivered at once, and in order."""
        stream = self._family.stream
        config = {
            "durable_name": CONSUMER,
            "filter_subject": f"ai.{self._family.name}.*",
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_S * 1e9),
            "max_ack_pending": HELD_MAX,
            "max_deliver": -1,
            "mem_storage": True,
        }
        with contextlib.suppress(NotFound):
            await self._connection.api(f"CONSUMER.DELETE.{stream}.{CONSUMER}")
        request = {"stream_name": stream, "config": config, "action": "create"}
        call = f"CONSUMER.CREATE.{stream}.{CONSUMER}.{config['filter_subject']}"
        try:
            created = await self._connection.api(call, request)
        except (ConfigMismatch, ServerError) as error:
            raise ConfigMismatch(f"{stream}: consumer {CONSUMER} could not be created: {error}") from None
        lane = Lane(self._family.name, "*", CONSUMER)
        self.pull = LanePull(lane, stream, CONSUMER, ACK_WAIT_S, pending=1, created=timestamp(created["created"]))
        self._puller.add(self.pull)
        if not self._duty_tasks:
            self._duty_tasks = [asyncio.create_task(self._route_all()), asyncio.create_task(self._sweep_all())]

    async def _stop_duty(self) -> None:
        """Stop routing and sweeping. Safe twice and unstarted."""
        tasks, self._duty_tasks = self._duty_tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pull, self.pull = self.pull, None
        if pull is not None:
            self._puller.remove(pull)
        self._queue.clear()

    # -- the bare subject

    async def _route_all(self) -> None:
        """Route the queued mails one at a time, so that each inbox gets them in the order in which they were sent."""
        while True:
            while self._queue:
                delivery = self._queue[0]
                try:
                    await self._route(delivery)
                    reply = b"+ACK"
                except AIQueueError as error:
                    subject = delivery.message.subject
                    log.warning("mail on %s could not be routed, retrying in %g s: %s", subject, ROUTE_RETRY_S, error)
                    await asyncio.sleep(ROUTE_RETRY_S)
                    continue  # with the same mail: later ones may be of its conversation
                except Exception:
                    log.exception("mail on %s could not be routed, redelivered in 60 s", delivery.message.subject)
                    reply = b'-NAK {"delay": 60000000000}'
                if self._queue and self._queue[0] is delivery:
                    self._queue.popleft()
                with contextlib.suppress(AIQueueError):
                    self._connection.tell(delivery.reply, reply)
            self._arrived.clear()
            await self._arrived.wait()

    async def _route(self, delivery: Delivery) -> None:
        """Store a mail in the inbox that it names or, without a target, in all inboxes of its tenant's roster.

        A redelivered mail is not stored twice: its Msg-Id contains its sequence on the bare subject.
        """
        message = delivery.message
        if headers.COPY in message.headers:
            return  # the mail itself is in its inbox
        envelope = parse_envelope(
            message.subject, delivery.seq, delivery.stored_at, message.headers, default_kind=self._family.default_kind
        )
        if not subjects.TOKEN.fullmatch(envelope.tenant):
            error = f"tenant {envelope.tenant!r} is not a valid token"
            await self._bounce_or_dead_letter(delivery, envelope, "no_such_agent", error)
        elif envelope.target is not None:  # an empty one is no agent's, and no wish to reach all
            await self._store_in_inbox(delivery, envelope, envelope.target)
        else:
            names = [card.agent for card in await self._inboxes.presence.roster(envelope.tenant)]
            others = [each for each in names if each != envelope.sender]
            for each in others:
                await self._store_in_inbox(delivery, envelope, each)
            if not others:
                error = "the mail names no target, and the roster is empty"
                await self._bounce_or_dead_letter(delivery, envelope, "no_such_agent", error)

    async def _store_in_inbox(self, delivery: Delivery, envelope: Envelope, to: str) -> None:
        """Store a mail in one inbox, or bounce it if the inbox refuses it."""
        move = f"routed-{delivery.seq}-{int(delivery.stored_at)}"
        message, broadcast = delivery.message, envelope.target is None
        try:
            await self._inboxes.forward(to, envelope, message.headers, message.data, move, broadcast=broadcast)
        except InboxFull as error:
            await self._bounce_or_dead_letter(delivery, envelope, "inbox_full", str(error))
        except BadInput as error:
            reason = "no_such_agent" if isinstance(error, InvalidToken) else "invalid"
            await self._bounce_or_dead_letter(delivery, envelope, reason, str(error))

    async def _bounce_or_dead_letter(self, delivery: Delivery, envelope: Envelope, reason: str, error: str) -> None:
        """Bounce a mail that cannot be stored. If nobody can get the bounce, dead-letter the mail."""
        target = envelope.target if envelope.target and subjects.TOKEN.fullmatch(envelope.target) else "nobody"
        if subjects.TOKEN.fullmatch(envelope.tenant) and await self._inboxes.bounce(envelope, target, reason, error):
            return
        await _dead_letter(
            self._dead, self._family.name, envelope, delivery.seq, delivery.stored_at, reason, error,
            delivery.message.headers, delivery.message.data,
        )  # fmt: skip

    # -- inboxes of agents that are away

    async def _sweep_all(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.sweep()
            except AIQueueError as error:
                log.info("could not look for expired mail, retrying in %g s: %s", SWEEP_EVERY_S, error)
            except Exception:
                log.exception("could not look for expired mail, retrying in %g s", SWEEP_EVERY_S)

    async def sweep(self) -> int:
        """Remove mail from inboxes and return it to its senders. Return the number of removed mails.

        1. The agent is offline: its expired mail is removed. An online agent bounces its expired mail itself.
        2. The inbox has a tenant or agent that is not a valid token: all its mail is removed.

        Reads at most SWEPT_MAILS_MAX mails and SWEPT_BYTES_MAX bytes. The next sweep continues after the last one.
        """
        counts = await self._inboxes.counts()
        online = await self._inboxes.presence.online()
        offline = sorted(each for each in counts if each not in online)
        first, after = self._sweep_from[:2], self._sweep_from[2]
        offline = [each for each in offline if each >= first] + [each for each in offline if each < first]
        mails_left, bytes_left, removed = SWEPT_MAILS_MAX, SWEPT_BYTES_MAX, 0
        max_age_s = self._inboxes.max_age_s
        for tenant, agent in offline:
            self._sweep_from = tenant, agent, after if (tenant, agent) == first else 0
            is_valid = subjects.TOKEN.fullmatch(tenant) and subjects.TOKEN.fullmatch(agent)
            inbox = subjects.inbox_filter(self._family.name, tenant, agent)
            async for mail in self._inboxes.read_all(inbox, after=self._sweep_from[2]):
                self._sweep_from = tenant, agent, mail.seq
                mails_left -= 1
                bytes_left -= len(mail.body)
                now = self._connection.clock.now()
                age_s = now - mail.stored_at
                if not is_valid:
                    error = f"{agent!r} of {tenant!r} is not a valid token"
                    removed += await self._remove_from_inbox(mail, "nobody", "no_such_agent", error)
                elif mail.envelope.expired(now) or (max_age_s and age_s >= OLD_PART * max_age_s):
                    error = "the mail expired while the agent was offline"
                    removed += await self._remove_from_inbox(mail, agent, "expired", error)
                if mails_left <= 0 or bytes_left <= 0:
                    return removed
        self._sweep_from = ("", "", 0)
        return removed

    async def _remove_from_inbox(self, mail: Unread, agent: str, reason: str, error: str) -> bool:
        """Bounce a mail, or dead-letter it if nobody can get the bounce. Then delete it from its inbox.

        Return False if the mail is still there.
        """
        bounced = await self._inboxes.bounce(mail.envelope, agent, reason, error)
        if not bounced and mail.envelope.kind != BOUNCE:
            try:
                await _dead_letter(
                    self._dead, self._family.name, mail.envelope, mail.seq, mail.stored_at, reason, error,
                    mail.headers, mail.body,
                )  # fmt: skip
            except QueueFull:
                return False
        return await self._connection.delete(self._family.stream, mail.seq)


async def _dead_letter(
    dead: DeadLetters, family: str, envelope: Envelope, seq: int, stored_at: float, reason: str, error: str,
    mail_headers: Mapping[str, str], body: bytes,
) -> None:  # fmt: skip
    target = envelope.target if envelope.target and subjects.TOKEN.fullmatch(envelope.target) else subjects.NORMAL
    failed = FailedJob(
        job_id=envelope.mail_id, kind=envelope.kind, lane=Lane(family, envelope.tenant, target), seq=seq, reason=reason,
        error=error, attempt=0, worker=CONSUMER, enqueued_at=stored_at, history=[],
    )  # fmt: skip
    await dead.add(failed, mail_headers, body)
