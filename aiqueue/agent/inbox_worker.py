"""One agent at work: its mail, conversation by conversation, each mail handled and then acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import attempt, codec, headers
from ..attempt import Handler, Limits, Outcome, Raised, Refused, Returned, Threads
from ..connection import Connection
from ..enqueue import DeadLetters, FailedJob
from ..errors import AIQueueError, BadInput, DecodeError, Unavailable
from ..job import M, Message, parse_message
from ..lanes import Delivery, LanePull, Leases
from ..mailbox import BOUNCE, Envelope, Inboxes, Mail, Sent
from .reply_waiter import ReplyWaiter, envelope_of, parcel_of

log = logging.getLogger("aiqueue.agent")

SETTLED_MAX = 1_024  # mails whose ack may have been lost: no more can be in hand
SETTLE_AGAIN_S, SETTLE_AGAIN_MAX_S = 1.0, 60.0

_Key = tuple[int, float]


@dataclass(frozen=True)
class Terms:
    """What an agent says of itself; see `Agent`."""

    name: str
    tenant: str
    handlers: Mapping[str, Handler]
    concurrency: int
    drain_timeout_s: float
    capabilities: tuple[str, ...]
    description: str


@dataclass(slots=True, eq=False)
class _Item:
    """A mail in hand. `verdict`: what became of it could not be written yet."""

    delivery: Delivery
    found: Envelope
    attempt: int = 1
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    verdict: Refused | None = None
    failures: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        return self.task is not None or self.timer is not None or self.attempt > 1 or self.verdict is not None


class InboxWorker:
    """The mail of one agent in this process.

    Mail of one conversation is handled one by one, in the order in which it was stored; up to `concurrency`
    conversations at once. A mail that failed waits here for its next attempt, and its conversation with it.
    """

    def __init__(self, terms: Terms, connection: Connection, inboxes: Inboxes, dead: DeadLetters) -> None:
        self.terms = terms
        self.inboxes = inboxes
        self.pull: LanePull | None = None
        self.leases: Leases | None = None
        self._connection = connection
        self._dead = dead
        self._items: dict[_Key, _Item] = {}
        self._conversations: dict[str, deque[_Item]] = {}
        self._ready: deque[str] = deque()  # conversations whose first mail awaits a slot
        self._running = 0
        self._settled: dict[_Key, None] = {}
        self._asking = ReplyWaiter(terms.name, terms.tenant, inboxes, self)
        self._limits = Limits()
        self._threads = Threads(f"aiqueue-agent-{terms.name}")
        self._until = self._suspect = 0
        self._draining = False
        self.changed: Callable[[], None] = lambda: None
        self._heard: float | None = None  # when a mail last came in, seconds since the epoch
        self.done = 0  # mails carried to an end
        self.clean = True

    # -- as a session

    @property
    def running(self) -> int:
        return self._running

    @property
    def held(self) -> int:
        """Mails in hand: those being handled, and those behind them."""
        return len(self._items)

    @property
    def active(self) -> bool:
        """Whether the inbox is served here; False while another process serves it, and this one stands by."""
        return self.pull is not None

    def vitals(self) -> dict[str, Any]:
        """How it is, as plain data. `state`: ok, draining or disconnected. Times are seconds since the epoch."""
        connected = self._connection.connected
        state = "draining" if self._draining else "ok" if connected else "disconnected"
        return {
            "state": state, "time": time.time(), "pid": os.getpid(), "worker": self.terms.name,
            "slots": self.terms.concurrency, "running": self._running, "waiting": self.held - self._running,
            "done": self.done, "last_delivery": self._heard, "connected": connected, "stalled_s": 0.0,
            "lanes": int(self.active), "standby": not self.active,
        }  # fmt: skip

    # -- sending

    async def send(self, message: Message, to: str, told: Mapping[str, Any]) -> Sent:
        return await self.inboxes.send(message, tenant=self.terms.tenant, to=to, sender=self.terms.name, **told)

    async def answer(self, mail: Mail[Any], message: Message, expires: str | float | None) -> str:
        if mail.sender is None:
            raise BadInput(f"mail {mail.id} names no sender: there is nobody to reply to")
        told = {"conversation": mail.conversation, "correlation": mail.id, "expires": expires}
        return (await self.send(message, mail.sender, told)).mail_id

    async def ask(
        self, message: Message, to: str, model: type[M] | None, conversation: str | None, timeout: str | float
    ) -> Mail[Any]:
        """Send a mail and await its reply; see `Agent.request`."""
        if not self.active:
            raise Unavailable(f"agent {self.terms.name} stands by: another process serves its inbox, and gets replies")
        return await self._asking.ask(message, to, model, conversation, timeout)

    # -- mail that comes in

    def beware(self, until: int, suspect: int) -> None:
        """A process has died with mails up to sequence `until` in its hands: they are handled one by one, so that the
        one that kills is known by the next death. `suspect` (0: none) has done so too often and is given up.
        """
        self._until, self._suspect = until, suspect

    def on_delivery(self, delivery: Delivery) -> None:
        self._heard = time.time()
        key = delivery.seq, delivery.stored_at
        item = self._items.get(key)
        if item is not None:  # its lease ran out, or the consumer was made anew: this is the one lease now
            self._let_go(item.delivery)
            item.delivery = delivery
            self._hold(delivery)
            return
        if key in self._settled:
            self._ack(delivery)
            return
        found = envelope_of(delivery, self.inboxes.family)
        if self._asking.take(found, delivery):
            self._ack(delivery)
            return
        if self._draining:
            return
        self._hold(delivery)
        item = self._items[key] = _Item(delivery, found)
        queue = self._conversations.get(found.conversation)
        if queue is None:
            self._conversations[found.conversation] = deque((item,))
            self._ready.append(found.conversation)
            self._start_ready()
        else:
            queue.append(item)

    def forget_waiting(self) -> None:
        """The consumer is no more: what has not begun comes again by the next one."""
        for conversation, queue in list(self._conversations.items()):
            for item in [each for each in queue if not each.begun]:
                queue.remove(item)
                self._drop(item)
            if not queue:
                del self._conversations[conversation]
        idle = (each for each, queue in self._conversations.items() if not queue[0].task and not queue[0].timer)
        self._ready = deque(idle)

    async def abandon(self) -> None:
        """Another process serves the inbox now: end what runs here, and say nothing of it."""
        self.forget_waiting()
        items = list(self._items.values())
        tasks = [item.task for item in items if item.task is not None]
        for item in items:
            if item.timer is not None:
                item.timer.cancel()
            if item.task is not None:
                item.task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        for item in items:
            self._drop(item)
        self._conversations.clear()
        self._ready.clear()

    async def drain(self) -> None:
        """Begin no more; give what runs the drain timeout, then cancel it."""
        self._draining = True
        self._ready.clear()
        tasks = [item.task for item in self._items.values() if item.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.terms.drain_timeout_s)
            self.clean = not late
        await self.abandon()
        self._asking.fail(Unavailable(f"agent {self.terms.name} was stopped"))
        self._threads.close()

    def _start_ready(self) -> None:
        while self._ready and self._running < self.terms.concurrency and not self._draining:
            item = self._next()
            if item is None:
                return
            self._running += 1
            item.task = asyncio.create_task(self._run(item))

    def _next(self) -> _Item | None:
        """Whose turn it is; None: the oldest mail of a dead process goes first, and has begun or waits."""
        if self._until:
            oldest = min(self._items)
            if oldest[0] <= self._until:
                item = self._items[oldest]
                if self._running or item.found.conversation not in self._ready:
                    return None
                self._ready.remove(item.found.conversation)
                return item
            self._until = 0
        return self._conversations[self._ready.popleft()][0]

    async def _run(self, item: _Item) -> None:
        again_s: float | None = None
        try:
            outcome = await self._handle(item)
            if isinstance(outcome, Refused):
                await self._undeliver(item, outcome)
            if isinstance(outcome, float):
                again_s = outcome
            else:
                self._ack(item.delivery)
        except AIQueueError as error:
            again_s = self._later(item, error)
        except asyncio.CancelledError:
            again_s = -1.0  # abandoned: said of it is nothing, it comes again elsewhere
        except Exception as error:
            log.exception("mail %s to %s", item.found.mail_id, self.terms.name)
            again_s = self._later(item, Unavailable(str(error)))
        finally:
            self._running -= 1
            item.task = None
        if again_s is None:
            self._end(item)
        elif again_s >= 0 and not self._draining:
            item.timer = asyncio.get_running_loop().call_later(again_s, self._again, item)
        self._start_ready()
        self.changed()

    def _later(self, item: _Item, error: AIQueueError) -> float:
        item.failures += 1
        delay_s = min(SETTLE_AGAIN_MAX_S, SETTLE_AGAIN_S * 2.0 ** min(item.failures - 1, 16))
        log.warning(
            "what became of mail %s could not be written, again in %g s: %s", item.found.mail_id, delay_s, error
        )
        return delay_s

    def _again(self, item: _Item) -> None:
        item.timer = None
        self._ready.append(item.found.conversation)
        self._start_ready()

    def _end(self, item: _Item) -> None:
        self.done += 1
        self._drop(item)
        queue = self._conversations.get(item.found.conversation)
        if queue is None or queue[0] is not item:
            return
        queue.popleft()
        if queue:
            self._ready.append(item.found.conversation)
        else:
            del self._conversations[item.found.conversation]

    def _drop(self, item: _Item) -> None:
        self._let_go(item.delivery)
        self._items.pop((item.delivery.seq, item.delivery.stored_at), None)

    # -- one mail

    async def _handle(self, item: _Item) -> Refused | float | None:
        """What becomes of a mail: None where it is handled, or in how many seconds it is to be tried again."""
        if item.verdict is not None:
            return item.verdict
        if item.delivery.seq == self._suspect:
            return Refused("killed_worker", "the processes that began it died, one after the other")
        if item.found.expired(time.time()):
            return Refused("expired", "its time was over before it was handled")
        raw = parcel_of(item.delivery, self.inboxes.family, item.found, self.terms.name)
        contents = attempt.decode_body(raw)
        if contents.data is None:
            return Refused("undecodable", contents.problem)
        handler = self.terms.handlers.get(contents.kind)
        if handler is None:
            return self._unhandled(contents, item.found, broadcast=headers.BROADCAST in raw.headers)
        if not codec.is_accepted_version(contents.version, raw.family.schema_versions):
            accepted = ", ".join(raw.family.schema_versions)
            return Refused("unknown_kind", f"schema version {contents.version!r} is none of {accepted}")
        try:
            message = parse_message(handler.model, contents.data)
        except DecodeError as error:
            return Refused("invalid", error.reason)
        told = item.delivery.message.headers
        mail = Mail(message, item.found, to=self.terms.name, attempt=item.attempt, told=told, home=self)
        outcome = await self._call(handler, mail)
        return self._settle(item, handler, outcome)

    def _unhandled(self, contents: attempt.DecodedJob, found: Envelope, *, broadcast: bool) -> Refused | None:
        if contents.kind == BOUNCE:
            log.warning("a mail of agent %s came back: %s", self.terms.name, contents.data)
            return None
        if broadcast:
            return None
        if found.correlation is not None:
            return Refused("expired", f"nobody at {self.terms.name} awaits this reply any more")
        known = ", ".join(sorted(self.terms.handlers)) or "none"
        return Refused("unknown_kind", f"agent {self.terms.name} takes no {contents.kind!r}; its kinds: {known}")

    async def _call(self, handler: Handler, mail: Mail[Any]) -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        limit = None if handler.timeout_s is None else self._limits.start(task, handler.timeout_s)
        outcome: Outcome
        call: Callable[[Any], Any] = handler.call
        try:
            value = await call(mail) if handler.is_async else await self._threads.run(lambda: call(mail))
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            outcome = attempt.outcome_of_error(error, handler.on)
        else:
            outcome = Returned(value)
        finally:
            if limit is not None:
                self._limits.stop(limit)
        if limit is not None and limit.expired:
            if limit.absolve():
                raise asyncio.CancelledError
            return attempt.timeout_outcome(handler.timeout_s)
        if task.cancelling() and not isinstance(outcome, Returned):
            raise asyncio.CancelledError
        return outcome

    def _settle(self, item: _Item, handler: Handler, outcome: Outcome) -> Refused | float | None:
        if isinstance(outcome, Returned):
            return None
        if isinstance(outcome, Refused):
            return outcome
        if not isinstance(outcome, Raised):  # a handler of mail has no other outcomes
            outcome = Raised(f"the handler ended as {type(outcome).__name__}", "")
        retry = handler.backoff(outcome.rule)
        delay_s = retry.delay_s(item.attempt) if outcome.after_s is None else outcome.after_s
        if item.attempt >= retry.attempts:
            return Refused("attempts", outcome.error, outcome.trace)
        if item.found.expired(time.time() + delay_s):
            late = f"{outcome.error} (again in {delay_s:.1f} s would be too late)"
            return Refused("expired", late, outcome.trace)
        self._remember(item, outcome.error, outcome.trace)
        log.info(
            "mail %s to %s failed, again in %.1f s: %s", item.found.mail_id, self.terms.name, delay_s, outcome.error
        )
        item.attempt += 1
        return delay_s

    async def _undeliver(self, item: _Item, verdict: Refused) -> None:
        """Keep what cannot be handled as a dead letter, and tell its sender: one that merely came too late is only
        told, if there is somebody to tell.
        """
        if item.verdict is None:
            item.verdict = verdict
            self._remember(item, verdict.error, verdict.trace)
        found, name = item.found, self.terms.name
        if verdict.reason != "expired":
            await self._bury(item, verdict)
        told = await self.inboxes.bounce(found, name, verdict.reason, verdict.error)
        if verdict.reason == "expired" and not told and found.kind != BOUNCE:
            await self._bury(item, verdict)
        log.warning("mail %s of %s to %s (%s): %s", found.mail_id, found.sender, name, verdict.reason, verdict.error)

    async def _bury(self, item: _Item, verdict: Refused) -> None:
        delivery, found = item.delivery, item.found
        obituary = FailedJob(
            job_id=found.mail_id, kind=found.kind, lane=delivery.lane.key, seq=delivery.seq, reason=verdict.reason,
            error=verdict.error, attempt=item.attempt, worker=self.terms.name, enqueued_at=delivery.stored_at,
            history=item.history,
        )  # fmt: skip
        await self._dead.add(obituary, delivery.message.headers, delivery.message.data)

    def _remember(self, item: _Item, error: str, trace: str) -> None:
        entry: dict[str, Any] = {
            "attempt": item.attempt, "at": time.time(), "worker": self.terms.name, "error": error,
            **({"traceback": trace} if trace else {}),
        }  # fmt: skip
        item.history = [*item.history, entry][-50:]

    # -- small things

    def _hold(self, delivery: Delivery) -> None:
        if self.leases is not None:
            self.leases.hold_lease(delivery.reply, delivery.lane.ack_wait_s)

    def _let_go(self, delivery: Delivery) -> None:
        if self.leases is not None:
            self.leases.drop_lease(delivery.reply)

    def _ack(self, delivery: Delivery) -> None:
        """Acknowledge. Where the word is lost with a link or a consumer, it is said when the mail comes again."""
        if len(self._settled) >= SETTLED_MAX:
            del self._settled[next(iter(self._settled))]
        self._settled[delivery.seq, delivery.stored_at] = None
        with contextlib.suppress(AIQueueError):
            self._connection.tell(delivery.reply, b"+ACK")
