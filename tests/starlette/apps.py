"""The same service twice, in FastAPI and in plain Starlette, and a server for it in this process.

Who asks is told by the header X-User, in place of a cookie: the tenant is the user's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

import aiohttp
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import aiqueue
import aiqueue.fastapi as aiq
from aiqueue import starlette as plain
from aiqueue.starlette.application import KEY, WebState


class Count(aiqueue.Message[int], kind="count"):
    """Count up to `to`, a chunk each; how it ends: "" with a result, "fail", "reject", or "wait" for ever."""

    to: int = 3
    ends: str = ""


worker = aiqueue.Worker(drain_timeout=0.1)


@worker.handle(Count, retry=aiqueue.Backoff(attempts=2, first=0.01))
async def count(job: aiqueue.Job[Count]) -> int:
    for number in range(job.message.to):
        await job.chunk(f"{number}\n")
    match job.message.ends:
        case "fail":
            problem = "password=hunter2 is wrong"
            raise RuntimeError(problem)
        case "reject":
            raise aiqueue.Reject("we count up to 3 only")
        case "wait":
            await asyncio.Event().wait()
    return job.message.to


class Asked(BaseModel):
    to: int = 3
    ends: str = ""
    timeout: float = 30.0


def tenant_of_user(x_user: Annotated[str | None, Header()] = None) -> str:
    if x_user is None:
        raise HTTPException(401)
    return x_user


def fastapi_app(client: aiqueue.Client) -> FastAPI:
    app = FastAPI(lifespan=aiq.lifespan(client))
    aiq.install_errors(app)
    router = APIRouter(prefix="/api", dependencies=[aiq.tenant_from(tenant_of_user)])

    @router.post("/counts")
    @router.post("/others")
    async def start(asked: Asked, request: Request, queue: aiq.Queue, key: aiq.IdempotencyKey) -> Response:
        handle = await queue.enqueue(Count(to=asked.to, ends=asked.ends), unique=key, timeout=asked.timeout)
        return aiq.accepted(request, handle, "show")

    @router.get("/jobs/{job_id}")
    async def show(job: aiq.TheJob) -> aiq.JobView:
        return await aiq.describe(job)

    @router.get("/jobs/{job_id}/result")
    async def result(job: Annotated[aiqueue.Handle[int], Depends(aiq.job_of(Count))]) -> int:
        return await job.result(timeout=0.5)

    @router.delete("/jobs/{job_id}")
    async def cancel(job: aiq.TheJob) -> bool:
        return await job.cancel()

    @router.get("/jobs/{job_id}/events")
    async def events(job: aiq.TheJob, after: aiq.LastEventId) -> Response:
        return aiq.sse(job, after, ping_s=0.1)

    app.include_router(router)
    return app


class HeaderUsers:
    """ASGI middleware: the user in a header is the tenant."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            if "x-user" not in request.headers:
                await Response(status_code=401)(scope, receive, send)
                return
            plain.set_tenant(request, request.headers["x-user"])
        await self.app(scope, receive, send)


def starlette_app(client: aiqueue.Client) -> Starlette:
    async def start(request: Request) -> Response:
        asked = Asked.model_validate(await request.json())
        handle = await plain.queue(request).enqueue(
            Count(to=asked.to, ends=asked.ends), unique=plain.idempotency_key(request), timeout=asked.timeout
        )
        return plain.accepted(request, handle, "show")

    async def show(request: Request) -> Response:
        return JSONResponse(await plain.describe(await plain.the_job(request)))

    async def result(request: Request) -> Response:
        return JSONResponse(await (await plain.the_job(request, model=Count)).result(timeout=0.5))

    async def cancel(request: Request) -> Response:
        return JSONResponse(await (await plain.the_job(request)).cancel())

    async def events(request: Request) -> Response:
        return plain.sse(await plain.the_job(request), plain.last_event_id(request), ping_s=0.1)

    routes = [
        Route("/api/counts", start, methods=["POST"]),
        Route("/api/others", start, methods=["POST"]),
        Route("/api/jobs/{job_id}", show),
        Route("/api/jobs/{job_id}", cancel, methods=["DELETE"]),
        Route("/api/jobs/{job_id}/result", result),
        Route("/api/jobs/{job_id}/events", events),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(HeaderUsers)], lifespan=plain.lifespan(client))
    plain.install_errors(app)
    return app


APPS = {"fastapi": fastapi_app, "starlette": starlette_app}


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Served(NamedTuple):
    """An application over real HTTP, and a session of one user of it."""

    http: aiohttp.ClientSession
    app: Starlette
    url: str

    @property
    def state(self) -> WebState:
        found: WebState = getattr(self.app.state, KEY)
        return found

    async def start(self, **asked: Any) -> str:
        """Have a job enqueued, and return its URL."""
        async with self.http.post("/api/counts", json=asked) as answer:
            assert answer.status == 202, await answer.text()
            return answer.headers["location"]


@asynccontextmanager
async def serving(app: Starlette, user: str) -> AsyncIterator[Served]:
    server = _Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5))
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done(), task.exception()
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    timeout = aiohttp.ClientTimeout(20)
    try:
        async with aiohttp.ClientSession(url, headers={"x-user": user}, timeout=timeout) as http:
            yield Served(http, app, url)
    finally:
        server.should_exit = True
        await task
