"""The keyword search in numpy, beside FTS5's own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from aiqueue.rag.store import SqliteStore, sqlite_file
from aiqueue.rag.store.conformance.data import DIMENSIONS, EMBEDDER, content_of, vector_of
from aiqueue.rag.store.keyword_search import KeywordSearch, Stems, best_in_index
from aiqueue.rag.store.texts import terms_of
from aiqueue.rag.store.vector_cache import CacheBudget, VectorCache, varints
from aiqueue.rag.types import Chunk, DocumentHeader, IndexedChunks, IndexedDocument

WORDS = [
    "queue", "queues", "queued", "worker", "café", "CAFE", "naïve", "x2", "größe", "2024", "retry", "отчёт", "ναός",
    "東京", "data's",
]  # fmt: skip


def document(chance: random.Random, number: int, version: int) -> IndexedDocument:
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 200))) for _ in range(chance.randint(1, 4))]
    content = content_of(texts)
    headed = [
        Chunk(each.number, each.text, " ".join(chance.choices(WORDS, k=chance.randint(0, 3))))
        for each in content.chunks
    ]
    header = DocumentHeader(f"d{number}", version, f"h{version}", chance.choice(WORDS), metadata={"even": number % 2})
    return IndexedDocument(header, IndexedChunks(headed, content.bodies, content.headings))


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Of a tenant whose documents were stored, replaced and deleted."""
    chance, store = random.Random(5), SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    for version in range(1, 4):
        numbers = range(120) if version == 1 else chance.sample(range(120), 30)
        await store.put("acme", [document(chance, number, version) for number in numbers])
    for number in chance.sample(range(120), 20):
        await store.delete("acme", f"d{number}", 9)
    await store.close()
    [file] = tmp_path.glob("*.sqlite")
    return file


@pytest.mark.parametrize("filtered", [False, True])
def test_bm25_in_numpy_finds_and_scores_the_same_chunks_as_fts5(path: Path, filtered: bool) -> None:
    chance = random.Random(6)
    db = sqlite_file.connect(path, "acme", writer=False)
    cache = VectorCache(lambda: sqlite_file.connect(path, "acme", writer=False), CacheBudget(2**30))
    snapshot, search, chunks = cache.snapshot(), KeywordSearch(Stems()), sqlite_file.meta(db)["chunks"]
    documents = [row[0] for row in db.execute("SELECT number FROM documents WHERE number % 3 = 0")]
    allowed = np.array(documents, np.int64) if filtered else None
    for _ in range(60):
        terms = terms_of(" ".join(chance.sample(WORDS, chance.randint(1, 4))))
        chosen = search._counts.select(db, terms, chunks)
        found = search.best(db, snapshot, terms, chunks, 1_000, allowed)
        assert found == pytest.approx(best_in_index(db, chosen, 1_000, allowed), rel=1e-9), terms
        if len(set(found.values())) == len(found):
            assert search.best(db, snapshot, terms, chunks, 7, allowed).keys() == set(
                sorted(found, key=found.__getitem__)[-7:]
            )
    db.close()
    cache.close()


async def test_chunks_are_found_while_others_come_and_go_and_the_lengths_in_memory_are_packed_anew(
    tmp_path: Path,
) -> None:
    chance, store = random.Random(7), SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    for version in range(1, 9):
        numbers = range(40) if version == 1 else chance.sample(range(40), 12)
        await store.put("acme", [document(chance, number, version) for number in numbers])
        await store.delete("acme", f"d{chance.randrange(40)}", version)
        for words in ("queue", "worker retry", "café größe"):
            hybrid = await store.search("acme", words, vector_of("nothing"), 1_000)
            keyword = await store.search("acme", words, None, 1_000, mode="keyword")  # by FTS5 alone
            by_keyword = {(each.document_id, each.number) for each in keyword}
            assert by_keyword <= {(each.document_id, each.number) for each in hybrid}
            assert by_keyword
    await store.close()


@pytest.mark.parametrize(
    ("block", "numbers"),
    [
        (b"\x00\x7f", [0, 127]),
        (b"\x81\x00", [128]),
        (b"\x01\x81\x80\x00\x05", [1, 16_384, 5]),
        (b"\x83\xe8\x07", [62_471]),
    ],
)
def test_varints_are_read_as_sqlite_writes_them(block: bytes, numbers: list[int]) -> None:
    assert varints(block).tolist() == numbers


@pytest.mark.parametrize(
    ("term", "stem"), [("queues", "queue"), ("Größe", "groß"), ("naïve", "naiv"), ("東 京", None), ("", None)]
)
def test_a_stem_is_what_the_index_holds_of_one_word(term: str, stem: str | None) -> None:
    stems = Stems()
    assert [stems.of(term), stems.of(term)] == [stem, stem]
