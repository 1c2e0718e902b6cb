"""Requests for a job's result, answered by `aiqueue respond` or any other responder."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

from .. import codec, headers, subjects
from ..connection import Received
from ..enqueue import Producer
from ..errors import BadInput, DecodeError, ResultTimeout, Unavailable
from ..job import Message
from ..logs import running_job
from ..payload import R, document_in, encode_message, parse_result
from ..topology import Family
from ..tracing import NOT_SENT, TRACEPARENT, Sending, names
from . import replies

REPEAT_AFTER_S = 10.0  # the responder may have died; repeating the request with the same id is harmless
PAUSE_S, PAUSE_MAX_S = 0.1, 2.0  # between requests that found no responder
BARE_ID_BYTES_MAX = 80  # of a request that is only an id: a token, and what stands around it
ABSENT_MAX_S = 5.0  # without a responder: a responder that was restarted, or that reconnects, is back by then


async def request_result(
    producer: Producer,
    message: Message[R],
    *,
    tenant: str,
    priority: str,
    unique: str | None,
    extra: Mapping[str, str] | None,
    timeout_s: float | None,
) -> R:
    """Send a request until it is answered, and return the result. Implements `Client.request`."""
    family, request_headers = producer.request_headers(message, tenant, priority, unique, extra)
    job_id = request_headers[headers.JOB_ID]
    if family.reply_within_s is None:
        raise BadInput(
            f"family {family.name} answers no requests (it has no reply_within): enqueue the job, and await its result"
        )
    if message.aiq_documents:
        raise BadInput(f"a {message.aiq_kind} with documents cannot be a request: enqueue it, and await the result")
    total_s = family.reply_within_s if timeout_s is None else timeout_s
    with start_request(producer, family, tenant, request_headers, job_id):
        answer = await send_until_answered(
            producer, family, tenant, request_headers, encode_message(message), job_id=job_id,
            same_id=f"unique={job_id!r}", timeout_s=total_s,
        )  # fmt: skip
        result: R = replies.read_answer(answer.headers, answer.data)
    if message.aiq_result is not Any:
        result = parse_result(type(message), result, job_id=job_id, secrets=answer.headers.get(headers.SECRET, ""))
    return result


async def send_until_answered(
    producer: Producer,
    family: Family,
    tenant: str,
    request_headers: dict[str, str],
    body: bytes,
    *,
    job_id: str,
    same_id: str,
    timeout_s: float,
) -> Received:
    """Send a request for the result of job `job_id` until it is answered, and return the answer.

    A large result is fetched: the answer is as if the result had fitted into a message.

    `request_headers` or the body name the job. `same_id` says how the caller names it again, in the error of
    a timeout. Raises the error in the answer, ResultTimeout, and Unavailable if there is no responder for ABSENT_MAX_S,
    or if the request could not be sent.
    """
    subject = f"{family.journal}.{tenant}"
    end, pause_s, absent_since = time.monotonic() + timeout_s, PAUSE_S, math.inf
    maybe_enqueued = False  # a responder may have had the request: the job continues
    problem: Unavailable | None = None
    said = ""  # why a responder has asked for another request
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await producer.clock.ensure(family.stream)
    while (left_s := end - time.monotonic()) > 0:
        slice_s = min(left_s, REPEAT_AFTER_S)
        request_headers[headers.DEADLINE] = str(round((producer.clock.now() + slice_s) * 1000))
        try:
            answer = await _send_request(producer, subject, body, request_headers, slice_s)
            try:
                replies.raise_error(answer.headers, answer.data, job_id)
            except Unavailable as error:
                said = f" (last: {error})"
                raise
            break
        except ResultTimeout:
            absent_since, maybe_enqueued = math.inf, True
            said = said if slice_s < REPEAT_AFTER_S else ""  # else a responder has waited for the job
            continue  # only this request has timed out
        except Unavailable as error:
            problem = error
            now = time.monotonic()
            if "no responders" in str(error):
                absent_since = min(absent_since, now)
                if not maybe_enqueued and now + pause_s >= min(absent_since + ABSENT_MAX_S, end):
                    raise Unavailable(f"no responder answers on {subject}: run `aiqueue respond`") from None
            else:
                absent_since, maybe_enqueued = math.inf, maybe_enqueued or error.maybe_stored
            if producer.connection.closing:
                raise
        await asyncio.sleep(max(0.0, min(pause_s, end - time.monotonic())))
        pause_s = min(pause_s * 2, PAUSE_MAX_S)
    else:
        if not maybe_enqueued:
            why = f": {problem}" if problem is not None else ", because the server does not answer"
            raise Unavailable(f"the request for job {job_id} was not sent within {timeout_s:g} s{why}")
        raise ResultTimeout(
            f"timed out after {timeout_s:g} s waiting for the result of job {job_id}"
            f"{said}; the job continues: repeat the request with {same_id}"
        )
    document = document_in(answer.headers, tenant)
    if document is None:
        return answer
    body = await producer.documents.read_result_body(document, max(0.0, end - time.monotonic()))
    return replies.with_result(answer, body, job_id)


def start_request(
    producer: Producer, family: Family, tenant: str, request_headers: dict[str, str], job_id: str
) -> Sending:
    """Start the span of a request, and add the headers of its trace to those of the request."""
    if producer.tracing is None or headers.find(request_headers, TRACEPARENT):
        return NOT_SENT
    sending = producer.tracing.start_send(
        str(family.journal), tenant, job_id, operation=names.REQUEST, of=running_job.get()
    )
    if sending is None:
        return NOT_SENT
    request_headers.update(sending.headers)
    return sending


def find_bare_id(body: bytes, content_type: str) -> str:
    """Return the id that is the whole body of a request: as a text, or as one in JSON or CBOR; "" if it is none."""
    if len(body) > BARE_ID_BYTES_MAX:
        return ""
    text: Any = body.decode("ascii", "replace").strip().strip('"')
    if content_type == codec.CBOR:
        with contextlib.suppress(DecodeError):
            text = codec.decode(body, content_type)
    return text if isinstance(text, str) and subjects.TOKEN.fullmatch(text) else ""


async def _send_request(
    producer: Producer, subject: str, body: bytes, request_headers: Mapping[str, str], timeout_s: float
) -> Received:
    return await producer.connection.request(subject, body, headers=dict(request_headers), timeout_s=timeout_s)
