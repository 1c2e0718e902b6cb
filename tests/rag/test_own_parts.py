"""Parts in place of the default ones: an embedder, a store, and embeddings by the gateway that rag.toml names."""

from __future__ import annotations

from pathlib import Path

import pytest

import aiqueue
from aiqueue.errors import ConfigMismatch, JobFailed
from aiqueue.gateway.standin import StandIn
from aiqueue.rag import Rag, RagWorker, load, open_bound_store
from aiqueue.rag.store import SqliteStore

from ..gateway.running import KEY, KEY_VARIABLE, running, write_config
from .asking import HashEmbedder

TEXT = "Otters hold paws while they sleep."


async def ingest(rag: Rag) -> None:
    assert (await (await rag.ingest("otters.md", tenant="acme", content=TEXT)).result(25))["state"] == "completed"


async def ask(rag: Rag) -> list[str]:
    result = await (await rag.ask("otters", tenant="acme")).result(25)
    return [each["text"] for each in result["passages"]]


async def test_an_embedder_of_a_worker_makes_the_vectors_and_a_changed_one_is_refused_until_all_are_made_anew(
    client: aiqueue.Client, rag_file: Path
) -> None:
    rag, embedder = Rag(client), HashEmbedder()
    async with RagWorker(rag_file, embedder=embedder).running(client):
        await ingest(rag)
        assert await ask(rag) == [TEXT]
        assert embedder.embedded[-1] == "otters"
    async with RagWorker(rag_file).running(client):  # by wordllama
        with pytest.raises(JobFailed, match="run `aiqueue rag reindex --tenant acme`"):
            await ask(rag)
        assert (await (await rag.reindex(tenant="acme")).result(25))["embedder"] == "wordllama-256"
        assert await ask(rag) == [TEXT]


async def test_a_store_of_a_worker_has_the_documents_and_no_other_worker_begins_a_second_one(
    client: aiqueue.Client, rag_file: Path, tmp_path: Path
) -> None:
    rag = Rag(client)
    async with RagWorker(rag_file, store=SqliteStore(tmp_path / "own"), embedder=HashEmbedder()).running(client):
        await ingest(rag)
        assert await ask(rag) == [TEXT]
    assert list((tmp_path / "own").glob("acme-*.sqlite"))
    with pytest.raises(ConfigMismatch, match="in the store that a worker was given, and here they would be on host"):
        async with RagWorker(rag_file).running(client):
            pass
    with pytest.raises(ConfigMismatch, match="RagWorker\\(store=…\\)"):
        await open_bound_store(client, load(rag_file), "acme")


async def test_a_model_of_the_gateway_makes_the_vectors_of_documents_and_questions(
    client: aiqueue.Client, rag_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    rag_file.write_text(f'{rag_file.read_text()}[embedder]\nkind = "gateway"\nmodel = "vectors"\ndimensions = 8\n')
    rag = Rag(client)
    async with StandIn() as standin:
        path = write_config(tmp_path, standin.url)
        monkeypatch.setenv("AIQUEUE_GATEWAY", str(path))
        async with running(client, path), RagWorker(rag_file).running(client):
            await ingest(rag)
            assert await ask(rag) == [TEXT]
            calls = len(standin.calls)
            assert await ask(rag) == [TEXT]
        assert len(standin.calls) == calls
        assert {each.model for each in standin.calls} == {"vectors-1"}
    assert list((tmp_path / "store-embeddings").glob("acme-*.sqlite"))


def test_a_model_of_the_gateway_needs_its_dimensions(rag_file: Path) -> None:
    rag_file.write_text('[embedder]\nkind = "gateway"\nmodel = "vectors"\n')
    with pytest.raises(aiqueue.AIQueueError, match=r"embedder\.dimensions: is missing: how many numbers a vector of"):
        load(rag_file)
