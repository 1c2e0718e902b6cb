"""The guide's retrieval by its own subjects: a plain client ingests a document, asks, and gets passages, from the one
command of retrieval. With nats-py and with the Node.js client, each answer within the guide's 30 s.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.rag import RagWorker

from ..support import eventually
from .clients import Plain

TEXT = "# Otters\n\nOtters hold each other's paws while they sleep, so that they do not drift apart."


@pytest.fixture(scope="module")
def rag_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all tests of the file, because their account knows where the documents are."""
    path = tmp_path_factory.mktemp("rag") / "rag.toml"
    path.write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n')
    return path


@pytest.fixture
async def worker(client: aiqueue.Client, rag_file: Path) -> AsyncIterator[RagWorker]:
    worker = RagWorker(rag_file)
    async with worker.running(client):
        yield worker


async def ingest(plain: Plain, tenant: str, document: dict[str, Any]) -> None:
    """By the guide's snippet, and wait by the guide family's status."""
    await plain.run("Publishing document for ingestion", tenant_id=tenant, encoded_document=json.dumps(document))
    request = json.dumps({"document_id": (document.get("data") or document)["document_id"]})

    async def is_indexed() -> bool:
        told = await plain.do("request", subject=f"ai.rag.status.{tenant}", body=request)
        return bool(told["data"].get("state") == "completed")

    await eventually(is_indexed)


async def ask(plain: Plain, tenant: str, query: dict[str, Any]) -> dict[str, Any]:
    answer = await plain.run("Requesting results", tenant_id=tenant, encoded_query=json.dumps(query))
    found: dict[str, Any] = answer["data"]
    return found


async def test_a_document_is_ingested_and_a_question_gets_its_passage(
    plain: Plain, worker: RagWorker, tenant: str
) -> None:
    await ingest(plain, tenant, {"document_id": "otters.md", "content": TEXT, "metadata": {"kind": "animal"}})
    found = await ask(plain, tenant, {"query_id": "q-1", "query": "Why do otters hold paws?"})
    assert (found["query_id"], found["query"]) == ("q-1", "Why do otters hold paws?")
    (passage,) = found["passages"]
    assert (passage["document_id"], passage["heading"], passage["metadata"]) == (
        "otters.md", "Otters", {"kind": "animal"},
    )  # fmt: skip
    assert passage["text"] in TEXT
    assert await ask(plain, tenant, {"query_id": "q-1", "query": "Why do otters hold paws?"}) == found
    assert (await ask(plain, f"{tenant}x", {"query_id": "q-1", "query": "otters"}))["passages"] == []


async def test_a_query_that_was_published_is_answered_by_a_request_with_its_payload(
    plain: Plain, worker: RagWorker, tenant: str
) -> None:
    body = {"message_type": "rag_document", "schema_version": "1.0", "data": {
        "document_id": "otters", "tenant_id": tenant, "metadata": {},
        "chunks": [{"chunk_id": "c-1", "content": "Otters sleep afloat.", "embedding": [0.1], "metadata": {"page": 3}}],
    }}  # fmt: skip
    await ingest(plain, tenant, body)
    query = {
        "message_type": "rag_query",
        "schema_version": "1.0",
        "data": {"query_id": "q-2", "query": "otters", "k": 1},
    }
    await plain.run("Publishing query", tenant_id=tenant, encoded_query=json.dumps(query))
    (passage,) = (await ask(plain, tenant, query))["passages"]
    assert (passage["text"], passage["page"]) == ("Otters sleep afloat.", 3)


async def test_a_newer_version_and_bytes_as_base64_replace_what_is_found(
    plain: Plain, worker: RagWorker, tenant: str
) -> None:
    await ingest(plain, tenant, {"document_id": "d", "content": "Beavers build dams."})
    page = b"<html><body><h1>Rivers</h1><p>Walruses live by the sea.</p></body></html>"
    document = {"document_id": "d", "content": base64.b64encode(page).decode(), "encoding": "base64"}
    await plain.run("Publishing document for ingestion", tenant_id=tenant, encoded_document=json.dumps(document))

    async def is_replaced() -> bool:
        found = await ask(plain, tenant, {"query": "walruses and dams"})
        return [each["text"] for each in found["passages"]] == ["Walruses live by the sea."]

    await eventually(is_replaced)
