"""What one process does for the mail of all agents: it brings mail from the bare subject to inboxes, and sends back
what has expired in the inbox of an agent that is away.

The process that holds the presence key ``duty`` does it; the others look every two seconds whether it is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping

from .. import headers, subjects
from ..connection import timestamp
from ..enqueue import DeadLetters, FailedJob
from ..errors import AIQueueError, BadInput, ConfigMismatch, InboxFull, InvalidToken, NotFound, QueueFull, ServerError
from ..lanes import Delivery, LanePull, Puller
from ..mailbox import BOUNCE, Envelope, Inboxes, Unread, envelope
from ..subjects import Lane

log = logging.getLogger("aiqueue.agent")

CONSUMER = "router"
DUTY = "duty"
TTL_S = 10.0
KEEP_S = 3.0
TAKE_S = 2.0
ACK_WAIT_S = 30.0
HELD_MAX = 64
SWEEP_S = 15.0
SWEPT_MAILS_MAX = 5_000  # mails that one sweep looks at
SWEPT_BYTES_MAX = 16 * 1024 * 1024
OLD_PART = 0.9  # mail that is as old as this part of the stream's max_age goes back before the server drops it
AGAIN_S = 5.0


class Duty:
    """See the module. It runs from `start` to `stop`, through lost links."""

    def __init__(self, inboxes: Inboxes, dead: DeadLetters, puller: Puller) -> None:
        self._inboxes = inboxes
        self._dead = dead
        self._puller = puller
        self._connection = inboxes.connection
        self._family = inboxes.family
        self._hold = inboxes.presence.duty(DUTY, TTL_S)
        self._queue: deque[Delivery] = deque()
        self._came = asyncio.Event()
        self._lost = asyncio.Event()
        self._swept = ("", "")  # the inbox at which the next sweep begins
        self._tasks: list[asyncio.Task[None]] = []
        self._on: list[asyncio.Task[None]] = []
        self.pull: LanePull | None = None

    @property
    def held(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end()
        await self._hold.release()

    def on_delivery(self, delivery: Delivery) -> None:
        self._queue.append(delivery)
        self._came.set()

    def gone(self, pull: LanePull) -> None:
        """The consumer is no more: what is here comes again."""
        self._puller.remove(pull)
        if pull is self.pull:
            self.pull = None
            self._queue.clear()
            self._lost.set()

    async def _watch(self) -> None:
        said = False
        while True:
            try:
                on = await (self._hold.keep() if self._hold.held else self._hold.take())
                if on and self.pull is None:
                    await self._begin()
                elif not on:
                    await self._end()
                said = False
            except AIQueueError as error:
                if not said:  # once, not every two seconds
                    log.warning("mail on the bare subject is not brought to its inboxes: %s", error)
                said = True
            except Exception:
                log.exception("routing mail")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEP_S if self._hold.held else TAKE_S):
                    await self._lost.wait()
            self._lost.clear()

    async def _begin(self) -> None:
        """Make the consumer anew: what the last process on duty had in hand comes again at once, and in order."""
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
            made = await self._connection.api(call, request)
        except (ConfigMismatch, ServerError) as error:
            raise ConfigMismatch(f"{stream}: no consumer {CONSUMER}: {error}") from None
        lane = Lane(self._family.name, "*", CONSUMER)
        self.pull = LanePull(lane, stream, CONSUMER, ACK_WAIT_S, pending=1, created=timestamp(made["created"]))
        self._puller.add(self.pull)
        if not self._on:
            self._on = [asyncio.create_task(self._route_all()), asyncio.create_task(self._sweep_all())]

    async def _end(self) -> None:
        tasks, self._on = self._on, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pull, self.pull = self.pull, None
        if pull is not None:
            self._puller.remove(pull)
        self._queue.clear()

    # -- the bare subject

    async def _route_all(self) -> None:
        """One after the other, so that they come to an inbox as they were sent."""
        while True:
            while self._queue:
                delivery = self._queue[0]
                try:
                    await self._route(delivery)
                    word = b"+ACK"
                except AIQueueError as error:
                    log.warning("mail on %s waits: %s", delivery.message.subject, error)
                    await asyncio.sleep(AGAIN_S)
                    continue  # it is tried again: those behind it may be of its conversation
                except Exception:
                    log.exception("routing a mail on %s", delivery.message.subject)
                    word = b'-NAK {"delay": 60000000000}'
                if self._queue and self._queue[0] is delivery:
                    self._queue.popleft()
                with contextlib.suppress(AIQueueError):
                    self._connection.tell(delivery.reply, word)
            self._came.clear()
            await self._came.wait()

    async def _route(self, delivery: Delivery) -> None:
        """Store a mail in the inbox that it names, or in all of its tenant's roster. Stored twice, it is there
        once: its Msg-Id tells its place on the bare subject.
        """
        message = delivery.message
        told = message.headers
        if headers.COPY in told:
            return  # of a mail that is in its inbox
        found = envelope(
            message.subject, delivery.seq, delivery.stored_at, told, default_kind=self._family.default_kind
        )
        if not subjects.TOKEN.fullmatch(found.tenant):
            await self._return(delivery, found, "no_such_agent", f"tenant {found.tenant!r} is no token")
        elif found.target:
            await self._deliver(delivery, found, found.target)
        else:
            names = [card.agent for card in await self._inboxes.presence.roster(found.tenant)]
            others = [each for each in names if each != found.sender]
            for each in others:
                await self._deliver(delivery, found, each)
            if not others:
                await self._return(delivery, found, "no_such_agent", "it names no target, and the roster is empty")

    async def _deliver(self, delivery: Delivery, found: Envelope, to: str) -> None:
        hop = f"routed-{delivery.seq}-{int(delivery.stored_at)}"
        message = delivery.message
        try:
            await self._inboxes.forward(to, found, message.headers, message.data, hop, broadcast=not found.target)
        except InboxFull as error:
            await self._return(delivery, found, "inbox_full", str(error))
        except BadInput as error:
            reason = "no_such_agent" if isinstance(error, InvalidToken) else "invalid"
            await self._return(delivery, found, reason, str(error))

    async def _return(self, delivery: Delivery, found: Envelope, reason: str, error: str) -> None:
        """Send a mail back that cannot be stored, and keep it as a dead letter where nobody can be told."""
        target = found.target if found.target and subjects.TOKEN.fullmatch(found.target) else "nobody"
        if subjects.TOKEN.fullmatch(found.tenant) and await self._inboxes.bounce(found, target, reason, error):
            return
        await _bury(self._dead, self._family.name, found, delivery.seq, delivery.stored_at, reason, error,
                    delivery.message.headers, delivery.message.data)  # fmt: skip

    # -- inboxes of agents that are away

    async def _sweep_all(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except AIQueueError as error:
                log.info("expired mail is looked for later: %s", error)
            except Exception:
                log.exception("looking for expired mail")

    async def sweep(self) -> int:
        """Send back what has expired in the inboxes of agents that are offline, and what lies where no agent can come,
        its id being no token; how much that was. It looks at most at
        SWEPT_MAILS_MAX mails and SWEPT_BYTES_MAX bytes, and the next sweep goes on from there. An agent that is online
        sends its own back.
        """
        counts = await self._inboxes.counts()
        online = await self._inboxes.presence.online()
        away = sorted(each for each in counts if each not in online)
        away = [each for each in away if each >= self._swept] + [each for each in away if each < self._swept]
        left, left_bytes, returned = SWEPT_MAILS_MAX, SWEPT_BYTES_MAX, 0
        max_age_s = self._inboxes.max_age_s
        for tenant, agent in away:
            self._swept = tenant, agent
            real = subjects.TOKEN.fullmatch(tenant) and subjects.TOKEN.fullmatch(agent)
            async for mail in self._inboxes.read_all(f"ai.{self._family.name}.{tenant}.{agent}"):
                left -= 1
                left_bytes -= len(mail.body)
                age_s = time.time() - mail.stored_at
                if not real:
                    returned += await self._give_up(
                        mail, "nobody", "no_such_agent", f"{agent!r} of {tenant!r}: no token"
                    )
                elif mail.envelope.expired(time.time()) or (max_age_s and age_s >= OLD_PART * max_age_s):
                    returned += await self._give_up(mail, agent, "expired", "its time was over before the agent came")
                if left <= 0 or left_bytes <= 0:
                    return returned
        self._swept = ("", "")
        return returned

    async def _give_up(self, mail: Unread, agent: str, reason: str, error: str) -> bool:
        told = await self._inboxes.bounce(mail.envelope, agent, reason, error)
        if not told and mail.envelope.kind != BOUNCE:
            try:
                await _bury(self._dead, self._family.name, mail.envelope, mail.seq, mail.stored_at, reason, error,
                            mail.headers, mail.body)  # fmt: skip
            except QueueFull:
                return False
        return await self._connection.delete(self._family.stream, mail.seq)


async def _bury(
    dead: DeadLetters, family: str, found: Envelope, seq: int, stored_at: float, reason: str, error: str,
    told: Mapping[str, str], body: bytes,
) -> None:  # fmt: skip
    target = found.target if found.target and subjects.TOKEN.fullmatch(found.target) else subjects.NORMAL
    obituary = FailedJob(
        job_id=found.mail_id, kind=found.kind, lane=Lane(family, found.tenant, target), seq=seq, reason=reason,
        error=error, attempt=0, worker=CONSUMER, enqueued_at=stored_at, history=[],
    )  # fmt: skip
    await dead.add(obituary, told, body)
