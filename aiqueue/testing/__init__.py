"""Tests of programs that use aiqueue, on the real server: accounts, clients, calls of handlers, jobs whose time comes.

The pytest plugin (`plugin`) is loaded in every pytest run where aiqueue is installed, so everything else is imported on
first use. No other room may import this one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advancing import Advanced, advance
    from .asserting import EnqueuedJob, assert_enqueued
    from .clients import client, environment
    from .draining import Drained, drain
    from .performed import Performed, PerformedChild
    from .performing import perform
    from .recorder import document
    from .server import AccountServer, ServerAccount
    from .spawning import SpawnedWorker, spawn

_MODULE_OF = {
    "AccountServer": "server",
    "Advanced": "advancing",
    "Drained": "draining",
    "EnqueuedJob": "asserting",
    "Performed": "performed",
    "PerformedChild": "performed",
    "ServerAccount": "server",
    "SpawnedWorker": "spawning",
    "advance": "advancing",
    "assert_enqueued": "asserting",
    "client": "clients",
    "document": "recorder",
    "drain": "draining",
    "environment": "clients",
    "perform": "performing",
    "spawn": "spawning",
}

__all__ = [
    "AccountServer", "Advanced", "Drained", "EnqueuedJob", "Performed", "PerformedChild", "ServerAccount",
    "SpawnedWorker", "advance", "assert_enqueued", "client", "document", "drain", "environment", "perform", "spawn",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
