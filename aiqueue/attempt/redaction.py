"""Keeps the secrets of a message out of what its handler's errors say: exceptions often repeat their input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import headers
from ..codec import secret_paths
from .decoding import DecodedJob
from .handler import Handler
from .outcome_types import Outcome, Raised, Refused


def secrets_of(job_headers: Mapping[str, str], handler: Handler | None) -> str:
    """Return which fields are secret, by the publisher's header and by the handler's model; empty for none."""
    of_model = secret_paths.header_of_class(handler.model) if handler is not None else ""
    return secret_paths.merge(job_headers.get(headers.SECRET, ""), of_model)


def secrets_of_body(decoded: DecodedJob, job_headers: Mapping[str, str], handler: Handler | None) -> str:
    """As `secrets_of`, for the body as it is stored: a plain publisher may have put the message into an envelope."""
    found = secrets_of(job_headers, handler)
    return secret_paths.within_data(found) if found and decoded.version is not None else found


def without_secrets(outcome: Outcome, secrets: str, data: Any, body: bytes) -> Outcome:
    """Return an outcome whose error and traceback do not contain the secrets of `data`, a message's plain data.

    None: it is not known which part of the `body` is secret, so the error repeats no line of it.
    """
    if not secrets or not isinstance(outcome, Raised | Refused):
        return outcome
    if data is None:
        secrets, data = secret_paths.WHOLE, body
    error, trace = (secret_paths.redact(text, data, secrets) for text in (outcome.error, outcome.trace))
    return replace(outcome, error=error, trace=trace)
