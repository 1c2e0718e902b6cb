"""Group commit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from aiqueue.errors import BadInput, Unavailable
from aiqueue.rag.store import SqliteStore, Upserter
from aiqueue.rag.store.conformance.data import DIMENSIONS, EMBEDDER, document_of, everything
from aiqueue.rag.types import IndexedDocument, PutOutcome


class Watched(SqliteStore):
    """Notes the groups of its puts, and how many were under way at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.groups: list[int] = []
        self.now = self.most = 0
        self.down = False

    async def put(self, tenant: str, documents: Sequence[IndexedDocument]) -> list[PutOutcome]:
        self.groups.append(len(documents))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.down:
                raise Unavailable("down")
            return await super().put(tenant, documents)
        finally:
            self.now -= 1


@pytest.fixture
async def store(tmp_path: Path):
    store = Watched(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    yield store
    await store.close()


async def test_what_arrives_while_a_transaction_is_under_way_is_the_next_one(store: Watched) -> None:
    upserter = Upserter(store)
    documents = [document_of(f"d{n}", 1, f"apple {n}") for n in range(200)]
    outcomes = await asyncio.gather(*(upserter.put("acme", each) for each in documents))
    assert outcomes == ["new"] * 200
    assert sum(store.groups) == 200
    assert max(store.groups) == 64
    assert len(store.groups) <= 5
    assert store.most == 1
    assert len(await everything(store, "acme")) == 200
    await upserter.close()
    assert not upserter._queues


async def test_a_document_alone_is_stored_at_once_and_of_a_trickle_several_together(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.rag.store.upserter.SPACING_S", 1.5)
    upserter = Upserter(store)
    begun = time.monotonic()
    assert await upserter.put("acme", document_of("first", 1, "apple")) == "new"
    assert time.monotonic() - begun < 1.5
    puts = []
    for n in range(5):
        puts.append(asyncio.create_task(upserter.put("acme", document_of(f"d{n}", 1, "apple"))))
        await asyncio.sleep(0.02)
    assert await asyncio.gather(*puts) == ["new"] * 5
    assert time.monotonic() - begun >= 1.5
    assert store.groups == [1, 5]
    await upserter.close()


async def test_a_document_that_fails_does_not_fail_its_group(store: Watched) -> None:
    upserter = Upserter(store)
    documents = [document_of(f"d{n}", 1, "apple", metadata={"a": object()} if n == 3 else {}) for n in range(8)]
    outcomes = await asyncio.gather(*(upserter.put("acme", each) for each in documents), return_exceptions=True)
    assert [isinstance(each, BadInput) for each in outcomes] == [n == 3 for n in range(8)]
    assert {each[0] for each in await everything(store, "acme")} == {f"d{n}" for n in range(8) if n != 3}


async def test_a_store_that_is_down_fails_the_whole_group_at_once(store: Watched) -> None:
    store.down = True
    upserter = Upserter(store)
    puts = [upserter.put("acme", document_of(f"d{n}", 1, "apple")) for n in range(8)]
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    assert all(isinstance(each, Unavailable) for each in outcomes)
    assert len(store.groups) == 1
    store.down = False
    assert await upserter.put("acme", document_of("d1", 1, "apple")) == "new"


async def test_versions_of_one_document_are_stored_one_after_the_other(store: Watched) -> None:
    upserter = Upserter(store)
    puts = [upserter.put("acme", document_of("a", version, f"apple {version}")) for version in (3, 1, 5)]
    assert await asyncio.gather(*puts) == ["new", "old", "new"]
    assert await everything(store, "acme") == {("a", 5, "apple 5")}
    assert store.groups == [1, 1, 1]


async def test_a_caller_that_leaves_before_its_transaction_stores_nothing(store: Watched) -> None:
    upserter = Upserter(store)
    first = asyncio.create_task(upserter.put("acme", document_of("a", 1, "apple")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert store.groups == [1]
    second = asyncio.create_task(upserter.put("acme", document_of("b", 1, "apple")))
    third = asyncio.create_task(upserter.put("acme", document_of("c", 1, "apple")))
    await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    assert await third == "new"
    await upserter.close()
    assert {each[0] for each in await everything(store, "acme")} == {"a", "c"}
    with pytest.raises(BadInput, match="closed"):
        await upserter.put("acme", document_of("d", 1, "apple"))


async def test_tenants_do_not_wait_for_each_other(store: Watched) -> None:
    await store.open("globex", EMBEDDER, DIMENSIONS)
    upserter = Upserter(store)
    await asyncio.gather(*(upserter.put(t, document_of("a", 1, "apple")) for t in ("acme", "globex")))
    assert store.most == 2


async def test_a_group_has_a_bound_of_chunks(store: Watched) -> None:
    upserter = Upserter(store)
    documents = [document_of(f"d{n}", 1, *["apple"] * 400) for n in range(5)]
    await asyncio.gather(*(upserter.put("acme", each) for each in documents))
    assert store.groups == [2, 2, 1]
