"""Agents' inboxes: mail is stored there whether the agent runs or not, and stays until it is handled.

An inbox is a subject of the stream, ``ai.agent.message.{tenant}.{agent}``: an empty inbox costs nothing. A copy of each
stored mail is published on the bare subject, for plain subscribers (docs/decisions/inboxes.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import NamedTuple

from .. import codec, headers, subjects
from ..connection import Connection, Stored, block
from ..enqueue import JobId, id_of_key
from ..errors import AIQueueError, BadInput, InboxFull, LaneFull, Unavailable
from ..job import Message, check_message, secret_headers
from ..logs import running_job
from ..payload import encode_message
from ..topology import Topology
from ..tracing import NOT_SENT, TRACEPARENT, Sending, Tracing, names
from ..units import Deadline, Duration, parse_deadline, parse_duration
from .mail import Bounce, Envelope, parse_envelope
from .presence import Card, Presence

CONCURRENT_STORES_MAX = 64  # of one broadcast
OLDEST_MAX = 1_000  # inboxes whose oldest mail `stats` reads


class Sent(NamedTuple):
    """A stored mail. `duplicate`: a mail with the same `unique` was stored before."""

    mail_id: str
    """Id of the mail, which a reply names."""
    tenant: str
    to: str
    """Agent that the mail is for."""
    conversation: str
    """Conversation that the mail is part of."""
    seq: int
    """Sequence of the mail in its stream."""
    duplicate: bool


class Unread(NamedTuple):
    """A mail that is stored in an inbox. `stored_at`: seconds since the epoch."""

    seq: int
    stored_at: float
    envelope: Envelope
    headers: Mapping[str, str]
    body: bytes


class InboxStats(NamedTuple):
    """The state of one inbox. Times are seconds since the epoch.

    `card` is None if the agent is not registered, `online_since` if no process serves the inbox, `oldest_at` if the
    inbox is empty or was not read.
    """

    tenant: str
    agent: str
    card: Card | None
    online_since: float | None
    unread: int
    oldest_at: float | None


class Inboxes:
    """The inboxes of all tenants: send and read mail, register agents. Mail is handled by an `Agent`."""

    def __init__(self, connection: Connection, topology: Topology, tracing: Tracing | None = None) -> None:
        self.connection = connection
        self.tracing = tracing
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
        """Put an agent on the roster, so that it gets broadcasts before it first runs; or replace its card.

        Raises BadInput (InvalidToken), QueueFull, Unavailable, NotFound.
        """
        return await self.presence.register(
            tenant, agent, kinds=kinds, capabilities=capabilities, description=description
        )

    async def remove(self, agent: str, *, tenant: str) -> int:
        """Remove an agent from the roster and delete its unread mail. Return the number of deleted mails.

        Raises what `create` raises, and BadInput while a process serves the inbox.
        """
        subject = subjects.inbox(self.family.name, tenant, agent)
        if (tenant, agent) in await self.presence.online(tenant):
            raise BadInput(f"agent {agent} of {tenant} is online: stop it first")
        await self.presence.unregister(tenant, agent)
        response = await self.connection.api(f"STREAM.PURGE.{self.family.stream}", {"filter": subject})
        return int(response.get("purged", 0))

    async def send(
        self,
        message: Message,
        *,
        tenant: str,
        to: str,
        sender: str | None = None,
        conversation: str | None = None,
        correlation: str | None = None,
        expires: Deadline | None = None,
        unique: str | None = None,
        extra: Mapping[str, str] | None = None,
        timeout: Duration = 30.0,
    ) -> Sent:
        """Store one mail in an agent's inbox, whether the agent runs or not.

        - `sender`: the agent that gets a reply or a bounce. None: no agent does.
        - `conversation` (default: a new one): mails of one conversation are handled in the order in which they were
          stored.
        - `expires` (a duration from now, such as "5m", or a datetime): a mail that is not handled by then is returned
          to its sender.
        - `unique`: the mail's id, or any other text, of which the id is then a hash. A second mail with this id to the
          same agent is not stored within the stream's duplicate window (2 minutes).

        Raises BadInput (InvalidToken, EncodeError, TooLarge), InboxFull, StreamFull, Unavailable (see its
        `maybe_stored`), NotFound, AccessDenied.
        """
        subject = subjects.inbox(self.family.name, tenant, to)
        mail_id, _, shown = JobId(subjects.new_id(), False) if unique is None else id_of_key(unique)
        if expires is not None:
            await self.connection.clock.ensure(self.family.stream)
        mail_headers = self._make_headers(message, mail_id, sender, conversation, correlation, expires, extra)
        if shown:
            mail_headers[headers.UNIQUE] = shown
        body, timeout_s = _encode(message), parse_duration("timeout", timeout)
        with self._start_send(tenant, mail_id, mail_headers):
            sent = await self._store(subject, to, tenant, mail_id, mail_headers, body, timeout_s)
        self._publish_copy(tenant, {**mail_headers, headers.TARGET: to}, sent, body)
        return sent._replace(duplicate=sent.duplicate and unique is not None)

    async def send_encoded(
        self, body: bytes, mail_headers: Mapping[str, str], *, tenant: str, to: str, timeout_s: float = 30.0
    ) -> Sent:
        """Store a mail that the caller has encoded, with the caller's headers. Its id is in ``Aiq-Job-Id``, or new.

        Otherwise as `send`. Raises what `send` raises.
        """
        subject, given_id = subjects.inbox(self.family.name, tenant, to), mail_headers.get(headers.JOB_ID)
        mail_id = subjects.foreign_id(given_id) if given_id else subjects.new_id()
        all_headers = {**mail_headers, headers.JOB_ID: mail_id}
        sent = await self._store(subject, to, tenant, mail_id, all_headers, body, timeout_s)
        self._publish_copy(tenant, {**all_headers, headers.TARGET: to}, sent, body)
        return sent._replace(duplicate=sent.duplicate and bool(given_id))

    async def broadcast(
        self,
        message: Message,
        *,
        tenant: str,
        sender: str | None = None,
        conversation: str | None = None,
        expires: Deadline | None = None,
        extra: Mapping[str, str] | None = None,
        timeout: Duration = 30.0,
    ) -> dict[str, Sent | AIQueueError]:
        """Store a mail in every inbox of the tenant's roster except the sender's. Return the outcome for each agent.

        An error about one inbox is returned as that agent's outcome. An agent without a handler for the kind ignores
        the mail. Raises what `send` raises.
        """
        subjects.token("tenant", tenant)
        timeout_s, mail_id = parse_duration("timeout", timeout), subjects.new_id()
        if expires is not None:
            await self.connection.clock.ensure(self.family.stream)
        mail_headers = self._make_headers(message, mail_id, sender, conversation, None, expires, extra)
        body = _encode(message)
        mail_headers[headers.BROADCAST] = "1"
        agents = [card.agent for card in await self.presence.roster(tenant) if card.agent != sender]
        limit = asyncio.Semaphore(CONCURRENT_STORES_MAX)

        async def store(agent: str) -> Sent | AIQueueError:
            subject = subjects.inbox(self.family.name, tenant, agent)
            async with limit:
                try:
                    return await self._store(subject, agent, tenant, mail_id, mail_headers, body, timeout_s)
                except AIQueueError as error:
                    return error

        with self._start_send(tenant, mail_id, mail_headers) as sending:
            outcomes = dict(zip(agents, await asyncio.gather(*map(store, agents)), strict=True))
            sending.set(names.BATCH_COUNT, len(agents))
        stored = next((each for each in outcomes.values() if isinstance(each, Sent)), None)
        if stored is not None:
            self._publish_copy(tenant, mail_headers, stored, body)
        return outcomes

    async def forward(
        self, to: str, envelope: Envelope, mail_headers: Mapping[str, str], body: bytes, move: str, *, broadcast: bool
    ) -> None:
        """Store a mail from the bare subject in an agent's inbox. `move` names the move: the same move stores one mail.

        Raises what `send` raises.
        """
        kept = headers.carried(mail_headers, ours=True) | {
            headers.JOB_ID: envelope.mail_id,
            headers.CONVERSATION: headers.ascii_line(envelope.conversation, 128),
            headers.ENQUEUED: f"{envelope.sent_at:.6f}",
        }
        if broadcast:
            kept[headers.BROADCAST] = "1"
        subject = subjects.inbox(self.family.name, envelope.tenant, to)
        await self._store(subject, to, envelope.tenant, envelope.mail_id, kept, body, 30.0, move=f"/{move}")

    async def bounce(self, envelope: Envelope, to: str, reason: str, error: str) -> bool:
        """Send a bounce to the sender of a mail that agent `to` did not handle. A second bounce is not stored.

        Return False if nobody can get the bounce: the mail names no sender, is a bounce itself, or the sender's inbox
        is full. Raises Unavailable.
        """
        if envelope.sender is None or envelope.kind == Bounce.aiq_kind:
            return False
        bounce = Bounce(
            reason=reason, error=error, mail_id=envelope.mail_id, mail_kind=envelope.kind, target=to,
            conversation=envelope.conversation, correlation=envelope.correlation,
        )  # fmt: skip
        mail_id = subjects.foreign_id(f"{envelope.mail_id}-bounced-{to}")
        # a bounce names no sender, because nobody may reply to it
        mail_headers = self._make_headers(bounce, mail_id, None, None, envelope.mail_id, None, None)
        mail_headers[headers.CONVERSATION] = headers.ascii_line(envelope.conversation, 128)
        try:
            subject = subjects.inbox(self.family.name, envelope.tenant, envelope.sender)
            sent = await self._store(
                subject, envelope.sender, envelope.tenant, mail_id, mail_headers, _encode(bounce), 10.0
            )
        except (InboxFull, BadInput):
            return False
        copy_headers = {**mail_headers, headers.TARGET: envelope.sender}
        self._publish_copy(envelope.tenant, copy_headers, sent, _encode(bounce))
        return True

    async def read(self, agent: str, *, tenant: str, after: int = 0) -> AsyncGenerator[Unread, None]:
        """Yield the unread mail of an agent, oldest first, also mail that is being handled. Nothing is removed."""
        subject = subjects.inbox(self.family.name, tenant, agent)
        async for each in self.read_all(subject, after=after):
            yield each

    async def read_all(self, subject: str, *, after: int = 0) -> AsyncGenerator[Unread, None]:
        """Yield the stored mail of any subject, oldest first. The subject's tokens are not checked."""
        async for stored in self.connection.read(self.family.stream, subject, seq=after + 1):
            yield self._parse_unread(stored)

    def _parse_unread(self, stored: Stored) -> Unread:
        mail_headers = dict(stored.headers)
        headers.restore_case(mail_headers)
        envelope = parse_envelope(
            stored.subject, stored.seq, stored.time, mail_headers, default_kind=self.family.default_kind
        )
        return Unread(stored.seq, stored.time, envelope, mail_headers, stored.data)

    async def counts(self, tenant: str = "*") -> dict[tuple[str, str], int]:
        """Return (tenant, agent) of each inbox that holds mail, with the number of mails."""
        tenant_token = tenant if tenant == "*" else subjects.token("tenant", tenant)
        request = {"subjects_filter": subjects.inbox_filter(self.family.name, tenant_token), "offset": 0}
        counts: dict[tuple[str, str], int] = {}
        while True:
            info = await self.connection.api(f"STREAM.INFO.{self.family.stream}", request)
            found = info["state"].get("subjects") or {}
            for subject, mails in found.items():
                tenant_of_inbox, agent = subjects.parse_mail(subject)
                assert agent is not None  # the filter has a token for it
                counts[tenant_of_inbox, agent] = mails
            if len(found) < 100_000:
                return counts
            request["offset"] = len(counts)

    async def stats(self, tenant: str | None = None) -> list[InboxStats]:
        """Return all inboxes of a tenant (None: of all tenants): those of registered agents, and those that hold mail.

        `oldest_at` is set for the first 1,000 inboxes that hold mail.
        """
        cards = {(each.tenant, each.agent): each for each in await self.presence.roster(tenant)}
        online = await self.presence.online(tenant)
        counts = await self.counts(tenant or "*")
        filled = sorted(counts)[:OLDEST_MAX]
        oldest = dict(zip(filled, await asyncio.gather(*(self._find_oldest(*each) for each in filled)), strict=True))
        return [
            InboxStats(*each, cards.get(each), online.get(each), counts.get(each, 0), oldest.get(each))
            for each in sorted({*cards, *counts, *online})
        ]

    async def _find_oldest(self, tenant: str, agent: str) -> float | None:
        """Return when the oldest mail of an inbox was stored."""
        stored = await self.connection.first(self.family.stream, subjects.inbox_filter(self.family.name, tenant, agent))
        return stored.time if stored is not None else None

    def start_request(self, tenant: str) -> Sending:
        """Start the span of a mail and the wait for its reply, to be entered. It is the current one within."""
        if self.tracing is None:
            return NOT_SENT
        destination = names.destination(self.family.name)
        found = self.tracing.start_send(
            destination, tenant, operation=names.REQUEST, of=running_job.get(), may_begin=False
        )
        return NOT_SENT if found is None else found.with_current_span()

    def _start_send(self, tenant: str, mail_id: str, mail_headers: dict[str, str]) -> Sending:
        """Start the span of a mail that is sent, and add the headers of its trace to those of the mail."""
        if self.tracing is None or headers.find(mail_headers, TRACEPARENT):
            return NOT_SENT
        destination = names.destination(self.family.name)
        sending = self.tracing.start_send(destination, tenant, mail_id, of=running_job.get()) or NOT_SENT
        sending.set(names.CONVERSATION_ID, mail_headers[headers.CONVERSATION])
        mail_headers.update(sending.headers)
        return sending

    def _make_headers(
        self,
        message: Message,
        mail_id: str,
        sender: str | None,
        conversation: str | None,
        correlation: str | None,
        expires: Deadline | None,
        extra: Mapping[str, str] | None,
    ) -> dict[str, str]:
        check_message(message)
        mail_headers = {
            headers.CONTENT_TYPE: codec.CBOR,
            headers.KIND: message.aiq_kind,
            headers.JOB_ID: mail_id,
            headers.CONVERSATION: _check_line("conversation", conversation) if conversation else mail_id,
        }
        mail_headers |= secret_headers(message)
        if sender is not None:
            mail_headers[headers.SOURCE] = subjects.token("sender", sender)
        if correlation is not None:
            mail_headers[headers.CORRELATION] = correlation
        if expires is not None:
            expires_at = parse_deadline("expires", expires, self.connection.clock.now())
            mail_headers[headers.DEADLINE] = str(round(expires_at * 1000))
        for name, value in (extra or {}).items():
            if str(name).lower().startswith(("nats-", "aiq-", "content-type", headers.TARGET, headers.SOURCE)):
                raise BadInput(f"header {name!r} is reserved: choose another name")
            mail_headers[name] = value
        return mail_headers

    async def _store(
        self, subject: str, to: str, tenant: str, mail_id: str, mail_headers: Mapping[str, str], body: bytes,
        timeout_s: float, move: str = "",
    ) -> Sent:  # fmt: skip
        msg_id = subjects.msg_id(self.family.name, tenant, mail_id, to) + move
        all_headers = {**mail_headers, headers.TARGET: to, headers.MSG_ID: msg_id}
        try:
            ack = await self.connection.store(subject, body, all_headers, timeout_s=timeout_s)
        except LaneFull:
            raise InboxFull(to, limit=self.family.max_msgs_per_subject) from None
        conversation = mail_headers.get(headers.CONVERSATION, mail_id)
        return Sent(mail_id, tenant, to, conversation, ack.seq, ack.duplicate)

    def _publish_copy(self, tenant: str, mail_headers: Mapping[str, str], sent: Sent, body: bytes) -> None:
        """Publish a copy of a stored mail on the bare subject, for plain subscribers.

        The copy has the Msg-Id of the stored mail, so that the stream drops it as a duplicate. A copy of a refused mail
        would be stored, so a refused mail is not copied.
        """
        msg_id = subjects.msg_id(self.family.name, tenant, sent.mail_id, sent.to)
        all_headers = {**mail_headers, headers.MSG_ID: msg_id, headers.COPY: "1"}
        try:
            self.connection.tell(f"ai.{self.family.name}.{tenant}", body, block=block(all_headers))
        except (Unavailable, BadInput):
            return  # a copy may be lost: the mail itself is stored


def _encode(message: Message) -> bytes:
    """Return the body of a mail. Raises BadInput if the message has fields for documents, EncodeError."""
    if message.aiq_documents:
        raise BadInput(
            f"a mail cannot contain documents, and {message.aiq_kind} has a field for one: put the document with "
            "`keep` and send its sha256, or enqueue a job for the agent's work"
        )
    return encode_message(message)


def _check_line(what: str, value: str) -> str:
    """Return `value` if it is valid as a header. Raises BadInput, naming `what`."""
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isascii() or not value.isprintable():
        raise BadInput(f"{what} must be 1 to 128 printable ASCII characters, not {str(value)[:80]!r}")
    if value != value.strip():
        raise BadInput(f"{what} must not start or end with a space: {value!r}")
    return value
