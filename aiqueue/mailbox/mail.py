"""Mail between agents: what a handler gets, and what the headers of a stored one say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol

from .. import headers, subjects
from ..job import M_co, Message

FAMILY = "agent.message"
BOUNCE = "agent.bounce"


class Bounce(Message, kind=BOUNCE, family=FAMILY):
    """What the sender of a mail gets when it could not be handled. `reason` is one word: ``expired``, ``inbox_full``,
    ``no_such_agent``, ``unknown_kind``, ``undecodable``, ``invalid``, ``rejected``, ``attempts``, ``killed_worker``;
    `error` is a line. The others say which mail it was.
    """

    reason: str
    error: str
    mail_id: str
    mail_kind: str
    target: str
    conversation: str
    correlation: str | None = None


class Envelope(NamedTuple):
    """What the headers of a stored mail say. Times are seconds since the epoch. `sender` is None where nobody, or
    no agent id, is named: a bounce could not reach it.
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
        return self.deadline is not None and now >= self.deadline


def envelope(subject: str, seq: int, stored_at: float, told: Mapping[str, str], *, default_kind: str) -> Envelope:
    """The envelope of a stored mail. On the bare subject the target is the header's, in an inbox the subject's."""
    parts = subject.split(".")
    found = told.get(headers.JOB_ID)
    mail_id = subjects.foreign_id(found) if found else f"s{seq}-{int(stored_at * 1e6):x}"
    sender = told.get(headers.SOURCE, "")
    deadline = headers.number(told.get(headers.DEADLINE, ""))
    return Envelope(
        mail_id,
        told.get(headers.KIND, "")[:128] or default_kind,
        parts[3],
        parts[4] if len(parts) > 4 else told.get(headers.TARGET),
        sender if subjects.TOKEN.fullmatch(sender) else None,
        told.get(headers.CONVERSATION) or mail_id,
        told.get(headers.CORRELATION),
        deadline / 1000 if deadline else None,
        headers.decimal(told.get(headers.ENQUEUED, "")) or stored_at,
    )


class Correspondent(Protocol):
    """Whom a mail talks to: the inbox that it came to."""

    async def answer(self, mail: Mail[Any], message: Message, expires: str | float | None) -> str: ...


class Mail(Generic[M_co]):
    """One message from one agent to another, as a handler gets it.

    `sender` is the agent that sent it (None: it did not say). `conversation` holds mails together; those of one are
    handled one after the other. `correlation` is the id of the mail that this one answers, None if it answers none.
    `attempt` counts from 1. `sent_at` and `deadline` are seconds since the epoch.
    """

    __slots__ = (
        "_home", "attempt", "conversation", "correlation", "deadline", "headers", "id", "kind", "message", "sender",
        "sent_at", "tenant", "to",
    )  # fmt: skip

    def __init__(
        self, message: M_co, found: Envelope, *, to: str, attempt: int, told: Mapping[str, str], home: Correspondent
    ) -> None:
        self.message: M_co = message
        self.id = found.mail_id
        self.kind = found.kind
        self.tenant = found.tenant
        self.to = to
        self.sender = found.sender
        self.conversation = found.conversation
        self.correlation = found.correlation
        self.deadline = found.deadline
        self.sent_at = found.sent_at
        self.attempt = attempt
        self.headers = told
        self._home = home

    def __repr__(self) -> str:
        return f"<Mail {self.id} {self.kind} {self.sender or '?'} -> {self.to} attempt {self.attempt}>"

    async def reply(self, message: Message, *, expires: str | float | None = None) -> str:
        """Send an answer to the sender's inbox, in this conversation, and return its id. A `request` that waits for it
        gets it, else a handler there. Raises BadInput where there is no sender, and as `Agent.send`.
        """
        return await self._home.answer(self, message, expires)
