"""Errors as answers over HTTP: application/problem+json (RFC 9457), with a status for each error of aiqueue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from ..errors import (
    AccountFull,
    AIQueueError,
    BadInput,
    Conflict,
    DecodeError,
    DiskFull,
    JobCancelled,
    JobFailed,
    JobGone,
    LoadError,
    MailBounced,
    NotFound,
    QueueFull,
    ReplyTimeout,
    ResponderError,
    ResultDisabled,
    ResultInvalid,
    ResultTimeout,
    SettingsError,
    StreamFull,
    TooLarge,
    TopologyError,
    Unavailable,
    UnknownFamily,
)

MEDIA_TYPE: Final = "application/problem+json"
RETRY_S: Final = 1.0  # after an outage of the server, or a wait that was too short


class HttpProblem(NamedTuple):
    """An answer in place of a result. `detail`: one line for the caller, without what concerns only the service.

    `body`: None for a status without one.
    """

    status: int
    """Status code of the HTTP answer."""
    detail: str
    headers: Mapping[str, str]
    """HTTP headers of the answer, such as Retry-After."""
    body: Mapping[str, Any] | None


_FAULT: Final = "the service has failed"  # what it is stands in its log
# By the first class that matches: the status, and the text in place of the error's own. None: the error's own.
_STATUSES: Final[tuple[tuple[tuple[type[AIQueueError], ...], int, str | None], ...]] = (
    ((UnknownFamily, LoadError, SettingsError, TopologyError, DecodeError), 500, _FAULT),
    ((TooLarge,), 413, None),
    ((BadInput,), 422, None),
    ((Unavailable,), 503, "the queue does not answer now"),
    ((StreamFull, AccountFull, DiskFull), 503, "the queue is full"),
    ((QueueFull,), 429, None),
    ((NotFound,), 404, "there is no such job (any more)"),
    ((JobGone,), 410, "the job is gone without an outcome"),
    ((Conflict,), 409, None),
    ((ResultTimeout, ReplyTimeout), 504, "there is no answer yet; what was asked goes on"),
    ((ResultDisabled,), 204, ""),
    ((ResultInvalid, ResponderError, MailBounced), 502, "what the service depends on has failed"),
    ((AIQueueError,), 500, _FAULT),
)
_FAILURES: Final[Mapping[str, int]] = {"deadline": 504, "rejected": 422}  # by the reason of a dead letter; others: 502


def problem_of(error: AIQueueError) -> HttpProblem:
    """Return what a caller is answered with when this error is raised.

    Texts of exceptions that a handler did not raise on purpose, and those about the service, its server and its
    settings, are left out. `Retry-After` is there if the same request can succeed later.
    """
    if isinstance(error, JobFailed):
        status, detail = _of_failure(error)
    else:
        status, shown = next((status, text) for kinds, status, text in _STATUSES if isinstance(error, kinds))
        detail = str(error) if shown is None else shown
    if status == HTTPStatus.NO_CONTENT:
        return HttpProblem(status, detail, {}, None)
    body: dict[str, Any] = {
        "type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail,
        "error": type(error).__name__, "retryable": error.retryable,
    }  # fmt: skip
    if isinstance(error, JobFailed):
        body |= {"job_id": error.job_id, "reason": error.reason}
    if isinstance(error, Unavailable):
        body["maybe_stored"] = error.maybe_stored
    headers = {}
    if error.retryable:
        wait_s = error.retry_after_s if isinstance(error, QueueFull) else RETRY_S
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
    return HttpProblem(status, detail, headers, body)


def _of_failure(failed: JobFailed) -> tuple[int, str]:
    if isinstance(failed, JobCancelled):
        return 410, f"job {failed.job_id} was cancelled"
    status = _FAILURES.get(failed.reason, 502)
    if failed.reason in _FAILURES:
        return status, f"job {failed.job_id} has failed ({failed.reason}): {failed.error}"
    return status, f"job {failed.job_id} has failed ({failed.reason})"
