"""All vectors of a tenant made anew by another embedder, also while others ingest, and after a worker has died."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import NotFound, Unavailable
from aiqueue.rag import Rag, RagDocument, RagReindex, RagWorker, reindex
from aiqueue.rag.embedding import WordLlamaEmbedder

from ..support import eventually


class Failing(WordLlamaEmbedder):
    """Fails at its second call, once."""

    calls = 0

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise Unavailable("no model")
        return await super().embed(texts, tenant=tenant)


async def fill(client: aiqueue.Client, file: Path, count: int) -> None:
    async with RagWorker(file).running(client):
        documents = [RagDocument(document_id=f"d{at}", content=f"Otter number {at} swims.") for at in range(count)]
        handles = [await client.enqueue(each, tenant="acme") for each in documents]
        for each in handles:
            await each.result(25)


async def is_refused(worker: RagWorker, document_id: str) -> bool:
    assert worker._runtime is not None
    known = await worker._runtime.store.document("acme", document_id)
    return known is not None and "run `aiqueue rag reindex" in known.reason


async def found(worker: RagWorker, text: str) -> list[str]:
    assert worker._runtime is not None
    vector = await worker._runtime.batcher.embed([text], tenant="acme")
    passages = await worker._runtime.store.search("acme", text, vector, 3, mode="vector")
    return [each.document_id for each in passages]


async def test_documents_wait_for_a_reindex_after_a_change_of_the_embedder(
    client: aiqueue.Client, rag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiqueue.rag import ingest  # noqa: PLC0415  (the module)

    monkeypatch.setattr(ingest, "EMBEDDER_CHANGED_S", 0.2)
    await fill(client, rag_file, 3)
    other = RagWorker(rag_file, embedder=WordLlamaEmbedder(64))
    async with other.running(client):
        waiting = await client.enqueue(RagDocument(document_id="new", content="A new otter dives."), tenant="acme")
        await eventually(lambda: is_refused(other, "new"))
        done = await (await client.enqueue(RagReindex(all=True), tenant="acme")).result(25)
        assert (done["embedded"], done["embedder"]) == (3, "wordllama-64")
        assert (await waiting.result(25))["outcome"] == "new"
        assert (await found(other, "a new otter dives"))[0] == "new"
        assert other._runtime is not None
        stats = await other._runtime.store.stats("acme")
    assert (stats.embedder, stats.dimensions, stats.chunks) == ("wordllama-64", 64, 4)


async def test_a_document_waits_for_a_reindex_however_often_it_was_tried(
    client: aiqueue.Client, plain: Any, rag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiqueue.rag import ingest  # noqa: PLC0415  (the module)

    monkeypatch.setattr(ingest, "EMBEDDER_CHANGED_S", 0.01)
    await fill(client, rag_file, 1)
    headers = {"Aiq-Job-Id": "tried", "Aiq-Kind": "rag.document", "Aiq-Parked": "1", "Aiq-Attempt": "8"}
    body = b'{"document_id": "new", "content": "A new otter dives."}'
    other = RagWorker(rag_file, embedder=WordLlamaEmbedder(64))
    async with other.running(client):
        await plain.jetstream().publish("ai.rag.ingest.acme", body, headers=headers)
        await eventually(lambda: is_refused(other, "new"))
        await (await client.enqueue(RagReindex(all=True), tenant="acme")).result(25)
        waiting = await client.job("tried", tenant="acme", family="rag.ingest")
        assert (await waiting.result(25))["outcome"] == "new"


async def test_a_reindex_whose_worker_has_failed_goes_on_with_what_is_missing(
    client: aiqueue.Client, rag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "ROWS", 4)
    await fill(client, rag_file, 10)
    embedder = Failing(64)
    async with RagWorker(rag_file, embedder=embedder).running(client) as _:
        done = await (await client.enqueue(RagReindex(all=True), tenant="acme")).result(25)
    assert done["embedded"] == 6  # of the second attempt: four were stored by the first one


@pytest.mark.parametrize(
    ("document_id", "why"), [("none", "neither stored, nor among"), ("d0", "was ingested by value")]
)
async def test_a_reindex_of_a_document_that_cannot_be_read_again_is_one_line_and_leaves_nothing(
    client: aiqueue.Client, rag_file: Path, document_id: str, why: str
) -> None:
    await fill(client, rag_file, 1)
    async with RagWorker(rag_file).running(client):
        with pytest.raises(NotFound, match=why) as raised:
            await Rag(client).reindex(tenant="acme", document_id=document_id)
        assert "\n" not in str(raised.value)
        handle = await client.enqueue(RagReindex(document_id=document_id), tenant="acme")
        result = await handle.result(25)
    assert (result["state"], len(result["problems"])) == ("failed", 1)
    assert [each async for each in client.dead.find()] == []


async def test_a_reindex_of_a_document_is_a_job_where_no_worker_says_whether_that_can_be_read(
    client: aiqueue.Client, rag_file: Path
) -> None:
    handle = await Rag(client).reindex(tenant="acme", document_id="none")
    async with RagWorker(rag_file).running(client):
        assert (await handle.result(25))["problems"] == ["it is not indexed: ingest it"]
