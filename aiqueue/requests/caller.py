"""Requests that await their answers, from a responder of ours or any other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from .. import codec, headers
from ..connection import Received
from ..enqueue import Producer
from ..errors import BadInput, ResultTimeout, Unavailable
from ..job import Message
from . import replies

ASK_AGAIN_S = 10.0  # a responder may have died with the request; asking again with the same id is harmless
PAUSE_S, PAUSE_MAX_S = 0.1, 2.0


async def call(
    producer: Producer,
    message: Message,
    *,
    tenant: str,
    priority: str,
    unique: str | None,
    extra: Mapping[str, str] | None,
    timeout_s: float | None,
) -> Any:
    """See `Client.request`."""
    family, told = producer.told(message, tenant, priority, unique, extra)
    job_id = told[headers.JOB_ID]
    if family.reply_within_s is None:
        raise BadInput(f"family {family.name} answers no requests (no reply_within): enqueue, and await the result")
    if message.aiq_documents:
        raise BadInput(f"a {message.aiq_kind} with documents cannot be a request: enqueue it, and await the result")
    subject, body = f"{family.journal}.{tenant}", codec.encode(message)
    patience_s = family.reply_within_s if timeout_s is None else timeout_s
    end, pause_s = time.monotonic() + patience_s, PAUSE_S
    while (left_s := end - time.monotonic()) > 0:
        slice_s = min(left_s, ASK_AGAIN_S)
        told[headers.DEADLINE] = str(round((time.time() + slice_s) * 1000))
        try:
            answer = await _ask(producer, subject, body, told, slice_s)
            return replies.read(answer.headers, answer.data, job_id)
        except ResultTimeout:
            continue  # of this slice
        except Unavailable as error:
            if "no responders" in str(error):
                raise Unavailable(f"nobody answers on {subject}: run `aiqueue respond`") from None
            if producer.connection.closing:
                raise
        await asyncio.sleep(max(0.0, min(pause_s, end - time.monotonic())))
        pause_s = min(pause_s * 2, PAUSE_MAX_S)
    raise ResultTimeout(f"no answer to {job_id} within {patience_s:g} s: it goes on, ask again with unique={job_id!r}")


async def _ask(producer: Producer, subject: str, body: bytes, told: Mapping[str, str], timeout_s: float) -> Received:
    return await producer.connection.request(subject, body, headers=dict(told), timeout_s=timeout_s)
