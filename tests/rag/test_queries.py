"""Questions are answered with passages within their deadline, and cost nothing after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.rag import Rag, RagQuery, queries

from .asking import State, answering, put

DOCUMENTS = {
    "cats.md": ["The cat sleeps on the warm roof.", "A cat eats fish."],
    "dogs.md": ["The dog guards the house at night."],
}


@pytest.fixture
async def state(client: aiqueue.Client, tmp_path: Path) -> AsyncIterator[State]:
    async with answering(client, tmp_path) as state:
        await put(state.store, "acme", DOCUMENTS, lang="en")
        yield state


@pytest.fixture
def rag(client: aiqueue.Client) -> Rag:
    return Rag(client)


async def test_a_question_gets_passages_with_document_section_position_and_score(rag: Rag, state: State) -> None:
    await put(state.store, "acme", {"fish.md": ["Fish swim."]}, lang="de")
    handle = await rag.ask("Who guards the house?", tenant="acme", k=2, where={"lang": "en"})
    result = await handle.result(20)
    assert (result["query_id"], result["query"], result["mode"]) == (handle.id, "Who guards the house?", "hybrid")
    assert len(result["passages"]) == 2
    assert {each["metadata"]["lang"] for each in result["passages"]} == {"en"}
    first = next(each for each in result["passages"] if each["document_id"] == "dogs.md")
    took_s = result["took_s"]
    assert 0 < took_s < 10
    assert first == {
        "document_id": "dogs.md", "version": 256, "title": "DOGS.MD", "source": "", "heading": "Part 0", "number": 0,
        "start": 0, "page": None, "text": DOCUMENTS["dogs.md"][0], "score": first["score"], "metadata": {"lang": "en"},
    }  # fmt: skip
    assert 0 < first["score"] <= 1
    assert "answer" not in result


async def test_modes_search_by_words_or_vectors_alone_and_words_embed_nothing(rag: Rag, state: State) -> None:
    async def ask(question: str, **options: Any) -> list[str]:
        result = await (await rag.ask(question, tenant="acme", **options)).result(20)
        return [each["text"] for each in result["passages"]]

    assert await ask("guards", mode="keyword") == DOCUMENTS["dogs.md"]
    assert state.embedder.embedded == []
    assert (await ask(DOCUMENTS["cats.md"][1], mode="vector", k=1)) == DOCUMENTS["cats.md"][1:]
    assert state.embedder.embedded == [DOCUMENTS["cats.md"][1]]


async def test_a_tenant_without_documents_gets_no_passages_and_no_other_tenants(rag: Rag, state: State) -> None:
    result = await (await rag.ask("cat", tenant="globex")).result(20)
    assert result["passages"] == []
    assert state.embedder.embedded == []


async def test_the_guides_bare_query_and_its_envelope_are_answered(
    client: aiqueue.Client, plain: Any, state: State
) -> None:
    assert state.store is not None
    async with aiqueue.Responder().running(client):
        for body in (
            b'{"query_id": "q-1", "query": "guards"}',
            b'{"message_type": "rag_query", "data": {"query_id": "q-2", "query": "guards"}, "schema_version": "1.0"}',
        ):
            answer = await plain.request("ai.rag.results.acme", body, timeout=20)
            assert b'"document_id":"dogs.md"' in answer.data.replace(b": ", b":")


async def test_a_wrong_filter_or_another_tenant_is_a_failure_in_one_line(
    client: aiqueue.Client, rag: Rag, state: State
) -> None:
    with pytest.raises(JobFailed, match="where: key 'a b'") as failed:
        await (await rag.ask("cat", tenant="acme", where={"a b": 1})).result(20)
    assert failed.value.reason == "rejected"
    with pytest.raises(JobFailed, match="tenant_id 'globex' is not the tenant"):
        await (await client.enqueue(RagQuery(query="cat", tenant_id="globex"), tenant="acme")).result(20)
    assert state.embedder.embedded in (["cat"], [])


async def test_a_question_whose_deadline_is_over_is_dropped_before_it_is_embedded(
    client: aiqueue.Client, tmp_path: Path, rag: Rag
) -> None:
    handle = await rag.ask("cat", tenant="acme", deadline=0.05)
    await asyncio.sleep(0.1)
    async with answering(client, tmp_path) as state:
        await put(state.store, "acme", DOCUMENTS)
        with pytest.raises(JobFailed) as failed:
            await handle.result(20)
        assert failed.value.reason == "deadline"
        assert state.embedder.embedded == []


async def test_a_search_that_outlasts_the_deadline_ends_with_it(rag: Rag, state: State) -> None:
    state.embedder.delay_s = 30
    with pytest.raises(JobFailed, match="the search took longer than"):
        await (await rag.ask("cat", tenant="acme", deadline="1s")).result(10)


async def test_attempts_behind_other_answers_and_deaths_of_workers_do_not_count_towards_a_questions_failure(
    client: aiqueue.Client, plain: Any, state: State
) -> None:
    headers = {
        "Aiq-Job-Id": "tried", "Aiq-Kind": "rag.query", "Content-Type": "application/json", "Aiq-Parked": "1",
        "Aiq-Attempt": "30",
    }  # fmt: skip
    state.embedder.failures = 2
    await plain.jetstream().publish("ai.rag.queries.acme", b'{"query": "Who guards the house?"}', headers=headers)
    handle = await client.job("tried", tenant="acme", family="rag.queries")
    assert (await handle.result(20))["passages"]


async def test_a_question_that_fails_by_itself_eight_times_is_a_dead_letter_with_its_reason(
    rag: Rag, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_DELAYS", aiqueue.Backoff(attempts=8, first="10ms", cap="20ms"))
    state.embedder.failures = 100
    with pytest.raises(JobFailed, match="it has failed 8 times, last with: RuntimeError: no model"):
        await (await rag.ask("cat", tenant="acme")).result(20)
    assert state.embedder.failures == 92
