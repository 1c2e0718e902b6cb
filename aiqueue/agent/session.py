"""All agents that one client runs: they share one puller for their inboxes, one thread for their leases, one router.

One process at a time serves an inbox: the one that holds the inbox's presence lock. A process that acquires the lock
recreates the inbox's consumer under a new name. So the mail that its predecessor did not acknowledge is redelivered at
once and in order, and late acks of the predecessor go to a consumer that no longer exists (docs/decisions/inboxes.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any
from weakref import WeakKeyDictionary

from .. import subjects
from ..client import Client
from ..connection import delivery_number, timestamp, to_its_end
from ..errors import AIQueueError, BadInput, ConfigMismatch, NotFound, ServerError
from ..lanes import RECREATE_AFTER_S, Delivery, LanePull, Leases, Puller
from ..mailbox import PresenceLock
from ..subjects import Lane
from .inbox_worker import InboxWorker
from .router import MailRouter

log = logging.getLogger(__name__)

AGENTS_MAX = 500  # of one client: each has a standing pull
HELD_MAX = 1_024  # mails that all agents of a client hold; near it fewer are requested at once
CAPACITY_MIN = 64
WINDOW_MIN, WINDOW_PER_SLOT = 32, 16  # limit of the mails that one agent holds: a minimum, and a number per slot
LOCK_TTL_S = 30.0  # the locks of a process that died expire after so long
RENEW_EVERY_S = 10.0
ACQUIRE_EVERY_S = 2.0  # how often a process that stands by tries to acquire the lock
CHECK_EVERY_S = 1.0
CONCURRENT_CREATES_MAX = 16
DEATHS_MAX = 3  # of processes in a row over one mail, which is then dead-lettered

_sessions: WeakKeyDictionary[Client, AgentSession] = WeakKeyDictionary()


class _Member:
    """An agent in this session, with the lock of its inbox."""

    def __init__(self, inbox_worker: InboxWorker, lock: PresenceLock) -> None:
        self.inbox_worker = inbox_worker
        self.lock = lock
        self.lock_task: asyncio.Task[None] | None = None
        self.consumer_lost = asyncio.Event()
        self.last_number = 0  # of the deliveries of the present consumer
        self.replaced_consumer = ""  # name of this process's own consumer that is to be recreated
        self.error_logged = False


class AgentSession:
    """See the module. The first agent that a client runs creates it; it closes with the last agent."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection = client.connection
        self._inboxes = client.inboxes
        self._family = self._inboxes.family
        self._refill_scheduled = False
        self._puller = Puller(self._connection, deliver=self._on_delivery, gone=self._on_gone, changed=self._changed)
        self._leases = Leases(self._connection, shortest_s=self._family.ack_wait_s)
        self._router = MailRouter(self._inboxes, client.dead, self._puller)
        self._by_pull: dict[LanePull, _Member] = {}
        self._members: set[_Member] = set()
        self._create_limit = asyncio.Semaphore(CONCURRENT_CREATES_MAX)
        self._consumers: dict[str, dict[str, Any]] = {}  # by filter subject, as last listed
        self._listed_at = 0.0
        self._pull_task: asyncio.Task[None] | None = None
        self._open_task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, client: Client) -> AgentSession:
        """Return the session of a client, and create it if there is none."""
        session = _sessions.get(client)
        if session is None:
            session = _sessions[client] = cls(client)
        return session

    async def join(self, inbox_worker: InboxWorker) -> None:
        """Serve an agent's inbox as soon as no other process does. This is tried once before the method returns.

        Raises BadInput, NotFound, Unavailable.
        """
        if len(self._members) >= AGENTS_MAX:
            raise BadInput(f"a client runs at most {AGENTS_MAX} agents: connect another client")
        spec = inbox_worker.spec
        member = _Member(inbox_worker, self._inboxes.presence.inbox_lock(spec.tenant, spec.name, LOCK_TTL_S))
        self._members.add(member)
        inbox_worker.leases, inbox_worker.changed = self._leases, self._changed
        try:
            if self._open_task is None:
                self._open_task = asyncio.create_task(self._open())
            await asyncio.shield(self._open_task)
            if await member.lock.acquire():
                await self._serve(member)
        except BaseException:
            await self._remove(member)
            raise
        member.lock_task = asyncio.create_task(self._hold_inbox(member))

    async def leave(self, inbox_worker: InboxWorker) -> None:
        """Stop serving an agent's inbox, and let its running handlers finish. Safe twice.

        If this is cancelled, the handlers are cancelled at once. The inbox is released all the same.
        """
        for member in [each for each in self._members if each.inbox_worker is inbox_worker]:
            await self._remove(member)

    async def _remove(self, member: _Member) -> None:
        try:
            await member.inbox_worker.drain()  # while replies still arrive and the inbox is still locked
        finally:
            await to_its_end(self._release(member))

    async def _release(self, member: _Member) -> None:
        """Stop serving and holding an inbox. The last agent of the session closes it."""
        if member.lock_task is not None:
            member.lock_task.cancel()
            await asyncio.wait([member.lock_task])
        await self._unserve(member)
        await member.lock.release()
        self._members.discard(member)
        if not self._members and _sessions.get(self._client) is self:
            del _sessions[self._client]
            await self._close()

    async def _open(self) -> None:
        await self._puller.open()
        self._leases.start()
        self._pull_task = asyncio.create_task(self._check_pulls())
        self._router.start()

    async def _close(self) -> None:
        if self._open_task is not None:
            await asyncio.wait([self._open_task])
        await self._router.stop()
        if self._pull_task is not None:
            self._pull_task.cancel()
            await asyncio.wait([self._pull_task])
        await self._puller.close()
        await self._leases.stop()

    # -- pulling

    def _changed(self) -> None:
        """Mail has come or has ended: request more at the end of this turn of the event loop, after handlers start."""
        if not self._refill_scheduled:
            self._refill_scheduled = True
            asyncio.get_running_loop().call_soon(self._refill)

    def _refill(self) -> None:
        """Request as many mails as may be held."""
        self._refill_scheduled = False
        held = sum(member.inbox_worker.held for member in self._members) + self._router.held
        capacity = max(CAPACITY_MIN, HELD_MAX - held)
        self._puller.refill(capacity // 2, capacity // 2)

    async def _check_pulls(self) -> None:
        """Once a second, drop lost pulls, and make up for a refill that failed."""
        while True:
            try:
                self._puller.drop_lost_pulls()
                self._refill()
            except Exception:
                log.exception("could not pull mail, retrying in %g s", CHECK_EVERY_S)
            await asyncio.sleep(CHECK_EVERY_S)

    def _on_delivery(self, delivery: Delivery) -> None:
        member = self._by_pull.get(delivery.lane)
        if member is not None:
            number = delivery_number(delivery.reply)
            if number > member.last_number + 1:
                # A server died with deliveries. They would be redelivered when their leases expire, after newer mail.
                self._on_gone(delivery.lane)
            else:
                member.last_number = number
                member.inbox_worker.on_delivery(delivery)
        elif delivery.lane is self._router.pull:
            self._router.on_delivery(delivery)
        self._changed()

    def _on_gone(self, pull: LanePull) -> None:
        """Stop pulling from a consumer that is lost, or seems to be: the server may still have it after an election."""
        member = self._by_pull.pop(pull, None)
        if member is None:
            self._router.on_consumer_gone(pull)
            return
        self._puller.remove(pull)
        member.replaced_consumer = pull.consumer
        if member.inbox_worker.pull is pull:
            member.inbox_worker.pull = None
            member.inbox_worker.drop_unstarted()
        member.consumer_lost.set()

    # -- one agent

    async def _hold_inbox(self, member: _Member) -> None:
        """Acquire and renew the lock of an inbox. Serve the inbox with the lock, and recreate a lost consumer."""
        spec = member.inbox_worker.spec
        while True:
            try:
                async with asyncio.timeout(RENEW_EVERY_S if member.inbox_worker.active else ACQUIRE_EVERY_S):
                    await member.consumer_lost.wait()
                await asyncio.sleep(RECREATE_AFTER_S)
            except TimeoutError:
                pass
            member.consumer_lost.clear()
            try:
                held = await (member.lock.renew() if member.lock.held else member.lock.acquire())
                if held and not member.inbox_worker.active:
                    await self._serve(member)
                elif not held and (member.inbox_worker.active or member.inbox_worker.held):
                    log.warning("agent %s of %s: another process serves the inbox now", spec.name, spec.tenant)
                    await self._unserve(member)
                    await member.inbox_worker.abandon()
                member.error_logged = False
            except AIQueueError as error:
                if not member.error_logged:  # once, not every two seconds
                    log.warning("agent %s of %s: inbox not served, retrying: %s", spec.name, spec.tenant, error)
                member.error_logged = True
            except Exception:
                log.exception("agent %s of %s: inbox not served, retrying", spec.name, spec.tenant)

    async def _serve(self, member: _Member) -> None:
        """Create the inbox's consumer and pull from it.

        If a dead process left a consumer with mail, record its death and let the inbox worker handle that mail singly.
        """
        spec, family = member.inbox_worker.spec, self._family
        lane = Lane(family.name, spec.tenant, spec.name)
        window = min(family.max_ack_pending, HELD_MAX, max(WINDOW_MIN, WINDOW_PER_SLOT * spec.concurrency))
        async with self._create_limit:
            name, created, replaced = await self._create_consumer(subjects.inbox(*lane[:3]), lane, window)
        if replaced is not None and replaced["num_ack_pending"] and replaced["name"] != member.replaced_consumer:
            oldest = await self._connection.first(family.stream, subjects.inbox(*lane[:3]))
            if oldest is not None:
                deaths = await self._inboxes.presence.record_death(spec.tenant, spec.name, oldest.seq)
                suspect_seq = oldest.seq if deaths >= DEATHS_MAX else 0
                member.inbox_worker.handle_singly_until(replaced["delivered"]["stream_seq"], suspect_seq)
        pull = LanePull(lane, family.stream, name, family.ack_wait_s, pending=1, created=created)
        member.last_number, member.replaced_consumer = 0, ""
        member.inbox_worker.pull, member.inbox_worker.window = pull, window
        self._by_pull[pull] = member
        self._puller.add(pull)
        self._changed()

    async def _unserve(self, member: _Member) -> None:
        """Delete the agent's consumer. The next consumer starts with the mail that is not acknowledged."""
        pull, member.inbox_worker.pull = member.inbox_worker.pull, None
        if pull is None:
            return
        self._by_pull.pop(pull, None)
        self._puller.remove(pull)
        with contextlib.suppress(AIQueueError):
            await self._connection.flush()  # so that the acks arrive first
            await self._connection.api(f"CONSUMER.DELETE.{pull.stream}.{pull.consumer}", timeout=2.0)

    async def _create_consumer(self, subject: str, lane: Lane, window: int) -> tuple[str, float, dict[str, Any] | None]:
        """Create a consumer for an inbox, under a new name.

        Return its name, when it was created, and the info of the consumer that it replaced. None: it replaced none.
        """
        family = self._family
        prefix, replaced = f"{lane.tenant}-{lane.priority}-", None
        name = prefix + subjects.new_id()
        config = {
            "durable_name": name,
            "filter_subject": subject,
            "ack_policy": "explicit",
            "ack_wait": round(family.ack_wait_s * 1e9),
            "max_ack_pending": window,
            "max_deliver": family.max_deliver,
            "inactive_threshold": round(family.inactive_threshold_s * 1e9),
            "mem_storage": True,  # its state is not used by the next consumer
        }
        request = {"stream_name": family.stream, "config": config, "action": "create"}
        call = f"CONSUMER.CREATE.{family.stream}.{name}.{subject}"
        try:
            created = await self._connection.api(call, request)
        except (ConfigMismatch, ServerError):
            replaced = await self._delete_leftover(subject, prefix)
            created = await self._connection.api(call, request)
        return name, timestamp(created["created"]), replaced

    async def _delete_leftover(self, subject: str, prefix: str) -> dict[str, Any] | None:
        """Delete the consumer that another process left on an inbox and return its info; None if there is none.

        Raises ConfigMismatch if the consumer was not created by an agent session.
        """
        left = self._consumers.pop(subject, None)
        if left is None and time.monotonic() - self._listed_at > 1.0:
            self._consumers = await self._list_consumers()
            self._listed_at = time.monotonic()
            left = self._consumers.pop(subject, None)
        if left is None:
            return None
        if not left["name"].startswith(prefix):
            raise ConfigMismatch(
                f"consumer {left['name']} of another program gets the mail of {subject}: delete the consumer"
            )
        with contextlib.suppress(NotFound):
            await self._connection.api(f"CONSUMER.DELETE.{self._family.stream}.{left['name']}")
        return left

    async def _list_consumers(self) -> dict[str, dict[str, Any]]:
        """Return the consumers of the stream by their filter subjects."""
        found: dict[str, dict[str, Any]] = {}
        offset = 0
        while True:
            page: dict[str, Any] = await self._connection.api(
                f"CONSUMER.LIST.{self._family.stream}", {"offset": offset}
            )
            consumers = page.get("consumers") or []
            found |= {each["config"].get("filter_subject", ""): each for each in consumers}
            offset += len(consumers)
            if not consumers or offset >= page["total"]:
                return found
