"""Requests of an agent that wait for their replies. Replies arrive in the agent's own inbox, like all mail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from .. import attempt, subjects
from ..attempt import RawJob
from ..errors import AIQueueError, BadInput, DecodeError, MailBounced, ReplyTimeout, Unavailable
from ..job import M, Message, untyped
from ..lanes import Delivery
from ..mailbox import BOUNCE, Bounce, Envelope, Inboxes, Mail, ReplySender, Unread, parse_envelope
from ..payload import parse_message
from ..topology import Family
from ..units import Duration, parse_duration

log = logging.getLogger(__name__)

PENDING_MAX = 10_000
SEARCH_EVERY_S = 1.0
FOUND_MAX = 1_024  # replies found by a search that may be delivered all the same


class ReplyWaiter:
    """The requests of one agent that have no reply yet, by the id of their mail.

    A reply is delivered like all mail. While `is_window_full` is true, the server delivers nothing: the reply is stored
    behind mail that waits for the request. The waiter then searches the inbox for it once a second.
    """

    def __init__(
        self, name: str, tenant: str, inboxes: Inboxes, reply_sender: ReplySender, is_window_full: Callable[[], bool]
    ) -> None:
        self._name = name
        self._tenant = tenant
        self._inboxes = inboxes
        self._reply_sender = reply_sender
        self._is_window_full = is_window_full
        self._pending: dict[str, asyncio.Future[Unread]] = {}
        self._sent: dict[str, int] = {}  # the sequences of the pending requests
        self._searched_seq = 0  # up to here the inbox has no reply to a pending request
        self._found: dict[tuple[int, str], None] = {}
        self._search_task: asyncio.Task[None] | None = None

    async def request(
        self, message: Message, to: str, model: type[M] | None, conversation: str | None, timeout: Duration
    ) -> Mail[Any]:
        """Send a mail and wait for its reply; see `Agent.request`."""
        timeout_s = parse_duration("timeout", timeout)
        if len(self._pending) >= PENDING_MAX:
            raise BadInput(f"{PENDING_MAX:,} requests wait for a reply already: let some of them end first")
        mail_id = subjects.new_id()
        future = self._pending[mail_id] = asyncio.get_running_loop().create_future()
        if self._search_task is None or self._search_task.done():
            self._search_task = asyncio.create_task(self._search_all())
        try:
            async with asyncio.timeout(timeout_s) as limit:
                sent = await self._inboxes.send(
                    message, tenant=self._tenant, to=to, sender=self._name, conversation=conversation,
                    expires=timeout_s, unique=mail_id, timeout=timeout_s,
                )  # fmt: skip
                self._sent[mail_id] = sent.seq
                reply_mail = await future
        except TimeoutError:
            if not limit.expired():
                raise
            raise ReplyTimeout(f"agent {to} did not reply to {mail_id} within {timeout_s:g} s") from None
        finally:
            self._pending.pop(mail_id, None)
            self._sent.pop(mail_id, None)
        return self._open_reply(reply_mail, to, mail_id, model)

    def try_resolve(self, envelope: Envelope, delivery: Delivery) -> bool:
        """Hand a mail to the request that waits for it. Return False if no request does, nor got it by a search."""
        future = self._pending.get(envelope.correlation) if envelope.correlation else None
        if future is None:
            return (delivery.seq, envelope.mail_id) in self._found
        if not future.done():
            message = delivery.message
            future.set_result(Unread(delivery.seq, delivery.stored_at, envelope, message.headers, message.data))
        return True

    async def _search_all(self) -> None:
        """Search the inbox once a second as long as requests are pending."""
        await asyncio.sleep(SEARCH_EVERY_S)
        while self._pending:
            if self._sent and self._is_window_full():
                try:
                    await self._search()
                except AIQueueError as error:
                    log.info("agent %s: could not search for replies, retrying: %s", self._name, error)
                except Exception:
                    log.exception("agent %s: could not search for replies, retrying", self._name)
            await asyncio.sleep(SEARCH_EVERY_S)
        self._searched_seq = 0

    async def _search(self) -> None:
        """Read the inbox from where the last search ended. Hand replies to their requests and delete them.

        A reply is stored after its request, so a search never has to read a mail again.
        """
        inbox = subjects.inbox(self._inboxes.family.name, self._tenant, self._name)
        async for mail in self._inboxes.read_all(inbox, after=max(self._searched_seq, min(self._sent.values()))):
            self._searched_seq = mail.seq
            future = self._pending.get(mail.envelope.correlation) if mail.envelope.correlation else None
            if future is None or future.done():
                continue
            future.set_result(mail)
            if len(self._found) >= FOUND_MAX:
                del self._found[next(iter(self._found))]
            self._found[mail.seq, mail.envelope.mail_id] = None  # delivered by now, or if the deletion fails
            await self._inboxes.connection.delete(self._inboxes.family.stream, mail.seq)

    def close(self, error: Unavailable) -> None:
        """End all waiting requests with an error, because no reply can arrive here any more."""
        if self._search_task is not None:
            self._search_task.cancel()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)

    def _open_reply(self, reply_mail: Unread, to: str, mail_id: str, model: type[M] | None) -> Mail[Any]:
        """Return the mail in a reply. Raises MailBounced, DecodeError."""
        family = self._inboxes.family
        seq, stored_at, envelope, mail_headers, body = reply_mail
        raw = RawJob(family, envelope.tenant, self._name, seq, stored_at, mail_headers, body)
        decoded = attempt.decode_body(raw)
        if decoded.data is None:
            raise DecodeError(f"the reply of {to} to {mail_id}: {decoded.problem}")
        if decoded.kind == BOUNCE:
            bounce = parse_message(Bounce, decoded.data)
            raise MailBounced(mail_id, to=to, reason=bounce.reason, error=bounce.error)
        if model is not None and decoded.kind != model.aiq_kind:
            raise DecodeError(f"the reply of {to} to {mail_id} is a {decoded.kind}, not a {model.aiq_kind}")
        message = parse_message(model or untyped(decoded.kind, family.name), decoded.data)
        return Mail(
            message, envelope, to=self._name, attempt=1, mail_headers=mail_headers,
            reply_sender=self._reply_sender,
        )  # fmt: skip


def envelope_of(delivery: Delivery, family: Family) -> Envelope:
    """Return the envelope of a delivered mail."""
    message = delivery.message
    return parse_envelope(
        message.subject, delivery.seq, delivery.stored_at, message.headers, default_kind=family.default_kind
    )


def raw_job_of(delivery: Delivery, family: Family, envelope: Envelope, name: str) -> RawJob:
    """Return a delivered mail in the form that `attempt.decode_body` takes. `name` is the agent's."""
    message = delivery.message
    return RawJob(family, envelope.tenant, name, delivery.seq, delivery.stored_at, message.headers, message.data)
