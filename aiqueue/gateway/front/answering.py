"""A request's answer as a whole, and the client that may leave before it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from ...errors import AIQueueError, JobFailed
from .bodies import ClientGone
from .context import Front
from .idempotency import Submission

if TYPE_CHECKING:
    from ...client import Handle

log = logging.getLogger(__name__)
T = TypeVar("T")

ON_DISCONNECT: Final = "x-aiqueue-on-disconnect"
CANCEL_S: Final = 10.0

_cancels: set[asyncio.Task[None]] = set()  # of clients that have left


async def wait_gone(receive: Receive) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns. Raises ClientGone, after `work` was cancelled, if the client leaves before."""
    working, gone = asyncio.create_task(work), asyncio.create_task(wait_gone(receive))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([working, gone])


async def answer(request: Request, front: Front, submission: Submission) -> dict[str, Any]:
    """Return the result of a request's job. Raises what `Handle.result` raises, and ClientGone: then the job goes on,
    or is cancelled if the request asks for that.
    """
    handle = submission.handle
    request.state.request_id = handle.id
    try:
        found = await unless_gone(request.receive, handle.result(timeout=front.settings.answer_s))
    except ClientGone:
        on_gone(request, handle)
        raise
    except JobFailed:
        submission.settle(None)
        raise
    submission.settle(found)
    return found


def json_response(answer: dict[str, Any]) -> Response:
    """Return the response of an answer. Embeddings are megabytes of numbers, for which json.dumps takes a second."""
    return Response(pydantic_core.to_json(answer, inf_nan_mode="null"), media_type="application/json")


def on_gone(request: Request, handle: Handle[Any]) -> None:
    """Cancel the job of a client that has left, if its request asks for that by ``x-aiqueue-on-disconnect: cancel``."""
    if request.headers.get(ON_DISCONNECT) == "cancel":
        task = asyncio.create_task(_cancel(handle))
        _cancels.add(task)
        task.add_done_callback(_cancels.discard)


async def _cancel(handle: Handle[Any]) -> None:
    try:
        async with asyncio.timeout(CANCEL_S):
            await handle.cancel()
    except (AIQueueError, TimeoutError) as error:
        log.warning("job %s goes on, though its client has left and asked to cancel it: %s", handle.id, error)
