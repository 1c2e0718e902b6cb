"""What is the SQLite store's own: its files, its processes, its memory."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiqueue.errors import BadInput, ConfigMismatch, Corrupt, Unavailable
from aiqueue.rag import StoreUnavailable
from aiqueue.rag.store import (
    SqliteStore,
    settling,
    sqlite_file,
    sqlite_reads,
    sqlite_store,
    sqlite_writes,
    vector_cache,
)
from aiqueue.rag.store.conformance.data import (
    DIMENSIONS,
    EMBEDDER,
    content_of,
    document_of,
    everything,
    found,
    vector_of,
)
from aiqueue.rag.types import DocumentHeader

from ... import forks

WRITER = """
import asyncio, sys
from aiqueue.rag.store import SqliteStore
from aiqueue.rag.store.conformance.data import DIMENSIONS, EMBEDDER, content_of, document_of
from aiqueue.rag.types import DocumentHeader

async def main(root, first, step, count):
    store = SqliteStore(root)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    for n in range(first, count, step):
        texts = [f"apple v{n} part{i}" for i in range(n % 5 + 1)]
        await store.put("acme", [document_of(f"d{n % 7}", n, *texts), document_of(f"e{n % 11}", n, *texts)])
        for batch in range(2):
            content = content_of([f"big v{n} p{batch}", "q", "r"], first=3 * batch)
            await store.stage("acme", "big", n, f"h{n}", batch, content)
        await store.commit("acme", DocumentHeader("big", n, f"h{n}"))
        await store.delete("acme", f"e{n % 11}", n) if n % 3 == 0 else None
        print(n, flush=True)
    await store.close()

asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
"""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    yield store
    await store.close()


def start_writer(root: Path, first: int, step: int, count: int) -> forks.Program:
    (root / "writer.py").write_text(WRITER)
    arguments = [str(root), str(first), str(step), str(count)]
    return forks.start("writer.py", *arguments, cwd=root, stdout=subprocess.PIPE)


def check_whole(path: Path) -> None:
    """Every document is one whole version, and all indexes hold the same chunks."""
    db = sqlite_file.connect(path, "acme", writer=True)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        db.execute("INSERT INTO fts (fts) VALUES ('integrity-check')")
        ids = [row[0] for row in db.execute("SELECT id FROM chunks ORDER BY id")]
        assert [row[0] for row in db.execute("SELECT id FROM vectors ORDER BY id")] == ids
        by_word = db.execute("SELECT rowid FROM fts WHERE fts MATCH 'apple OR big OR q OR r' ORDER BY rowid")
        assert [row[0] for row in by_word] == ids
        assert sqlite_file.meta(db)["chunks"] == len(ids)
        for number, first, count, indexed, settled in db.execute(
            "SELECT number, first_chunk, chunks, indexed, settled FROM documents"
        ).fetchall():
            bodies = db.execute("SELECT id, body FROM chunks WHERE document = ? ORDER BY id", (number,)).fetchall()
            assert [row[0] for row in bodies] == list(range(first, first + count))
            assert bool(indexed) is (count > 0)
            assert all(f" v{settled} " in body for _, body in bodies if body not in "qr")
    finally:
        db.close()


def test_two_processes_write_one_tenant_while_others_search(tmp_path: Path) -> None:
    async def read() -> None:
        store = SqliteStore(tmp_path)
        writers = [start_writer(tmp_path, first, 2, 120) for first in (1, 2)]
        while any(each.poll() is None for each in writers):
            for passages in await asyncio.gather(*(store.search("acme", "apple big", None, 50) for _ in range(4))):
                versions = Counter(document_id for document_id, _ in {(p.document_id, p.version) for p in passages})
                assert set(versions.values()) <= {1}
        assert [each.wait() for each in writers] == [0, 0]
        for each in writers:
            assert each.stdout is not None
            each.stdout.close()
        vector = vector_of("apple")
        passages = await store.search("acme", "", vector, 1_000, mode="vector")
        assert {each.version for each in passages if each.document_id == "big"} == {119}
        assert {each.document_id: each.version for each in passages if each.document_id[0] == "d"} == {
            f"d{n % 7}": n for n in range(113, 120)
        }
        await store.close()

    asyncio.run(read())
    check_whole(sqlite_file.path_of(tmp_path, "acme"))


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_at_any_moment_leaves_whole_documents(tmp_path: Path, kills: int) -> None:
    first = 1
    for _ in range(kills):
        writer = start_writer(tmp_path, first, 1, 1_000_000)
        assert writer.stdout is not None
        assert writer.stdout.readline()
        time.sleep(random.uniform(0, 0.2))  # anywhere within its transactions
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        check_whole(sqlite_file.path_of(tmp_path, "acme"))
        first += len(lines) + 1
    assert first > kills


def test_tenants_that_differ_in_case_only_have_different_files(tmp_path: Path) -> None:
    paths = {sqlite_file.path_of(tmp_path, tenant).name.lower() for tenant in ("acme", "Acme", "ACME")}
    assert len(paths) == 3


async def test_a_file_under_another_tenants_name_is_refused(store: SqliteStore, tmp_path: Path) -> None:
    await store.put("acme", [document_of("a", 1, "apple")])
    await store.close()
    sqlite_file.path_of(tmp_path, "acme").rename(sqlite_file.path_of(tmp_path, "globex"))
    other = SqliteStore(tmp_path)
    with pytest.raises(ConfigMismatch, match="of tenant acme, not of globex"):
        await other.search("globex", "apple", None, 5)
    await other.close()


async def test_a_database_of_a_newer_aiqueue_is_refused_with_the_remedy(store: SqliteStore, tmp_path: Path) -> None:
    await store.close()
    with sqlite3.connect(sqlite_file.path_of(tmp_path, "acme")) as db:
        db.execute(f"PRAGMA user_version = {sqlite_file.SCHEMA + 1}")
    db.close()
    other = SqliteStore(tmp_path)
    with pytest.raises(ConfigMismatch, match="upgrade aiqueue"):
        await other.open("acme", EMBEDDER, DIMENSIONS)
    await other.close()


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\x00" + b"\xff" * 5_000])
async def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    sqlite_file.path_of(tmp_path, "acme").write_bytes(content)
    store = SqliteStore(tmp_path)
    with pytest.raises((Corrupt, Unavailable), match=r"acme-.*sqlite: "):
        await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.close()


async def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = sqlite_file.path_of(tmp_path, "acme")
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    store = SqliteStore(tmp_path)
    with pytest.raises(ConfigMismatch, match="not a database of aiqueue"):
        await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    db.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
async def test_only_their_owner_can_read_the_files(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "new" / "root")
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.put("acme", [document_of("a", 1, "apple")])
    assert {each.stat().st_mode & 0o077 for each in (tmp_path / "new" / "root").iterdir()} == {0}
    await store.close()


async def test_a_lock_that_is_not_released_is_an_error_that_may_be_retried(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "WRITE_WAIT_S", 0.05)
    other = sqlite3.connect(sqlite_file.path_of(tmp_path, "acme"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="lock"):
        await store.put("acme", [document_of("a", 1, "apple")])
    other.execute("ROLLBACK")
    other.close()
    assert await store.put("acme", [document_of("a", 1, "apple")]) == ["new"]


async def test_asking_about_an_unknown_tenant_makes_no_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "root")
    assert await store.search("acme", "apple", None, 5) == []
    assert await store.document("acme", "a") is None
    await store.close()
    assert not (tmp_path / "root").exists()
    with pytest.raises(BadInput, match="closed"):
        await store.document("acme", "a")


async def test_what_is_stored_after_the_file_was_moved_away_is_in_a_new_file_and_found(
    store: SqliteStore, tmp_path: Path
) -> None:
    """As the error of a damaged file advises: a worker that runs on must not write into what was moved."""
    await store.put("acme", [document_of("former", 1, "apple")])
    assert len(await everything(store, "acme")) == 1
    path = sqlite_file.path_of(tmp_path, "acme")
    for each in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        each.rename(f"{each}.away")
    assert await store.document("acme", "former") is None
    assert await store.put("acme", [document_of("later", 1, "pear")]) == ["new"]
    other = SqliteStore(tmp_path)
    for each_store in (store, other):
        assert await everything(each_store, "acme") == {("later", 1, "pear")}
    await other.close()


async def test_batches_of_which_nothing_came_for_two_days_are_dropped(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.stage("acme", "left", 1, "h", 0, content_of(["apple"]))
    await store.stage("acme", "alive", 1, "h", 0, content_of(["apple"]))
    with sqlite3.connect(sqlite_file.path_of(tmp_path, "acme")) as db:
        db.execute("UPDATE staged SET at = at - ?", (settling.STAGED_KEPT_S + 1,))
    db.close()
    await store.stage("acme", "alive", 1, "h", 1, content_of(["apple"], first=1))
    assert await store.staged("acme", "left", 1, "h") == set()
    assert await store.staged("acme", "alive", 1, "h") == {0, 1}


async def test_vectors_are_loaded_by_the_first_question_that_needs_them(store: SqliteStore) -> None:
    await store.put("acme", [document_of("a", 1, *["apple"] * 100)])
    await store.search("acme", "apple", None, 5)
    assert store.cached_bytes == 0
    await store.search("acme", "apple", vector_of("apple"), 5)
    assert store.cached_bytes >= 100 * DIMENSIONS * 4


async def test_the_bound_of_the_vectors_in_memory_holds_over_all_tenants(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path, cache_bytes=3 * 128 * DIMENSIONS * 4)
    for tenant in ("t1", "t2", "t3", "t4"):
        await store.open(tenant, EMBEDDER, DIMENSIONS)
        await store.put(tenant, [document_of("a", 1, *(f"{tenant} w{i}" for i in range(100)))])
    for tenant in ("t1", "t2", "t3", "t4", "t1"):
        assert len(await everything(store, tenant)) == 100
        assert 0 < store.cached_bytes <= 3 * 128 * DIMENSIONS * 4
    await store.close()


async def test_a_tenant_above_the_bound_is_searched_from_disk_with_the_same_answer(tmp_path: Path) -> None:
    cached, uncached = SqliteStore(tmp_path), SqliteStore(tmp_path, cache_bytes=1_000)
    for each in (cached, uncached):
        await each.open("acme", EMBEDDER, DIMENSIONS)
    words = [f"w{i}" for i in range(40)]
    documents = [
        document_of(f"d{n}", 1, " ".join(random.sample(words, 5)), metadata={"n": n % 3}) for n in range(5_000)
    ]
    await cached.put("acme", documents)
    for where in (None, {"n": 1}):
        answers = [
            await each.search("acme", "", vector_of("w1 w2"), 50, where=where, mode="vector")
            for each in (cached, uncached)
        ]
        scores = [[each.score for each in answer] for answer in answers]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert {each.metadata["n"] for each in answers[1]} == ({1} if where else {0, 1, 2})
    assert uncached.cached_bytes == 0
    await cached.close()
    await uncached.close()


async def test_the_vectors_in_memory_follow_what_this_and_other_processes_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_cache, "REFRESH_S", 0.0)
    monkeypatch.setattr(sqlite_writes, "REMOVED_KEPT", 20)
    mine, other = SqliteStore(tmp_path), SqliteStore(tmp_path)
    for each in (mine, other):
        await each.open("acme", EMBEDDER, DIMENSIONS)
    rng = random.Random(1)
    expected: dict[str, tuple[int, list[str]]] = {}
    for version in range(1, 300):
        store = rng.choice((mine, other))
        document_id = f"d{rng.randrange(40)}"
        if rng.random() < 0.2:
            await store.delete("acme", document_id, version)
            expected.pop(document_id, None)
        else:
            texts = [f"apple {version} {i}" for i in range(rng.randrange(1, 6))]
            await store.put("acme", [document_of(document_id, version, *texts)])
            expected[document_id] = (version, texts)
        if rng.random() < 0.5:
            all_of = {(name, at, text) for name, (at, texts) in expected.items() for text in texts}
            assert await everything(rng.choice((mine, other)), "acme") == all_of
    await mine.close()
    await other.close()


async def test_a_log_of_removals_that_was_cut_makes_a_cache_load_all_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_cache, "REFRESH_S", 0.0)
    monkeypatch.setattr(sqlite_writes, "REMOVED_KEPT", 10)
    store, reader = SqliteStore(tmp_path), SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.put("acme", [document_of("kept", 1, "apple kept"), document_of("a", 1, "apple 1")])
    assert len(await everything(reader, "acme")) == 2
    await store.put("acme", [document_of("a", version, f"apple {version}") for version in range(2, 1_010)])
    assert await everything(reader, "acme") == {("kept", 1, "apple kept"), ("a", 1_009, "apple 1009")}
    await store.close()
    await reader.close()


async def test_chunks_that_are_gone_take_no_place_among_the_candidates(store: SqliteStore) -> None:
    await store.put("acme", [document_of("a", 1, *["pear"] * 300), document_of("b", 1, *["apple plum"] * 700)])
    assert len(await store.search("acme", "", vector_of("pear"), 1_000, mode="vector")) == 1_000
    await store.delete("acme", "a", 2)
    passages = await store.search("acme", "", vector_of("pear"), 1, mode="vector")
    assert [each.document_id for each in passages] == ["b"]


async def test_no_word_of_a_large_document_is_left_when_it_goes(store: SqliteStore, tmp_path: Path) -> None:
    await store.put("acme", [document_of("big", 1, *(f"apple w{n}" for n in range(2_500))), document_of("b", 1, "w7")])
    assert await store.delete("acme", "big", 2)
    db = sqlite3.connect(sqlite_file.path_of(tmp_path, "acme"))
    assert db.execute("SELECT count(*) FROM fts WHERE fts MATCH 'apple'").fetchone() == (0,)
    db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, fts, row)")
    assert db.execute("SELECT term FROM words").fetchall() == [("w7",)]
    db.close()


async def test_many_tenants_are_served_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "OPEN_TENANTS_MAX", 3)
    store = SqliteStore(tmp_path)

    async def use(number: int) -> None:
        tenant = f"t{number}"
        await store.open(tenant, EMBEDDER, DIMENSIONS)
        await store.put(tenant, [document_of("a", 1, f"apple {tenant}")])
        assert found(await store.search(tenant, "apple", vector_of("apple"), 5)) == {("a", 1, f"apple {tenant}")}

    for number in range(12):
        await use(number)
    assert len(store._tenants) == 3
    for number in range(12):
        assert await store.put(f"t{number}", [document_of("a", 1, f"apple t{number}")]) == ["same"]
    await asyncio.gather(*(use(number) for number in range(12, 24)))
    await store.close()


async def test_the_log_of_a_database_is_cut_though_readers_are_always_there(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "WAL_BYTES_MAX", 1_000_000)
    done = False

    async def read() -> None:
        while not done:
            await store.search("acme", "apple", vector_of("apple"), 5)

    readers = [asyncio.create_task(read()) for _ in range(3)]
    for n in range(30):
        await store.put("acme", [document_of(f"d{n}", 1, *[f"apple {n} {i} " + "x" * 900 for i in range(40)])])
    done = True
    await asyncio.gather(*readers)
    assert Path(f"{sqlite_file.path_of(tmp_path, 'acme')}-wal").stat().st_size < 3_000_000


async def test_a_cancelled_put_is_done_or_not_and_the_next_call_goes_on(store: SqliteStore) -> None:
    for n in range(20):
        task = asyncio.create_task(store.put("acme", [document_of(f"d{n}", 1, "apple", "pear")]))
        await asyncio.sleep(0)
        if n % 2:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await store.put("acme", [document_of("last", 1, "apple", "pear")]) == ["new"]
    counts = Counter(each[0] for each in await everything(store, "acme"))
    assert set(counts.values()) == {2}
    assert {f"d{n}" for n in range(0, 20, 2)} <= set(counts)


async def test_a_staged_document_of_many_batches_is_committed_in_their_order(store: SqliteStore) -> None:
    for batch in reversed(range(5)):
        content = content_of([f"apple b{batch} c{i}" for i in range(64)], first=64 * batch)
        await store.stage("acme", "big", 1, "h", batch, content)
    assert await store.commit("acme", DocumentHeader("big", 1, "h")) == "new"
    passages = await store.search("acme", "", vector_of("apple"), 1_000, mode="vector")
    assert {each.number: each.text for each in passages} == {n: f"apple b{n // 64} c{n % 64}" for n in range(320)}


def test_the_products_of_a_scan_are_those_of_a_matrix_product() -> None:
    rng = np.random.default_rng(1)
    block, vector = rng.standard_normal((50, 256), np.float32), rng.standard_normal(256, np.float32)
    out = vector_cache.products(block, vector, np.empty(50, np.float32))
    assert out == pytest.approx(block @ vector, abs=1e-4)


def test_an_error_of_the_disk_says_what_to_do(tmp_path: Path) -> None:
    path, remedy = tmp_path / "t.sqlite", "let the user of the workers write the file and its directory"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("CREATE TABLE t (x)")
    db.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable, match=f"readonly database: {remedy}"), sqlite_file.translated(path):
        db.execute("INSERT INTO t VALUES (1)")
    db.close()
    with pytest.raises(StoreUnavailable, match=f"open database file: {remedy}"), sqlite_file.translated(path):
        sqlite3.connect(tmp_path / "none" / "t.sqlite").execute("SELECT 1")


async def test_a_document_that_another_process_replaces_is_found_by_its_vector_all_the_time(tmp_path: Path) -> None:
    here, there = SqliteStore(tmp_path), SqliteStore(tmp_path)
    for store in (here, there):
        await store.open("acme", EMBEDDER, DIMENSIONS)
    for version in range(1, 6):
        await there.put("acme", [document_of("d", version, f"otter {version}")])
        passages = await here.search("acme", "", vector_of("otter"), 5, mode="vector")
        assert {each.version for each in passages} == {version}
    await here.close()
    await there.close()


async def test_vectors_that_are_dropped_while_they_are_counted_are_gone(tmp_path: Path) -> None:
    class Crowded(vector_cache.CacheBudget):
        def take(self, cache: vector_cache.VectorCache, size_bytes: int) -> bool:
            fits = super().take(cache, size_bytes)
            self.release(cache)  # as another thread does that needs the room
            cache.drop()
            return fits

    store = SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.put("acme", [document_of("d", 1, "otter")])
    await store.close()
    path = sqlite_file.path_of(tmp_path, "acme")
    cache = vector_cache.VectorCache(lambda: sqlite_file.connect(path, "acme", writer=False), Crowded(10**9))
    assert cache.snapshot() is not None
    assert cache._snapshot is None
    cache.close()


@pytest.mark.parametrize(("cores", "at_once"), [(1, 1), (2, 1), (4, 2)])
async def test_as_many_searches_run_at_once_as_half_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, at_once: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    store = SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.put("acme", [document_of("d", 1, "apple")])
    begun, go = threading.Semaphore(0), threading.Event()
    search = sqlite_reads.search

    def held(*given: Any) -> Any:
        begun.release()
        assert go.wait(10)
        return search(*given)

    monkeypatch.setattr(sqlite_reads, "search", held)
    waiting = [asyncio.create_task(store.search("acme", "apple", vector_of("apple"), 1)) for _ in range(5)]
    for _ in range(at_once):
        assert await asyncio.to_thread(begun.acquire, timeout=10)
    assert not await asyncio.to_thread(begun.acquire, timeout=0.05)
    go.set()
    assert [len(each) for each in await asyncio.gather(*waiting)] == [1] * 5
    await store.close()
