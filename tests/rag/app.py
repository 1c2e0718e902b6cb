"""A retrieval worker as a process of its own, for tests that kill it. It logs each text that it embeds."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.rag import RagWorker
from aiqueue.rag.embedding import WordLlamaEmbedder

from ..gateway.running import shorten_leases

LOG = os.open(os.environ["EMBED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
STOPS_AFTER = int(os.environ.get("EMBED_STOPS_AFTER", "0"))  # texts, 0: never; then it waits to be killed
DEADLY = "a text that ends its process"


class Logging(WordLlamaEmbedder):
    count = 0

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        if any(DEADLY in each for each in texts):
            os._exit(9)
        found = await super().embed(texts, tenant=tenant)
        os.write(LOG, b"%d\n" % len(texts))
        self.count += len(texts)
        if 0 < STOPS_AFTER < self.count:
            await asyncio.Event().wait()
        return found


worker = RagWorker(Path(os.environ["RAG_FILE"]), embedder=Logging(), concurrency=8)
worker.suspect_after = 2  # so that a test of it is quick


async def _work() -> None:
    """Run the worker with short leases."""
    url, user, password = sys.argv[1:]
    async with aiqueue.connect(url, user=user, password=password) as client:
        await shorten_leases(client)
        async with importlib.import_module("tests.rag.app").worker.running(client):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_work())
