"""Which job a request becomes: a new one, that of its Idempotency-Key, or that of the request which a client repeats.

docs/decisions/gateway-front.md has all cases.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from starlette.requests import Request

from ...enqueue import FreshId
from ...errors import AIQueueError, IdReused, Unavailable
from ...tracing import received_trace
from ..answers import usage_of
from ..api_key_store import ApiKey
from ..api_keys import KeyCredit
from ..key_budgets import API_KEY
from ..recent_requests import RecentRequests
from ..requests import EmbeddingRequest, GatewayRequest
from ..token_bound import tokens_at_most
from .authentication import PRIORITY_HEADER, priority_of
from .context import Front
from .errors import ApiError

if TYPE_CHECKING:
    from ...client import Handle

log = logging.getLogger(__name__)

KEY_HEADER: Final = "idempotency-key"
REPEATED: Final = "x-stainless-retry-count"  # of OpenAI's clients: how often they have sent this request before
_KEY = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")

_notes: set[asyncio.Task[None]] = set()  # being written


class Submission(NamedTuple):
    """A request's job, and what its API key's limits have admitted for it. `is_new`: the job was stored just now, under
    an id of its own.
    """

    handle: Handle[dict[str, Any]]
    admitted: KeyCredit
    is_new: bool = False

    def settle(self, answer: dict[str, Any] | None) -> None:
        """Count the tokens of the answer against the limits of the API key. None: it has failed, and counts none."""
        if answer is None:
            self.admitted.settle(0)
            return
        used = usage_of(answer)
        self.admitted.settle(None if used is None else used.total_tokens)


async def submit(request: Request, front: Front, asked: GatewayRequest | EmbeddingRequest) -> Submission:
    """Enqueue a request, or join the one that it repeats. Raises ApiError, and what `Client.enqueue` raises."""
    key: ApiKey = request.state.key
    priority = priority_of(key, request.headers.get(PRIORITY_HEADER))
    front.gateway.check(asked, tenant=key.tenant, api_key=key)  # what can never be answered counts against no limit
    tokens = tokens_at_most(asked, front.config.find_model(asked.model))
    admitted = await front.keys.admit(key, tokens=tokens)
    try:
        handle, is_new = await _enqueue(request, front, asked, priority)
    except BaseException:
        admitted.settle(0)
        raise
    if handle.duplicate:
        admitted.settle(0)
    return Submission(handle, admitted, is_new)


async def _enqueue(
    request: Request, front: Front, asked: GatewayRequest | EmbeddingRequest, priority: str
) -> tuple[Handle[dict[str, Any]], bool]:
    """Return the job, and whether its id is new."""
    key: ApiKey = request.state.key
    of_trace = received_trace(request.headers, front.client.tracing)
    options: dict[str, Any] = {
        "tenant": key.tenant, "priority": priority, "headers": {API_KEY: key.id, **of_trace},
        "timeout": front.settings.store_s,
    }  # fmt: skip
    given = idempotency_key(request)
    if given is not None:
        return await front.client.enqueue(asked, unique=given, on_duplicate="rerun_failed", **options), False
    repeated = request.headers.get(REPEATED)
    if repeated is None:  # not a client that repeats by itself
        return await front.client.enqueue(asked, **options), True
    recent = RecentRequests(front.client.connection, front.client.topology)
    fingerprint = asked.fingerprint()
    if repeated != "0":
        former = await _find(recent, key, fingerprint)
        if former is not None:
            try:
                return await front.client.enqueue(asked, unique=former, on_duplicate="rerun_failed", **options), False
            except IdReused:
                log.warning("job %s has another body than the request that has noted it", former)
    job_id = FreshId.make(front.client.connection.clock)
    task = asyncio.create_task(_note(recent, key, fingerprint, job_id))
    _notes.add(task)
    task.add_done_callback(_notes.discard)
    await asyncio.sleep(0)  # the note is sent, and then the job: a server that has the job has the note
    return await front.client.enqueue(asked, unique=job_id, **options), True


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a request; None: it has none. Raises ApiError."""
    given = request.headers.get(KEY_HEADER)
    if given is not None and _KEY.fullmatch(given) is None:
        raise ApiError(400, "Idempotency-Key must be 1 to 256 printable ASCII characters", code="invalid_key")
    return given


async def _find(recent: RecentRequests, key: ApiKey, fingerprint: str) -> str | None:
    try:
        return await recent.find(key.tenant, key.id, fingerprint)
    except Unavailable:  # made anew, it could be paid for twice: the client repeats it again
        raise
    except AIQueueError as error:
        log.warning("a repeated request is made anew, because the first one is not found: %s", error)
        return None


async def _note(recent: RecentRequests, key: ApiKey, fingerprint: str, job_id: str) -> None:
    try:
        await recent.note(key.tenant, key.id, fingerprint, job_id)
    except AIQueueError as error:
        log.warning("job %s: if its client repeats the request, it is made twice: %s", job_id, error)
