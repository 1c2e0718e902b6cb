"""``/v1/embeddings``."""

from __future__ import annotations

import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..requests import EmbeddingRequest
from .answering import answer, json_response
from .authentication import check_model
from .bodies import json_body
from .chat import parse_request
from .context import Front
from .idempotency import submit


def routes(front: Front) -> list[Route]:
    """Return the routes of embeddings."""

    async def create(request: Request) -> Response:
        def parse(data: dict[str, Any]) -> EmbeddingRequest:
            return parse_request(EmbeddingRequest, data)

        async with json_body(request, front, parse) as (_, asked):
            check_model(front, request.state.key, asked.model)
            submission = await submit(request, front, asked)
        found = await answer(request, front, submission)
        return json_response(_as_base64(found) if asked.encoding_format == "base64" else found)

    return [Route("/v1/embeddings", create, methods=["POST"])]


def _as_base64(answer: dict[str, Any]) -> dict[str, Any]:
    """Return embeddings as OpenAI's client asks for them, whether or not the provider knows base64."""
    data = []
    for each in answer.get("data") or ():
        vector = each.get("embedding")
        if isinstance(vector, list):
            each = {**each, "embedding": base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()}  # noqa: PLW2901
        data.append(each)
    return {**answer, "data": data}
