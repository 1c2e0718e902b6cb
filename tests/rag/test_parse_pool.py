"""Children that parse: what a document may do to them, and what becomes of the others."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from aiqueue.errors import LoadError, Unavailable
from aiqueue.rag.chunking import chunk
from aiqueue.rag.errors import ParseFailed
from aiqueue.rag.parse_pool import INLINE_BYTES_MAX, ParseLimits, ParsePool, _ParserProcess

from ..support import ROOT, Eventually, check_cancelled_start
from .pdfs import bomb_pdf, encrypted_pdf

GOOD = b"<html><title>T</title><h1>Good</h1><p>page</html>"
HOSTILE = "tests.rag.hostile_parser:HostileParser"
SMALL = ParseLimits(memory_bytes=300 * 1024**2, cpu_s=1, timeout_s=10.0)


@pytest.fixture
async def pool() -> AsyncIterator[ParsePool]:
    async with ParsePool(size=1, limits=SMALL, parsers=[HOSTILE]) as pool:
        yield pool
    assert pool.pids == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pool() -> AsyncIterator[ParsePool]:
    """A pool for tests that leave it well: each start of a child costs more than they do."""
    async with ParsePool(size=1, limits=SMALL, parsers=[HOSTILE]) as pool:
        yield pool
    assert pool.pids == []


async def is_well(pool: ParsePool) -> bool:
    return (await pool.parse_to_chunks(GOOD, name="good.html")).chunks[0].text == "page"


async def test_a_page_is_parsed_in_a_child_which_is_kept_and_a_small_text_in_this_process(pool: ParsePool) -> None:
    await pool.parse(b"# A\n\ntext", name="a.md")
    assert pool.pids == []
    first = await pool.parse(GOOD, name="a.html")
    pids = pool.pids
    again = await pool.parse_to_chunks(GOOD, name="a.html")
    assert pool.pids == pids
    assert len(pids) == 1
    assert list(again.chunks) == chunk(first)


async def test_a_large_text_is_parsed_in_a_child_from_memory_and_from_a_file_alike(
    pool: ParsePool, tmp_path: Path
) -> None:
    text = ("# Heading\n\n" + "some words. " * 50 + "\n\n") * 2_000
    assert len(text) > INLINE_BYTES_MAX
    path = tmp_path / "a.md"
    path.write_text(text)
    from_memory = await pool.parse_to_chunks(text.encode(), name="a.md")
    assert pool.pids
    with path.open("rb") as file:
        file.read(100)  # where it stands does not matter
        from_file = await pool.parse_to_chunks(file, name="a.md")
    assert from_memory == from_file == await pool.parse_to_chunks(path, name="a.md")
    assert list(from_file.chunks) == chunk(await pool.parse(path, name="a.md"))


async def test_a_small_file_is_parsed_without_a_child(pool: ParsePool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("small")
    assert (await pool.parse(path)).sections[0].text == "small"
    assert pool.pids == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"exit", "x.hostile", r"its parser crashed \(exit code 7\)"),
        (b"abort", "x.hostile", r"its parser crashed \(SIGABRT\), as happens when it needs more than 0.293 GiB"),
        (b"spin", "x.hostile", "more than 1 s of CPU to read: split it, or raise parsing.time"),
        (b"memory", "x.hostile", "more than 0.293 GiB of memory to read: split it, or raise parsing.memory"),
        (b"bad fields", "x.hostile", "the hostile parser raised"),
        (b"<html><body>" + b"<div>" * 200_000 + b"deep", "x.html", "nested deeper than 2,048"),
        (bomb_pdf(500_000_000), "x.pdf", "its parser crashed|more than 1 s of CPU|GiB of memory"),
        (encrypted_pdf(), "x.pdf", "encrypted"),
        (bytes(range(256)) * 1_000, "x.txt", "binary"),
        (b"\n" * 1_000_000, "x.txt", "no text"),
    ],
)  # fmt: skip
async def test_a_poisoned_document_fails_with_a_reason_and_the_next_one_is_read(
    shared_pool: ParsePool, content: bytes, name: str, reason: str
) -> None:
    assert await is_well(shared_pool)
    with pytest.raises(ParseFailed, match=reason) as raised:
        await shared_pool.parse_to_chunks(content, name=name)
    assert len(str(raised.value).splitlines()) == 1
    assert await is_well(shared_pool)


async def test_a_document_that_takes_too_long_is_stopped() -> None:
    limits = ParseLimits(timeout_s=0.3)
    async with ParsePool(limits=limits, parsers=[HOSTILE]) as pool:
        with pytest.raises(ParseFailed, match=r"longer than 0\.3 s to read: split it, or raise parsing.time"):
            await pool.parse(b"sleep", name="x.hostile")
        assert pool.pids == []


@pytest.mark.asyncio(loop_scope="module")
async def test_text_before_tags_that_are_nested_too_deeply_is_read_and_the_rest_is_a_problem(
    shared_pool: ParsePool,
) -> None:
    parsed = await shared_pool.parse(b"<html><body><p>before</p>" + b"<div>" * 200_000 + b"deep", name="x.html")
    assert [each.text for each in parsed.sections] == ["before"]
    assert parsed.problems == ["its tags are nested deeper than 2,048: what follows there is not read"]


async def test_a_document_is_not_blamed_for_what_an_earlier_one_did_to_the_child(
    pool: ParsePool, eventually: Eventually
) -> None:
    await pool.parse(b"exit later", name="x.hostile")
    [pid] = pool.pids
    os.kill(pid, signal.SIGKILL)
    assert await is_well(pool)
    assert pool.pids != [pid]


async def test_others_are_parsed_while_one_child_dies() -> None:
    async with ParsePool(size=2, limits=SMALL, parsers=[HOSTILE]) as pool:
        bad = [pool.parse(b"abort", name="x.hostile") for _ in range(3)]
        good = [is_well(pool) for _ in range(10)]
        found = await asyncio.gather(*bad, *good, return_exceptions=True)
        assert all(isinstance(each, ParseFailed) for each in found[:3])
        assert found[3:] == [True] * 10
        assert len(pool.pids) <= 2


@pytest.mark.asyncio(loop_scope="module")
async def test_a_child_has_limits_of_memory_and_writes_no_core_file(shared_pool: ParsePool) -> None:
    assert (await shared_pool.parse(b"limits", name="x.hostile")).sections[0].text == str([SMALL.memory_bytes, 0])


@pytest.mark.asyncio(loop_scope="module")
async def test_two_megabytes_in_one_word_and_a_million_blank_lines_are_read(shared_pool: ParsePool) -> None:
    word = await shared_pool.parse_to_chunks(b"x" * 2_000_000, name="x.txt")
    assert "".join(each.text for each in word.chunks) == "x" * 2_000_000
    lines = await shared_pool.parse_to_chunks(b"a" + b"\n" * 1_000_000 + b"b", name="x.txt")
    assert [(each.start, each.text) for each in lines.chunks] == [(0, "a"), (1_000_001, "b")]


async def test_a_document_above_the_limits_fails_before_it_is_read(tmp_path: Path) -> None:
    async with ParsePool(limits=ParseLimits(size_bytes_max=10, chunks_max=2)) as pool:
        path = tmp_path / "a.txt"
        path.write_text("x" * 11)
        for content in (path, b"x" * 11):
            with pytest.raises(ParseFailed, match="11 bytes are above the limit of 10"):
                await pool.parse(content)
    async with ParsePool(limits=ParseLimits(chunks_max=2)) as pool:
        for name in ("x.txt", "x.html"):
            with pytest.raises(ParseFailed, match="more than 2 chunks"):
                await pool.parse_to_chunks(b"<html><p>" + b"word " * 1_000, name=name)


async def test_a_call_that_is_cancelled_ends_its_child(pool: ParsePool, eventually: Eventually) -> None:
    call = asyncio.create_task(pool.parse(b"sleep", name="x.hostile"))
    await eventually(lambda: bool(pool.pids))
    [pid] = pool.pids
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert pool.pids == []
    assert not Path(f"/proc/{pid}").exists()
    assert await is_well(pool)


async def test_a_child_whose_start_is_cancelled_has_ended_when_the_start_has(monkeypatch: pytest.MonkeyPatch) -> None:
    await check_cancelled_start(monkeypatch, _ParserProcess, lambda: _ParserProcess.start(SMALL, []))


async def test_a_closed_pool_starts_no_child_and_close_is_safe_twice() -> None:
    pool = ParsePool()
    assert await is_well(pool)
    await pool.close()
    await pool.close()
    with pytest.raises(Unavailable, match="closed"):
        await is_well(pool)


async def test_a_document_is_not_to_blame_for_the_end_of_its_pool() -> None:
    pool = ParsePool(size=1, limits=SMALL, parsers=[HOSTILE])
    call = asyncio.create_task(pool.parse(b"sleep", name="a.hostile"))
    while not pool.pids:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # now it is most likely read; before that the answer is the same
    await pool.close()
    with pytest.raises(Unavailable, match="closed"):
        await call


async def test_a_parser_that_cannot_be_loaded_is_refused_at_once() -> None:
    with pytest.raises(LoadError, match=r"no\.such"):
        ParsePool(parsers=["no.such:parser"])


PARENT = """
import asyncio, sys
from aiqueue.rag.parse_pool import ParsePool
async def main():
    pool = ParsePool(parsers=["tests.rag.hostile_parser:HostileParser"])
    await pool.parse(b"<html><p>text", name="x.html")
    busy = asyncio.create_task(pool.parse(b"sleep", name="x.hostile"))
    idle = asyncio.create_task(pool.parse(b"<html><p>text", name="x.html"))
    await idle
    print(*pool.pids, flush=True)
    await busy
asyncio.run(main())
"""


async def test_children_end_with_a_parent_that_is_killed_whether_they_are_busy_or_idle(eventually: Eventually) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert parent.stdout is not None
        pids = (await asyncio.to_thread(parent.stdout.readline)).split()
        assert len(pids) == 2
        parent.kill()
    await eventually(lambda: not any(is_alive(each) for each in pids))


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_public_door_of_the_room_loads_neither_numpy_nor_what_reads_documents() -> None:
    heavy = "numpy", "lxml", "pypdfium2", "semantic_text_splitter", "aiohttp", "wordllama"
    ours = "aiqueue.rag, aiqueue.rag.parse_pool, aiqueue.rag.fetching"
    code = f"import sys, {ours}; print([each for each in {heavy} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
