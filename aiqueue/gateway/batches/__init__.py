"""OpenAI's files and batches: the lines of a file as durable jobs, and their answers as a file.

`client` is what callers use, `engine` what a worker runs. Only `store` knows the connection.
"""

from __future__ import annotations

from .client import BatchEnded, Batches
from .messages import GatewayBatch
from .model import BATCH_ENDPOINTS, BatchFile, BatchQuota, BatchQuotas, LineProblem, RequestBatch
from .store import BatchStore

__all__ = [
    "BATCH_ENDPOINTS",
    "BatchEnded",
    "BatchFile",
    "BatchQuota",
    "BatchQuotas",
    "BatchStore",
    "Batches",
    "GatewayBatch",
    "LineProblem",
    "RequestBatch",
]  # fmt: skip
