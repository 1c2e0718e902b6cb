"""Calls the handler of a mail: decodes the mail, finds its handler, and runs the handler within its timeout."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from typing import Any

from .. import attempt, codec, headers
from ..attempt import (
    PLAIN_TYPES,
    DecodedJob,
    Handler,
    Limit,
    Limits,
    Outcome,
    Raised,
    RawJob,
    Refused,
    Returned,
    Threads,
)
from ..codec import secret_paths
from ..errors import DecodeError
from ..job import ANY_KIND, Message, RawMessage
from ..lanes import Delivery
from ..logs import running_job
from ..mailbox import BOUNCE, Envelope, Mail, ReplySender
from ..payload import parse_message
from ..topology import Family
from ..tracing import TRACEPARENT, TRACESTATE, Tracing, bounded_all, is_sampled, names, read_parent
from .reply_waiter import raw_job_of

log = logging.getLogger(__name__)


class MailCall:
    """One call of a mail's handler.

    - `task` runs the handler. None: nothing is called, and `outcome` says what becomes of the mail.
    - `outcome`: what the handler has ended with; None until then.
    - `secrets`: the secret fields of the mail.
    - `mail`: what the handler is called with.
    """

    __slots__ = ("decoded", "handler", "limit", "mail", "outcome", "raw", "secrets", "task")

    def __init__(self, raw: RawJob, decoded: DecodedJob, handler: Handler | None, secrets: str) -> None:
        self.raw = raw
        self.decoded = decoded
        self.handler = handler
        self.secrets = secrets
        self.outcome: Outcome | None = None
        self.task: asyncio.Task[None] | None = None
        self.limit: Limit | None = None
        self.mail: Mail[Any] | None = None

    @property
    def outcome_within_limit(self) -> Outcome | None:
        """The outcome, which is a timeout if that was over by then."""
        if self.limit is not None and self.limit.expired and self.handler is not None:
            return attempt.timeout_outcome(self.handler.timeout_s)
        return self.outcome


class MailHandlers:
    """The handlers of one agent."""

    def __init__(
        self, agent: str, handlers: Mapping[str, Handler], family: Family, reply_sender: ReplySender,
        tracing: Tracing | None,
    ) -> None:  # fmt: skip
        self._tracing = tracing
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

    def start(self, delivery: Delivery, envelope: Envelope, number: int) -> MailCall:
        """Call the handler for attempt `number` at a mail, in a task of its own with a copy of the context variables.

        Nothing is called for a mail that cannot be decoded, has no handler here, or that nobody has to handle.
        """
        raw = raw_job_of(delivery, self._family, envelope, self._agent)
        decoded = attempt.decode_body(raw)
        handler = self._find_handler(decoded)
        if decoded.data is None:
            secrets = self.secrets_of_undecoded(raw.headers)
        else:
            secrets = attempt.secrets_of_body(decoded, raw.headers, handler)
        call = MailCall(raw, decoded, handler, secrets)
        message = self._message_of(raw, decoded, handler, envelope)
        if handler is None or not isinstance(message, Message | RawMessage):
            assert not isinstance(message, Message | RawMessage)
            call.outcome = self._redact(call, message)
            return call
        mail: Mail[Any] = Mail(
            message, envelope, to=self._agent, attempt=number, mail_headers=raw.headers,
            reply_sender=self._reply_sender,
        )  # fmt: skip
        call.mail = mail
        run = self._run if self._tracing is None or not _is_traced(self._tracing, mail) else self._run_traced
        context = self._base_context.copy()
        call.task = asyncio.get_running_loop().create_task(run(call, handler, mail), context=context)
        if handler.timeout_s is not None:
            call.limit = self._limits.start_task(call.task, handler.timeout_s)
        return call

    def end(self, call: MailCall) -> Outcome:
        """Return the outcome of a call whose task has ended. What this returns repeats no secret of the mail."""
        outcome = call.outcome_within_limit
        if call.mail is not None:
            call.mail.is_abandoned = True  # where its function is still in a thread
        if call.limit is not None:
            self._limits.stop(call.limit)
        if outcome is None:  # cancelled before its first step
            outcome = attempt.outcome_of_error(asyncio.CancelledError(), {})
        return self._redact(call, outcome)

    def _redact(self, call: MailCall, outcome: Outcome) -> Outcome:
        return attempt.without_secrets(outcome, call.secrets, call.decoded.data, call.raw.body)

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

    def _message_of(
        self, raw: RawJob, decoded: DecodedJob, handler: Handler | None, envelope: Envelope
    ) -> Message | RawMessage | Outcome:
        """Return what the handler is called with, or the outcome of a mail that needs no call."""
        if handler is not None and handler.any_of:
            return attempt.make_raw_message(raw, decoded)
        if decoded.data is None:
            return Refused("undecodable", decoded.problem)
        if handler is None:
            return self._refuse_kind(decoded, envelope, broadcast=headers.BROADCAST in raw.headers)
        if not codec.is_accepted_version(decoded.version, raw.family.schema_versions):
            accepted = ", ".join(raw.family.schema_versions)
            return Refused("unknown_kind", f"schema version {decoded.version!r} is none of {accepted}")
        try:
            message: Message = parse_message(handler.model, decoded.data)
        except DecodeError as error:
            return Refused("invalid", error.reason)
        return message

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

    async def _run(self, call: MailCall, handler: Handler, mail: Mail[Any]) -> None:
        running_job.set(mail)
        try:
            if handler.is_async:
                value = await handler.call(mail)
            else:
                value = await handler.call_in_thread(mail, self._threads.run)
            plain = type(value) in PLAIN_TYPES
            call.outcome = Returned(value) if plain else await attempt.outcome_of_value(value)
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            call.outcome = attempt.outcome_of_error(error, handler.on)

    async def _run_traced(self, call: MailCall, handler: Handler, mail: Mail[Any]) -> None:
        """As `_run`, with a span around it."""
        tracing = self._tracing
        assert tracing is not None
        started = tracing.start_process(
            names.destination(self._family.name),
            mail.tenant,
            parent=read_parent(headers.find(mail.headers, TRACEPARENT) or ""),
            tracestate=headers.find(mail.headers, TRACESTATE) or "",
            run=f"{self._family.name} {mail.id} {self._agent}",
            attributes=bounded_all({
                names.MESSAGE_ID: mail.id, names.KIND: mail.kind, names.ATTEMPT: mail.attempt,
                names.CONVERSATION_ID: mail.conversation, names.AGENT_NAME: self._agent,
            }),
        )  # fmt: skip
        with started:
            await self._run(call, handler, mail)
            outcome = call.outcome_within_limit
            started.set(names.OUTCOME, "done" if isinstance(outcome, Returned) else type(outcome).__name__.lower())
            if isinstance(outcome, Raised | Refused):
                masked = self._redact(call, outcome)
                assert isinstance(masked, Raised | Refused)
                started.fail(masked.error_type, masked.error)


def _is_traced(tracing: Tracing, mail: Mail[Any]) -> bool:
    """Return whether an attempt at a mail is traced: by its headers, and without any by its id."""
    traceparent = headers.find(mail.headers, TRACEPARENT)
    if traceparent is not None and read_parent(traceparent) is not None:
        return is_sampled(traceparent)
    return tracing.begins_trace(mail.id)
