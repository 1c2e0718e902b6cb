"""The inbox worker of one agent: handles mail by conversation, and acknowledges each mail after it is handled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import attempt, headers
from ..attempt import Handler, Outcome, Raised, Refused, Returned
from ..connection import Connection, to_its_end
from ..enqueue import DeadLetters, FailedJob, last_trace
from ..errors import AIQueueError, BadInput, Unavailable
from ..job import M, Message
from ..lanes import Delivery, LanePull, Leases
from ..mailbox import BOUNCE, Inboxes, Mail, Sent
from ..units import Deadline, Duration
from .held_mail import HeldMail
from .mail_handlers import MailCall, MailHandlers
from .reply_waiter import ReplyWaiter, envelope_of

log = logging.getLogger(__name__)

SETTLED_MAX = 1_024  # mails whose ack may have been lost: an agent holds at most so many
HISTORY_MAX = 50
SETTLE_RETRY_S, SETTLE_RETRY_MAX_S = 1.0, 60.0

_Key = tuple[int, float]


@dataclass(frozen=True)
class AgentSpec:
    """The declaration of an agent; see `Agent`."""

    name: str
    tenant: str
    handlers: Mapping[str, Handler]
    concurrency: int
    drain_timeout_s: float
    capabilities: tuple[str, ...]
    description: str


class InboxWorker:
    """Handles the mail of one agent in this process.

    The mails of one conversation are handled one at a time, in the order in which they were stored. Up to `concurrency`
    conversations are handled at once. A mail that failed waits here for its next attempt and blocks its conversation.
    """

    def __init__(self, spec: AgentSpec, connection: Connection, inboxes: Inboxes, dead: DeadLetters) -> None:
        self.spec = spec
        self.inboxes = inboxes
        self.pull: LanePull | None = None
        self.window = 0  # how many mails the server delivers before the first of them is acknowledged
        self.leases: Leases | None = None
        self._connection = connection
        self._dead = dead
        self._mails: dict[_Key, HeldMail] = {}
        self._conversations: dict[str, deque[HeldMail]] = {}
        self._ready: deque[str] = deque()  # conversations whose first mail waits for a slot
        self._running = 0
        self._settled: dict[_Key, None] = {}
        self._reply_waiter = ReplyWaiter(spec.name, spec.tenant, inboxes, self, self._is_window_full)
        self._mail_handlers = MailHandlers(spec.name, spec.handlers, inboxes.family, self, inboxes.tracing)
        self._singly_until = self._suspect_seq = 0
        self._draining = False
        self.changed: Callable[[], None] = lambda: None
        self._last_delivery_at: float | None = None  # seconds since the epoch
        self.done = 0  # mails that were handled, bounced or dead-lettered
        self.clean = True  # False: handlers had to be cancelled after the drain timeout

    # -- state

    @property
    def running(self) -> int:
        """How many mails are being handled."""
        return self._running

    @property
    def held(self) -> int:
        """How many mails this process holds: those being handled, and those that wait."""
        return len(self._mails)

    @property
    def active(self) -> bool:
        """Whether this process serves the inbox. False: another process serves it, and this one stands by."""
        return self.pull is not None

    def vitals(self) -> dict[str, Any]:
        """Return the state as plain data. `state`: ok, draining or disconnected. Times are seconds since the epoch."""
        connected = self._connection.connected
        state = "draining" if self._draining else "ok" if connected else "disconnected"
        return {
            "state": state, "time": time.time(), "pid": os.getpid(), "worker": self.spec.name,
            "slots": self.spec.concurrency, "running": self._running, "waiting": self.held - self._running,
            "done": self.done, "last_delivery": self._last_delivery_at, "connected": connected, "stalled_s": 0.0,
            "lanes": int(self.active), "standby": not self.active,
        }  # fmt: skip

    # -- sending

    async def send(self, message: Message, to: str, options: Mapping[str, Any]) -> Sent:
        """Send a mail from this agent. `options`: see `Inboxes.send`."""
        return await self.inboxes.send(message, tenant=self.spec.tenant, to=to, sender=self.spec.name, **options)

    async def send_reply(self, mail: Mail[Any], message: Message, expires: Deadline | None) -> str:
        """Send the reply to a mail; see `Mail.reply`."""
        if mail.sender is None:
            raise BadInput(f"mail {mail.id} names no sender, so there is no agent to reply to")
        options = {"conversation": mail.conversation, "correlation": mail.id, "expires": expires}
        return (await self.send(message, mail.sender, options)).mail_id

    async def request(
        self, message: Message, to: str, model: type[M] | None, conversation: str | None, timeout: Duration
    ) -> Mail[Any]:
        """Send a mail and wait for its reply; see `Agent.request`."""
        if not self.active:
            raise Unavailable(f"agent {self.spec.name} stands by: another process serves its inbox and gets replies")
        with self.inboxes.start_request(self.spec.tenant):
            return await self._reply_waiter.request(message, to, model, conversation, timeout)

    def _is_window_full(self) -> bool:
        """Whether the server may deliver no more mail. An agent that drains does not hold what is delivered to it."""
        return self.active and (self._draining or self.held >= self.window)

    # -- deliveries

    def handle_singly_until(self, seq: int, suspect_seq: int) -> None:
        """Handle mails up to sequence `seq` one at a time, because a process died while it held them.

        Then the next death shows which mail kills the processes. The mail `suspect_seq` (0: none) has killed too many:
        it is dead-lettered.
        """
        self._singly_until, self._suspect_seq = seq, suspect_seq

    def on_delivery(self, delivery: Delivery) -> None:
        """Queue a delivered mail in its conversation.

        1. The mail is held already: only its lease is replaced.
        2. The mail was settled, and its ack was lost: the ack is repeated.
        3. The mail is a reply that a request waits for: the request gets it.
        4. The agent drains: the mail is ignored, and redelivered to the next process.
        """
        self._last_delivery_at = time.time()
        key = delivery.seq, delivery.stored_at
        held = self._mails.get(key)
        if held is not None:  # its lease expired, or the consumer was recreated
            self._drop_lease(held.delivery)
            held.delivery = delivery
            self._hold_lease(delivery)
            return
        if key in self._settled:
            self._ack(delivery)
            return
        envelope = envelope_of(delivery, self.inboxes.family)
        if self._reply_waiter.try_resolve(envelope, delivery):
            self._ack(delivery)
            return
        if self._draining:
            return
        self._hold_lease(delivery)
        held = self._mails[key] = HeldMail(delivery, envelope)
        queue = self._conversations.get(envelope.conversation)
        if queue is None:
            self._conversations[envelope.conversation] = deque((held,))
            self._ready.append(envelope.conversation)
            self._start_ready()
        else:
            queue.append(held)

    def drop_unstarted(self) -> None:
        """Drop all mail that was not started, because the consumer is gone and the next consumer redelivers it."""
        for conversation, queue in list(self._conversations.items()):
            for held in [each for each in queue if not each.started]:
                queue.remove(held)
                self._drop(held)
            if not queue:
                del self._conversations[conversation]
        idle = (each for each, queue in self._conversations.items() if not queue[0].task and not queue[0].timer)
        self._ready = deque(idle)

    async def abandon(self) -> None:
        """Cancel the running handlers and drop all mail without an ack: the next process gets it redelivered."""
        self.drop_unstarted()
        self._conversations.clear()
        self._ready.clear()  # before the wait: a handler that ends would start the next one
        mails = list(self._mails.values())
        tasks = [held.task for held in mails if held.task is not None]
        for held in mails:
            if held.timer is not None:
                held.timer.cancel()
            if held.task is not None:
                held.abandoned = True
                held.task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        for held in mails:
            self._drop(held)

    async def drain(self) -> None:
        """Start no more handlers. Running ones may continue for the drain timeout, then they are cancelled.

        If this is cancelled, they are cancelled at once.
        """
        self._draining = True
        self._ready.clear()
        end, left_s = time.monotonic() + self.spec.drain_timeout_s, self.spec.drain_timeout_s
        try:
            # what a mail's handler has ended with may take a task too
            while left_s > 0 and (tasks := [held.task for held in self._mails.values() if held.task is not None]):
                await asyncio.wait(tasks, timeout=left_s)
                left_s = end - time.monotonic()
        finally:
            self.clean = all(held.task is None for held in self._mails.values())
            await to_its_end(self._stop())

    async def _stop(self) -> None:
        await self.abandon()
        self._reply_waiter.close(Unavailable(f"agent {self.spec.name} was stopped while a request waited"))
        self._mail_handlers.close()

    def _start_ready(self) -> None:
        """Start handlers for conversations that are ready, as long as slots are free."""
        while self._ready and self._running < self.spec.concurrency and not self._draining:
            held = self._pick_next()
            if held is None:
                return
            self._running += 1
            self._start(held)

    def _pick_next(self) -> HeldMail | None:
        """Return the mail to start next. None: the oldest mail of a dead process is first, and cannot start now."""
        if self._singly_until:
            oldest = min(self._mails)
            if oldest[0] <= self._singly_until:
                held = self._mails[oldest]
                if self._running or held.envelope.conversation not in self._ready:
                    return None
                self._ready.remove(held.envelope.conversation)
                return held
            self._singly_until = 0
        return self._conversations[self._ready.popleft()][0]

    def _start(self, held: HeldMail) -> None:
        """Start the handler of a mail in a task of its own. A mail that needs no call of a handler ends in a task too.

        The end of a mail may start the next mail: a task keeps many such mails in a row from recursing.
        """
        ending: Outcome | Exception | None = self._find_refusal(held)
        if ending is None:
            try:
                call = self._mail_handlers.start(held.delivery, held.envelope, held.attempt)
            except Exception as error:  # noqa: BLE001  (logged, and tried again as what could not be stored)
                ending = error
            else:
                held.secrets, ending = call.secrets, call.outcome
                if call.task is not None:
                    held.task = call.task
                    call.task.add_done_callback(partial(self._on_handled, held, call))
                    return
        held.task = asyncio.create_task(self._settle(held, ending))

    def _on_handled(self, held: HeldMail, call: MailCall, task: asyncio.Task[None]) -> None:
        """The handler of a mail has ended: acknowledge the mail, set the timer for its next attempt, or refuse it."""
        retry_s: float | None = None  # None: the mail has ended; below 0: no next attempt here
        try:
            outcome = self._mail_handlers.end(call)
            if held.abandoned and not isinstance(outcome, Returned):
                retry_s = -1.0
            elif isinstance(verdict := self._judge_outcome(held, outcome, call.handler), Refused):
                held.task = asyncio.create_task(self._settle(held, verdict))
                return
            elif verdict is None:
                self._ack(held.delivery)
            else:
                retry_s = verdict
        except Exception as error:  # noqa: BLE001  (logged there)
            retry_s = self._count_settle_failure(held, error)
        self._end(held, retry_s)

    async def _settle(self, held: HeldMail, ending: Outcome | Exception | None) -> None:
        """Acknowledge a mail, once it is stored why it was refused, if it was."""
        retry_s: float | None = None
        try:
            if isinstance(ending, Refused):
                await self._settle_refusal(held, ending)
            if isinstance(ending, Exception):
                retry_s = self._count_settle_failure(held, ending)
            else:
                self._ack(held.delivery)
        except asyncio.CancelledError:
            retry_s = -1.0  # abandoned, so the next process gets it
        except Exception as error:  # noqa: BLE001  (logged there)
            retry_s = self._count_settle_failure(held, error)
        self._end(held, retry_s)

    def _end(self, held: HeldMail, retry_s: float | None) -> None:
        """Free the slot of a mail. None: the mail has ended; else its next attempt is due in so many seconds."""
        self._running -= 1
        held.task = None
        if retry_s is None:
            self._finish(held)
        elif retry_s >= 0 and not self._draining:
            held.timer = asyncio.get_running_loop().call_later(retry_s, self._resume, held)
        self._start_ready()
        self.changed()

    def _count_settle_failure(self, held: HeldMail, error: Exception) -> float:
        """Log that the end of a mail could not be stored. Return the seconds until this is retried."""
        held.failures += 1
        delay_s = min(SETTLE_RETRY_MAX_S, SETTLE_RETRY_S * 2.0 ** min(held.failures - 1, 16))
        text, mail_id = "mail %s: its outcome could not be stored, retrying in %g s: %s", held.envelope.mail_id
        unexpected = not isinstance(error, AIQueueError)
        log.log(logging.ERROR if unexpected else logging.WARNING, text, mail_id, delay_s, error, exc_info=unexpected)
        return delay_s

    def _resume(self, held: HeldMail) -> None:
        """Make the conversation of a mail ready, because the next attempt of the mail is due."""
        held.timer = None
        self._ready.append(held.envelope.conversation)
        self._start_ready()

    def _finish(self, held: HeldMail) -> None:
        """Drop a mail that has ended, and let its conversation continue."""
        self.done += 1
        self._drop(held)
        queue = self._conversations.get(held.envelope.conversation)
        if queue is None or queue[0] is not held:
            return
        queue.popleft()
        if queue:
            self._ready.append(held.envelope.conversation)
        else:
            del self._conversations[held.envelope.conversation]

    def _drop(self, held: HeldMail) -> None:
        self._drop_lease(held.delivery)
        key = held.delivery.seq, held.delivery.stored_at
        if self._mails.get(key) is held:  # an abandoned mail may have come again
            del self._mails[key]

    # -- one mail

    def _find_refusal(self, held: HeldMail) -> Refused | None:
        """Return why a mail is not handled, as far as its headers and its past say that."""
        if held.refusal is not None:
            return held.refusal
        if held.delivery.seq == self._suspect_seq:
            return Refused(
                "killed_worker", "several processes died in a row, and each held this mail as its oldest one"
            )
        if malformed := headers.find_malformed(held.delivery.message.headers):
            return Refused("invalid", malformed)
        if held.envelope.expired(self._connection.clock.now()):
            return Refused("expired", "the mail expired before it was handled")
        return None

    def _judge_outcome(self, held: HeldMail, outcome: Outcome, handler: Handler | None) -> Refused | float | None:
        """Return what becomes of a mail after its handler has ended.

        1. None: it is handled.
        2. Refused: it is bounced or dead-lettered.
        3. A float: it is retried in so many seconds.
        """
        if isinstance(outcome, Returned):
            return None
        if isinstance(outcome, Refused):
            return outcome
        if not isinstance(outcome, Raised):  # a handler of mail has no other outcomes
            outcome = Raised(f"the handler ended with an outcome that mail does not have: {type(outcome).__name__}", "")
        if outcome.pauses_key:
            attempt.warn_of_no_key(f"mail {held.envelope.mail_id} to {self.spec.name}", "mail has no key")
        delay_s = attempt.delay_after(handler, outcome, held.attempt)
        if delay_s is None:
            return Refused("attempts", outcome.error, outcome.trace)
        if held.envelope.expired(self._connection.clock.now() + delay_s):
            late = f"{outcome.error} (the mail expires before its retry in {delay_s:.1f} s)"
            return Refused("expired", late, outcome.trace)
        self._add_to_history(held, outcome.error, outcome.trace)
        mail_id = held.envelope.mail_id
        log.info(
            "mail %s (%s) to %s of %s: attempt %d failed, retry in %.1f s: %s%s", mail_id, held.envelope.kind,
            self.spec.name, self.spec.tenant, held.attempt, delay_s, outcome.error, last_trace(held.history),
        )  # fmt: skip
        held.attempt += 1
        return delay_s

    async def _settle_refusal(self, held: HeldMail, refusal: Refused) -> None:
        """Bounce and dead-letter a mail. An expired mail is dead-lettered only if nobody can get the bounce."""
        if held.refusal is None:
            held.refusal = refusal
            self._add_to_history(held, refusal.error, refusal.trace)
        envelope, name = held.envelope, self.spec.name
        if refusal.reason != "expired":
            await self._dead_letter(held, refusal)
        bounced = await self.inboxes.bounce(envelope, name, refusal.reason, refusal.error)
        if refusal.reason == "expired" and not bounced and envelope.kind != BOUNCE:
            await self._dead_letter(held, refusal)
        log.warning(
            "mail %s (%s) of %s to %s of %s was not handled (%s): %s%s", envelope.mail_id, envelope.kind,
            envelope.sender, name, self.spec.tenant, refusal.reason, refusal.error, last_trace(held.history),
        )  # fmt: skip

    async def _dead_letter(self, held: HeldMail, refusal: Refused) -> None:
        delivery, envelope, secrets = held.delivery, held.envelope, held.secrets
        if secrets is None:
            secrets = self._mail_handlers.secrets_of_undecoded(delivery.message.headers)
        failed = FailedJob(
            job_id=envelope.mail_id, kind=envelope.kind, lane=delivery.lane.key, seq=delivery.seq,
            reason=refusal.reason, error=refusal.error, attempt=held.attempt, worker=self.spec.name,
            enqueued_at=delivery.stored_at, history=held.history, secrets=secrets,
        )  # fmt: skip
        await self._dead.add(failed, delivery.message.headers, delivery.message.data)

    def _add_to_history(self, held: HeldMail, error: str, trace: str) -> None:
        entry: dict[str, Any] = {
            "attempt": held.attempt, "at": time.time(), "worker": self.spec.name, "error": error,
            **({"traceback": trace} if trace else {}),
        }  # fmt: skip
        held.history = [*held.history, entry][-HISTORY_MAX:]

    # -- leases and acks

    def _hold_lease(self, delivery: Delivery) -> None:
        if self.leases is not None:
            self.leases.hold_lease(delivery.reply, delivery.lane.ack_wait_s, time.monotonic())

    def _drop_lease(self, delivery: Delivery) -> None:
        if self.leases is not None:
            self.leases.drop_lease(delivery.reply)

    def _ack(self, delivery: Delivery) -> None:
        """Acknowledge a mail. If the ack is lost, it is repeated when the mail is redelivered."""
        if len(self._settled) >= SETTLED_MAX:
            del self._settled[next(iter(self._settled))]
        self._settled[delivery.seq, delivery.stored_at] = None
        with contextlib.suppress(AIQueueError):
            self._connection.tell(delivery.reply, b"+ACK")
