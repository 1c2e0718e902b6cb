"""A gateway worker in a process of its own, to be killed: run by `running.child`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import aiqueue.client
from aiqueue.gateway import GatewayWorker, UsageLedger
from aiqueue.gateway.paid_call import PaidCall

from .running import shorten_leases

log = logging.getLogger(__name__)


async def hang(*_: Any, **__: Any) -> Any:
    """Stand where a worker is killed before the record of a call is begun, or ended."""
    log.warning("hangs")
    await asyncio.Event().wait()


async def answer() -> None:
    match os.environ.get("GATEWAY_TEST_HANG"):
        case "end":
            PaidCall.end = hang  # type: ignore[method-assign]
        case "begin":
            UsageLedger.begin = hang  # type: ignore[method-assign]
    concurrency = int(os.environ.get("GATEWAY_TEST_CONCURRENCY", "100"))
    url, user, password, path = sys.argv[1:]
    async with aiqueue.client.connect(url, user=user, password=password) as client:
        await shorten_leases(client)
        async with GatewayWorker(Path(path), concurrency=concurrency).running(client):
            await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    asyncio.run(answer())
