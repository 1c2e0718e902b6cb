"""The front as an ASGI application."""

from __future__ import annotations

import asyncio
import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import subjects
from ...errors import AIQueueError
from . import batches, chat, embeddings, files, health, models
from .authentication import Authentication
from .bodies import ClientGone, Incoming
from .context import Front
from .errors import RETRY_S, ApiError, error_of

log = logging.getLogger(__name__)


def build_app(front: Front) -> Starlette:
    """Return the application. Its errors have OpenAI's shape, and every response has `x-request-id`."""
    parts = (health, models, chat, embeddings, files, batches)
    app = Starlette(
        routes=[route for part in parts for route in part.routes(front)],
        middleware=[Middleware(RequestId), Middleware(Authentication, front=front)],
        exception_handlers={
            HTTPException: _on_http_error,
            ApiError: _on_error,
            AIQueueError: _on_error,
            ClientGone: _on_gone,
        },
    )
    app.router.redirect_slashes = False
    return app


class RequestId:
    """ASGI middleware: each response names its request, by the job's id where there is one, and is sent when the client
    has sent its body. What fails unexpectedly is a 500 in OpenAI's shape.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = subjects.new_id()
        has_started, incoming = False, Incoming(scope, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
                if not await incoming.drop_rest():
                    message["headers"].append((b"connection", b"close"))
                has_started = True
            await send(message)

        try:
            await self._app(scope, incoming.receive, send_with_id)
        except asyncio.CancelledError:  # the drain is over: what is left of a stream is cut
            if not has_started:
                error = ApiError(503, "the gateway is restarting", code="draining", retry_after_s=RETRY_S)
                await error.response()(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise
            log.exception("request %s has failed", state["request_id"])
            await error_of(error).response()(scope, receive, send_with_id)


async def _on_error(_: Request, error: Exception) -> Response:
    return error_of(error).response()


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        problem = f"unknown request URL: {request.method[:16]} {request.url.path[:200]}"
        return ApiError(404, problem, code="unknown_url").response()
    found = ApiError(error.status_code, error.detail)
    return JSONResponse(found.body(), found.status, {**found.headers(), **(error.headers or {})})
