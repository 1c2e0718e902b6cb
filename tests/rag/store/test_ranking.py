"""The recipe, its words and its filters."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiqueue.errors import BadInput
from aiqueue.rag.store import PgVectorStore, SqliteStore
from aiqueue.rag.store.conformance.data import DIMENSIONS, EMBEDDER, document_of, new_tenant, vector_of
from aiqueue.rag.store.filters import matches, metadata_json, parse_where, postgres_where, sqlite_where
from aiqueue.rag.store.keyword_search import TermCounts
from aiqueue.rag.store.ranking import fuse
from aiqueue.rag.store.settling import Known, settle_put
from aiqueue.rag.store.texts import STOP_WORDS, clean, index_text, select_terms, terms_of
from aiqueue.rag.types import VectorStore

CORPUS = {
    "install.md": ("Install > Linux", "Download the archive, unpack the archive and put the binary on the path."),
    "upgrade.md": ("Upgrade", "Stop the old service first. Download the new release and start the service again."),
    "backup.md": ("Backup and restore", "A snapshot holds all data. Restore a snapshot to another machine."),
    "limits.md": ("Limits", "A request above the limit is refused. Raise the limit in the settings."),
    "login.md": ("Security > Login", "A password is hashed. Sessions expire after an hour."),
    "tls.md": ("Security > Certificates", "Certificates are renewed every month. Put the key on the machine."),
}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How do I restore a snapshot?", "backup.md"),
        ("which requests are refused by limits", "limits.md"),
        ("renewing certificates", "tls.md"),
        ("install linux", "install.md"),
        ("What happens to sessions after an hour?", "login.md"),
        ("starting a service again", "upgrade.md"),
    ],
)
async def test_the_best_passage_of_a_small_corpus_is_the_one_a_reader_would_name(
    tmp_path: Path, question: str, expected: str
) -> None:
    store = SqliteStore(tmp_path)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.put("acme", [document_of(name, 1, text, heading=heading) for name, (heading, text) in CORPUS.items()])
    for mode in ("keyword", "hybrid"):
        passages = await store.search("acme", question, vector_of(question), 3, mode=mode)
        assert passages[0].document_id == expected
    await store.close()


def test_half_of_a_hybrid_score_is_of_each_search() -> None:
    assert fuse({1: 10.0, 2: 5.0, 3: 0.0}, {2: 0.9, 4: 0.5, 5: 0.1}, 5) == [
        (2, 0.75), (1, 0.5), (4, pytest.approx(0.25)), (3, 0.0), (5, 0.0),
    ]  # fmt: skip


def test_a_search_that_found_nothing_leaves_the_decision_to_the_other() -> None:
    assert fuse({}, {7: 0.4, 8: 0.2}, 5) == [(7, 1.0), (8, 0.0)]
    assert fuse({7: 3.0}, {}, 5) == [(7, 1.0)]
    assert fuse({}, {}, 5) == []
    assert fuse({1: 2.0}, {2: 1.0}, 5, "keyword") == [(1, 1.0)]
    assert fuse({1: 2.0}, {2: 1.0}, 5, "vector") == [(2, 1.0)]


def test_of_equal_scores_the_earlier_chunk_is_first() -> None:
    assert [row for row, _ in fuse({9: 1.0, 3: 1.0, 5: 1.0}, {}, 2)] == [3, 5]


def test_frequent_terms_are_dropped_but_the_three_rarest_are_kept() -> None:
    counts = {"rare": 4, "some": 40, "many": 60, "most": 800, "all": 1_000, "none": 0}

    def select(*terms: str) -> list[str]:
        return select_terms(terms, 1_000, lambda term, limit: min(limit, counts[term]))

    assert select("all", "rare", "most", "some", "many", "none") == ["rare", "some", "many"]
    assert select("rare", "some", "all") == ["rare", "some", "all"]
    assert select("all", "most", "none") == ["all", "most"]
    counts |= {f"r{n}": 1 for n in range(10)}
    assert select("all", *(f"r{n}" for n in range(10))) == [f"r{n}" for n in range(10)]


def test_of_the_rarest_terms_those_in_most_of_many_chunks_are_kept_only_alone() -> None:
    counts = {"rare": 900, "some": 3_900, "many": 4_100, "most": 19_000}

    def select(*terms: str) -> list[str]:
        return select_terms(terms, 20_000, lambda term, limit: min(limit, counts[term]))

    assert select("most", "rare", "many", "some") == ["rare", "some"]
    assert select("most", "some") == ["some"]
    assert select("most", "rare") == ["rare"]
    assert select("most", "many") == ["many"]
    assert select("most") == ["most"]


def test_a_term_is_counted_once_until_the_chunks_have_changed_by_a_fifth_and_a_new_word_is_found_at_once() -> None:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE fts USING fts5 (body)")
    db.executemany("INSERT INTO fts VALUES (?)", [(f"all {'rare' if n % 50 == 0 else ''}",) for n in range(100)])
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    counts = TermCounts()

    def counted(*terms: str, chunks: int) -> set[str]:
        statements.clear()
        assert counts.select(db, terms, chunks)
        return {each.split('"')[1] for each in statements if "MATCH" in each}

    assert counted("all", "rare", "new", chunks=100) == {"all", "rare", "new"}
    db.execute("INSERT INTO fts VALUES ('new')")
    assert counted("all", "rare", "new", chunks=101) == {"new"}
    assert counted("all", "rare", "new", chunks=101) == set()
    assert counts.select(db, ["all", "rare", "new"], 101) == ["rare", "new", "all"]
    assert counted("all", chunks=126) == {"all"}


def test_terms_are_words_without_stop_words_and_pairs_of_unspaced_scripts() -> None:
    assert terms_of("How do I use the GIL-free build of Python_3?") == ["gil", "free", "build", "python", "3"]
    assert terms_of("数据库 x") == ["数 据", "据 库", "x"]
    assert terms_of("酒") == ["酒"]
    assert terms_of("the of and ?! \x00 🍎") == []
    assert len(terms_of(" ".join(f"w{n}" for n in range(1_000)))) == 64
    assert index_text("ab数据c") == "ab 数  据 c"
    assert {each.lower() for each in STOP_WORDS} == STOP_WORDS


@given(st.text(max_size=20))
@settings(max_examples=50)
@example("\ud83d\x00")
def test_cleaned_text_is_what_every_database_takes(text: str) -> None:
    cleaned = clean(text)
    assert "\x00" not in cleaned
    assert len(cleaned) == len(text)
    cleaned.encode()


def test_equal_versions_are_settled_by_their_hash_and_a_delete_wins() -> None:
    stored = Known(shown=5, settled=5, indexed=True, content_hash="h")
    assert settle_put(stored, 5, "h") == "same"
    assert settle_put(stored, 5, "other") == "new"  # the same job again, after an upgrade of its parser
    assert settle_put(Known(shown=5, settled=5), 5, "h") == "old"


# Metadata and filters that often meet: few keys, few values.
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.0, 2**62, -(2**63), 1e300, 1e-5]),
    st.sampled_from(["", "a", "b", "1", "true", "null", "[]", "ä", "'", '"', "%s", "\U0001f34e", "\uffff"]),
    st.text(max_size=3),
)  # fmt: skip
_keys = st.sampled_from(["a", "b", "a.b", "-"])
_metadata = st.dictionaries(
    _keys, st.one_of(_scalars, st.lists(_scalars, max_size=3), st.dictionaries(_keys, _scalars, max_size=2)), max_size=3
)
_ordered = st.one_of(
    st.integers(-3, 3), st.sampled_from([0.5, 1e300]), st.sampled_from(["", "a", "b", "1", "ä", "\uffff"])
)
_conditions = st.one_of(
    _scalars,
    st.dictionaries(st.sampled_from(["eq", "ne"]), _scalars, min_size=1),
    st.dictionaries(st.just("in"), st.lists(_scalars, max_size=3), min_size=1),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), _ordered, min_size=1),
)
_where = st.dictionaries(_keys, _conditions, max_size=2)


@given(_metadata, _where)
@example({"a": {"a": None}}, {"a": None})
@example({"a": "[]"}, {"a": None})
@example({"a": []}, {"a": None})
@settings(max_examples=200)
def test_a_filter_in_sqlite_decides_as_the_plain_rule(metadata: dict[str, Any], where: dict[str, Any]) -> None:
    conditions = parse_where(where)
    text = metadata_json(metadata)
    sql, values = sqlite_where(conditions, "m")
    db = sqlite3.connect(":memory:")
    row = db.execute(f"SELECT count(*) FROM (SELECT ? AS m) WHERE TRUE{sql}", [text, *values]).fetchone()
    db.close()
    assert bool(row[0]) is matches(json.loads(text), conditions)


@pytest.fixture(scope="module")
def plain_postgres(postgres: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres, autocommit=True) as connection:
        yield connection


@given(metadata=_metadata, where=_where)
@settings(max_examples=150)
def test_a_filter_in_postgres_decides_as_the_plain_rule(
    plain_postgres: psycopg.Connection[Any], metadata: dict[str, Any], where: dict[str, Any]
) -> None:
    conditions = parse_where(where)
    text = metadata_json(metadata)
    sql, values = postgres_where(conditions, "m")
    query = f"SELECT count(*) FROM (SELECT %s::jsonb AS m) AS t WHERE TRUE{sql}"
    row = plain_postgres.execute(query.encode(), [text, *values]).fetchone()
    assert row is not None
    assert bool(row[0]) is matches(json.loads(text), conditions)


def test_the_largest_filter_is_a_small_statement_that_every_sqlite_runs_at_once() -> None:
    where = {f"key{number}": {"in": [*range(100, 220), *"ab", True, None]} for number in range(30)}
    metadata = metadata_json({f"key{number}": number for number in range(30)})
    sql, values = sqlite_where(parse_where(where), "m")
    db = sqlite3.connect(":memory:")
    db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)  # where an SQLite has the fewest
    assert db.execute(f"SELECT count(*) FROM (SELECT ? AS m) WHERE TRUE{sql}", [metadata, *values]).fetchone()[0] == 0
    db.close()
    assert len(sql) < 40_000  # a connection keeps up to 256 such statements
    sql, values = postgres_where(parse_where(where), "m")
    assert len(sql) < 40_000
    assert len(values) < 1_000


@given(
    st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.text() | st.binary() | st.floats(), st.lists, max_leaves=4)
    )
)
@settings(max_examples=50)
def test_any_filter_is_read_or_refused_in_one_line(where: dict[str, Any]) -> None:
    try:
        parse_where(where)
    except BadInput as error:
        text = str(error)
    else:
        text = "read"
    assert len(text.splitlines()) == 1


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def make_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "sqlite":
        root = tmp_path_factory.mktemp("store")
        return lambda: SqliteStore(root)
    dsn = request.getfixturevalue("postgres")
    return lambda: PgVectorStore(dsn)


_texts = st.one_of(
    st.text(max_size=30), st.sampled_from(["apple", "NEAR(apple", '"apple', "apple OR *", "- apple", "數據", "\ud83d"])
)
_acts = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["put", "put", "delete", "stage", "move"]),
        st.sampled_from(["a", "b", "ä/ß"]),
        st.integers(1, 6), st.lists(_texts, min_size=1, max_size=3),
    ),
    max_size=8,
)  # fmt: skip


@given(acts=_acts, question=_texts)
@settings(max_examples=25)
def test_no_question_of_a_tenant_returns_anothers_chunk_nor_an_older_version(
    make_store: Any, acts: list[tuple[int, str, str, int, list[str]]], question: str
) -> None:
    async def run(store: VectorStore) -> None:
        tenants = [new_tenant() for _ in range(3)]
        last: dict[tuple[int, str], tuple[int, str]] = {}
        for tenant in tenants:
            await store.open(tenant, EMBEDDER, DIMENSIONS)
        for who, act, document_id, version, texts in acts:
            tenant = tenants[who]
            document = document_of(document_id, version, *texts, title=tenant)
            if act == "stage":
                await store.stage(tenant, document_id, version, document.header.content_hash, 0, document.content)
                await store.commit(tenant, document.header)
            elif act == "put":
                await store.put(tenant, [document])
            elif act == "move":
                await store.move(tenant, document_id, version, document.header.content_hash)
            else:
                await store.delete(tenant, document_id, version)
            known, _ = last.get((who, document_id), (0, ""))
            if act != "move" and (version > known or (version == known and (act == "delete" or _ != "delete"))):
                last[who, document_id] = (version, act)
        for who, tenant in enumerate(tenants):
            for mode in ("keyword", "vector", "hybrid"):
                for passage in await store.search(tenant, question, vector_of(question), 100, mode=mode):
                    assert passage.title == tenant
                    version, act = last[who, passage.document_id]
                    assert act != "delete"
                    assert passage.version >= version

    async def with_store() -> None:
        store = make_store()
        try:
            await run(store)
        finally:
            await store.close()

    asyncio.run(with_store())
