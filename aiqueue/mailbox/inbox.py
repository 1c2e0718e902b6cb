"""Agents' inboxes: mail is put there whether the agent runs or not, and stays until it is handled.

An inbox is a subject of the stream, ``ai.agent.message.{tenant}.{agent}``: it costs nothing while it is empty. What is
stored there is shown to plain subscribers of the guide's bare subject too, as a copy (docs/decisions/inboxes.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import NamedTuple

from .. import codec, headers, subjects
from ..connection import Connection, Stored, block
from ..enqueue import parse_duration
from ..errors import AIQueueError, BadInput, InboxFull, LaneFull, Unavailable
from ..job import Message
from ..topology import Topology
from .mail import Bounce, Envelope, envelope
from .presence import Card, Presence

AT_ONCE_MAX = 64  # stores of one broadcast that are under way
OLDEST_MAX = 1_000  # inboxes that are asked for their oldest mail


class Sent(NamedTuple):
    """A stored mail. `duplicate`: it had been stored before, under the same `unique`."""

    mail_id: str
    tenant: str
    to: str
    conversation: str
    seq: int
    duplicate: bool


class Unread(NamedTuple):
    """A mail as it lies in an inbox. `stored_at`: seconds since the epoch."""

    seq: int
    stored_at: float
    envelope: Envelope
    headers: Mapping[str, str]
    body: bytes


class InboxStats(NamedTuple):
    """An inbox. `card` None: not registered. `online_since` and `oldest_at` (None: no) are seconds since the epoch."""

    tenant: str
    agent: str
    card: Card | None
    online_since: float | None
    unread: int
    oldest_at: float | None


class Inboxes:
    """The inboxes of all tenants, for those who send, look or register; handling mail is an `Agent`'s."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self.connection = connection
        self.family = topology.inbox_family
        self.presence = Presence(connection, topology)
        self.max_age_s = topology.streams[self.family.stream].config["max_age"] / 1e9

    async def create(
        self,
        agent: str,
        *,
        tenant: str,
        kinds: Sequence[str] = (),
        capabilities: Sequence[str] = (),
        description: str = "",
    ) -> Card:
        """Put an agent on the roster before it first runs: it gets broadcasts from now on. Done again, the card is
        replaced. Raises BadInput (InvalidToken), QueueFull, Unavailable, NotFound.
        """
        return await self.presence.register(
            tenant, agent, kinds=kinds, capabilities=capabilities, description=description
        )

    async def remove(self, agent: str, *, tenant: str) -> int:
        """Take an agent off the roster and delete its unread mail; how much that was. Raises as `create`, and BadInput
        while a process serves the inbox.
        """
        subject = subjects.inbox(self.family.name, tenant, agent)
        if (tenant, agent) in await self.presence.online(tenant):
            raise BadInput(f"agent {agent} of {tenant} is online: stop it first")
        await self.presence.unregister(tenant, agent)
        answer = await self.connection.api(f"STREAM.PURGE.{self.family.stream}", {"filter": subject})
        return int(answer.get("purged", 0))

    async def send(
        self,
        message: Message,
        *,
        tenant: str,
        to: str,
        sender: str | None = None,
        conversation: str | None = None,
        correlation: str | None = None,
        expires: str | float | None = None,
        unique: str | None = None,
        extra: Mapping[str, str] | None = None,
        timeout: str | float = 30.0,
    ) -> Sent:
        """Store one mail in an agent's inbox, whether that runs or not.

        `sender` is who gets a bounce or a reply; None: nobody. `conversation` (default: a new one) holds mails
        together, and those of one are handled in the order in which they were stored. `expires` (seconds from now, or
        "5m"): a mail not handled by then goes back to its sender. `unique` is the mail's id: a second one to the same
        agent within the stream's duplicate window (2 minutes) is not stored.

        Raises BadInput (InvalidToken, EncodeError, TooLarge), InboxFull, StreamFull, Unavailable (see its
        `maybe_stored`), NotFound, AccessDenied.
        """
        subject = subjects.inbox(self.family.name, tenant, to)
        mail_id = subjects.new_id() if unique is None else subjects.token("unique key", unique)
        told = self._headers(message, mail_id, sender, conversation, correlation, expires, extra)
        body = _body(message)
        sent = await self._store(subject, to, tenant, mail_id, told, body, parse_duration("timeout", timeout))
        self._copy(tenant, {**told, headers.TARGET: to}, sent, body)
        return sent._replace(duplicate=sent.duplicate and unique is not None)

    async def broadcast(
        self,
        message: Message,
        *,
        tenant: str,
        sender: str | None = None,
        conversation: str | None = None,
        expires: str | float | None = None,
        extra: Mapping[str, str] | None = None,
        timeout: str | float = 30.0,
    ) -> dict[str, Sent | AIQueueError]:
        """Store a mail in every inbox of the tenant's roster but the sender's, and tell for each agent what became of
        it. Raises as `send`, but an error about one inbox is told in its place. An agent that does not handle its kind
        lets it be.
        """
        subjects.token("tenant", tenant)
        timeout_s, mail_id = parse_duration("timeout", timeout), subjects.new_id()
        told, body = self._headers(message, mail_id, sender, conversation, None, expires, extra), _body(message)
        told[headers.BROADCAST] = "1"
        names = [card.agent for card in await self.presence.roster(tenant) if card.agent != sender]
        gate = asyncio.Semaphore(AT_ONCE_MAX)

        async def store(agent: str) -> Sent | AIQueueError:
            subject = subjects.inbox(self.family.name, tenant, agent)
            async with gate:
                try:
                    return await self._store(subject, agent, tenant, mail_id, told, body, timeout_s)
                except AIQueueError as error:
                    return error

        outcomes = dict(zip(names, await asyncio.gather(*map(store, names)), strict=True))
        stored = next((each for each in outcomes.values() if isinstance(each, Sent)), None)
        if stored is not None:
            self._copy(tenant, told, stored, body)
        return outcomes

    async def forward(
        self, to: str, found: Envelope, told: Mapping[str, str], body: bytes, hop: str, *, broadcast: bool
    ) -> None:
        """Store what came on the bare subject in an agent's inbox. Done twice under one `hop`, it is stored once.
        Raises as `send`.
        """
        kept = headers.carried(told, ours=True) | {
            headers.JOB_ID: found.mail_id,
            headers.CONVERSATION: headers.ascii_line(found.conversation, 128),
            headers.ENQUEUED: f"{found.sent_at:.6f}",
        }
        if broadcast:
            kept[headers.BROADCAST] = "1"
        subject = subjects.inbox(self.family.name, found.tenant, to)
        await self._store(subject, to, found.tenant, found.mail_id, kept, body, 30.0, hop=f"/{hop}")

    async def bounce(self, found: Envelope, to: str, reason: str, error: str) -> bool:
        """Tell the sender of a mail that it came to nothing; done twice, it is told once. False where there is nobody
        to tell: no sender, a bounce, or an inbox without room. Raises Unavailable.
        """
        if found.sender is None or found.kind == Bounce.aiq_kind:
            return False
        said = Bounce(
            reason=reason, error=error, mail_id=found.mail_id, mail_kind=found.kind, target=to,
            conversation=found.conversation, correlation=found.correlation,
        )  # fmt: skip
        # no sender: nothing can be said to a bounce
        mail_id = subjects.foreign_id(f"{found.mail_id}-bounced-{to}")
        told = self._headers(said, mail_id, None, None, found.mail_id, None, None)
        told[headers.CONVERSATION] = headers.ascii_line(found.conversation, 128)
        try:
            subject = subjects.inbox(self.family.name, found.tenant, found.sender)
            sent = await self._store(subject, found.sender, found.tenant, mail_id, told, _body(said), 10.0)
        except (InboxFull, BadInput):
            return False
        self._copy(found.tenant, {**told, headers.TARGET: found.sender}, sent, _body(said))
        return True

    async def read(self, agent: str, *, tenant: str, after: int = 0) -> AsyncGenerator[Unread, None]:
        """The unread mail of an agent, the oldest first, taking nothing: mail that is being handled is among it."""
        subject = subjects.inbox(self.family.name, tenant, agent)
        async for each in self.read_all(subject, after=after):
            yield each

    async def read_all(self, subject: str, *, after: int = 0) -> AsyncGenerator[Unread, None]:
        """The same by the subject, whatever stands in it."""
        async for stored in self.connection.read(self.family.stream, subject, seq=after + 1):
            yield self._unread(stored)

    def _unread(self, stored: Stored) -> Unread:
        found = envelope(stored.subject, stored.seq, stored.time, stored.headers, default_kind=self.family.default_kind)
        return Unread(stored.seq, stored.time, found, stored.headers, stored.data)

    async def counts(self, tenant: str = "*") -> dict[tuple[str, str], int]:
        """(tenant, agent) of the inboxes that hold mail, and how much."""
        whose = tenant if tenant == "*" else subjects.token("tenant", tenant)
        request = {"subjects_filter": f"ai.{self.family.name}.{whose}.*", "offset": 0}
        counts: dict[tuple[str, str], int] = {}
        while True:
            info = await self.connection.api(f"STREAM.INFO.{self.family.stream}", request)
            found = info["state"].get("subjects") or {}
            for subject, mails in found.items():
                parts = subject.split(".")
                counts[parts[3], parts[4]] = mails
            if len(found) < 100_000:
                return counts
            request["offset"] = len(counts)

    async def stats(self, tenant: str | None = None) -> list[InboxStats]:
        """All inboxes of a tenant, or of all: those of registered agents, and those that hold mail. The age of the
        oldest mail is told for the first 1,000 that hold some.
        """
        cards = {(each.tenant, each.agent): each for each in await self.presence.roster(tenant)}
        online = await self.presence.online(tenant)
        counts = await self.counts(tenant or "*")
        asked = sorted(counts)[:OLDEST_MAX]
        oldest = dict(zip(asked, await asyncio.gather(*(self._oldest(*each) for each in asked)), strict=True))
        return [
            InboxStats(*each, cards.get(each), online.get(each), counts.get(each, 0), oldest.get(each))
            for each in sorted({*cards, *counts, *online})
        ]

    async def _oldest(self, tenant: str, agent: str) -> float | None:
        stored = await self.connection.first(self.family.stream, f"ai.{self.family.name}.{tenant}.{agent}")
        return stored.time if stored is not None else None

    def _headers(
        self,
        message: Message,
        mail_id: str,
        sender: str | None,
        conversation: str | None,
        correlation: str | None,
        expires: str | float | None,
        extra: Mapping[str, str] | None,
    ) -> dict[str, str]:
        told = {
            headers.CONTENT_TYPE: codec.CBOR,
            headers.KIND: message.aiq_kind,
            headers.JOB_ID: mail_id,
            headers.CONVERSATION: _line("conversation", conversation) if conversation else mail_id,
        }
        if sender is not None:
            told[headers.SOURCE] = subjects.token("sender", sender)
        if correlation is not None:
            told[headers.CORRELATION] = correlation
        if expires is not None:
            told[headers.DEADLINE] = str(round((time.time() + parse_duration("expires", expires)) * 1000))
        for name, value in (extra or {}).items():
            if str(name).lower().startswith(("nats-", "aiq-", "content-type", headers.TARGET, headers.SOURCE)):
                raise BadInput(f"header {name!r} is not the caller's to set")
            told[name] = value
        return told

    async def _store(
        self, subject: str, to: str, tenant: str, mail_id: str, told: Mapping[str, str], body: bytes,
        timeout_s: float, hop: str = "",
    ) -> Sent:  # fmt: skip
        msg_id = subjects.msg_id(self.family.name, tenant, mail_id, to) + hop
        whole = {**told, headers.TARGET: to, headers.MSG_ID: msg_id}
        try:
            ack = await self.connection.store(subject, body, whole, timeout_s=timeout_s)
        except LaneFull:
            raise InboxFull(to, limit=self.family.max_msgs_per_subject) from None
        conversation = told.get(headers.CONVERSATION, mail_id)
        return Sent(mail_id, tenant, to, conversation, ack.seq, ack.duplicate)

    def _copy(self, tenant: str, told: Mapping[str, str], sent: Sent, body: bytes) -> None:
        """Show a stored mail to those who listen to the bare subject. Under the Msg-Id that the stream has just taken
        it is dropped there; only so: a copy of what was refused would be stored.
        """
        msg_id = subjects.msg_id(self.family.name, tenant, sent.mail_id, sent.to)
        whole = {**told, headers.MSG_ID: msg_id, headers.COPY: "1"}
        try:
            self.connection.tell(f"ai.{self.family.name}.{tenant}", body, block=block(whole))
        except (Unavailable, BadInput):
            return  # core messages promise nothing


def _body(message: Message) -> bytes:
    if message.aiq_documents:
        raise BadInput(
            f"a mail holds no documents, and {message.aiq_kind} has a field for one: put the document with `keep`, "
            "send its sha256, or enqueue a job for the agent's work"
        )
    return codec.encode(message)


def _line(what: str, value: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isascii() or not value.isprintable():
        raise BadInput(f"{what} must be 1 to 128 printable ASCII characters, not {str(value)[:80]!r}")
    if value != value.strip():
        raise BadInput(f"{what} must not begin or end with a space: {value!r}")
    return value
