"""The front as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import subjects
from ...errors import AIQueueError
from ...starlette import server_events
from ..batches import GatewayBatch
from . import batches, chat, embeddings, files, health, models
from .authentication import Authentication
from .bodies import ClientGone, Incoming
from .context import Front
from .errors import RETRY_S, ApiError, error_of

log = logging.getLogger(__name__)

_DRAINING: Final = "the gateway is restarting: send the request again; Last-Event-ID has the rest of a stream"
_EVENTS: Final = f"{server_events.MEDIA_TYPE}; charset=utf-8".encode()


def build_app(front: Front) -> Starlette:
    """Return the application. Its errors have OpenAI's shape, and every response has `x-request-id`."""
    parts = [health, models, chat, embeddings]
    if front.client.topology.has("batches"):
        parts += [files, batches]
    else:
        log.info("files and batches are not served: %s", front.client.topology.advice(GatewayBatch.aiq_family))
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
        has_started = is_stream = False
        incoming = Incoming(scope, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal has_started, is_stream
            if message["type"] == "http.response.start":
                is_stream = (b"content-type", _EVENTS) in message["headers"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
                if not await incoming.drop_rest():
                    message["headers"].append((b"connection", b"close"))
                has_started = True
            await send(message)

        try:
            await self._app(scope, incoming.receive, send_with_id)
        except asyncio.CancelledError:  # the drain is over: what is left of a stream is cut
            error = ApiError(503, _DRAINING, code="draining", retry_after_s=RETRY_S)
            if not has_started:
                await error.response()(scope, receive, send_with_id)
            elif is_stream:
                await send(
                    {"type": "http.response.body", "body": server_events.event(error.body()), "more_body": False}
                )
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
    method, path = request.method[:16], request.url.path
    if error.status_code == 404:
        if _methods(request, f"/v1{path}") or _methods(request, path.removeprefix("/v1")):
            hint = "base_url must end with /v1, once"
        else:
            paths = {each.path for each in request.app.routes if each.path.startswith("/v1/") and "{" not in each.path}
            hint = f"there are {', '.join(sorted(paths))}"
        return ApiError(404, f"unknown request URL: {method} {path[:200]}; {hint}", code="unknown_url").response()
    if error.status_code == 405:
        methods = ", ".join(_methods(request, path))
        problem = f"{method} {path[:200]} is not allowed; allowed: {methods}"
        return ApiError(405, problem, code="method_not_allowed").response({"allow": methods})
    found = ApiError(error.status_code, error.detail)
    return JSONResponse(found.body(), found.status, {**found.headers(), **(error.headers or {})})


def _methods(request: Request, path: str) -> list[str]:
    """Return the methods that a path has; none: it is unknown."""
    scope = {**request.scope, "path": path, "root_path": ""}
    found = (each.methods for each in request.app.routes if each.matches(scope)[0] is not Match.NONE)
    return sorted({method for methods in found for method in methods or ()})
