"""All agents that one client runs: one puller for their inboxes, one thread for their leases, their presence.

An inbox is served by one process at a time, which holds its presence key. Who takes the key makes the inbox's consumer
anew, under a name of its own: what its predecessor left unacknowledged comes again at once and in order, and what that
one may still say is said to a consumer that is no more (docs/decisions/inboxes.md).
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
from ..connection import delivery_number, timestamp
from ..errors import AIQueueError, BadInput, ConfigMismatch, NotFound, ServerError
from ..lanes import RECREATE_AFTER_S, Delivery, LanePull, Leases, Puller
from ..mailbox import Hold
from ..subjects import Lane
from .inbox_worker import InboxWorker
from .router import Duty

log = logging.getLogger("aiqueue.agent")

AGENTS_MAX = 500  # of one client: each has a standing pull
HELD_MAX = 1_024  # mails in the hands of all agents of a client; above it fewer are asked for at once
ROOM_MIN = 64
WINDOW_MIN, WINDOW_PER_SLOT = 32, 16  # mails in the hands of one agent, at most
TTL_S = 30.0  # a process that died leaves its inboxes after so long
KEEP_S = 10.0
TAKE_S = 2.0  # how often one that stands by looks
TEND_S = 1.0
MAKE_AT_ONCE_MAX = 16
DEATHS_MAX = 3  # of processes in a row over one mail, which is then given up

_rooms: WeakKeyDictionary[Client, AgentSession] = WeakKeyDictionary()


class _Post:
    """An agent in this room, and its hold on the inbox."""

    def __init__(self, desk: InboxWorker, hold: Hold) -> None:
        self.desk = desk
        self.hold = hold
        self.tender: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()  # its consumer is gone
        self.heard = 0  # the number of its consumer's last delivery
        self.former = ""  # a consumer of our own that is to be made anew
        self.said = False


class AgentSession:
    """See the module. Made by the first agent that a client runs, ended with the last."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection = client.connection
        self._inboxes = client.inboxes
        self._family = self._inboxes.family
        self._wake = asyncio.Event()
        self._puller = Puller(self._connection, deliver=self._on_delivery, gone=self._on_gone, changed=self._wake.set)
        self._leases = Leases(self._connection, shortest_s=self._family.ack_wait_s)
        self._duty = Duty(self._inboxes, client.dead, self._puller)
        self._posts: dict[LanePull, _Post] = {}
        self._all: set[_Post] = set()
        self._making = asyncio.Semaphore(MAKE_AT_ONCE_MAX)
        self._consumers: dict[str, dict[str, Any]] = {}  # by their filters, as last listed
        self._listed = 0.0
        self._engine: asyncio.Task[None] | None = None
        self._opened: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, client: Client) -> AgentSession:
        """The room of a client."""
        room = _rooms.get(client)
        if room is None:
            room = _rooms[client] = cls(client)
        return room

    async def join(self, desk: InboxWorker) -> None:
        """Have an agent's mail come in, as soon as no other process serves its inbox: that is tried once before this
        returns. Raises BadInput, NotFound, Unavailable.
        """
        if len(self._all) >= AGENTS_MAX:
            raise BadInput(f"a client runs at most {AGENTS_MAX} agents: connect another one")
        terms = desk.terms
        post = _Post(desk, self._inboxes.presence.hold(terms.tenant, terms.name, TTL_S))
        self._all.add(post)
        desk.leases, desk.changed = self._leases, self._wake.set
        try:
            if self._opened is None:
                self._opened = asyncio.create_task(self._open())
            await asyncio.shield(self._opened)
            if await post.hold.take():
                await self._serve(post)
        except BaseException:
            await self._leave(post)
            raise
        post.tender = asyncio.create_task(self._tend(post))

    async def leave(self, desk: InboxWorker) -> None:
        """Take no more of an agent's mail, and let it finish what it has begun. Safe twice."""
        for post in [each for each in self._all if each.desk is desk]:
            await self._leave(post)

    async def _leave(self, post: _Post) -> None:
        await post.desk.drain()  # while replies still come in, and the inbox is still held
        if post.tender is not None:
            post.tender.cancel()
            await asyncio.wait([post.tender])
        await self._unserve(post)
        await post.hold.release()
        self._all.discard(post)
        if not self._all and _rooms.get(self._client) is self:
            del _rooms[self._client]
            await self._close()

    async def _open(self) -> None:
        await self._puller.open()
        self._leases.start()
        self._engine = asyncio.create_task(self._pull())
        self._duty.start()

    async def _close(self) -> None:
        if self._opened is not None:
            await asyncio.wait([self._opened])
        await self._duty.stop()
        if self._engine is not None:
            self._engine.cancel()
            await asyncio.wait([self._engine])
        await self._puller.close()
        await self._leases.stop()

    # -- the engine

    async def _pull(self) -> None:
        """Keep the pulls at what may be held, whenever something has changed, and look once a second if all is well."""
        tended = 0.0
        while True:
            try:
                now = time.monotonic()
                if now - tended >= TEND_S:
                    tended = now
                    self._puller.drop_lost_pulls()
                held = sum(post.desk.held for post in self._all) + self._duty.held
                room = max(ROOM_MIN, HELD_MAX - held)
                self._puller.refill(room // 2, room // 2)
            except Exception:
                log.exception("pulling mail")  # and again in a second
            try:
                async with asyncio.timeout(TEND_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    def _on_delivery(self, delivery: Delivery) -> None:
        post = self._posts.get(delivery.lane)
        if post is not None:
            number = delivery_number(delivery.reply)
            if number > post.heard + 1:
                self._on_gap(post, delivery.lane)
            else:
                post.heard = number
                post.desk.on_delivery(delivery)
        elif delivery.lane is self._duty.pull:
            self._duty.on_delivery(delivery)
        self._wake.set()

    def _on_gap(self, post: _Post, pull: LanePull) -> None:
        """Deliveries were lost on their way here: a server has died with them. They would come again when their leases
        run out, after newer mail; so the consumer is made anew.
        """
        post.former = pull.consumer
        self._on_gone(pull)

    def _on_gone(self, pull: LanePull) -> None:
        post = self._posts.pop(pull, None)
        if post is None:
            self._duty.gone(pull)
            return
        self._puller.remove(pull)
        if post.desk.pull is pull:
            post.desk.pull = None
            post.desk.forget_waiting()
        post.lost.set()

    # -- one agent

    async def _tend(self, post: _Post) -> None:
        """Keep the hold on an inbox, win it where it is another's, and mend what is lost."""
        terms = post.desk.terms
        while True:
            try:
                async with asyncio.timeout(KEEP_S if post.desk.active else TAKE_S):
                    await post.lost.wait()
                await asyncio.sleep(RECREATE_AFTER_S)
            except TimeoutError:
                pass
            post.lost.clear()
            try:
                held = await (post.hold.keep() if post.hold.held else post.hold.take())
                if held and not post.desk.active:
                    await self._serve(post)
                elif not held and post.desk.active:
                    log.warning("agent %s of %s: another process serves its inbox", terms.name, terms.tenant)
                    await self._unserve(post)
                    await post.desk.abandon()
                post.said = False
            except AIQueueError as error:
                if not post.said:  # once, not every two seconds
                    log.warning("agent %s of %s: %s", terms.name, terms.tenant, error)
                post.said = True
            except Exception:
                log.exception("agent %s of %s", terms.name, terms.tenant)

    async def _serve(self, post: _Post) -> None:
        terms, family = post.desk.terms, self._family
        key = Lane(family.name, terms.tenant, terms.name)
        window = min(family.max_ack_pending, HELD_MAX, max(WINDOW_MIN, WINDOW_PER_SLOT * terms.concurrency))
        async with self._making:
            name, created, left = await self._make(subjects.inbox(*key), key, window)
        if left is not None and left["num_ack_pending"] and left["name"] != post.former:
            oldest = await self._connection.first(family.stream, subjects.inbox(*key))
            if oldest is not None:
                died = await self._inboxes.presence.died(terms.tenant, terms.name, oldest.seq)
                suspect = oldest.seq if died >= DEATHS_MAX else 0
                post.desk.beware(left["delivered"]["stream_seq"], suspect)
        pull = LanePull(key, family.stream, name, family.ack_wait_s, pending=1, created=created)
        post.heard, post.former = 0, ""
        post.desk.pull = pull
        self._posts[pull] = post
        self._puller.add(pull)
        self._wake.set()

    async def _unserve(self, post: _Post) -> None:
        """Take the agent's consumer away: the next one begins with what is not acknowledged."""
        pull, post.desk.pull = post.desk.pull, None
        if pull is None:
            return
        self._posts.pop(pull, None)
        self._puller.remove(pull)
        with contextlib.suppress(AIQueueError):
            await self._connection.flush()  # the acks first
            await self._connection.api(f"CONSUMER.DELETE.{pull.stream}.{pull.consumer}", timeout=2.0)

    async def _make(self, subject: str, key: Lane, window: int) -> tuple[str, float, dict[str, Any] | None]:
        """A consumer for an inbox, of a name that none has had: its name, when it was made, and the one that a dead
        process has left, which goes first.
        """
        family = self._family
        prefix, left = f"{key.tenant}-{key.priority}-", None
        name = prefix + subjects.new_id()
        config = {
            "durable_name": name,
            "filter_subject": subject,
            "ack_policy": "explicit",
            "ack_wait": round(family.ack_wait_s * 1e9),
            "max_ack_pending": window,
            "max_deliver": family.max_deliver,
            "inactive_threshold": round(family.inactive_threshold_s * 1e9),
            "mem_storage": True,  # what it knows is of no use to the next one
        }
        request = {"stream_name": family.stream, "config": config, "action": "create"}
        call = f"CONSUMER.CREATE.{family.stream}.{name}.{subject}"
        try:
            made = await self._connection.api(call, request)
        except (ConfigMismatch, ServerError):
            left = await self._evict(subject, prefix)
            made = await self._connection.api(call, request)
        return name, timestamp(made["created"]), left

    async def _evict(self, subject: str, prefix: str) -> dict[str, Any] | None:
        left = self._consumers.pop(subject, None)
        if left is None and time.monotonic() - self._listed > 1.0:
            self._consumers = await self._list()
            self._listed = time.monotonic()
            left = self._consumers.pop(subject, None)
        if left is None:
            return None
        if not left["name"].startswith(prefix):
            raise ConfigMismatch(f"consumer {left['name']} of another program takes the mail of {subject}: delete it")
        with contextlib.suppress(NotFound):
            await self._connection.api(f"CONSUMER.DELETE.{self._family.stream}.{left['name']}")
        return left

    async def _list(self) -> dict[str, dict[str, Any]]:
        """The consumers of the stream by their filters, page by page."""
        found: dict[str, dict[str, Any]] = {}
        offset = 0
        while True:
            page: dict[str, Any] = await self._connection.api(
                f"CONSUMER.LIST.{self._family.stream}", {"offset": offset}
            )
            some = page.get("consumers") or []
            found |= {each["config"].get("filter_subject", ""): each for each in some}
            offset += len(some)
            if not some or offset >= page["total"]:
                return found
