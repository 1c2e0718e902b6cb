"""What a user declares of an agent: its name, its settings and the handlers of its mail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar, overload

from .. import subjects
from ..attempt import Around, Handler, Policies, is_async_handler, parse_around
from ..client import Client, check_client
from ..errors import AIQueueError, BadInput
from ..job import ANY_KIND, AnyM, M, Message, RawMessage, check_model
from ..mailbox import FAMILY, Mail, Sent
from ..processes import reset_signals_at_fork
from ..units import Backoff, Deadline, Duration, parse_duration, text, texts, whole_number
from ..worker import check_attempt_options
from .inbox_worker import AgentSpec, InboxWorker
from .session import AgentSession

R = TypeVar("R")
C = TypeVar("C", bound=AbstractContextManager[Any] | AbstractAsyncContextManager[Any])
CONCURRENCY_MAX = 1_000


class _MailHandlerDecorator(Generic[AnyM]):
    """The decorator that `Agent.handle` returns. It accepts only functions of the right mail."""

    def __init__(self, add: Callable[[Callable[[Mail[AnyM]], Any]], None]) -> None:
        self._add = add

    def __call__(self, function: Callable[[Mail[AnyM]], R]) -> Callable[[Mail[AnyM]], R]:
        self._add(function)
        return function


class Agent:
    """An agent: a name, an inbox, and handlers for its mail.

    - `concurrency` (1 to 1,000, default 8): how many conversations are handled at once. The mails of one conversation
      are handled one at a time, in order.
    - `capabilities`, `description`: shown on the agent's card, beside the kinds it handles.
    - `drain_timeout` (default "30s"): how long running handlers may continue after the agent is stopped.
    Raises BadInput.
    """

    def __init__(
        self,
        name: str,
        *,
        tenant: str,
        concurrency: int = 8,
        capabilities: Sequence[str] = (),
        description: str = "",
        drain_timeout: Duration = "30s",
    ) -> None:
        self.name = subjects.token("agent", name)
        self.tenant = subjects.token("tenant", tenant)
        self.concurrency = whole_number("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self.capabilities = texts("capabilities", capabilities)
        self.description = text("description", description)
        self.drain_timeout_s = parse_duration("drain_timeout", drain_timeout)
        self._handlers: dict[str, Handler] = {}
        self._arounds: tuple[Around, ...] = ()
        self._inbox_worker: InboxWorker | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of messages that have a handler. ``*`` stands for every kind: see `handle_any`."""
        return tuple(self._handlers)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers that are registered, in the order of their registration."""
        return tuple(self._handlers.values())

    def handle(
        self,
        model: type[M],
        *,
        retry: Backoff | None = None,
        timeout: Duration | None = "10m",
        on: Policies | None = None,
    ) -> _MailHandlerDecorator[M]:
        """Register a function for a kind of message: a decorator.

        The function takes one ``Mail[model]``. An async function runs on the event loop; a plain one runs in a thread
        and cannot send mail. When the function returns, the mail is acknowledged.
        - `retry` (default ``Backoff()``: 5 attempts), `timeout` and `on`: as in `Worker.handle`. The function may raise
          ``Retry`` and ``Reject``.
        - A failed mail blocks its own conversation until it is handled or dead-lettered. Other conversations continue.
        - Register a handler for `Bounce` to receive bounces of sent mail.
        Raises BadInput for a kind that has a handler already, and for an invalid policy.
        """
        check_model("handle", model)
        given = check_attempt_options(retry, timeout, on)

        def add(function: Callable[[Mail[M]], Any]) -> None:
            if model.aiq_kind in self._handlers:
                raise BadInput(f"kind {model.aiq_kind!r} has a handler already")
            call: Callable[..., Any] = function
            self._handlers[model.aiq_kind] = Handler(
                model, call, is_async_handler(function), given.retry, given.timeout_s, False, on=given.on,
                arounds=self._arounds,
            )  # fmt: skip

        return _MailHandlerDecorator(add)

    def handle_any(
        self, *, retry: Backoff | None = None, timeout: Duration | None = "10m", on: Policies | None = None
    ) -> _MailHandlerDecorator[RawMessage]:
        """Register a function for all mail that no other handler of this agent takes: a decorator.

        The function takes one ``Mail[RawMessage]``: the body as it is stored, which no model has checked. It gets
        - mail of every kind that has no handler here, also of no kind; broadcasts too,
        - mail in an envelope of a schema version that is not accepted,
        - mail of such a kind whose body cannot be decoded,
        - replies of such a kind that no `request` waits for; ``mail.correlation`` is set then.
        It gets no bounces: without a handler for `Bounce` they are logged.
        The agent's card lists the kind ``*``. The options are those of `handle`.
        Raises BadInput for a second such function, and for an invalid policy.
        """
        given = check_attempt_options(retry, timeout, on)

        def add(function: Callable[[Mail[RawMessage]], Any]) -> None:
            if ANY_KIND in self._handlers:
                raise BadInput(f"agent {self.name} has a handler for every kind already")
            call: Callable[..., Any] = function
            self._handlers[ANY_KIND] = Handler(
                RawMessage, call, is_async_handler(function), given.retry, given.timeout_s, False, on=given.on,
                any_of=FAMILY, arounds=self._arounds,
            )  # fmt: skip

        return _MailHandlerDecorator(add)

    def around(self, function: Callable[[Mail[Any]], C]) -> Callable[[Mail[Any]], C]:
        """Put a context manager around each call of each handler of this agent: a decorator, as `Worker.around`.

        The function takes one ``Mail``. Replies that a `request` waits for are not inside. Raises BadInput.
        """
        self._arounds = (*self._arounds, parse_around(function, "the mail"))
        for kind, handler in self._handlers.items():
            self._handlers[kind] = replace(handler, arounds=self._arounds)
        return function

    async def send(
        self,
        message: Message,
        *,
        to: str,
        conversation: str | None = None,
        expires: Deadline | None = None,
        unique: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: Duration = 30.0,
    ) -> Sent:
        """Store a mail in another agent's inbox, whether that agent runs or not.

        - `conversation` (default: a new one): mails of one conversation are handled in the order in which they were
          stored.
        - `expires` (a duration from now, such as "5m", or a datetime): a mail that is not handled by then is returned.
        - `unique`: the mail's id, or any other text, of which the id is then a hash. A second mail with this id to the
          same agent is not stored within 2 minutes.

        If the mail cannot be handled, this agent gets a bounce.
        Raises BadInput (InvalidToken, EncodeError, TooLarge), InboxFull, Unavailable, NotFound.
        """
        options = {
            "conversation": conversation,
            "expires": expires,
            "unique": unique,
            "extra": headers,
            "timeout": timeout,
        }
        return await self._running_worker().send(message, to, options)

    async def broadcast(
        self,
        message: Message,
        *,
        conversation: str | None = None,
        expires: Deadline | None = None,
        timeout: Duration = 30.0,
    ) -> dict[str, Sent | AIQueueError]:
        """Store a mail in the inbox of every other agent on the tenant's roster, also of offline agents.

        Return the outcome for each agent. Raises what `send` raises.
        """
        return await self._running_worker().inboxes.broadcast(
            message, tenant=self.tenant, sender=self.name, conversation=conversation, expires=expires, timeout=timeout
        )

    @overload
    async def request(
        self, message: Message, *, to: str, reply: type[M], conversation: str | None = None, timeout: Duration = 30.0
    ) -> Mail[M]: ...
    @overload
    async def request(
        self, message: Message, *, to: str, conversation: str | None = None, timeout: Duration = 30.0
    ) -> Mail[Message]: ...
    async def request(
        self,
        message: Message,
        *,
        to: str,
        reply: type[M] | None = None,
        conversation: str | None = None,
        timeout: Duration = 30.0,
    ) -> Mail[Any]:
        """Send a mail and wait for its reply, which arrives in this agent's own inbox.

        `reply` is the model of the reply; without it the reply's message has the fields it was sent with. The mail
        expires with the `timeout`. The reply does not wait for its conversation, so a handler may call this.

        Raises ReplyTimeout, MailBounced, DecodeError (the reply does not fit `reply`), Unavailable (this process stands
        by: another process gets the replies), and what `send` raises.
        """
        if reply is not None:
            check_model("reply", reply)
        return await self._running_worker().request(message, to, reply, conversation, timeout)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[InboxWorker]:
        """Serve the inbox on an open client while the block runs. Leaving the block finishes the running handlers.

        If another process serves the inbox already, this process stands by and takes over when the other one ends
        (`InboxWorker.active`). Raises BadInput, NotFound if a stream is missing, Unavailable.
        """
        check_client(client)
        if self._inbox_worker is not None:
            raise BadInput(f"agent {self.name} runs already: leave its `async with agent.running(...)` block first")
        reset_signals_at_fork()
        spec = AgentSpec(
            self.name, self.tenant, dict(self._handlers), self.concurrency, self.drain_timeout_s, self.capabilities,
            self.description,
        )  # fmt: skip
        inbox_worker = self._inbox_worker = InboxWorker(spec, client.connection, client.inboxes, client.dead)
        session = None
        try:
            await client.inboxes.create(
                self.name, tenant=self.tenant, kinds=sorted(self._handlers), capabilities=self.capabilities,
                description=self.description,
            )  # fmt: skip
            session = AgentSession.of(client)
            await session.join(inbox_worker)
            yield inbox_worker
        finally:
            try:
                if session is not None:
                    await session.leave(inbox_worker)
            finally:
                self._inbox_worker = None

    def _running_worker(self) -> InboxWorker:
        if self._inbox_worker is None:
            raise BadInput(f"agent {self.name} does not run: use `async with agent.running(client):`")
        return self._inbox_worker


class AgentGroup:
    """Several agents that run together as one service, on one client and with one health report."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self.agents = tuple(agents)
        self.name = f"{len(self.agents)} agents"

    @property
    def drain_timeout_s(self) -> float:
        """The longest of the agents' drain timeouts."""
        return max(each.drain_timeout_s for each in self.agents)

    @asynccontextmanager
    async def running(self, client: Client) -> AsyncIterator[InboxWorkerGroup]:
        """Run all agents while the block runs. Leaving the block stops them at the same time.

        Raises what `Agent.running` raises.
        """
        entered: list[Any] = []
        inbox_workers: list[InboxWorker] = []
        try:
            for each in self.agents:
                context = each.running(client)
                inbox_workers.append(await context.__aenter__())
                entered.append(context)
            yield InboxWorkerGroup(self.name, inbox_workers)
        finally:
            results = await asyncio.gather(
                *(each.__aexit__(None, None, None) for each in entered), return_exceptions=True
            )
            for error in results:
                if isinstance(error, BaseException):
                    raise error


class InboxWorkerGroup:
    """The inbox workers of an agent group, seen as one: see `InboxWorker`."""

    def __init__(self, name: str, inbox_workers: Sequence[InboxWorker]) -> None:
        self._name = name
        self._inbox_workers = inbox_workers

    @property
    def running(self) -> int:
        return sum(each.running for each in self._inbox_workers)

    @property
    def done(self) -> int:
        return sum(each.done for each in self._inbox_workers)

    @property
    def clean(self) -> bool:
        return all(each.clean for each in self._inbox_workers)

    def vitals(self) -> dict[str, Any]:
        """Return the state of the group as plain data: that of the first inbox worker, with the sums of all."""
        each_vitals = [each.vitals() for each in self._inbox_workers]
        sums = {key: sum(each[key] for each in each_vitals) for key in ("slots", "running", "waiting", "done", "lanes")}
        last_delivery = max((each["last_delivery"] for each in each_vitals if each["last_delivery"]), default=None)
        standby = all(each["standby"] for each in each_vitals)
        return {**each_vitals[0], **sums, "worker": self._name, "last_delivery": last_delivery, "standby": standby}
