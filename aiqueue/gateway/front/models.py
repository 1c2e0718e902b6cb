"""``/v1/models``: those of gateway.toml that the API key may call."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .authentication import check_model
from .context import Front


def routes(front: Front) -> list[Route]:
    """Return the routes of models."""

    async def list_models(request: Request) -> Response:
        models = front.models_of(request.state.key)
        return JSONResponse({"object": "list", "data": [_describe(front, name) for name in sorted(models)]})

    async def retrieve(request: Request) -> Response:
        name = request.path_params["name"]
        check_model(front, request.state.key, name)
        return JSONResponse(_describe(front, name))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", retrieve, methods=["GET"]),
    ]


def _describe(front: Front, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": front.config.models[name].provider.name}
