"""Requests of an agent that await their replies, which come to its own inbox like all mail."""

from __future__ import annotations

import asyncio
from typing import Any

from .. import attempt, subjects
from ..attempt import RawJob
from ..enqueue import parse_duration
from ..errors import BadInput, DecodeError, MailBounced, ReplyTimeout, Unavailable
from ..job import M, Message, parse_message, untyped
from ..lanes import Delivery
from ..mailbox import BOUNCE, Bounce, Correspondent, Envelope, Inboxes, Mail, envelope
from ..topology import Family

ASKED_MAX = 10_000


class ReplyWaiter:
    """What one agent has asked and not been told."""

    def __init__(self, name: str, tenant: str, inboxes: Inboxes, home: Correspondent) -> None:
        self._name = name
        self._tenant = tenant
        self._inboxes = inboxes
        self._home = home
        self._asked: dict[str, asyncio.Future[Delivery]] = {}

    async def ask(
        self, message: Message, to: str, model: type[M] | None, conversation: str | None, timeout: str | float
    ) -> Mail[Any]:
        """Send a mail and await its reply; see `Agent.request`."""
        timeout_s = parse_duration("timeout", timeout)
        if len(self._asked) >= ASKED_MAX:
            raise BadInput(f"{ASKED_MAX:,} requests await a reply already: await some of them first")
        mail_id = subjects.new_id()
        future = self._asked[mail_id] = asyncio.get_running_loop().create_future()
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
            self._asked.pop(mail_id, None)
        return self._reply(delivery, to, mail_id, model)

    def take(self, found: Envelope, delivery: Delivery) -> bool:
        """Whether this is a reply that is awaited: then who asked has it now."""
        future = self._asked.get(found.correlation) if found.correlation else None
        if future is None:
            return False
        if not future.done():
            future.set_result(delivery)
        return True

    def fail(self, error: Unavailable) -> None:
        """No reply will come here any more."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)

    def _reply(self, delivery: Delivery, to: str, mail_id: str, model: type[M] | None) -> Mail[Any]:
        family = self._inboxes.family
        found = envelope_of(delivery, family)
        contents = attempt.decode_body(parcel_of(delivery, family, found, self._name))
        if contents.data is None:
            raise DecodeError(f"the reply of {to} to {mail_id}: {contents.problem}")
        if contents.kind == BOUNCE:
            said = parse_message(Bounce, contents.data)
            raise MailBounced(mail_id, to=to, reason=said.reason, error=said.error)
        if model is not None and contents.kind != model.aiq_kind:
            raise DecodeError(f"the reply of {to} to {mail_id} is a {contents.kind}, not a {model.aiq_kind}")
        message = parse_message(model or untyped(contents.kind, family.name), contents.data)
        told = delivery.message.headers
        return Mail(message, found, to=self._name, attempt=1, told=told, home=self._home)


def envelope_of(delivery: Delivery, family: Family) -> Envelope:
    """The envelope of a mail as it came in."""
    message = delivery.message
    return envelope(
        message.subject, delivery.seq, delivery.stored_at, message.headers, default_kind=family.default_kind
    )


def parcel_of(delivery: Delivery, family: Family, found: Envelope, name: str) -> RawJob:
    """The same as what reads bodies takes."""
    message = delivery.message
    return RawJob(family, found.tenant, name, delivery.seq, delivery.stored_at, message.headers, message.data)
