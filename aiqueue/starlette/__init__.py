"""The queue in a Starlette application: its lifespan, requests, errors and streams. `aiqueue.fastapi` is the same in
FastAPI's terms.

May not know a product. What is imported here at once, and `server_events`, which the gateway uses too, need no
Starlette. The rest is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .problems import HttpProblem, problem_of
from .tenant_client import TenantClient

if TYPE_CHECKING:
    from . import server_events
    from .application import lifespan
    from .event_stream import EventStream, sse
    from .requests import (
        checked_event_id,
        find_job,
        idempotency_key,
        last_event_id,
        queue,
        scoped_key,
        set_tenant,
        the_job,
    )
    from .responses import JobView, accepted, describe, install_errors

_MODULE_OF = {
    "EventStream": "event_stream",
    "JobView": "responses",
    "accepted": "responses",
    "checked_event_id": "requests",
    "describe": "responses",
    "find_job": "requests",
    "idempotency_key": "requests",
    "install_errors": "responses",
    "last_event_id": "requests",
    "lifespan": "application",
    "queue": "requests",
    "scoped_key": "requests",
    "set_tenant": "requests",
    "sse": "event_stream",
    "the_job": "requests",
}

__all__ = [
    "EventStream", "HttpProblem", "JobView", "TenantClient", "accepted", "checked_event_id", "describe", "find_job",
    "idempotency_key", "install_errors", "last_event_id", "lifespan", "problem_of", "queue", "scoped_key",
    "server_events", "set_tenant", "sse", "the_job",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what needs Starlette on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] != "starlette":
            raise
        problem = "aiqueue.starlette needs starlette: pip install 'aiqueue[starlette]'"
        raise ModuleNotFoundError(problem, name=missing.name) from None
    value = getattr(module, name)
    globals()[name] = value
    return value
