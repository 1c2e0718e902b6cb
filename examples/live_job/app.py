"""A web service whose page shows a job while it runs: `uvicorn app:app`, beside `aiqueue work tasks:worker`."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Cookie, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from tasks import Report

import aiqueue.fastapi as aiq

SECRET = os.environ.get("SECRET", "only for this example").encode()

app = FastAPI(title="Reports", lifespan=aiq.lifespan())
aiq.install_errors(app)


# -- who asks: a signed cookie, because a browser's EventSource sends no other header


class Login(BaseModel):
    tenant: str = Field(pattern="^[a-z0-9-]{1,40}$")


def sign(tenant: str) -> str:
    return f"{tenant}.{hmac.new(SECRET, tenant.encode(), hashlib.sha256).hexdigest()}"


def current_tenant(session: Annotated[str, Cookie()] = "") -> str:
    tenant = session.partition(".")[0]
    if not hmac.compare_digest(session.encode(), sign(tenant).encode()):
        raise HTTPException(401, "log in first")
    return tenant


@app.post("/login", status_code=204)
async def login(asked: Login, request: Request, response: Response) -> None:
    """Log in as anybody: an example. Yours checks a password, or asks an identity provider."""
    is_https = request.url.scheme == "https"
    response.set_cookie("session", sign(asked.tenant), httponly=True, samesite="strict", secure=is_https)


# -- jobs: all of them of the tenant who has logged in


class Asked(BaseModel):
    topic: str = Field(min_length=1, max_length=80)
    lines: int = Field(default=20, ge=1, le=200)


jobs = APIRouter(prefix="/jobs", dependencies=[aiq.tenant_from(current_tenant)])


@jobs.post("", status_code=202)
async def start(asked: Asked, request: Request, queue: aiq.Queue, key: aiq.IdempotencyKey) -> Response:
    handle = await queue.enqueue(Report(topic=asked.topic, lines=asked.lines), unique=key)
    return aiq.accepted(request, handle, "show")


@jobs.get("/{job_id}")
async def show(job: aiq.TheJob) -> aiq.JobView:
    return await aiq.describe(job)


@jobs.delete("/{job_id}")
async def cancel(job: aiq.TheJob) -> bool:
    return await job.cancel()


@jobs.get("/{job_id}/events")
async def events(job: aiq.TheJob, after: aiq.LastEventId) -> Response:
    return aiq.sse(job, after)


app.include_router(jobs)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))
