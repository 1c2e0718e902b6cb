"""``/healthz`` and ``/readyz``, for load balancers and orchestrators: without a key, and without details."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...errors import AIQueueError
from .context import Front

ANSWER_S: Final = 2.0  # of the server


def routes(front: Front) -> list[Route]:
    """Return the routes of health."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        state = await _state(front)
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    return [Route("/healthz", healthz, methods=["GET"]), Route("/readyz", readyz, methods=["GET"])]


async def _state(front: Front) -> str:
    if front.is_draining:
        return "draining"
    try:
        async with asyncio.timeout(ANSWER_S):
            await front.client.connection.flush()
    except (AIQueueError, TimeoutError):
        return "unavailable"
    return "ok" if front.client.connection.connected else "unavailable"
