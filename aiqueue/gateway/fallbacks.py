"""Fallback models: each is called by a child of the job, so that it waits in the lane of its own model's limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote, unquote

from ..errors import BadInput
from ..headers import PARENT
from ..job import Job, Reject
from ..subjects import ParentRun
from .call_notes import note_fallback
from .key_budgets import API_KEY
from .requests import GatewayRequest
from .runtime import Request, Runtime
from .stored_chunks import ChunkWriter, as_chunks

FALLBACK_OF: Final = "Gateway-Fallback-Of"  # headers of a child: the model that was asked for
REQUEST_ID: Final = "Gateway-Request-Id"  # and whose request it is, percent-encoded
ID_MAX: Final = 512


def fallback_of(job: Job[Any]) -> str | None:
    """Return the model in whose place a job is called; None if it is no fallback.

    Only a child of a request is one: a publisher may set the header, too.
    """
    parent = ParentRun.parse(job.headers.get(PARENT, ""))
    value = job.headers.get(FALLBACK_OF) if parent is not None and parent.family == job.family else None
    return unquote(value) if value else None


def request_id_of(job: Job[Any]) -> str:
    """Return the id of the request that a job answers, at most 512 characters."""
    told = job.headers.get(REQUEST_ID)
    found = unquote(told) if told and fallback_of(job) is not None else job.message.request_id
    try:
        (found or "").encode()
    except UnicodeEncodeError:
        found = None
    return (found or job.id)[:ID_MAX]


async def answer_by_fallback(
    runtime: Runtime, job: Job[Any], why: str, *, begun: Sequence[str], lost: int, calls: int
) -> dict[str, Any]:
    """Return the answer of the first fallback of the job's model that has one. Raises Reject with all reasons.

    The job waits for the child without a slot, and its handler runs again then. A fallback has no fallbacks itself.

    `why`: what is wrong with the model itself. `begun`: fallbacks that the run has enqueued, whatever gateway.toml says
    now. `lost`, `calls`: of the job's own calls, for the bill.
    """
    reasons = [why]
    model = runtime.config.models.get(job.message.model)
    known = () if model is None or fallback_of(job) is not None else model.fallbacks
    for name in dict.fromkeys((*begun, *known)):
        request: Request = job.message.model_copy(update={"model": name, "request_id": None, **_unstreamed(job)})
        if name not in begun:
            try:
                runtime.plan(request, name, job.tenant)
            except BadInput as error:
                reasons.append(f"fallback {name}: {error}")
                continue
            await note_fallback(job, name)
        told = {FALLBACK_OF: quote(job.message.model), REQUEST_ID: quote(request_id_of(job))}
        if API_KEY in job.headers:
            told[API_KEY] = job.headers[API_KEY]
        child = await job.enqueue(request, f"fallback {name}", headers=told)
        (found,) = await job.gather([child], on_failed="return")
        if isinstance(found, dict):
            return await _adopt(job, found, lost, calls)
        reasons.append(f"fallback {name}: {getattr(found, 'error', '') or found}")
    raise Reject("; ".join(reasons)) from None


def _unstreamed(job: Job[Any]) -> dict[str, Any]:
    """The child's journal has no reader: its answer comes as a whole."""
    return {"stream": False, "stream_options": None} if isinstance(job.message, GatewayRequest) else {}


async def _adopt(job: Job[Any], answer: dict[str, Any], lost: int, calls: int) -> dict[str, Any]:
    """Return the answer of a child as that of the job, and stream it if the request asks for that."""
    about = dict(answer.get("aiqueue") or {})
    about["possibly_billed"] = about.get("possibly_billed", 0) + lost
    about["attempts"] = about.get("attempts", 1) + calls
    answer = {**answer, "aiqueue": about}
    if getattr(job.message, "stream", False) and "choices" in answer:
        writer = ChunkWriter(job, f"fallback {about.get('model', '')}")
        for chunk in as_chunks(answer):
            await writer(chunk)
    return answer
