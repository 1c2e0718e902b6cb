"""Requests of an agent that wait for their replies. Replies arrive in the agent's own inbox, like all mail."""

from __future__ import annotations

import asyncio
from typing import Any

from .. import attempt, subjects
from ..attempt import RawJob
from ..errors import BadInput, DecodeError, MailBounced, ReplyTimeout, Unavailable
from ..job import M, Message, untyped
from ..lanes import Delivery
from ..mailbox import BOUNCE, Bounce, Envelope, Inboxes, Mail, ReplySender, parse_envelope
from ..payload import parse_message
from ..topology import Family
from ..units import Duration, parse_duration

PENDING_MAX = 10_000


class ReplyWaiter:
    """The requests of one agent that have no reply yet, by the id of their mail."""

    def __init__(self, name: str, tenant: str, inboxes: Inboxes, reply_sender: ReplySender) -> None:
        self._name = name
        self._tenant = tenant
        self._inboxes = inboxes
        self._reply_sender = reply_sender
        self._pending: dict[str, asyncio.Future[Delivery]] = {}

    async def request(
        self, message: Message, to: str, model: type[M] | None, conversation: str | None, timeout: Duration
    ) -> Mail[Any]:
        """Send a mail and wait for its reply; see `Agent.request`."""
        timeout_s = parse_duration("timeout", timeout)
        if len(self._pending) >= PENDING_MAX:
            raise BadInput(f"{PENDING_MAX:,} requests wait for a reply already: let some of them end first")
        mail_id = subjects.new_id()
        future = self._pending[mail_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await self._inboxes.send(
                    message, tenant=self._tenant, to=to, sender=self._name, conversation=conversation,
                    expires=timeout_s, unique=mail_id, timeout=timeout_s,
                )  # fmt: skip
                delivery = await future
        except TimeoutError:
            if not limit.expired():
                raise
            raise ReplyTimeout(f"agent {to} did not reply to {mail_id} within {timeout_s:g} s") from None
        finally:
            self._pending.pop(mail_id, None)
        return self._open_reply(delivery, to, mail_id, model)

    def try_resolve(self, envelope: Envelope, delivery: Delivery) -> bool:
        """Hand a mail to the request that waits for it. Return False if no request does."""
        future = self._pending.get(envelope.correlation) if envelope.correlation else None
        if future is None:
            return False
        if not future.done():
            future.set_result(delivery)
        return True

    def fail_all(self, error: Unavailable) -> None:
        """End all waiting requests with an error, because no reply can arrive here any more."""
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error)

    def _open_reply(self, delivery: Delivery, to: str, mail_id: str, model: type[M] | None) -> Mail[Any]:
        """Return the mail in a reply. Raises MailBounced, DecodeError."""
        family = self._inboxes.family
        envelope = envelope_of(delivery, family)
        decoded = attempt.decode_body(raw_job_of(delivery, family, envelope, self._name))
        if decoded.data is None:
            raise DecodeError(f"the reply of {to} to {mail_id}: {decoded.problem}")
        if decoded.kind == BOUNCE:
            bounce = parse_message(Bounce, decoded.data)
            raise MailBounced(mail_id, to=to, reason=bounce.reason, error=bounce.error)
        if model is not None and decoded.kind != model.aiq_kind:
            raise DecodeError(f"the reply of {to} to {mail_id} is a {decoded.kind}, not a {model.aiq_kind}")
        message = parse_message(model or untyped(decoded.kind, family.name), decoded.data)
        return Mail(
            message, envelope, to=self._name, attempt=1, mail_headers=delivery.message.headers,
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
