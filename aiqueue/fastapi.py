"""The queue in a FastAPI application: `aiqueue.starlette`, with what a request says as dependencies.

::

    app = FastAPI(lifespan=aiq.lifespan(), dependencies=[aiq.tenant_from(current_tenant)])
    aiq.install_errors(app)

    @app.post("/summaries")
    async def start(asked: Asked, request: Request, queue: aiq.Queue, key: aiq.IdempotencyKey) -> Response:
        handle = await queue.enqueue(Summarise(text=asked.text), unique=key)
        return aiq.accepted(request, handle, "show")

    @app.get("/jobs/{job_id}")
    async def show(job: aiq.TheJob) -> aiq.JobView:
        return await aiq.describe(job)

    @app.get("/jobs/{job_id}/events")
    async def events(job: aiq.TheJob, after: aiq.LastEventId) -> Response:
        return aiq.sse(job, after)

docs/guides/web.md has a whole service.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

try:
    from fastapi import Depends, Header, Path, Query
    from starlette.requests import HTTPConnection
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"aiqueue.fastapi needs {missing.name}: pip install 'aiqueue[fastapi]'", name=missing.name
    ) from None

from .client import Handle
from .job import Message
from .payload import R
from .starlette import (
    EventStream,
    JobView,
    TenantClient,
    accepted,
    checked_event_id,
    describe,
    find_job,
    install_errors,
    lifespan,
    queue,
    scoped_key,
    set_tenant,
    sse,
)

__all__ = [
    "EventStream", "IdempotencyKey", "JobView", "LastEventId", "Queue", "TenantClient", "TheJob", "accepted",
    "describe", "install_errors", "job_of", "lifespan", "set_tenant", "sse", "tenant_from",
]  # fmt: skip

_JobId = Annotated[str, Path(description="The id of a job")]


def tenant_from(dependency: Callable[..., Any]) -> Any:
    """Return a dependency for ``dependencies=[…]`` of an application, a router or a route: a request is of the tenant
    that your dependency returns.

    Yours authenticates the request, and raises ``HTTPException(401)`` if it cannot. It may have dependencies of its
    own. The tenant is as in `set_tenant`.
    """

    def tenant(connection: HTTPConnection, tenant: str = Depends(dependency)) -> None:
        set_tenant(connection, tenant)

    return Depends(tenant)


def _queue(connection: HTTPConnection) -> TenantClient:
    return queue(connection)


Queue = Annotated[TenantClient, Depends(_queue)]
"""The queue of the request's tenant."""


def job_of(model: type[Message[R]], *, family: str | None = None) -> Callable[..., Awaitable[Handle[R]]]:
    """Return a dependency as `TheJob`, whose result has the type that the message's class declares::

        async def result(job: Annotated[aiqueue.Handle[Summary], Depends(aiq.job_of(Summarise))]) -> Summary:

    It looks in one family only, that of `model` unless you name another.
    """

    async def job(queue: Queue, job_id: _JobId) -> Handle[R]:
        found: Handle[R] = await find_job(queue, job_id, model=model, family=family)
        return found

    return job


async def _the_job(queue: Queue, job_id: _JobId) -> Handle[Any]:
    return await find_job(queue, job_id)


TheJob = Annotated[Handle[Any], Depends(_the_job)]
"""The job that the path names as ``{job_id}``: by its id, or its `unique`. That of another tenant is NotFound."""


def _idempotency_key(
    connection: HTTPConnection,
    idempotency_key: Annotated[str | None, Header(description="Makes repetitions one job")] = None,
) -> str | None:
    return scoped_key(connection, idempotency_key)


IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
"""What makes a repeated request one job: pass it as `unique`. From the header Idempotency-Key; None without one."""


def _last_event_id(
    last_event_id: Annotated[str | None, Header(description="The last event that the client has")] = None,
    after: Annotated[str | None, Query(description="The same, of who can send no header")] = None,
) -> str | None:
    return checked_event_id(last_event_id or after)


LastEventId = Annotated[str | None, Depends(_last_event_id)]
"""The id of the last event that the client has: pass it to `sse`. From the header Last-Event-ID, or ``?after=``."""
