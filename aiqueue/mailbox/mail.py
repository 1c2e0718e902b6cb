"""Mail between agents: what a handler gets, and what the headers of a stored mail contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol

from .. import headers, subjects
from ..job import M_co, Message
from ..units import Deadline

FAMILY = "agent.message"
BOUNCE = "agent.bounce"


class Bounce(Message, kind=BOUNCE, family=FAMILY):
    """The message that a sender gets when its mail could not be handled.

    `reason` is one word: ``expired``, ``inbox_full``, ``no_such_agent``, ``unknown_kind``, ``undecodable``,
    ``invalid``, ``rejected``, ``attempts``, ``killed_worker``. `error` is one line. The other fields identify the mail.
    """

    reason: str
    error: str
    mail_id: str
    """Id of the mail that could not be handled."""
    mail_kind: str
    """Kind of the mail's message."""
    target: str
    """Agent that the mail was sent to."""
    conversation: str
    """Conversation that the mail belongs to."""
    correlation: str | None = None
    """Id of the mail that it replies to; None: it is no reply."""


class Envelope(NamedTuple):
    """What the headers of a stored mail contain. Times are seconds since the epoch.

    `sender` is None if the mail names no sender, or one that is no agent id: then a bounce cannot be delivered.
    """

    mail_id: str
    kind: str
    tenant: str
    target: str | None
    sender: str | None
    conversation: str
    correlation: str | None
    deadline: float | None
    sent_at: float

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and now >= self.deadline


def parse_envelope(
    subject: str, seq: int, stored_at: float, mail_headers: Mapping[str, str], *, default_kind: str
) -> Envelope:
    """Return the envelope of a stored mail. In an inbox the subject names the target, on the bare subject a header."""
    tenant, agent = subjects.parse_mail(subject)
    given_id = mail_headers.get(headers.JOB_ID)
    mail_id = subjects.foreign_id(given_id) if given_id else f"s{seq}-{int(stored_at * 1e6):x}"
    sender = mail_headers.get(headers.SOURCE, "")
    return Envelope(
        mail_id,
        mail_headers.get(headers.KIND, "")[:128] or default_kind,
        tenant,
        mail_headers.get(headers.TARGET) if agent is None else agent,
        sender if subjects.TOKEN.fullmatch(sender) else None,
        mail_headers.get(headers.CONVERSATION) or mail_id,
        mail_headers.get(headers.CORRELATION),
        headers.milliseconds(mail_headers.get(headers.DEADLINE, "")),
        headers.decimal(mail_headers.get(headers.ENQUEUED, "")) or stored_at,
    )


class ReplySender(Protocol):
    """What sends the reply to a mail: the inbox worker that handles the mail."""

    async def send_reply(self, mail: Mail[Any], message: Message, expires: Deadline | None) -> str: ...


class Mail(Generic[M_co]):
    """One message from one agent to another, as a handler gets it.

    - `message`: of the handler's class, and a `RawMessage` in a handler of every kind.
    - `sender`: the agent that sent the mail. None: the mail names no sender.
    - `conversation`: mails of one conversation are handled one at a time, in order.
    - `correlation`: the id of the mail that this mail answers. None: it is no reply.
    - `attempt`: counts from 1.
    - `sent_at` and `deadline`: seconds since the epoch.
    """

    __slots__ = (
        "_reply_sender", "attempt", "conversation", "correlation", "deadline", "headers", "id", "is_abandoned", "kind",
        "message", "sender", "sent_at", "tenant", "to",
    )  # fmt: skip

    def __init__(
        self,
        message: M_co,
        envelope: Envelope,
        *,
        to: str,
        attempt: int,
        mail_headers: Mapping[str, str],
        reply_sender: ReplySender,
    ) -> None:
        self.message: M_co = message
        self.id = envelope.mail_id
        self.kind = message.aiq_kind  # the envelope does not know the kind that stands in a body
        self.tenant = envelope.tenant
        self.to = to
        self.sender = envelope.sender
        self.conversation = envelope.conversation
        self.correlation = envelope.correlation
        self.deadline = envelope.deadline
        self.sent_at = envelope.sent_at
        self.attempt = attempt
        self.headers = mail_headers
        self._reply_sender = reply_sender
        self.is_abandoned = False  # as `Job.is_abandoned`

    def __repr__(self) -> str:
        return f"<Mail {self.id} {self.kind} {self.sender or '?'} -> {self.to} attempt {self.attempt}>"

    async def reply(self, message: Message, *, expires: Deadline | None = None) -> str:
        """Send a reply to the sender's inbox, in this conversation, and return the reply's id.

        If a `request` there waits for the reply, the request gets it; otherwise a handler does.
        Raises BadInput if the mail names no sender, and what `Agent.send` raises.
        """
        return await self._reply_sender.send_reply(self, message, expires)
