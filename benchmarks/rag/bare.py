"""The pipeline without a queue: ``python -m benchmarks.rag.bare DIRECTORY TENANT FIRST COUNT SEED``.

Parses, chunks, embeds and stores made documents, 64 at a time, from when the file `go` is in the directory. It ends
when it is told to.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aiqueue.rag import DocumentHeader, Embedder, IndexedChunks, IndexedDocument
from aiqueue.rag.chunking import chunk
from aiqueue.rag.parsing import DocumentSource, Parsers

from . import parts, texts

GROUP = 64
STEP_S = 0.001


async def main(directory: Path, tenant: str, first: int, count: int, seed: int) -> None:
    documents = [(f"note-{n}.txt", texts.document(n, seed).encode()) for n in range(first, first + count)]
    store, embedder, parsers = parts.open_store(directory / "store"), parts.open_embedder(), Parsers()
    await store.open(tenant, embedder.name, embedder.dimensions)
    await _indexed(documents[:1], tenant, embedder, parsers)  # loads what is loaded on first use
    (directory / f"ready-{os.getpid()}").touch()
    while not (directory / "go").exists():
        await asyncio.sleep(STEP_S)
    for start in range(0, count, GROUP):
        await store.put(tenant, await _indexed(documents[start : start + GROUP], tenant, embedder, parsers))
    while True:
        await asyncio.sleep(1)


async def _indexed(
    documents: Sequence[tuple[str, bytes]], tenant: str, embedder: Embedder, parsers: Parsers
) -> list[IndexedDocument]:
    parsed = [parsers.parse(content, DocumentSource(name, "text/plain")) for name, content in documents]
    cut = [chunk(each) for each in parsed]
    every = [each for chunks in cut for each in chunks]
    vectors = await embedder.embed([*(each.text for each in every), *(each.heading for each in every)], tenant=tenant)
    bodies, headings, at, made = vectors[: len(every)], vectors[len(every) :], 0, []
    for (name, content), document, chunks in zip(documents, parsed, cut, strict=True):
        own = slice(at, at := at + len(chunks))
        header = DocumentHeader(name, time.time_ns() // 1_000, hashlib.sha256(content).hexdigest(), document.title)
        made.append(IndexedDocument(header, IndexedChunks(chunks, bodies[own], headings[own])))
    return made


if __name__ == "__main__":
    where, whose, *numbers = sys.argv[1:]
    asyncio.run(main(Path(where), whose, *map(int, numbers)))
