"""What serves a subscription: a worker for a queue of jobs, an agent for an inbox, a responder for requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from .. import headers, subjects
from ..agent import Agent, Mail
from ..backoff import Backoff
from ..client import Client
from ..errors import BadInput
from ..job import Job, RawMessage
from ..mailbox import Inboxes
from ..responder import Request, Responder
from ..topology import Family
from ..units import Duration
from ..worker import Worker
from .message import Callback, JobMsg, Msg, to_result
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
        answer = value if message.answer is None else message.answer
        return None if answer is None else to_result(answer)

    def handle_in_thread(job: Job[RawMessage]) -> Any:
        return to_result(function(JobMsg(job)))

    register = worker.handle_any(family.name, retry=options.retry, timeout=options.timeout)
    register(handle if options.callback.is_async else handle_in_thread)
    return worker.running(client)


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

    async def handle(mail: Mail[RawMessage]) -> None:
        await call(callback, _mail_message(mail, inboxes))

    def handle_in_thread(mail: Mail[RawMessage]) -> None:
        callback.function(_mail_message(mail, inboxes))

    register = agent.handle_any(retry=options.retry, timeout=options.timeout)
    register(handle if callback.is_async else handle_in_thread)
    return agent.running(client)


def serve_requests(client: Client, route: Route, options: ServeOptions, call: Call) -> AbstractAsyncContextManager[Any]:
    """Return the context of a responder that calls the callback with each new request. Raises BadInput."""
    family = _family_of(route)

    async def answer(request: Request) -> Any:
        responded: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def respond(body: bytes) -> None:
            if not responded.done():
                responded.set_result(body)

        message = Msg(request.subject, request.body, request.headers, reply=request.reply, respond=respond)
        value = await call(options.callback, message)
        if value is not None and not responded.done():
            return to_result(value)
        return to_result(await responded)

    concurrency = REQUEST_CONCURRENCY if options.concurrency is None else options.concurrency
    responder = Responder(
        families=[family.name], tenants=None if route.tenant == "*" else [route.tenant],
        drain_timeout=options.drain_timeout, answer=answer, concurrency=concurrency,
    )  # fmt: skip
    return responder.running(client)


def _mail_message(mail: Mail[RawMessage], inboxes: Inboxes) -> Msg:
    """Return a mail as a message. Its reply subject is the sender's inbox."""
    sender = mail.sender

    async def respond(body: bytes) -> None:
        assert sender is not None
        fields = {
            headers.SOURCE: mail.to, headers.CONVERSATION: mail.conversation, headers.CORRELATION: mail.id,
        }  # fmt: skip
        await inboxes.send_encoded(body, fields, tenant=mail.tenant, to=sender)

    bare = f"ai.{inboxes.family.name}.{mail.tenant}"
    return Msg(
        bare, mail.message.body, mail.headers, reply=f"{bare}.{sender}" if sender else "",
        respond=respond if sender else None, mail=mail,
    )  # fmt: skip


def _family_of(route: Route) -> Family:
    assert route.family is not None
    return route.family
