"""``/v1/batches``: the lines of a file as requests, which are answered within a day."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..api_key_store import ApiKey
from ..batches import Batches, RequestBatch
from ..key_budgets import API_KEY
from .authentication import priority_of
from .bodies import json_body
from .context import Front
from .errors import ApiError
from .files import keep_of, page, translated
from .idempotency import REPEATED, idempotency_key

BATCHES_PAGE: Final = 20
BATCHES_PAGE_MAX: Final = 100
REPEATED_S: Final = 1_200  # for how long a client may repeat a request by itself
_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})


def routes(front: Front) -> list[Route]:
    """Return the routes of batches."""
    batches = Batches(front.client, front.settings.quotas)

    async def create(request: Request) -> Response:
        key: ApiKey = request.state.key
        priority_of(key, "batch")
        async with json_body(request, front, _check) as (body, _):
            given = idempotency_key(request)
            former = None if given is not None else await _repeated(batches, request, body)
            if former is not None:
                return JSONResponse(former.public())
            made = await batches.create(
                body["input_file_id"], tenant=key.tenant, endpoint=body["endpoint"],
                completion_window=body["completion_window"], metadata=body.get("metadata"),
                output_keep_s=keep_of(body.get("output_expires_after"), "output_expires_after"),
                models=key.models, headers={API_KEY: key.id},
                unique=None if given is None else f"{key.id}/{given}",
            )  # fmt: skip
        return JSONResponse(made.public())

    async def list_batches(request: Request) -> Response:
        return page(request, await batches.batches(request.state.key.tenant), BATCHES_PAGE, BATCHES_PAGE_MAX)

    async def retrieve(request: Request) -> Response:
        found = await batches.batch(request.path_params["batch_id"], tenant=request.state.key.tenant)
        return JSONResponse(found.public())

    async def cancel(request: Request) -> Response:
        found = await batches.cancel(request.path_params["batch_id"], tenant=request.state.key.tenant)
        return JSONResponse(found.public())

    return [
        Route("/v1/batches", translated(create), methods=["POST"]),
        Route("/v1/batches", translated(list_batches), methods=["GET"]),
        Route("/v1/batches/{batch_id}", translated(retrieve), methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", translated(cancel), methods=["POST"]),
    ]


def _check(body: dict[str, Any]) -> None:
    """Raise ApiError for what is no request for a batch; the rest is checked by `Batches.create`."""
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(name), str):
            raise ApiError(400, f"{name} is missing, or is no text", code="missing_required_parameter", param=name)
    if unknown := body.keys() - _FIELDS:
        name = min(map(str, unknown))[:80]
        raise ApiError(400, f"unknown parameter {name!r}", code="unknown_parameter", param=name)


async def _repeated(batches: Batches, request: Request, body: dict[str, Any]) -> RequestBatch | None:
    """Return the batch of the request that a client has sent before, and repeats by itself; None: there is none."""
    if request.headers.get(REPEATED, "0") == "0":
        return None
    key: ApiKey = request.state.key
    for batch in await batches.batches(key.tenant):
        asked = batch.input_file_id, batch.endpoint, batch.metadata or {}
        is_same = asked == (body["input_file_id"], body["endpoint"], body.get("metadata") or {})
        if is_same and batch.headers.get(API_KEY) == key.id and await batches.age_s(batch) < REPEATED_S:
            return batch
    return None
