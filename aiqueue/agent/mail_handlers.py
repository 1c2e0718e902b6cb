"""Calls the handler of a mail: decodes the mail, finds its handler, and runs the handler within its timeout."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import attempt, codec, headers, secret_paths
from ..attempt import PLAIN_TYPES, DecodedJob, Handler, Limits, Outcome, RawJob, Refused, Returned, Threads
from ..errors import DecodeError
from ..job import ANY_KIND, Message, RawMessage
from ..lanes import Delivery
from ..mailbox import BOUNCE, Envelope, Mail, ReplySender
from ..payload import parse_message
from ..topology import Family
from .reply_waiter import raw_job_of

log = logging.getLogger(__name__)


class Handled(NamedTuple):
    """What became of one call. `handler`: that of the mail's kind, or None. `secrets`: the mail's secret fields."""

    outcome: Outcome
    handler: Handler | None
    secrets: str


class MailHandlers:
    """The handlers of one agent."""

    def __init__(self, agent: str, handlers: Mapping[str, Handler], family: Family, reply_sender: ReplySender) -> None:
        self._agent = agent
        self._handlers = handlers
        self._family = family
        self._reply_sender = reply_sender
        self._base_context = contextvars.copy_context()  # every mail gets a copy
        self._limits = Limits()
        self._threads = Threads(f"aiqueue-agent-{agent}")

    def close(self) -> None:
        """Let idle threads end."""
        self._threads.close()

    async def call(self, delivery: Delivery, envelope: Envelope, number: int) -> Handled:
        """Call the handler for attempt `number` at a mail. What it returns repeats no secret of the mail.

        Refused without a call: the mail cannot be decoded, or has no handler here. Returned without a call: nobody has
        to handle the mail. Raises CancelledError if this task is cancelled.
        """
        raw = raw_job_of(delivery, self._family, envelope, self._agent)
        decoded = attempt.decode_body(raw)
        handler = self._find_handler(decoded)
        outcome = await self._call_decoded(raw, decoded, handler, envelope, number)
        if decoded.data is None:
            secrets = self.secrets_of_undecoded(raw.headers)
        else:
            secrets = attempt.secrets_of_body(decoded, raw.headers, handler)
        return Handled(attempt.without_secrets(outcome, secrets, decoded.data, raw.body), handler, secrets)

    def _find_handler(self, decoded: DecodedJob) -> Handler | None:
        """Return the handler of a mail: that of its kind, else that of every kind, which gets no bounces.

        The latter also goes first for a schema version that is not accepted.
        """
        typed = self._handlers.get(decoded.kind)
        accepts = codec.is_accepted_version(decoded.version, self._family.schema_versions)
        if (typed is not None and accepts) or decoded.kind == BOUNCE:
            return typed
        return self._handlers.get(ANY_KIND, typed)

    def secrets_of_undecoded(self, mail_headers: Mapping[str, str]) -> str:
        """Return which fields of a mail may be secret, without decoding it. Without a kind it may be of any kind."""
        kind = mail_headers.get(headers.KIND)
        handlers = [self._handlers.get(kind)] if kind else [None, *self._handlers.values()]
        found = secret_paths.merge(*(attempt.secrets_of(mail_headers, each) for each in handlers))
        return secret_paths.within_data(found) if found and not kind else found

    async def _call_decoded(
        self, raw: RawJob, decoded: DecodedJob, handler: Handler | None, envelope: Envelope, number: int
    ) -> Outcome:
        if handler is not None and handler.any_of:
            raw_message = attempt.make_raw_message(raw, decoded)
            return await self._run(handler, self._make_mail(raw_message, envelope, number, raw))
        if decoded.data is None:
            return Refused("undecodable", decoded.problem)
        if handler is None:
            return self._refuse_kind(decoded, envelope, broadcast=headers.BROADCAST in raw.headers)
        if not codec.is_accepted_version(decoded.version, raw.family.schema_versions):
            accepted = ", ".join(raw.family.schema_versions)
            return Refused("unknown_kind", f"schema version {decoded.version!r} is none of {accepted}")
        try:
            message = parse_message(handler.model, decoded.data)
        except DecodeError as error:
            return Refused("invalid", error.reason)
        return await self._run(handler, self._make_mail(message, envelope, number, raw))

    def _make_mail(self, message: Message | RawMessage, envelope: Envelope, number: int, raw: RawJob) -> Mail[Any]:
        return Mail(
            message, envelope, to=self._agent, attempt=number, mail_headers=raw.headers,
            reply_sender=self._reply_sender,
        )  # fmt: skip

    def _refuse_kind(self, decoded: DecodedJob, envelope: Envelope, *, broadcast: bool) -> Outcome:
        """Return why a mail whose kind has no handler is refused; Returned if it is logged or ignored instead."""
        if decoded.kind == BOUNCE:
            log.warning("agent %s got a bounce and has no handler for it: %s", self._agent, decoded.data)
            return Returned(None)
        if broadcast:
            return Returned(None)
        if envelope.correlation is not None:
            return Refused("expired", f"no request of {self._agent} waits for this reply any more")
        known = ", ".join(sorted(self._handlers)) or "none"
        return Refused("unknown_kind", f"agent {self._agent} has no handler for {decoded.kind!r}; its kinds: {known}")

    async def _run(self, handler: Handler, mail: Mail[Any]) -> Outcome:
        """Run a handler within its timeout, in a task of its own. Raises CancelledError if this task is cancelled."""
        limit: list[attempt.Limit] = []

        def start_limit(task: asyncio.Task[None]) -> None:
            if handler.timeout_s is not None:
                limit.append(self._limits.start_task(task, handler.timeout_s))

        this_task = asyncio.current_task()
        assert this_task is not None
        cancelled_before = this_task.cancelling()
        try:
            outcome = await attempt.run_in_task(self._call(handler, mail), self._base_context.copy(), start_limit)
        finally:
            for each in limit:
                self._limits.stop(each)
        is_late = any(each.expired for each in limit)
        if this_task.cancelling() > cancelled_before and (is_late or not isinstance(outcome, Returned)):
            raise asyncio.CancelledError
        return attempt.timeout_outcome(handler.timeout_s) if is_late else outcome

    async def _call(self, handler: Handler, mail: Mail[Any]) -> Outcome:
        call: Any = handler.call
        try:
            value = await call(mail) if handler.is_async else await self._threads.run(lambda: call(mail))
            return Returned(value) if type(value) in PLAIN_TYPES else await attempt.outcome_of_value(value)
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            return attempt.outcome_of_error(error, handler.on)
