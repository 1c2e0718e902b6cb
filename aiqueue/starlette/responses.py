"""Answers about jobs, and those to errors."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import (
    Any,
    NotRequired,  # pydantic needs this one before Python 3.12
)

import pydantic_core
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from ..client import Handle
from ..errors import AIQueueError
from .problems import MEDIA_TYPE, problem_of
from .public_items import public_failure

log = logging.getLogger(__name__)


class JobView(TypedDict):
    """A job as its user may see it: plain data that JSON has. Times: seconds since the epoch."""

    id: str
    """The job's id."""
    state: str
    """One of `aiqueue.JobState`, such as "queued", "in_flight", "retrying", "done" or "failed"."""
    kind: str | None
    """Kind of the job's message; None: not known any more."""
    attempt: int | None
    """Number of the newest attempt that has written something, from 1; None: none has."""
    enqueued_at: float | None
    """When the job was enqueued; None: not known any more."""
    next_attempt_at: float | None
    """When the next attempt is due; None: the job does not wait for a time."""
    result: NotRequired[Any]
    """What the handler has returned, only of a job that is done; bytes are base64."""
    failure: NotRequired[dict[str, Any]]
    """Only of a job that has failed: `reason` in one word; `error` only of a rejection, or a deadline that is over."""


def accepted(request: Request, handle: Handle[Any], route: str, **path_params: Any) -> JSONResponse:
    """Return the answer to a request that has become a job: 202, with the job's `id`, and its URL as Location.

    `route`: the name of the route that shows the job; it is made with `path_params`, and the job's id as ``job_id``.
    """
    url = request.url_for(route, **{"job_id": handle.id, **path_params})
    return JSONResponse({"id": handle.id, "duplicate": handle.duplicate}, 202, {"location": url.path})


async def describe(handle: Handle[Any]) -> JobView:
    """Return a job's state, and its result or the reason of its failure, without what concerns only the service.

    Raises NotFound, Unavailable.
    """
    found = await handle.status()
    view: JobView = {
        "id": found.job_id, "state": found.state, "kind": found.kind, "attempt": found.attempt,
        "enqueued_at": found.enqueued_at, "next_attempt_at": found.next_attempt_at,
    }  # fmt: skip
    if found.state == "done":
        view["result"] = pydantic_core.to_jsonable_python(found.result, bytes_mode="base64", inf_nan_mode="null")
    if found.failure is not None:
        view["failure"] = public_failure(found.failure)
    return view


def install_errors(app: Starlette) -> None:
    """Answer every error of aiqueue that an endpoint raises as application/problem+json, see `problem_of`.

    Those that are the service's fault are logged, with what the caller is not told.
    """
    app.add_exception_handler(AIQueueError, answer_error)


async def answer_error(request: Request, error: Exception) -> Response:
    """Return the answer to an error of aiqueue."""
    assert isinstance(error, AIQueueError)
    problem = problem_of(error)
    if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    elif problem.status > HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s %s: %d: %s", request.method, request.url.path, problem.status, error)
    if problem.body is None:
        return Response(status_code=problem.status, headers=problem.headers)
    return JSONResponse(problem.body, problem.status, problem.headers, MEDIA_TYPE)
