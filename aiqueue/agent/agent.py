"""What a user declares of an agent: who it is, and what it does with its mail."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar, overload

from .. import subjects
from ..attempt import Handler, Policies
from ..backoff import Backoff
from ..client import Client
from ..errors import AIQueueError, BadInput
from ..job import M, Message
from ..mailbox import Bounce, Mail, Sent
from ..units import seconds
from ..worker import check_policies
from .inbox_worker import InboxWorker, Terms
from .session import AgentSession

log = logging.getLogger("aiqueue.agent")

R = TypeVar("R")
CONCURRENCY_MAX = 1_000

__all__ = ["Agent", "Bounce", "Mail"]


class _Register(Generic[M]):
    """What `Agent.handle` returns: a decorator that takes only functions of the right mail."""

    def __init__(self, add: Callable[[Callable[[Mail[M]], Any]], None]) -> None:
        self._add = add

    def __call__(self, function: Callable[[Mail[M]], R]) -> Callable[[Mail[M]], R]:
        self._add(function)
        return function


class Agent:
    """An agent: a name, an inbox, and handlers for its mail.

    `concurrency` (1 to 1,000, default 8) is how many conversations are handled at once; the mails of one are handled
    one by one, in order. `capabilities` and `description` go on its card, beside the kinds that it handles.
    `drain_timeout` (default "30s") bounds the finish of running handlers when it is told to stop. Raises BadInput.
    """

    def __init__(
        self,
        name: str,
        *,
        tenant: str,
        concurrency: int = 8,
        capabilities: Sequence[str] = (),
        description: str = "",
        drain_timeout: str | float = "30s",
    ) -> None:
        if isinstance(concurrency, bool) or not 1 <= concurrency <= CONCURRENCY_MAX:
            raise BadInput(f"concurrency must be from 1 to {CONCURRENCY_MAX:,}, not {concurrency!r}")
        if isinstance(capabilities, str):
            raise BadInput("capabilities is a list of words")
        self.name = subjects.token("agent", name)
        self.tenant = subjects.token("tenant", tenant)
        self.concurrency = concurrency
        self.capabilities = tuple(capabilities)
        self.description = description
        self.drain_timeout_s = seconds(drain_timeout)
        self._handlers: dict[str, Handler] = {}
        self._desk: InboxWorker | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of message that it handles."""
        return tuple(self._handlers)

    def handle(
        self,
        model: type[M],
        *,
        retry: Backoff | None = None,
        timeout: str | float | None = "10m",
        on: Policies | None = None,
    ) -> _Register[M]:
        """Register a function for a kind of message: a decorator.

        The function takes one ``Mail[model]``; an async one runs on the event loop, a plain one in a thread (which
        cannot send). When it returns, the mail is acknowledged. `retry` (default ``Backoff()``: 5 attempts), `timeout`
        and `on` are those of `Worker.handle`; a mail that is tried again holds its conversation up until it is
        handled or given up, and no other one. ``Retry`` and ``Reject`` may be raised. Register `Bounce` to hear of
        mail that came back. Raises BadInput for a kind that has a handler already.
        """
        policies = check_policies(on or {})
        timeout_s = None if timeout is None else seconds(timeout)
        if timeout_s == 0:
            raise BadInput("timeout must be above 0; None is no timeout")

        def add(function: Callable[[Mail[M]], Any]) -> None:
            if model.aiq_kind in self._handlers:
                raise BadInput(f"kind {model.aiq_kind!r} has a handler already")
            call: Callable[..., Any] = function
            self._handlers[model.aiq_kind] = Handler(
                model, call, _is_async(function), retry or Backoff(), timeout_s, False, on=policies
            )

        return _Register(add)

    async def send(
        self,
        message: Message,
        *,
        to: str,
        conversation: str | None = None,
        expires: str | float | None = None,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: str | float = 30.0,
    ) -> Sent:
        """Store a mail in another agent's inbox, whether that runs or not; see `Inboxes.send`. What becomes of it in
        the end is told by a bounce where it is nothing.

        Raises BadInput (InvalidToken, EncodeError, TooLarge), InboxFull, Unavailable, NotFound.
        """
        told = {
            "conversation": conversation,
            "expires": expires,
            "unique": unique,
            "extra": headers,
            "timeout": timeout,
        }
        return await self._at_work().send(message, to, told)

    async def broadcast(
        self,
        message: Message,
        *,
        conversation: str | None = None,
        expires: str | float | None = None,
        timeout: str | float = 30.0,
    ) -> dict[str, Sent | AIQueueError]:
        """Store a mail in the inbox of every other agent of the tenant's roster, those that are offline too, and tell
        for each what became of it.
        """
        return await self._at_work().inboxes.broadcast(
            message, tenant=self.tenant, sender=self.name, conversation=conversation, expires=expires, timeout=timeout
        )

    @overload
    async def request(
        self, message: Message, *, to: str, reply: type[M], conversation: str | None = None, timeout: str | float = 30.0
    ) -> Mail[M]: ...
    @overload
    async def request(
        self, message: Message, *, to: str, conversation: str | None = None, timeout: str | float = 30.0
    ) -> Mail[Message]: ...
    async def request(
        self,
        message: Message,
        *,
        to: str,
        reply: type[M] | None = None,
        conversation: str | None = None,
        timeout: str | float = 30.0,
    ) -> Mail[Any]:
        """Send a mail and await its reply, which comes to this agent's own inbox. `reply` is its model; without one
        the message has whatever fields it came with. The mail expires with the `timeout`.

        It passes this agent's conversations by, so a handler may ask while its own conversation waits for it.

        Raises ReplyTimeout, MailBounced (the other agent's inbox sent it back), DecodeError (the reply is no `reply`),
        Unavailable (this process stands by: another one gets the replies), and as `send`.
        """
        return await self._at_work().ask(message, to, reply, conversation, timeout)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[InboxWorker]:
        """Serve the inbox beside other code on an open client; leaving the block finishes what has begun. Where
        another process serves it already, this one stands by and takes over when that ends (`InboxWorker.active`).

        Raises BadInput, NotFound where a stream is missing, Unavailable.
        """
        if self._desk is not None:
            raise BadInput(f"agent {self.name} runs already")
        terms = Terms(
            self.name, self.tenant, dict(self._handlers), self.concurrency, self.drain_timeout_s, self.capabilities,
            self.description,
        )  # fmt: skip
        desk = self._desk = InboxWorker(terms, client.connection, client.inboxes, client.dead)
        room = None
        try:
            await client.inboxes.create(
                self.name, tenant=self.tenant, kinds=sorted(self._handlers), capabilities=self.capabilities,
                description=self.description,
            )  # fmt: skip
            room = AgentSession.of(client)
            await room.join(desk)
            yield desk
        finally:
            if room is not None:
                await room.leave(desk)
            self._desk = None

    def _at_work(self) -> InboxWorker:
        if self._desk is None:
            raise BadInput(f"agent {self.name} does not run: `async with agent.running(client):`")
        return self._desk


class AgentGroup:
    """Several agents that are run together, as one service: one client, and one word on how they are."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = tuple(agents)
        self.name = f"{len(self.agents)} agents"

    @property
    def drain_timeout_s(self) -> float:
        return max(each.drain_timeout_s for each in self.agents)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[Desks]:
        """Run them all; leaving the block has them finish side by side. Raises as `Agent.running`."""
        entered: list[Any] = []
        desks: list[InboxWorker] = []
        try:
            for each in self.agents:
                context = each.running(client)
                desks.append(await context.__aenter__())
                entered.append(context)
            yield Desks(self.name, desks)
        finally:
            ended = await asyncio.gather(
                *(each.__aexit__(None, None, None) for each in entered), return_exceptions=True
            )
            for error in ended:
                if isinstance(error, BaseException):
                    raise error


class Desks:
    """The desks of a troupe, taken together: see `InboxWorker`."""

    def __init__(self, name: str, desks: Sequence[InboxWorker]) -> None:
        self._name = name
        self._desks = desks

    @property
    def running(self) -> int:
        return sum(each.running for each in self._desks)

    @property
    def done(self) -> int:
        return sum(each.done for each in self._desks)

    @property
    def clean(self) -> bool:
        return all(each.clean for each in self._desks)

    def vitals(self) -> dict[str, Any]:
        """How they are, as plain data: one of them, with the sums of all."""
        told = [each.vitals() for each in self._desks]
        sums = {key: sum(each[key] for each in told) for key in ("slots", "running", "waiting", "done", "lanes")}
        heard = max((each["last_delivery"] for each in told if each["last_delivery"]), default=None)
        standby = all(each["standby"] for each in told)
        return {**told[0], **sums, "worker": self._name, "last_delivery": heard, "standby": standby}


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives something to await (an object whose __call__ is async, too)."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
