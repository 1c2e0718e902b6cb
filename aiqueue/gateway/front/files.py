"""``/v1/files``: the inputs of batches, and their outputs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...errors import NotFound
from ..batches import BatchEnded, Batches, BatchFile, BatchQuota
from ..batches.client import FILE_KEEP_S
from .bodies import read_chunks
from .context import Front
from .errors import RETRY_S, ApiError

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")

FORM_BYTES: Final = 64 * 1024  # of an upload, beside the file itself
FIELDS_MAX: Final = 8
FILES_PAGE: Final = 10_000
_NUMBER = re.compile(r"[0-9]{1,9}")


def routes(front: Front) -> list[Route]:
    """Return the routes of files."""
    batches = Batches(front.client, front.settings.quotas)

    async def create(request: Request) -> Response:
        with _uploading(front, request.state.key.tenant):
            form = await _read_form(request, front)
            try:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file is missing: send it as multipart/form-data", param="file")
                if form.get("purpose") != "batch":
                    raise ApiError(400, 'purpose must be "batch"', param="purpose")
                made = await batches.upload(
                    file.file, tenant=request.state.key.tenant, filename=file.filename or "batch.jsonl",
                    keep_s=_keep_of_form(form),
                )  # fmt: skip
            finally:
                await form.close()
        return JSONResponse(made.public())

    async def list_files(request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        files = await batches.files(request.state.key.tenant)
        wanted = [each for each in files if purpose is None or each.purpose == purpose]
        return page(request, wanted, FILES_PAGE, FILES_PAGE)

    async def retrieve(request: Request) -> Response:
        return JSONResponse((await find(request)).public())

    async def content(request: Request) -> Response:
        file = await find(request)
        headers = {"content-length": str(file.size)}
        return StreamingResponse(_chunks(file), media_type="application/octet-stream", headers=headers)

    async def _chunks(file: BatchFile) -> AsyncIterator[bytes]:
        async for chunk in batches.content(file):
            yield chunk

    async def delete(request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await batches.delete_file(file_id, tenant=request.state.key.tenant)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def find(request: Request) -> BatchFile:
        return await batches.file(request.path_params["file_id"], tenant=request.state.key.tenant)

    return [
        Route("/v1/files", translated(create), methods=["POST"]),
        Route("/v1/files", translated(list_files), methods=["GET"]),
        Route("/v1/files/{file_id}", translated(retrieve), methods=["GET"]),
        Route("/v1/files/{file_id}", translated(delete), methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", translated(content), methods=["GET"]),
    ]


def translated(endpoint: Endpoint) -> Endpoint:
    """Give what files and batches raise the status that OpenAI's clients expect."""

    @wraps(endpoint)
    async def call(request: Request) -> Response:
        try:
            return await endpoint(request)
        except BatchQuota as error:
            raise ApiError(429, str(error), code="quota_exceeded") from None
        except BatchEnded as error:
            raise ApiError(409, str(error), code="batch_ended") from None
        except NotFound as error:
            if not str(error).startswith("no such "):  # but a stream
                raise
            raise ApiError(404, str(error), code="not_found") from None

    return call


def page(request: Request, found: Sequence[Any], default: int, most: int) -> Response:
    """Return the page of a list, the newest first, that a request asks for by `limit`, `after` and `order`."""
    query = request.query_params
    text, order, after = query.get("limit", str(default)), query.get("order", "desc"), query.get("after")
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise ApiError(400, f"limit must be a whole number from 1 to {most:,}", param="limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, 'order must be "asc" or "desc"', param="order")
    items = list(found) if order == "desc" else list(reversed(found))
    if after is not None:
        ids = [each.id for each in items]
        if after not in ids:
            raise ApiError(404, f"no such id: {after[:80]!r}", code="not_found", param="after")
        items = items[ids.index(after) + 1 :]
    shown = items[: int(text)]
    return JSONResponse({
        "object": "list", "data": [each.public() for each in shown], "has_more": len(items) > len(shown),
        "first_id": shown[0].id if shown else None, "last_id": shown[-1].id if shown else None,
    })  # fmt: skip


def keep_of(given: Any, where: str) -> int:
    """Return for how long a file is to be kept, by OpenAI's `expires_after`; without one, for 30 days."""
    if given is None:
        return FILE_KEEP_S
    anchor = given.get("anchor") if isinstance(given, Mapping) else None
    seconds = given.get("seconds") if isinstance(given, Mapping) else None
    if anchor != "created_at" or isinstance(seconds, bool) or not isinstance(seconds, int):
        raise ApiError(400, f'{where} must be {{"anchor": "created_at", "seconds": …}}', param=where)
    return seconds


def _keep_of_form(form: FormData) -> int:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return FILE_KEEP_S
    is_number = isinstance(seconds, str) and _NUMBER.fullmatch(seconds)
    return keep_of({"anchor": anchor, "seconds": int(str(seconds)) if is_number else None}, "expires_after")


async def _read_form(request: Request, front: Front) -> FormData:
    """Return the form of an upload, whose file lies in a temporary file. Raises ApiError: 400, 408, 413."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send the file as multipart/form-data")
    settings = front.settings
    chunks = read_chunks(request, bytes_max=settings.quotas.file_bytes + FORM_BYTES, within_s=settings.file_s)
    parser = MultiPartParser(request.headers, _as_generator(chunks), max_files=1, max_fields=FIELDS_MAX)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError) as error:  # no boundary, a charset that is none
        problem = getattr(error, "message", "") or "the body is no multipart/form-data"
        raise ApiError(400, problem, code="invalid_form") from None


async def _as_generator(chunks: AsyncIterator[bytes]) -> Any:
    async for chunk in chunks:
        yield chunk


@contextmanager
def _uploading(front: Front, tenant: str) -> Iterator[None]:
    if not front.uploads.take(tenant, 1):
        problem = "the gateway receives too many files at once"
        raise ApiError(503, problem, code="overloaded", retry_after_s=RETRY_S)
    try:
        yield
    finally:
        front.uploads.give_back(tenant, 1)
