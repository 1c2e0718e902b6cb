"""A durable work queue for AI workloads on NATS JetStream."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agent import Agent
    from .bus import NATSClient
    from .client import Client, Handle, SyncClient, SyncHandle, connect, connect_sync
    from .config import Settings
    from .errors import AIQueueError, JobCancelled, JobFailed, JobState, QueueFull
    from .job import Child, Job, JobSpec, Message, RawMessage, Reject, Retry
    from .lanes import Pause
    from .payload import Document
    from .schedules import Calendar, Cron, Every, Once, Tick
    from .topology import Topology
    from .units import Backoff
    from .worker import Responder, Worker

__version__ = "0.1.0"

_MODULE_OF = {
    "AIQueueError": "errors",
    "Agent": "agent",
    "Backoff": "units",
    "Calendar": "schedules",
    "Child": "job",
    "Client": "client",
    "Cron": "schedules",
    "Document": "payload",
    "Every": "schedules",
    "Handle": "client",
    "Job": "job",
    "JobCancelled": "errors",
    "JobFailed": "errors",
    "JobSpec": "job",
    "JobState": "errors",
    "Message": "job",
    "NATSClient": "bus",
    "Once": "schedules",
    "Pause": "lanes",
    "QueueFull": "errors",
    "RawMessage": "job",
    "Reject": "job",
    "Responder": "worker",
    "Retry": "job",
    "Settings": "config",
    "SyncClient": "client",
    "SyncHandle": "client",
    "Tick": "schedules",
    "Topology": "topology",
    "Worker": "worker",
    "connect": "client",
    "connect_sync": "client",
}

__all__ = [
    "AIQueueError", "Agent", "Backoff", "Calendar", "Child", "Client", "Cron", "Document", "Every", "Handle", "Job",
    "JobCancelled", "JobFailed", "JobSpec", "JobState", "Message", "NATSClient", "Once", "Pause", "QueueFull",
    "RawMessage", "Reject", "Responder", "Retry", "Settings", "SyncClient", "SyncHandle", "Tick", "Topology",
    "Worker", "connect", "connect_sync",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line and the embedded server start quickly."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
