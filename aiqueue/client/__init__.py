"""The client: connect, enqueue, await a result, cancel; with asyncio or without.

May not run handlers: that is `worker`. What it wires together lives in the rooms below.
"""

from __future__ import annotations

from .blocking import SyncClient, SyncHandle, connect_sync
from .cancel import Verdict
from .client import Client, connect
from .handle import Handle

__all__ = ["Client", "Handle", "SyncClient", "SyncHandle", "Verdict", "connect", "connect_sync"]
