"""What serves a subscription: a worker for a queue of jobs, an agent for an inbox, a responder for requests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from .. import headers, subjects
from ..agent import Agent, Mail
from ..attempt import PLAIN_TYPES
from ..client import Client
from ..errors import BadInput
from ..job import Job, RawMessage
from ..mailbox import Inboxes
from ..topology import Family
from ..units import Backoff, Duration
from ..worker import WAIT_MAX_S, Request, Responder, Worker
from .message import Answer, Callback, JobMsg, Msg, data_of_answer, resolved, to_bytes, to_result
from .routes import Route

Call = Callable[[Callback, Msg], Any]
AGENT_QUEUE = "agent."
JOB_CONCURRENCY, REQUEST_CONCURRENCY = 100, 1_000
MAIL_CONCURRENCY = 1  # in order


@dataclass(frozen=True)
class ServeOptions:
    """The arguments of `NATSClient.subscribe`. `concurrency` None: the default of what serves."""

    callback: Callback
    concurrency: int | None
    retry: Backoff | None
    timeout: Duration | None
    drain_timeout: Duration


def serve_jobs(
    client: Client, route: Route, options: ServeOptions, enter: Callable[[], None]
) -> AbstractAsyncContextManager[Any]:
    """Return the context of a worker that calls the callback with each job of a route. Raises BadInput.

    `enter` is called before an async callback, in its task.
    """
    family = _family_of(route)
    tenants = None if route.tenant == "*" else [route.tenant]
    if tenants and family.lanes == "shared":
        raise BadInput(
            f"all tenants share the lanes of {family.name}, so the jobs of one tenant cannot be taken alone: subscribe "
            f"to ai.{family.name}.*"
        )
    concurrency = JOB_CONCURRENCY if options.concurrency is None else options.concurrency
    worker = Worker(tenants=tenants, concurrency=concurrency, drain_timeout=options.drain_timeout)
    function = options.callback.function

    async def handle(job: Job[RawMessage]) -> Any:  # not by `BusSubscription.call`: that costs two more calls a job
        message = JobMsg(job)
        enter()
        value = await function(message)
        if type(value) not in PLAIN_TYPES:
            value = await resolved(value)
        return _result_of(message, value)

    def handle_in_thread(job: Job[RawMessage]) -> Any:
        message = JobMsg(job)
        value = function(message)
        return end_on_loop(message, value) if inspect.isawaitable(value) else _result_of(message, value)

    async def end_on_loop(message: JobMsg, value: Awaitable[Any]) -> Any:  # which the worker awaits
        enter()
        return _result_of(message, await value)

    register = worker.handle_any(family.name, retry=options.retry, timeout=options.timeout)
    register(handle if options.callback.is_async else handle_in_thread)
    return worker.running(client)


def _result_of(message: JobMsg, value: Any) -> Any:
    """Return the result of a job whose callback has returned `value`: its answer, else that."""
    return to_result(value) if message.answer is None else data_of_answer(message.answer)


def serve_inbox(
    client: Client, route: Route, queue: str, options: ServeOptions, call: Call
) -> AbstractAsyncContextManager[Any]:
    """Return the context of an agent that calls the callback with each mail of its inbox. Raises BadInput."""
    family = _family_of(route)
    name = queue.removeprefix(AGENT_QUEUE)
    if not queue.startswith(AGENT_QUEUE) or not subjects.TOKEN.fullmatch(name) or route.last not in ("", name):
        raise BadInput(
            f'queue {queue!r} is no agent\'s inbox: subscribe with queue=f"agent.{{agent_id}}", or without a queue to '
            "observe"
        )
    if route.tenant == "*":
        raise BadInput(f"an agent has one tenant: subscribe to ai.{family.name}.{{tenant}}")
    agent = Agent(
        name, tenant=route.tenant, concurrency=MAIL_CONCURRENCY if options.concurrency is None else options.concurrency,
        drain_timeout=options.drain_timeout,
    )  # fmt: skip
    inboxes, callback = client.inboxes, options.callback

    async def handle(mail: Mail[RawMessage]) -> Any:
        return await call(callback, _mail_message(mail, inboxes))

    agent.handle_any(retry=options.retry, timeout=options.timeout)(handle)
    return agent.running(client)


def serve_requests(client: Client, route: Route, options: ServeOptions, call: Call) -> AbstractAsyncContextManager[Any]:
    """Return the context of a responder that calls the callback with each new request. Raises BadInput."""
    family = _family_of(route)

    async def answer(request: Request) -> Any:
        responded: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        async def respond(answer: Answer) -> None:
            if responded.done():
                raise BadInput(f"nobody waits for the answer to {request.id} any more: the call was ended")
            responded.set_result(answer)

        message = Msg(request.subject, request.body, request.headers, reply=request.reply, respond=respond)
        value = await call(options.callback, message)
        if value is not None and not responded.done():
            return to_result(value)
        try:
            async with asyncio.timeout(WAIT_MAX_S):
                return data_of_answer(await responded)
        except TimeoutError:
            raise BadInput(
                f"{options.callback.name} has returned None and has not responded within {WAIT_MAX_S:g} s: answer with "
                "`msg.respond(...)`, or return the answer"
            ) from None

    answer.__qualname__ = options.callback.name  # for logs
    concurrency = REQUEST_CONCURRENCY if options.concurrency is None else options.concurrency
    responder = Responder(
        families=[family.name], tenants=None if route.tenant == "*" else [route.tenant],
        drain_timeout=options.drain_timeout, answer=answer, concurrency=concurrency,
    )  # fmt: skip
    return responder.running(client)


def _mail_message(mail: Mail[RawMessage], inboxes: Inboxes) -> Msg:
    """Return a mail as a message. Its reply subject is the sender's inbox."""
    sender = mail.sender

    async def respond(answer: Answer) -> None:
        assert sender is not None
        fields = {
            headers.SOURCE: mail.to,
            headers.CONVERSATION: headers.ascii_line(mail.conversation, 128),  # a plain client may have set it
            headers.CORRELATION: mail.id,
        }
        await inboxes.send_encoded(to_bytes(answer), fields, tenant=mail.tenant, to=sender)

    bare = f"ai.{inboxes.family.name}.{mail.tenant}"
    return Msg(
        bare, mail.message.body, mail.headers, reply=f"{bare}.{sender}" if sender else "",
        respond=respond if sender else None, mail=mail,
    )  # fmt: skip


def _family_of(route: Route) -> Family:
    assert route.family is not None
    return route.family
