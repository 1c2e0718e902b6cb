"""The client: connect, enqueue, wait for a result, cancel; with asyncio or without.

This room may not run handlers: that is `worker`. It only combines what the rooms below do.
"""

from __future__ import annotations

from .act_many import ActOutcome
from .auditing import AuditedAct, AuditLine
from .cancel import Verdict
from .client import Client, check_client, connect
from .embedding import acquire_here
from .handle import Handle, tasks_awaiting_results
from .job_plans import JobPlan
from .options import EnqueueOptions, RequestOptions
from .sync_client import SyncClient, SyncHandle, connect_sync

__all__ = [
    "ActOutcome", "AuditLine", "AuditedAct", "Client", "EnqueueOptions", "Handle", "JobPlan", "RequestOptions",
    "SyncClient", "SyncHandle", "Verdict", "acquire_here",
    "check_client", "connect", "connect_sync", "tasks_awaiting_results",
]  # fmt: skip
