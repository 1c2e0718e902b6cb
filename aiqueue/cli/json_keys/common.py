"""What is common to all outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict


class Output(NamedTuple):
    """One form of a command's output. `when`: which one, "" if there is one form only. `lines`: an object a line."""

    type: Any
    when: str = ""
    lines: bool = False


class Common(TypedDict):
    """Keys that mean the same wherever they stand, and nothing else is said of them."""

    job_id: str
    """Id by which `aiqueue inspect` and `Client.job` find the job."""
    family: str
    """Family, such as agent.tasks."""
    tenant: str
    """Tenant that this is of."""
    priority: str
    """Priority of the lane: high, normal or low, or another one of the family."""
    kind: str
    """Kind of the message, which names its handler."""
    stream: str
    """Name of the stream on the server."""
    attempt: int
    """Number of the attempt, from 1; 0: none was started."""
    enqueued_at: float
    """When the job was enqueued, in seconds since the epoch."""
    headers: Mapping[str, str]
    """Headers of the message by name."""
    document_id: str
    """Id of the document, as its owner gave it."""
    month: str
    """Month in UTC, such as 2026-11."""
