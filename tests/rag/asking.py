"""Questions in a test: a worker that answers them from a store on disk, with vectors that cost nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import aiqueue
from aiqueue.gateway import load
from aiqueue.gateway.standin import embed
from aiqueue.rag import AnswerConfig, Chunk, DocumentHeader, IndexedChunks, IndexedDocument, RagConfig
from aiqueue.rag.answering import Answerer
from aiqueue.rag.embed_batcher import EmbedBatcher
from aiqueue.rag.queries import Queries, register_queries
from aiqueue.rag.store import SqliteStore

from .. import forks
from ..gateway.running import shorten_leases
from ..support import ROOT, Account

DIMENSIONS = 16


class HashEmbedder:
    """Vectors that are hashes. `embedded`: the texts so far. `delay_s`: of each call. `failures`: calls that fail."""

    name, dimensions = "stand-in-16", DIMENSIONS

    def __init__(self) -> None:
        self.embedded: list[str] = []
        self.delay_s = 0.0
        self.failures = 0

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        del tenant
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no model")
        self.embedded += texts
        await asyncio.sleep(self.delay_s)
        return vectors(texts)

    async def close(self) -> None:
        pass


@dataclass
class State:
    """What the handler of questions needs."""

    store: SqliteStore
    queries: Queries
    embedder: HashEmbedder


def vectors(texts: Sequence[str]) -> Any:
    made = np.asarray([embed(each, DIMENSIONS) for each in texts], np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


async def put(store: SqliteStore, tenant: str, documents: Mapping[str, Sequence[str]], **metadata: Any) -> None:
    """Store documents: their chunks by their ids."""
    await store.open(tenant, HashEmbedder.name, DIMENSIONS)
    made = []
    for document_id, texts in documents.items():
        chunks = [Chunk(number, text, f"Part {number}") for number, text in enumerate(texts)]
        header = DocumentHeader(document_id, 256, f"hash of {document_id}", document_id.upper(), metadata=metadata)
        made.append(
            IndexedDocument(header, IndexedChunks(chunks, vectors(texts), vectors([each.heading for each in chunks])))
        )
    assert await store.put(tenant, made) == ["new"] * len(made)


@asynccontextmanager
async def answering(
    client: aiqueue.Client,
    root: Path,
    config: AnswerConfig | None = None,
    gateway: Path | None = None,
    **options: Any,
) -> AsyncIterator[State]:
    """Run a worker that answers questions from the store in `root`."""
    store = SqliteStore(root)

    async def ready(tenant: str) -> bool:
        if not (await store.stats(tenant)).embedder:
            return False
        await store.open(tenant, HashEmbedder.name, DIMENSIONS)
        return True

    embedder = HashEmbedder()
    batcher = EmbedBatcher(embedder)
    answers = config or AnswerConfig()
    answerer = Answerer(client, answers, None if gateway is None else load(gateway))
    queries = Queries(
        client, RagConfig(answers=answers), store, embedder=batcher, ready=ready, answerer=answerer, **options
    )
    state = State(store, queries, embedder)

    @asynccontextmanager
    async def lend() -> AsyncIterator[State]:
        yield state

    worker = aiqueue.Worker(lifespan=lend, concurrency=20)
    register_queries(worker)
    try:
        async with worker.running(client):
            yield state
    finally:
        await batcher.close()
        await store.close()


@contextmanager
def answering_child(account: Account, root: Path, log: Path) -> Iterator[forks.Program]:
    """Run such a worker in a process of its own, whose answers are by the model "small". It is killed at the end."""
    arguments = [account.url, account.user, account.password, str(root)]
    with (
        log.open("ab") as out,
        forks.start("tests.rag.asking", *arguments, cwd=ROOT, stdout=out, stderr=out) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


async def _answer() -> None:
    url, user, password, root = sys.argv[1:]
    async with aiqueue.connect(url, user=user, password=password) as client:
        await shorten_leases(client)
        async with answering(client, Path(root), AnswerConfig(model="small", tokens_max=100)):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_answer())
