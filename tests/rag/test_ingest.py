"""Documents as jobs: what becomes of their versions, in whatever order they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, JobFailed
from aiqueue.rag import DocumentState, IndexedDocument, Rag, RagDelete, RagDocument, RagReindex, RagWorker, failures
from aiqueue.rag.embedding import WordLlamaEmbedder
from aiqueue.rag.failures import ATTEMPTS
from aiqueue.rag.runtime import RagRuntime

from ..support import eventually

TEXT = "Otters sleep while they hold each other's paws, so that they do not drift apart."


async def ingest(client: aiqueue.Client, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await (await client.enqueue(RagDocument(**fields), tenant="acme")).result(25)
    return found


async def state_of(worker: RagWorker, document_id: str) -> DocumentState:
    assert worker._runtime is not None
    found = await worker._runtime.store.document("acme", document_id)
    assert found is not None
    return found


async def texts_found(worker: RagWorker, text: str, mode: Any = "hybrid") -> list[str]:
    assert worker._runtime is not None
    vector = await worker._runtime.batcher.embed([text], tenant="acme", urgent=True)
    return [each.text for each in await worker._runtime.store.search("acme", text, vector, 10, mode=mode)]


async def test_a_document_by_value_is_found_and_its_job_says_so(client: aiqueue.Client, rag_worker: RagWorker) -> None:
    async with rag_worker.running(client):
        result = await ingest(client, document_id="notes/otters.md", content=f"# Otters\n\n{TEXT}", metadata={"n": 1})
        assert (result["state"], result["outcome"], result["chunks"], result["superseded"]) == (
            "completed", "new", 1, False,
        )  # fmt: skip
        for mode in ("hybrid", "keyword", "vector"):
            assert TEXT in (await texts_found(rag_worker, "do otters hold paws", mode))[0]
        known = await state_of(rag_worker, "notes/otters.md")
    assert (known.state, known.version, known.indexed_version) == ("completed", result["version"], result["version"])
    assert (known.title, known.metadata) == ("Otters", {"n": 1})


async def test_versions_within_a_second_are_jobs_of_their_own_and_the_last_one_is_found(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    handles = [
        await client.enqueue(RagDocument(document_id="d", content=f"the word of version {at} is w{at}x"), tenant="acme")
        for at in range(10)
    ]
    async with rag_worker.running(client):
        results = [await each.result(25) for each in handles]
        found = await texts_found(rag_worker, "word of version")
    assert found == ["the word of version 9 is w9x"]
    versions = [each["version"] for each in results]
    assert versions == sorted(set(versions))
    assert results[9]["superseded"] is False


async def test_the_same_content_only_moves_its_version_and_embeds_nothing(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    async with rag_worker.running(client):
        first = await ingest(client, document_id="d", content=TEXT)
        assert rag_worker._runtime is not None
        embedded = rag_worker._runtime.batcher.embedded
        second = await ingest(client, document_id="d", content=TEXT)
        assert rag_worker._runtime.batcher.embedded == embedded
        third = await ingest(client, document_id="d", content=TEXT, metadata={"lang": "en"})
        known = await state_of(rag_worker, "d")
    assert (first["outcome"], second["outcome"], third["outcome"]) == ("new", "same", "new")
    assert (known.indexed_version, known.metadata) == (third["version"], {"lang": "en"})


async def replayed(client: aiqueue.Client, worker: RagWorker, file: Path, text: str) -> dict[str, Any]:
    """Replay the only dead letter, of a document by path, which the worker may read from now on."""
    path = worker._path
    assert path is not None
    file.write_text(text)
    path.write_text(path.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{file.parent}"]\n')
    await worker.reload(client)
    (letter,) = [each async for each in client.dead.find()]
    await client.dead.replay(letter)
    handle = await client.job(letter.job_id, tenant="acme", family="rag.ingest")
    result: dict[str, Any] = await handle.result(25)
    return result


async def test_a_replayed_dead_letter_of_an_old_version_is_superseded_and_embeds_nothing(
    client: aiqueue.Client, rag_worker: RagWorker, tmp_path: Path
) -> None:
    file = tmp_path / "page.md"
    async with rag_worker.running(client):
        with pytest.raises(JobFailed, match="documents by path are off"):
            await ingest(client, document_id="d", path=str(file))
        newer = await ingest(client, document_id="d", content=TEXT)
        assert rag_worker._runtime is not None
        embedded = rag_worker._runtime.batcher.embedded
        result = await replayed(client, rag_worker, file, "an old text of otters")
        assert rag_worker._runtime.batcher.embedded == embedded
        assert await texts_found(rag_worker, "text of otters") == [TEXT]
        known = await state_of(rag_worker, "d")
    assert (result["state"], result["superseded"]) == ("completed", True)
    assert known.indexed_version == newer["version"] > result["version"]


async def test_a_delete_takes_what_was_stored_before_it_also_where_that_comes_later(
    client: aiqueue.Client, rag_worker: RagWorker, tmp_path: Path
) -> None:
    file = tmp_path / "page.md"
    async with rag_worker.running(client):
        with pytest.raises(JobFailed, match="documents by path are off"):
            await ingest(client, document_id="d", path=str(file))
        gone = await (await client.enqueue(RagDelete(document_id="d"), tenant="acme")).result(25)
        assert (await replayed(client, rag_worker, file, TEXT))["superseded"] is True
        assert await texts_found(rag_worker, "otters") == []
        assert (await state_of(rag_worker, "d")).state == "deleted"
        again = await ingest(client, document_id="d", content=TEXT)
        assert again["version"] > gone["version"]
        assert await texts_found(rag_worker, "otters") == [TEXT]


async def test_a_failed_version_keeps_the_former_one_and_says_why(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    async with rag_worker.running(client):
        first = await ingest(client, document_id="d", content=TEXT)
        with pytest.raises(JobFailed, match="cannot be read"):
            await ingest(client, document_id="d", content=b"\x00\x01\x02" * 100)
        known = await state_of(rag_worker, "d")
        assert await texts_found(rag_worker, "otters") == [TEXT]
        with pytest.raises(JobFailed, match="tenant_id 'globex' is not the tenant of this job, acme"):
            await ingest(client, document_id="d", content="x", tenant_id="globex")
    assert (known.state, known.indexed_version) == ("failed", first["version"])
    assert known.version > first["version"]
    assert "cannot be read" in known.reason


@pytest.mark.parametrize("document_id", ["/a\0b", "/" + "ü" * 1_000])
async def test_a_document_id_that_no_store_keeps_fails_for_good_at_the_first_attempt(
    client: aiqueue.Client, rag_worker: RagWorker, document_id: str
) -> None:
    async with rag_worker.running(client):
        with pytest.raises(JobFailed, match="document id"):
            await ingest(client, path=document_id)  # which is the id too


async def test_a_large_document_is_staged_and_an_attempt_embeds_only_what_is_missing(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    paragraphs = "\n\n".join(
        f"Paragraph {at} tells of w{at}x. " + "Otters swim in cold rivers. " * 28 for at in range(300)
    )
    async with rag_worker.running(client):
        runtime = rag_worker._runtime
        assert runtime is not None
        stage, staged = runtime.store.stage, 0

        async def failing(*args: Any) -> None:
            nonlocal staged
            staged += 1
            if staged == 3:
                raise aiqueue.errors.Unavailable("the disk is away")
            await stage(*args)

        runtime.store.stage = failing  # type: ignore[method-assign]
        result = await ingest(client, document_id="large", content=paragraphs)
        chunks = result["chunks"]
        assert chunks >= 200
        assert chunks <= runtime.batcher.embedded <= chunks + 64 + 2 * (chunks // 64 + 2)
        assert any("w299x" in each for each in await texts_found(rag_worker, "w299x"))
        stats = await runtime.store.stats("acme")
    assert (stats.documents, stats.chunks) == (1, chunks)


async def test_a_document_that_is_read_again_keeps_the_title_name_and_type_that_were_given_with_its_path(
    client: aiqueue.Client, rag_worker: RagWorker, rag_file: Path, tmp_path: Path
) -> None:
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{tmp_path}"]\n')
    file = tmp_path / "page"
    file.write_text(f"# Own heading\n\n{TEXT}")
    given = {"title": "Handbook", "name": "x.md", "content_type": "text/markdown"}
    async with rag_worker.running(client):
        await ingest(client, document_id="d", path=str(file), **given)
        for text, outcome in ((TEXT, "same"), ("An otter dives.", "new")):
            file.write_text(f"# Own heading\n\n{text}")
            again = await (await client.enqueue(RagReindex(document_id="d"), tenant="acme")).result(25)
            assert (again["outcome"], again["title"]) == (outcome, "Handbook")
            known = await state_of(rag_worker, "d")
            assert (known.title, known.hints) == ("Handbook", given)
        assert rag_worker._runtime is not None
        (passage,) = await rag_worker._runtime.store.search("acme", "otter dives", None, 5, mode="keyword")
    assert (passage.heading, passage.text) == ("Own heading", "An otter dives.")


async def test_a_document_that_is_read_again_hides_no_version_that_was_enqueued_before_that(
    client: aiqueue.Client, rag_worker: RagWorker, rag_file: Path, tmp_path: Path
) -> None:
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{tmp_path}"]\n')
    file = tmp_path / "page.md"
    file.write_text("an old text of otters")
    async with rag_worker.running(client):
        runtime = rag_worker._runtime
        assert runtime is not None
        await ingest(client, document_id="d", path=str(file))
        put, begun, go = runtime.upserter.put, asyncio.Event(), asyncio.Event()

        async def waiting(tenant: str, document: IndexedDocument) -> Any:
            if document.content.chunks[0].text == TEXT:
                begun.set()
                await go.wait()
            return await put(tenant, document)

        runtime.upserter.put = waiting  # type: ignore[method-assign]
        newer = await client.enqueue(RagDocument(document_id="d", content=TEXT), tenant="acme")
        await asyncio.wait_for(begun.wait(), 10)
        file.write_text("a corrected text of otters")
        again = await client.enqueue(RagReindex(document_id="d"), tenant="acme")
        assert (await again.result(25))["outcome"] == "new"
        assert await texts_found(rag_worker, "text of otters") == ["a corrected text of otters"]
        go.set()
        assert (await newer.result(25))["superseded"] is False
        assert await texts_found(rag_worker, "text of otters") == [TEXT]


def long_text(word: str, paragraphs: int) -> str:
    return "\n\n".join(f"Paragraph {at} of {word}. " + "Otters swim in cold rivers. " * 28 for at in range(paragraphs))


async def test_a_file_that_has_changed_before_its_dead_letter_is_replayed_is_read_as_it_is_then_without_parts_of_before(
    client: aiqueue.Client, rag_worker: RagWorker, rag_file: Path, tmp_path: Path
) -> None:
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{tmp_path}"]\n')
    file = tmp_path / "page.md"
    file.write_text(long_text("formerly", 300))
    async with rag_worker.running(client):
        runtime = rag_worker._runtime
        assert runtime is not None
        commit = runtime.store.commit

        async def refusing(*args: Any) -> Any:
            raise BadInput("it cannot be stored for now")

        runtime.store.commit = refusing  # type: ignore[method-assign]
        with pytest.raises(JobFailed, match="for now"):
            await ingest(client, document_id="d", path=str(file))
        runtime.store.commit = commit  # type: ignore[method-assign]
        file.write_text(long_text("presently", 150))
        (letter,) = [each async for each in client.dead.find()]
        await client.dead.replay(letter)
        handle = await client.job(letter.job_id, tenant="acme", family="rag.ingest")
        result = await handle.result(25)
        rows = await runtime.store.chunks("acme", runtime.batcher.embedder.name, limit=1_000)
    assert len(rows) == result["chunks"]
    assert not [chunk.text[:60] for _, chunk in rows if "formerly" in chunk.text]


async def test_chunks_of_the_publisher_are_indexed_as_they_are(
    client: aiqueue.Client, plain: Any, rag_worker: RagWorker
) -> None:
    """The guide family's envelope, published by a plain client."""
    body = (
        b'{"schema_version": "1.0", "message_type": "rag_document", "document_id": "plain/1", "content": "whole text",'
        b' "tenant_id": "acme", "timestamp": "2026-11-29T12:00:00Z", "metadata": {"lang": "en"}, "chunks": ['
        b'{"chunk_id": "c1", "content": "first piece", "embedding": [0.1, 0.2], "metadata": {"page": 2}},'
        b'{"chunk_id": "c2", "content": "second piece", "embedding": [0.1, 0.2], "metadata": {}}]}'
    )
    await plain.jetstream().publish("ai.rag.ingest.acme", body)
    async with rag_worker.running(client):
        await eventually(lambda: _is_completed(rag_worker, "plain/1"))
        known = await state_of(rag_worker, "plain/1")
        assert sorted(await texts_found(rag_worker, "piece")) == ["first piece", "second piece"]
    assert (known.chunks, known.metadata) == (2, {"lang": "en"})


async def _is_completed(worker: RagWorker, document_id: str) -> bool:
    assert worker._runtime is not None
    found = await worker._runtime.store.document("acme", document_id)
    return found is not None and found.state == "completed"


async def test_jobs_stored_before_the_family_lost_its_key_still_end(
    client: aiqueue.Client, plain: Any, rag_worker: RagWorker
) -> None:
    """By aiqueue's clients, with the document's id as the job's; by plain ones, with it as a header, or in the body."""
    former = {
        "Aiq-Job-Id": "doc-1",
        "document_id": "doc-1",
        "Aiq-Kind": "rag.document",
        "Content-Type": "application/json",
    }
    publish = plain.jetstream().publish
    await publish("ai.rag.ingest.acme", b'{"document_id": "doc-1", "content": "one otter"}', headers=former)
    await publish("ai.rag.ingest.acme", b'{"content": "two otters"}', headers={"document_id": "doc-2"})
    await publish("ai.rag.ingest.acme", b'{"document_id": "doc-3", "content": "three otters"}')
    await publish("ai.rag.ingest.acme", b'{"content": "an otter without a name"}', headers={"Aiq-Job-Id": "doc-4"})
    async with rag_worker.running(client):
        for at in range(1, 5):
            await eventually(lambda at=at: _is_completed(rag_worker, f"doc-{at}"))
        result = await (await client.job("doc-1", tenant="acme", family="rag.ingest")).result(25)
    assert (result["document_id"], result["state"]) == ("doc-1", "completed")


async def test_a_document_by_claim_check_and_by_path_is_ingested_and_reindexed_from_its_path(
    client: aiqueue.Client, rag_worker: RagWorker, rag_file: Path, tmp_path: Path
) -> None:
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{tmp_path}"]\n')
    stored = await client.documents.put(b"# Beavers\n\nBeavers build dams.", tenant="acme", name="beavers.md")
    file = tmp_path / "page.md"
    file.write_text(TEXT)
    async with rag_worker.running(client):
        assert (await ingest(client, document_id="b", document=stored))["title"] == "Beavers"
        await ingest(client, path=str(file), metadata={"lang": "en"})
        file.write_text("Voles dig.")
        again = await client.enqueue(RagReindex(document_id=str(file)), tenant="acme")
        assert (await again.result(25))["outcome"] == "new"
        refused = await client.enqueue(RagReindex(document_id="b"), tenant="acme")
        (problem,) = (await refused.result(25))["problems"]
        assert problem == "it was ingested by value, and its file is not known: ingest it again"
        known = await state_of(rag_worker, str(file))
        assert "Voles dig." in await texts_found(rag_worker, "voles")
    assert (known.source, known.metadata) == (str(file), {"lang": "en"})


class Failing(WordLlamaEmbedder):
    """Is away for the first calls."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        if self.failures:
            self.failures -= 1
            raise aiqueue.errors.Unavailable("no model")
        return await super().embed(texts, tenant=tenant)


async def store_parked(plain: Any, attempt: int, kind: str, body: bytes) -> None:
    """Store a job as one comes back whose earlier attempts ended without an outcome: their workers have died."""
    headers = {
        "Aiq-Job-Id": "tried", "Aiq-Kind": kind, "Content-Type": "application/json", "Aiq-Parked": "1",
        "Aiq-Attempt": str(attempt),
    }  # fmt: skip
    await plain.jetstream().publish("ai.rag.ingest.acme", body, headers=headers)


async def test_attempts_whose_workers_have_died_do_not_count_towards_a_documents_failure(
    client: aiqueue.Client, plain: Any, rag_file: Path
) -> None:
    await store_parked(plain, ATTEMPTS + 1, "rag.document", b'{"document_id": "d", "content": "one otter"}')
    async with RagWorker(rag_file, embedder=Failing(1)).running(client):
        result = await (await client.job("tried", tenant="acme", family="rag.ingest")).result(25)
    assert result["state"] == "completed"


async def test_a_document_that_fails_by_itself_each_time_is_a_dead_letter_with_its_reason(
    client: aiqueue.Client, rag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", aiqueue.Backoff(attempts=ATTEMPTS, first="10ms", cap="20ms"))
    worker = RagWorker(rag_file, embedder=Failing(100))
    async with worker.running(client):
        with pytest.raises(JobFailed, match="it has failed 8 times, last with: Unavailable: no model"):
            await ingest(client, document_id="d", content=TEXT)
        assert (await state_of(worker, "d")).state == "failed"


async def test_what_is_in_flight_at_many_kills_of_workers_is_done_by_a_child_with_a_store_of_its_own(
    client: aiqueue.Client, plain: Any, rag_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the worker, three more kills during trials would make a dead letter of it."""
    rag = Rag(client)
    async with RagWorker(rag_file).running(client):
        await ingest(client, document_id="first", content="one otter")
        await (await rag.ask("otter", tenant="acme")).result(25)
    handle = await client.enqueue(RagDocument(document_id="d", content=TEXT), tenant="acme")
    question = await rag.ask("otter", tenant="acme", deadline="1m")
    context = plain.jetstream()
    for stream in ("AI_RAG_INGEST", "AI_RAG_QUERIES"):
        (lane,) = await context.consumers_info(stream)
        pull = await context.pull_subscribe_bind(consumer=lane.name, stream=stream)
        for _ in range(30):  # deliveries without an outcome, as of workers that were killed
            (delivered,) = await pull.fetch(1, timeout=5)
            await delivered.nak()
    worker = RagWorker(rag_file)
    async with worker.running(client):
        assert (await handle.result(25))["state"] == "completed"
        assert (await question.result(25))["passages"]
        assert await texts_found(worker, "otters paws")
    assert caplog.text.count("is tried in a child process") == 2
    assert "tried in the worker" not in caplog.text


async def test_the_deadline_of_a_large_document_is_told_by_the_servers_clock(
    client: aiqueue.Client, rag_worker: RagWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(f"Paragraph {at} tells of w{at}x. " + "Otters swim in cold rivers. " * 28 for at in range(100))
    handle = await client.enqueue(RagDocument(document_id="d", content=text), tenant="acme", deadline="1h")
    async with rag_worker.running(client):
        monkeypatch.setattr(RagRuntime, "now", lambda runtime: runtime._client.connection.clock.now() + 7_200)
        with pytest.raises(JobFailed, match="its deadline has passed while it was ingested"):
            await handle.result(25)


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "WAIT_FIRST_S", 0.05)
    monkeypatch.setattr(failures, "WAIT_LONGEST_S", 0.2)


async def test_a_path_whose_root_is_missing_on_a_workers_host_waits_for_a_worker_that_has_it(
    client: aiqueue.Client, rag_file: Path, tmp_path: Path, quick_waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "shared"
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{root}"]\n')
    worker = RagWorker(rag_file)
    async with worker.running(client):
        assert f"{root} is not on this host" in caplog.text
        handle = await client.enqueue(RagDocument(document_id="d", path=str(root / "page.md")), tenant="acme")
        await eventually(lambda: _waits_for(worker, "d", "root"))
        new = tmp_path / "new"
        new.mkdir()
        (new / "page.md").write_text(TEXT)
        new.rename(root)
        assert (await handle.result(25))["state"] == "completed"


async def test_a_path_whose_root_no_worker_has_fails_after_an_hour_and_says_on_which_host(
    client: aiqueue.Client, rag_file: Path, tmp_path: Path, quick_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "shared"
    rag_file.write_text(rag_file.read_text() + f'[[tenant]]\nname = "acme"\nroots = ["{root}"]\n')
    monkeypatch.setattr(failures, "WAIT_S", 0.5)
    worker = RagWorker(rag_file)
    async with worker.running(client):
        with pytest.raises(JobFailed, match=r"it has waited for .* its root .*shared cannot be opened on"):
            await ingest(client, document_id="d", path=str(root / "page.md"))
        assert (await state_of(worker, "d")).state == "failed"
        root.mkdir()
        (root / "page.md").write_text(TEXT)
        (letter,) = [each async for each in client.dead.find()]
        await client.dead.replay(letter)
        handle = await client.job(letter.job_id, tenant="acme", family="rag.ingest")
        assert (await handle.result(25))["state"] == "completed"


async def _waits_for(worker: RagWorker, document_id: str, reason: str) -> bool:
    assert worker._runtime is not None
    found = await worker._runtime.store.document("acme", document_id)
    return found is not None and found.state == "working" and reason in found.reason


async def test_a_delayed_document_is_a_version_of_the_time_at_which_it_is_due_and_so_is_a_delayed_delete(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    delayed = await client.enqueue(RagDocument(document_id="d", content="an embargo ends"), tenant="acme", delay=1)
    gone = await client.enqueue(RagDelete(document_id="e"), tenant="acme", delay=1)
    before = [
        await client.enqueue(RagDocument(document_id=each, content="what was said before"), tenant="acme")
        for each in ("d", "e")
    ]
    async with rag_worker.running(client):
        due, former = await delayed.result(25), [await each.result(25) for each in before]
        assert due["superseded"] is (await gone.result(25))["superseded"] is False
        assert due["version"] > max(each["version"] for each in former)
        assert await texts_found(rag_worker, "an embargo said before") == ["an embargo ends"]
        assert (await ingest(client, document_id="d", content="and after"))["version"] > due["version"]
