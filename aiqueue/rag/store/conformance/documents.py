"""What becomes of versions: stored, staged, moved, deleted, failed."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np

from ....errors import BadInput
from ...types import Chunk, DocumentHeader, IndexedChunks, IndexedDocument, PutOutcome, VectorStore
from .data import (
    DIMENSIONS,
    EMBEDDER,
    content_of,
    document_of,
    everything,
    raises,
    vector_of,
)
from .suite import StoreSuite


class DocumentsSuite(StoreSuite):
    """The tests of documents."""

    def test_a_newer_version_replaces_the_same_hash_moves_and_an_older_one_changes_nothing(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            assert await store.put(tenant, [document_of("a", 20, "apple one", metadata={"n": 1})]) == ["new"]
            assert await store.put(tenant, [document_of("a", 10, "apple zero")]) == ["old"]
            assert await store.put(tenant, [document_of("a", 20, "apple one", metadata={"n": 1})]) == ["same"]
            assert await everything(store, tenant) == {("a", 20, "apple one")}
            assert await store.put(tenant, [document_of("a", 30, "apple one", metadata={"n": 2})]) == ["same"]
            assert await everything(store, tenant) == {("a", 30, "apple one")}
            assert (await store.search(tenant, "apple", None, 5, where={"n": 2})) != []
            assert await store.put(tenant, [document_of("a", 40, "apple two", "apple three")]) == ["new"]
            assert await everything(store, tenant) == {("a", 40, "apple two"), ("a", 40, "apple three")}
            assert await store.search(tenant, "one", None, 5, mode="keyword") == []
            assert (await store.stats(tenant)).chunks == 2

        self._run(test)

    def test_of_two_versions_in_one_put_the_higher_stands(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            for at, order in enumerate([(1, 2), (2, 1)]):
                documents = [document_of(f"d{at}", version, f"text {version}") for version in order]
                outcomes: list[PutOutcome] = await store.put(tenant, documents)
                assert outcomes == (["new", "new"] if order == (1, 2) else ["new", "old"])
            assert await everything(store, tenant) == {("d0", 2, "text 2"), ("d1", 2, "text 2")}

        self._run(test)

    def test_in_whatever_order_versions_and_deletes_arrive_the_last_one_stands(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            acts: list[tuple[str, int]] = [("put", 1), ("put", 2), ("delete", 3), ("put", 4), ("failed", 5)]
            for number, order in enumerate(itertools.permutations(acts)):
                document_id = f"d{number}"
                for act, version in order:
                    if act == "put":
                        await store.put(tenant, [document_of(document_id, version, f"{document_id} {version}")])
                    elif act == "delete":
                        await store.delete(tenant, document_id, version)
                    else:
                        await store.note(tenant, document_id, version, "failed", reason="no text")
                state = await store.document(tenant, document_id)
                assert state is not None
                assert (state.indexed_version, state.version, state.state, state.reason) == (4, 5, "failed", "no text")
            assert await everything(store, tenant) == {(f"d{n}", 4, f"d{n} 4") for n in range(120)}

        self._run(test)

    def test_what_was_deleted_stays_deleted_for_older_versions(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 10, "apple")])
            assert not await store.delete(tenant, "a", 9)
            assert await everything(store, tenant) == {("a", 10, "apple")}
            assert await store.delete(tenant, "a", 11)
            assert await store.delete(tenant, "a", 11)
            assert await everything(store, tenant) == set()
            assert await store.search(tenant, "apple", None, 5, mode="keyword") == []
            for version in (10, 11):
                assert await store.put(tenant, [document_of("a", version, "apple")]) == ["old"]
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.state, state.version, state.indexed_version, state.chunks) == ("deleted", 11, None, 0)
            assert await store.documents(tenant) == []
            assert await store.put(tenant, [document_of("a", 12, "apple")]) == ["new"]
            assert await store.delete(tenant, "unknown", 5)
            assert await store.put(tenant, [document_of("unknown", 4, "pear")]) == ["old"]

        self._run(test)

    def test_only_the_same_hash_moves_a_version(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 10, "apple", content_hash="h", problems=["page 2: empty"])])
            assert not await store.move(tenant, "a", 11, "other")
            assert not await store.move(tenant, "a", 9, "h")
            assert not await store.move(tenant, "b", 9, "h")
            assert await store.move(tenant, "a", 11, "h")
            assert await everything(store, tenant) == {("a", 11, "apple")}
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.state, state.version, state.done, state.total) == ("completed_with_errors", 11, 1, 1)
            assert list(state.problems) == ["page 2: empty"]
            await store.delete(tenant, "a", 12)
            assert not await store.move(tenant, "a", 13, "h")

        self._run(test)

    def test_hints_are_those_of_the_stored_version(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            async def hints() -> dict[str, str]:
                state = await store.document(tenant, "a")
                assert state is not None
                return dict(state.hints)

            given = {"title": "Häuser", "name": "x.md"}
            await store.put(tenant, [document_of("a", 1, "apple", hints=given)])
            assert await hints() == given
            assert await store.put(tenant, [document_of("a", 2, "apple", hints={"name": "y.md"})]) == ["same"]
            assert await hints() == {"name": "y.md"}
            assert await store.put(tenant, [document_of("a", 3, "pear", hints=given)]) == ["new"]
            assert await hints() == given
            await store.delete(tenant, "a", 4)
            assert await hints() == {}

        self._run(test)

    def test_a_staged_document_is_found_after_its_commit_only(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "former")])
            header = DocumentHeader("a", 2, "h2")
            await raises(BadInput, store.commit(tenant, header), "stage")
            await store.stage(tenant, "a", 2, "h2", 1, content_of(["apple 2", "apple 3"], first=2))
            await raises(BadInput, store.commit(tenant, header), "chunk 0")
            await store.stage(tenant, "a", 2, "h2", 0, content_of(["wrong", "wrong"]))
            await store.stage(tenant, "a", 2, "h2", 0, content_of(["apple 0", "apple 1"]))
            assert await store.staged(tenant, "a", 2, "h2") == {0, 1}
            assert await store.staged(tenant, "a", 3, "h2") == set()
            assert await everything(store, tenant) == {("a", 1, "former")}
            assert await store.commit(tenant, header) == "new"
            assert await everything(store, tenant) == {("a", 2, f"apple {n}") for n in range(4)}
            assert await store.staged(tenant, "a", 2, "h2") == set()
            assert await store.commit(tenant, header) == "same"
            assert await store.commit(tenant, DocumentHeader("a", 1, "h1")) == "old"
            passages = await store.search(tenant, "apple", vector_of("apple 3"), 4)
            assert {each.number for each in passages} == {0, 1, 2, 3}

        self._run(test)

    def test_batches_of_another_content_of_the_version_are_never_part_of_the_document(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            for batch in range(3):
                await store.stage(tenant, "a", 1, "former", batch, content_of([f"pear {batch}"], first=batch))
            assert await store.staged(tenant, "a", 1, "new") == set()
            await raises(BadInput, store.commit(tenant, DocumentHeader("a", 1, "new")), "stage")
            await store.stage(tenant, "a", 1, "new", 1, content_of(["apple 1"], first=1))
            assert await store.staged(tenant, "a", 1, "new") == {1}
            await raises(BadInput, store.commit(tenant, DocumentHeader("a", 1, "new")), "chunk 0")
            await store.stage(tenant, "a", 1, "new", 0, content_of(["apple 0"]))
            assert await store.commit(tenant, DocumentHeader("a", 1, "new")) == "new"
            assert await everything(store, tenant) == {("a", 1, "apple 0"), ("a", 1, "apple 1")}

        self._run(test)

    def test_staged_batches_go_when_a_newer_version_is_stored_or_deleted(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            for version in (1, 2, 9):
                await store.stage(tenant, "a", version, "h", 0, content_of(["apple"]))
            await store.put(tenant, [document_of("a", 3, "pear")])
            assert [await store.staged(tenant, "a", version, "h") for version in (1, 2, 9)] == [set(), set(), {0}]
            await store.stage(tenant, "a", 2, "h", 0, content_of(["apple"]))
            assert await store.staged(tenant, "a", 2, "h") == set()
            await store.delete(tenant, "a", 10)
            assert await store.staged(tenant, "a", 9, "h") == set()
            assert await everything(store, tenant) == set()

        self._run(test)

    def test_a_failed_newer_version_keeps_the_former_one_and_both_are_shown(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple")])
            await store.note(tenant, "a", 5, "working", stage="embed", done=64, total=200)
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.version, state.state, state.stage, state.done, state.total) == (
                5,
                "working",
                "embed",
                64,
                200,
            )
            await store.note(tenant, "a", 5, "failed", reason="no text\x00")
            await store.note(tenant, "a", 4, "working", stage="parse")
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.version, state.state, state.reason) == (5, "failed", "no text\ufffd")
            assert (state.indexed_version, state.chunks) == (1, 1)
            assert abs(state.updated_at - time.time()) < 60
            assert await everything(store, tenant) == {("a", 1, "apple")}
            assert (await store.stats(tenant)).failed == 1

        self._run(test)

    def test_a_cancelled_version_loses_its_staged_batches_and_the_former_one_stays(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple")])
            for version in (5, 6):
                await store.stage(tenant, "a", version, "h", 0, content_of(["pear"]))
            await store.note(tenant, "a", 6, "working", stage="embedding", job_id="job-6")
            await store.note(tenant, "a", 5, "cancelled", job_id="job-5")
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.version, state.state, state.job_id) == (6, "working", "job-6")
            assert [await store.staged(tenant, "a", version, "h") for version in (5, 6)] == [set(), {0}]
            await store.note(tenant, "a", 6, "cancelled", reason="by its owner")
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.state, state.reason, state.indexed_version) == ("cancelled", "by its owner", 1)
            assert await everything(store, tenant) == {("a", 1, "apple")}
            await store.put(tenant, [document_of("a", 7, "plum")])
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.state, state.job_id) == ("completed", "")

        self._run(test)

    def test_a_note_about_a_stored_version_changes_nothing(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 3, "apple")])
            await store.note(tenant, "a", 3, "working", stage="parse")
            state = await store.document(tenant, "a")
            assert state is not None
            assert (state.state, state.version) == ("completed", 3)
            await store.note(tenant, "new", 1, "queued")
            state = await store.document(tenant, "new")
            assert state is not None
            assert (state.state, state.indexed_version) == ("queued", None)

        self._run(test)

    def test_documents_are_listed_in_pages_by_id(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            ids = ["Zoo", "a b/c?.md", "apple", "Äpfel", "é", "日本"]
            await store.put(tenant, [document_of(each, 1, "apple") for each in ids])
            listed: list[str] = []
            while page := await store.documents(tenant, after=listed[-1] if listed else "", limit=4):
                assert len(page) <= 4
                listed += [each.document_id for each in page]
            assert listed == sorted(ids)
            await raises(BadInput, store.documents(tenant, limit=0), "limit")

        self._run(test)

    def test_a_document_that_cannot_be_stored_leaves_nothing_of_its_group(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            good = document_of("good", 1, "apple")
            header, chunks = DocumentHeader("bad", 1, "h"), [Chunk(0, "x")]
            short, holes = np.ones((1, 5), np.float32), np.full((1, DIMENSIONS), np.nan, np.float32)
            deep: Any = {}
            for _ in range(50):
                deep = {"a": deep}
            for bad in (
                IndexedDocument(header, IndexedChunks(chunks, short, short)),
                IndexedDocument(header, IndexedChunks(chunks, holes, holes)),
                document_of("bad", 1, "x", metadata=deep),
                document_of("bad", 1, "x", metadata={"a": object()}),
                document_of("bad", 1, "x", metadata={"a": 10**400}),
            ):
                await raises(BadInput, store.put(tenant, [good, bad]))
                assert await everything(store, tenant) == set()
            other = self.connect()
            await raises(BadInput, other.put(tenant, [good]), "open")
            await other.close()

        self._run(test)

    def test_two_objects_write_and_read_one_tenant_at_once(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            other = self.connect()
            await other.open(tenant, EMBEDDER, DIMENSIONS)

            async def write(to: VectorStore, first: int) -> None:
                for version in range(first, 41, 2):
                    await to.put(tenant, [document_of("shared", version, f"apple {version}")])
                    await to.put(tenant, [document_of(f"own-{version}", 1, f"pear {version}")])

            async def read(of: VectorStore) -> None:
                while not done:
                    passages = await of.search(tenant, "apple", vector_of("apple"), 10)
                    assert len({each.version for each in passages if each.document_id == "shared"}) <= 1
                    await asyncio.sleep(0)

            done = False
            readers = [asyncio.ensure_future(read(each)) for each in (store, other)]
            await asyncio.gather(write(store, 1), write(other, 2))
            done = True
            await asyncio.gather(*readers)
            expected = {("shared", 40, "apple 40")} | {(f"own-{n}", 1, f"pear {n}") for n in range(1, 41)}
            end = time.monotonic() + 5
            for each in (store, other):
                while await everything(each, tenant) != expected:
                    assert time.monotonic() < end, await everything(each, tenant)
                    await asyncio.sleep(0.02)
            await other.close()

        self._run(test)

    def test_stats_count_what_is_stored(self) -> None:
        async def test(store: VectorStore, tenant: str) -> None:
            await store.put(tenant, [document_of("a", 1, "apple", "pear"), document_of("b", 1, "sand")])
            await store.put(tenant, [document_of("a", 2, "apple", "pear", "plum")])
            await store.delete(tenant, "b", 2)
            await store.note(tenant, "c", 1, "failed", reason="empty")
            stats = await store.stats(tenant)
            assert (stats.documents, stats.chunks, stats.failed, stats.deleted) == (1, 3, 1, 1)
            assert (stats.embedder, stats.dimensions) == (EMBEDDER, DIMENSIONS)
            assert stats.bytes > 0

        self._run(test)
