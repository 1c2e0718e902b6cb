"""A retrieval worker as a process of its own, for tests that kill it. It logs each text that it embeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiqueue.rag import RagWorker
from aiqueue.rag.embedding import WordLlamaEmbedder

LOG = os.open(os.environ["EMBED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Logging(WordLlamaEmbedder):
    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        found = await super().embed(texts, tenant=tenant)
        os.write(LOG, b"%d\n" % len(texts))
        return found


worker = RagWorker(Path(os.environ["RAG_FILE"]), embedder=Logging(), concurrency=8)
