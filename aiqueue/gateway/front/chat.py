"""``/v1/chat/completions``: a request is a job; its answer comes as a whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pydantic
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ... import subjects
from ...enqueue import find_fingerprint, fingerprint_of, is_other_body
from ...headers import FINGERPRINT
from ...starlette import server_events
from ..api_key_store import ApiKey
from ..api_keys import KeyCredit
from ..requests import EmbeddingRequest, GatewayRequest
from .answering import answer, json_response, on_gone, wait_gone
from .authentication import check_model
from .bodies import json_body
from .chat_stream import ChatEvents, StreamPosition
from .context import Front
from .errors import ApiError, error_of, error_of_validation
from .idempotency import Submission, submit

if TYPE_CHECKING:
    from ...client import Handle

log = logging.getLogger(__name__)
R = TypeVar("R", GatewayRequest, EmbeddingRequest)

ON_RESTART: Final = "x-aiqueue-on-restart"
# the gateway's own fields, which are headers here, or another form of the request
_NOT_HERE: Final = ("request_id", "tenant_id", "timestamp", "reply_form", "prompt", "parameters")


def routes(front: Front) -> list[Route]:
    """Return the routes of chat completions."""

    async def create(request: Request) -> Response:
        def parse(data: dict[str, Any]) -> GatewayRequest:
            return parse_request(GatewayRequest, data)

        async with json_body(request, front, parse) as (_, asked):
            check_model(front, request.state.key, asked.model)
            position = request.headers.get("last-event-id")
            if position is not None and asked.stream:
                submission = await _resumed(request, front, asked, StreamPosition.parse(position))
            else:
                submission = await submit(request, front, asked)
        request.state.request_id = submission.handle.id
        if not asked.stream:
            return json_response(await answer(request, front, submission))
        events = ChatEvents(
            submission,
            asked.model,
            with_usage=bool((asked.stream_options or {}).get("include_usage")),
            with_restarts=request.headers.get(ON_RESTART) == "event",
            position=StreamPosition.parse(position) if position is not None else None,
        )
        return ChatStreamResponse(request, front, submission.handle, events)

    return [Route("/v1/chat/completions", create, methods=["POST"])]


def parse_request(model: type[R], data: Mapping[str, Any]) -> R:
    """Return the request in a body. Raises ApiError, which names the field that is wrong."""
    for name in _NOT_HERE:
        if name in data:
            raise ApiError(400, f"unknown parameter: {name}", code="unknown_parameter", param=name)
    try:
        return model(**data)
    except pydantic.ValidationError as error:
        raise error_of_validation(error) from None


async def _resumed(request: Request, front: Front, asked: GatewayRequest, position: StreamPosition) -> Submission:
    """Return the job whose stream is resumed: the tenant's, and of the same body. Raises ApiError."""
    key: ApiKey = request.state.key
    client, family = front.client, front.client.topology.family(asked.aiq_family)
    connection, stream = client.connection, client.topology.journal_stream.name
    # a job without a journal has no events, and would be looked for in its lanes
    first = await connection.first(stream, subjects.journal(family.journal or "", key.tenant, position.job_id))
    if first is None:
        raise ApiError(404, "there is no such stream (any more)", code="not_found")
    fingerprint = fingerprint_of(family, asked.model_dump(mode="json"), b"")
    if is_other_body(first.headers.get(FINGERPRINT, ""), fingerprint):  # unless the job was run again with this body
        known = await find_fingerprint(connection, stream, family, key.tenant, position.job_id)
        if is_other_body(known, fingerprint):
            problem = "Last-Event-ID is of another request: send it with the body of the request that it belongs to"
            raise ApiError(409, problem, code="last_event_id_reused")
    handle = await client.job(position.job_id, family=family.name, tenant=key.tenant)
    return Submission(handle, KeyCredit())  # a request that was admitted before


class ChatStreamResponse(Response):
    """The stream of a request's job. Errors before the first chunk keep their status; later ones are events."""

    def __init__(self, request: Request, front: Front, handle: Handle[Any], events: ChatEvents) -> None:
        super().__init__(headers=dict(server_events.HEADERS), media_type=server_events.MEDIA_TYPE)
        del self.headers["content-length"]
        self._request, self._front, self._handle, self._events = request, front, handle, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_gone(receive))
        sending = asyncio.create_task(self._send(scope, receive, send))
        try:
            await asyncio.wait([gone, sending], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                on_gone(self._request, self._handle)
            else:
                sending.result()
        finally:
            for task in (gone, sending):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([gone, sending])

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._front.settings
        async with (
            aclosing(self._events.parts()) as parts,
            server_events.EventFlow(parts, ping_s=settings.ping_s) as flow,
        ):
            await flow.begin(settings.status_s)  # raises the errors that keep their status
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                while (part := await flow.read()) is not None:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Exception as error:  # whatever it is, the client must hear that its stream has ended
                told = error_of(error)
                if told.status == 500:
                    log.exception("job %s: its stream has ended", self._handle.id)
                await send({"type": "http.response.body", "body": server_events.event(told.body()), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
