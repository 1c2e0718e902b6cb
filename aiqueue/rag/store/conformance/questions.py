"""What questions find: by words, vectors and filters, of one tenant and one embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ....errors import BadInput, EmbedderChanged, InvalidToken
from ...types import VectorStore
from .data import (
    DIMENSIONS,
    EMBEDDER,
    HOSTILE_TEXTS,
    HOSTILE_WHERE,
    content_of,
    document_of,
    everything,
    new_tenant,
    raises,
    vector_of,
)
from .suite import StoreSuite


class QuestionsSuite(StoreSuite):
    """The tests of questions."""

    def test_of_an_unknown_tenant_nothing_is_known(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            other = f"{tenant}-unknown"
            assert await store.document(other, "a") is None
            assert await store.documents(other) == []
            assert await store.search(other, "apple", vector_of("apple"), 5) == []
            assert await store.staged(other, "a", 1, "h") == set()
            assert not await store.move(other, "a", 1, "h")
            assert (await store.stats(other)).documents == 0
            await raises(InvalidToken, store.document("a/../b", "a"))

        self._run(test)

    def test_a_stored_document_is_found_whole_by_words_by_vector_and_by_both(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            document = document_of(
                "guide.md", 7, "apple pear", "stone iron", heading="Fruit > Trees", title="Fruit",
                source="/manual/guide.md", metadata={"lang": "en", "nested": {"a": [1, None, True]}},
            )  # fmt: skip
            assert await store.put(tenant, [document, document_of("other", 3, "water sand")]) == ["new", "new"]
            for mode in ("keyword", "vector", "hybrid"):
                passages = await store.search(tenant, "iron stone", vector_of("iron stone"), 3, mode=mode)
                best = passages[0]
                assert (best.document_id, best.version, best.title, best.source) == (
                    "guide.md",
                    7,
                    "Fruit",
                    "/manual/guide.md",
                )
                assert (best.heading, best.number, best.start, best.page) == ("Fruit > Trees", 1, 100, 2)
                assert (best.text, best.metadata) == ("stone iron", {"lang": "en", "nested": {"a": [1, None, True]}})
                scores = [each.score for each in passages]
                assert scores == sorted(scores, reverse=True)
                assert all(0 <= each <= 1 for each in scores)
            assert len(await store.search(tenant, "", vector_of("iron"), 1, mode="vector")) == 1
            assert await store.search(tenant, "iron", None, 3) != []

        self._run(test)

    def test_words_of_a_heading_and_of_a_title_find_a_chunk(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "water", heading="Harbours", title="Lisbon")])
            await store.put(tenant, [document_of("b", 1, "water")])
            for word in ("harbour", "LISBON"):
                passages = await store.search(tenant, word, None, 3, mode="keyword")
                assert [each.document_id for each in passages] == ["a"]

        self._run(test)

    def test_words_of_scripts_without_spaces_are_found(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(
                tenant, [document_of("a", 1, "关于数据库的检索和索引"), document_of("b", 1, "天气据数很好")]
            )
            passages = await store.search(tenant, "数据库", None, 3, mode="keyword")
            assert [each.document_id for each in passages] == ["a"]

        self._run(test)

    def test_k_is_1_to_1000_and_modes_are_known(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, *(f"apple w{i}" for i in range(40)))])
            vector = vector_of("apple")
            assert len(await store.search(tenant, "apple", vector, 1)) == 1
            assert len(await store.search(tenant, "apple", vector, 30)) == 30
            assert len(await store.search(tenant, "apple", vector, 1_000)) == 40
            for k in (0, -1, 1_001, True, 2.5, "5", None):
                await raises(BadInput, store.search(tenant, "apple", vector, k), "k ")  # type: ignore[arg-type]
            await raises(BadInput, store.search(tenant, "a", vector, 5, mode="other"), "mode")  # type: ignore[arg-type]
            await raises(BadInput, store.search(tenant, "a", None, 5, mode="vector"), "vector")
            await raises(BadInput, store.search(tenant, "a", vector[:5], 5), "vector")
            await raises(BadInput, store.search(tenant, "a", vector * np.nan, 5), "vector")

        self._run(test)

    def test_no_text_of_a_question_is_an_error_or_an_expression(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple pear"), document_of("b", 1, "iron sand")])
            for text in HOSTILE_TEXTS:
                for mode in ("keyword", "hybrid"):
                    passages = await store.search(tenant, text, vector_of("apple"), 5, mode=mode)
                    assert len(passages) <= 2, text[:50]
            not_apple = await store.search(tenant, "NOT apple", None, 5, mode="keyword")
            assert [each.document_id for each in not_apple] == ["a"]  # NOT is a word

        self._run(test)

    def test_hostile_documents_are_stored_and_found(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            for number, text in enumerate(HOSTILE_TEXTS):
                texts = (f"{text[:2_000]} apple",)
                document = document_of(f"d{number}", 1, *texts, title=text[:200], source=text[:200], heading=text[:200])
                await store.put(tenant, [document])
                assert await store.put(tenant, [document_of(f"d{number}", 2, "pear")]) == ["new"]
                await store.delete(tenant, f"d{number}", 3)
            await store.put(
                tenant, [document_of("ok", 1, "a\x00b \ud83d", title="\ud800", metadata={"k\x00": "\udc00"})]
            )
            passages = await store.search(tenant, "", vector_of("a"), 5, mode="vector")
            assert [(each.text, each.title) for each in passages] == [("a\ufffdb \ufffd", "\ufffd")]
            assert passages[0].metadata == {"k\ufffd": "\ufffd"}
            for document_id in ("", "a\x00", "\ud83d", "x" * 2_001):
                await raises(BadInput, store.put(tenant, [document_of(document_id, 1, "apple")]), "document id")
            for version in (0, -1, 2**63, True, 1.5):
                await raises(BadInput, store.put(tenant, [document_of("v", version, "apple")]), "version")  # type: ignore[arg-type]

        self._run(test)

    def test_filters_find_what_their_conditions_say(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            all_metadata: list[dict[str, Any]] = [
                {"lang": "en", "year": 2020, "tags": ["a", "b"], "ok": True, "x.y": "dot"},
                {"lang": "de", "year": 2024.5, "tags": [], "ok": False},
                {"lang": "1", "year": "2020", "tags": "b", "ok": 1},
                {"lang": None, "tags": {"a": "b"}},
            ]
            documents = [document_of(str(n), 1, "apple", metadata=each) for n, each in enumerate(all_metadata)]
            await store.put(tenant, documents)
            for where, expected in (
                ({}, "0123"), ({"lang": "en"}, "0"), ({"lang": 1}, ""), ({"lang": None}, "3"), ({"none": None}, "0123"),
                ({"lang": {"in": ["en", None]}}, "03"), ({"lang": {"eq": "de"}, "ok": False}, "1"),
                ({"lang": "' OR 1=1"}, ""), ({"lang": "\x00\ud83d"}, ""), ({"x.y": "dot"}, "0"), ({"year": 2020}, "0"),
                ({"year": {"gte": 2020, "lt": 2024}}, "0"), ({"year": {"gt": 2020}}, "1"), ({"tags": "b"}, "02"),
                ({"year": {"lte": 2024.5}}, "01"), ({"year": {"gte": "2020"}}, "2"), ({"tags": {"in": []}}, ""),
                ({"tags": {"in": ["a", "z"]}}, "0"), ({"tags": {"ne": "b"}}, "13"), ({"tags": None}, "1"),
                ({"ok": True}, "0"), ({"ok": 1}, "2"), ({"ok": {"ne": True}}, "123"),
            ):  # fmt: skip
                for mode in ("keyword", "vector", "hybrid"):
                    passages = await store.search(tenant, "apple", vector_of("apple"), 10, where=where, mode=mode)
                    assert sorted(each.document_id for each in passages) == list(expected), (where, mode)

        self._run(test)

    def test_what_is_no_filter_is_refused_in_one_line(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple")])
            for where in HOSTILE_WHERE:
                await raises(BadInput, store.search(tenant, "apple", None, 5, where=where), "where")

        self._run(test)

    def test_a_tenant_finds_nothing_of_another(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            others = (tenant.upper(), f"{tenant}_", new_tenant())
            await store.put(tenant, [document_of("a", 5, "apple mine")])
            for other in others:
                await store.open(other, EMBEDDER, DIMENSIONS)
                assert await store.search(other, "apple", vector_of("apple"), 5) == []
                assert await store.document(other, "a") is None
                assert await store.put(other, [document_of("a", 1, f"apple {other}")]) == ["new"]
                assert await store.delete(other, "b", 9)
            for each in (tenant, *others):
                for mode in ("keyword", "vector", "hybrid"):
                    passages = await store.search(each, "apple", vector_of("apple"), 5, mode=mode)
                    assert [p.text for p in passages] == [f"apple {'mine' if each == tenant else each}"]

        self._run(test)

    def test_another_embedder_is_refused_until_all_is_embedded_anew(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple one", "apple two"), document_of("b", 1, "pear")])
            other = self.connect()
            try:
                remedy = f"aiqueue rag reindex --tenant {tenant}"
                await raises(EmbedderChanged, other.open(tenant, "new-8", 8), remedy, EMBEDDER, "new-8")
                found_rows = await other.chunks(tenant, "new-8", limit=2)
                assert [chunk.text for _, chunk in found_rows] == ["apple one", "apple two"]
                found_rows += await other.chunks(tenant, "new-8", after=found_rows[-1][0])
                assert len(found_rows) == 3
                assert not await other.switch(tenant, "new-8", 8)
                await _replace(other, tenant, [row for row, _ in found_rows[:2]])
                assert [chunk.text for _, chunk in await other.chunks(tenant, "new-8", missing=True)] == ["pear"]
                assert not await other.switch(tenant, "new-8", 8)
                await _replace(other, tenant, [found_rows[2][0]])
                await store.put(tenant, [document_of("c", 1, "late")])
                await store.delete(tenant, "b", 2)
                assert not await other.switch(tenant, "new-8", 8)
                assert len(await everything(store, tenant)) == 3
                await _replace(other, tenant, [row for row, _ in await other.chunks(tenant, "new-8", missing=True)])
                assert await other.switch(tenant, "new-8", 8)
                assert await other.switch(tenant, "new-8", 8)
                assert len(await other.search(tenant, "", np.eye(8, dtype=np.float32)[0], 9, mode="vector")) == 3
                await raises(EmbedderChanged, store.put(tenant, [document_of("d", 1, "x")]), "new-8")
                await raises(EmbedderChanged, store.stage(tenant, "d", 1, "h", 0, content_of(["x"])), "new-8")
                await raises(EmbedderChanged, store.commit(tenant, document_of("d", 1, "x").header), "new-8")
                await raises(EmbedderChanged, store.search(tenant, "apple", vector_of("apple"), 5), "new-8")
                await raises(EmbedderChanged, store.open(tenant, EMBEDDER, DIMENSIONS), remedy)
                assert len(await store.search(tenant, "apple", None, 5, mode="keyword")) == 2
            finally:
                await other.close()

        self._run(test)

    def test_vectors_kept_for_a_third_embedder_are_not_taken(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple", "pear")])
            row_ids = [row for row, _ in await store.chunks(tenant, "third-8")]
            await _replace(store, tenant, row_ids, "third-8")
            assert not await store.switch(tenant, "new-8", 8)
            assert len(await store.chunks(tenant, "new-8", missing=True)) == 2
            await _replace(store, tenant, row_ids[:1])
            assert [row for row, _ in await store.chunks(tenant, "new-8", missing=True)] == row_ids[1:]
            assert not await store.switch(tenant, "new-8", 8)
            assert not await store.switch(tenant, "third-8", 8)
            await raises(BadInput, _replace(store, tenant, row_ids[1:], size=9), "numbers")
            await _replace(store, tenant, [*row_ids[1:], row_ids[-1] + 1_000])
            await raises(BadInput, store.switch(tenant, "new-8", 9), "dimensions")
            assert await store.switch(tenant, "new-8", 8)

        self._run(test)

    def test_a_tenant_without_chunks_takes_any_embedder(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.note(tenant, "a", 1, "failed")
            await store.open(tenant, "new-8", 8)
            stats = await store.stats(tenant)
            assert (stats.embedder, stats.dimensions) == ("new-8", 8)
            await store.open(tenant, EMBEDDER, DIMENSIONS)
            assert await store.put(tenant, [document_of("a", 2, "apple")]) == ["new"]

        self._run(test)


async def _replace(
    store: VectorStore, tenant: str, row_ids: Sequence[int], embedder: str = "new-8", size: int = 8
) -> None:
    vectors = np.tile(np.eye(size, dtype=np.float32)[0], (len(row_ids), 1))
    await store.replace_vectors(tenant, embedder, row_ids, vectors, vectors)
