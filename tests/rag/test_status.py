"""``ai.rag.status.{tenant}``: what becomes of a document, by request and reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cbor2
import pytest

import aiqueue
from aiqueue.errors import BadInput, JobFailed
from aiqueue.rag import Rag, RagDelete, RagDocument, RagWorker, status
from aiqueue.rag.status import read_document_id
from aiqueue.rag.store import SqliteStore

ODD_IDS = ["guide.md", "a b", "Straße/§1.md", "x" * 1_024, "{not json", '"quoted"', "12", "hgf", "*", "ai.rag.>"]


async def ask(plain: Any, body: bytes, headers: dict[str, str] | None = None, tenant: str = "acme") -> Any:
    return await plain.request(f"ai.rag.status.{tenant}", body, headers=headers, timeout=10)


async def test_a_plain_client_follows_a_document_from_its_queue_to_its_end(
    client: aiqueue.Client, plain: Any, rag_worker: RagWorker
) -> None:
    idle = RagWorker(rag_worker._path, tenants=["globex"])  # answers for no other tenant, and takes no other's jobs
    async with idle.running(client):
        with pytest.raises(Exception, match=r"no responders|NoResponders"):
            await ask(plain, b"guide.md")
    async with rag_worker.running(client):
        unknown = await ask(plain, b"guide.md")
        assert unknown.headers["Nats-Service-Error-Code"] == "404"
        assert json.loads(unknown.data)["error"] == "NotFound"
        result = await (
            await client.enqueue(RagDocument(document_id="guide.md", content="text"), tenant="acme")
        ).result(25)
        found = json.loads((await ask(plain, b"guide.md")).data)
        assert (found["state"], found["version"], found["indexed_version"]) == ("completed", *[result["version"]] * 2)
        same = await ask(plain, cbor2.dumps({"document_id": "guide.md"}))
        assert cbor2.loads(same.data) == found
        await (await client.enqueue(RagDelete(document_id="guide.md"), tenant="acme")).result(25)
        assert json.loads((await ask(plain, b'{"document_id": "guide.md"}')).data)["state"] == "deleted"
        assert (await ask(plain, b"guide.md", tenant="globex")).headers["Nats-Service-Error-Code"] == "404"


async def test_a_queued_version_is_told_beside_the_one_that_is_indexed(
    client: aiqueue.Client, plain: Any, rag_worker: RagWorker
) -> None:
    async with rag_worker.running(client):
        first = await (await client.enqueue(RagDocument(document_id="d", content="one"), tenant="acme")).result(25)
    assert rag_worker._path is not None
    store = SqliteStore(rag_worker._path.parent / "store")
    async with status.serving(client, store, None):
        newer = [RagDocument(document_id="d", content=f"later {at}") for at in range(2)]
        for each in newer:
            await client.enqueue(each, tenant="acme")
        await client.enqueue(RagDocument(document_id="new", content="x"), tenant="acme")
        found, fresh = [json.loads((await ask(plain, each)).data) for each in (b"d", b"new")]
    await store.close()
    assert (found["state"], found["indexed_version"]) == ("queued", first["version"])
    assert found["version"] > first["version"]
    assert (fresh["state"], fresh["indexed_version"], fresh["total"]) == ("queued", None, 0)


async def test_a_queued_document_is_found_also_where_its_content_lies_beside_the_queue(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    rag, store = Rag(client), SqliteStore(tmp_path / "store")
    async with status.serving(client, store, None):
        for document_id in ("guide.md", "a b", "x" * 1_024):
            await rag.ingest(document_id, tenant="acme", content="text " * 100_000)
            assert (await rag.status(document_id, tenant="acme")).state == "queued"
        await rag.ingest("Straße\n", tenant="acme", content="text")  # no header can hold this id
        assert (await rag.status("Straße\n", tenant="acme")).state == "queued"
    await store.close()


async def test_the_status_of_a_failed_document_has_its_reason(
    client: aiqueue.Client, plain: Any, rag_worker: RagWorker
) -> None:
    async with rag_worker.running(client):
        handle = await client.enqueue(RagDocument(document_id="d", content=""), tenant="acme")
        with pytest.raises(JobFailed):
            await handle.result(25)
        found = json.loads((await ask(plain, b"d")).data)
    assert (found["state"], found["indexed_version"]) == ("failed", None)
    assert found["reason"]


@pytest.mark.parametrize("document_id", ODD_IDS)
def test_a_document_id_is_read_as_it_was_sent_in_every_form(document_id: str) -> None:
    request = {"document_id": document_id}
    assert read_document_id(json.dumps(request).encode(), "") == document_id
    assert read_document_id(cbor2.dumps(request), "") == document_id
    assert read_document_id(json.dumps(request).encode(), "application/json; charset=utf-8") == document_id
    assert read_document_id(cbor2.dumps(request), "application/cbor") == document_id
    if document_id[0] != "{":
        assert read_document_id(document_id.encode(), "") == document_id
    assert read_document_id(document_id.encode(), "text/plain") == document_id


@pytest.mark.parametrize("body", [b"", b"  ", b"{}", b'{"document_id": 5}', b'{"document_id": ""}', b"{", b"\xff\xfe"])
def test_a_request_that_names_no_document_is_refused_in_one_line(body: bytes) -> None:
    with pytest.raises(BadInput) as raised:
        read_document_id(body, "")
    assert "\n" not in str(raised.value)


async def test_what_is_around_the_workers_handlers_is_around_questions_too(
    client: aiqueue.Client, rag_worker: RagWorker
) -> None:
    kinds: list[str] = []

    @rag_worker.around
    @contextmanager
    def note(job: aiqueue.Job) -> Iterator[None]:
        kinds.append(job.kind)
        yield

    rag = Rag(client)
    async with rag_worker.running(client):
        await (await rag.ingest("d", tenant="acme", content="Otters hold paws.")).result(20)
        await (await rag.ask("otters", tenant="acme")).result(20)
    assert kinds == ["rag.document", "rag.query"]
