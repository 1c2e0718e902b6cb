"""Documents whose jobs end before they are stored: cancelled, past their deadline, or while the store is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.enqueue import Parking
from aiqueue.errors import AIQueueError, JobCancelled, JobFailed, Unavailable
from aiqueue.rag import Rag, RagWorker, failures
from aiqueue.rag.embedding import WordLlamaEmbedder
from aiqueue.rag.runtime import RagRuntime

from ..support import eventually

LARGE = "\n\n".join(f"Paragraph {at} tells of w{at}x. " + "Otters swim in rivers. " * 30 for at in range(200))


class Halting(WordLlamaEmbedder):
    """Waits at its `halts_at`th call, or fails from it on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.halts_at, self.fails = 0, 0, False

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Any:
        self.calls += 1
        if self.halts_at and self.calls >= self.halts_at:
            if self.fails:
                raise Unavailable("no model")
            await asyncio.Event().wait()
        return await super().embed(texts, tenant=tenant)


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "WAIT_FIRST_S", 0.05)
    monkeypatch.setattr(failures, "WAIT_LONGEST_S", 0.2)


@pytest.fixture
def embedder() -> Halting:
    return Halting()


@pytest.fixture
def worker(rag_file: Path, embedder: Halting) -> RagWorker:
    return RagWorker(rag_file, embedder=embedder)


def runtime_of(worker: RagWorker) -> RagRuntime:
    assert worker._runtime is not None
    return worker._runtime


async def is_state(client: aiqueue.Client, state: str, reason: str = "") -> bool:
    found = await Rag(client).status("d", tenant="acme")
    return found.state == state and reason in found.reason


async def staged(worker: RagWorker) -> int:
    store: Any = runtime_of(worker).store
    count: int = await store._existing("acme").read(lambda db: db.execute("SELECT count(*) FROM staged").fetchone()[0])
    return count


async def former(client: aiqueue.Client) -> dict[str, Any]:
    handle = await Rag(client).ingest("d", tenant="acme", content="The former version of otters.")
    return await handle.result(25)


async def is_found(client: aiqueue.Client) -> list[str]:
    result = await (await Rag(client).ask("version of otters", tenant="acme", mode="keyword")).result(25)
    return [each["text"] for each in result["passages"]]


async def test_a_large_document_that_is_cancelled_ends_as_cancelled_and_the_former_version_stays(
    client: aiqueue.Client, worker: RagWorker, embedder: Halting
) -> None:
    async with worker.running(client):
        first = await former(client)
        embedder.halts_at = embedder.calls + 3
        handle = await Rag(client).ingest("d", tenant="acme", content=LARGE)
        await eventually(lambda: embedder.calls == embedder.halts_at)
        assert await staged(worker) > 0
        assert await handle.cancel()
        with pytest.raises(JobCancelled):
            await handle.result(10)
        await eventually(lambda: is_state(client, "cancelled", "its job was cancelled"))
        known = await Rag(client).status("d", tenant="acme")
        assert (known.indexed_version, await staged(worker)) == (first["version"], 0)
        assert known.version > first["version"]
        assert await is_found(client) == ["The former version of otters."]


async def test_a_worker_that_stops_says_nothing_of_its_documents_which_go_on_elsewhere(
    client: aiqueue.Client, rag_file: Path, embedder: Halting
) -> None:
    embedder.halts_at = 3
    first = RagWorker(rag_file, embedder=embedder, drain_timeout="10ms")
    async with first.running(client):
        handle = await Rag(client).ingest("d", tenant="acme", content=LARGE)
        await eventually(lambda: embedder.calls == 3)
    async with RagWorker(rag_file).running(client):
        assert (await handle.result(25))["state"] == "completed"
        assert await is_state(client, "completed")


async def test_a_document_that_is_cancelled_between_two_attempts_ends_as_cancelled(
    client: aiqueue.Client, worker: RagWorker, embedder: Halting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", aiqueue.Backoff(attempts=8, first="1m"))
    embedder.halts_at, embedder.fails = 3, True
    async with worker.running(client):
        handle = await Rag(client).ingest("d", tenant="acme", content=LARGE)
        await eventually(lambda: is_state(client, "working", "no model"))
        assert await staged(worker) > 0
        assert await handle.cancel()
        await eventually(lambda: is_state(client, "cancelled", "its job was cancelled"))
        assert await staged(worker) == 0


async def test_a_document_that_is_cancelled_just_before_it_is_parked_is_not_working_until_its_next_attempt(
    client: aiqueue.Client, worker: RagWorker, embedder: Halting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", aiqueue.Backoff(attempts=8, first="1h", cap="1h"))
    park, begun, go = Parking.park, asyncio.Event(), asyncio.Event()

    async def parks_late(*args: Any, **options: Any) -> Any:
        begun.set()
        await go.wait()
        return await park(*args, **options)

    monkeypatch.setattr(Parking, "park", parks_late)
    embedder.halts_at, embedder.fails = 1, True
    async with worker.running(client):
        handle = await Rag(client).ingest("d", tenant="acme", content="text")
        await asyncio.wait_for(begun.wait(), 25)
        assert await handle.cancel()
        go.set()
        await eventually(lambda: is_state(client, "cancelled", "its job was cancelled"))


async def test_a_document_whose_next_attempt_would_be_after_its_deadline_has_failed(
    client: aiqueue.Client, worker: RagWorker, embedder: Halting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", aiqueue.Backoff(attempts=8, first="1h", cap="1h"))
    embedder.halts_at, embedder.fails = 1, True
    async with worker.running(client):
        handle = await Rag(client).ingest("d", tenant="acme", content="text", deadline="10m")
        with pytest.raises(JobFailed, match="would be after its deadline"):
            await handle.result(25)
        await eventually(lambda: is_state(client, "failed", "would be after its deadline"))


async def allow_pages(worker: RagWorker, count: int) -> None:
    """Let the tenant's database have so many pages: SQLite takes one that is full for a full disk."""
    store: Any = runtime_of(worker).store
    await store._existing("acme").write(lambda db: db.execute(f"PRAGMA max_page_count = {count}").fetchone())


async def test_documents_wait_while_the_disk_is_full_and_their_status_says_why(
    client: aiqueue.Client, worker: RagWorker, quick_waits: None
) -> None:
    async with worker.running(client):
        await former(client)
        await allow_pages(worker, 1)
        handle = await Rag(client).ingest("d", tenant="acme", content=LARGE)
        await eventually(lambda: is_reason(client, "d", "disk is full: free space on its disk"))
        assert await is_found(client) == ["The former version of otters."]
        await allow_pages(worker, 1_000_000)
        assert (await handle.result(25))["outcome"] == "new"
        assert await is_state(client, "completed")


async def is_reason(client: aiqueue.Client, document_id: str, reason: str) -> bool:
    found = await Rag(client).status(document_id, tenant="acme")
    return found.state in ("queued", "working") and reason in found.reason


async def test_a_damaged_store_fails_questions_at_once_and_documents_wait_until_it_is_moved_away(
    client: aiqueue.Client, rag_file: Path, quick_waits: None
) -> None:
    async with RagWorker(rag_file).running(client):
        await former(client)
    (file,) = (rag_file.parent / "store").glob("acme-*.sqlite")
    file.write_bytes(b"no database" * 1_000)
    remedy = "move the file away and ingest its documents again"
    async with RagWorker(rag_file).running(client):
        handle = await Rag(client).ingest("d", tenant="acme", content="The latter version of otters.")
        with pytest.raises(JobFailed, match=remedy) as failed:
            await (await Rag(client).ask("otters", tenant="acme")).result(10)
        assert "\n" not in str(failed.value)
        with pytest.raises(AIQueueError, match=remedy):
            await Rag(client).status("d", tenant="acme")
        file.rename(file.with_suffix(".damaged"))
        assert (await handle.result(25))["outcome"] == "new"
        assert await is_found(client) == ["The latter version of otters."]


async def test_a_store_that_is_away_for_an_hour_fails_its_documents_with_what_to_do(
    client: aiqueue.Client, worker: RagWorker, quick_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "WAIT_S", 0.3)
    async with worker.running(client):
        await former(client)
        await allow_pages(worker, 1)
        handle = await Rag(client).ingest("e", tenant="acme", content=LARGE)
        with pytest.raises(JobFailed, match=r"it has waited for .*: free space on its disk"):
            await handle.result(25)


async def test_a_worker_whose_stores_directory_cannot_be_made_says_what_to_do(
    client: aiqueue.Client, rag_file: Path
) -> None:
    rag_file.write_text('[store]\npath = "/dev/null/store"\n')
    with pytest.raises(
        AIQueueError, match=r"/dev/null/store: .*: let the user of the workers write it, or set store.path"
    ):
        async with RagWorker(rag_file).running(client):
            pass
