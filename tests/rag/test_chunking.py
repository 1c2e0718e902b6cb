"""Chunks: of a size that can be embedded, nothing left out, and in time that grows with the text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiqueue.rag import ParsedDocument, Section
from aiqueue.rag.chunking import CHUNK_CHARS, CHUNK_CHARS_MIN, chunk, split_text
from aiqueue.rag.errors import ParseFailed

PIECES = [
    " ", "\n", "\n\n", "\r\n", "x" * 2_000, "e\u0301" * 900, "\u0301" * 1_500, "\U0001f3f3\ufe0f\u200d\U0001f308" * 400,
    "\x1c" * 1_300, "\u2003" * 1_300, "word " * 700, "a.\n" * 500, "ab\n\n" * 5_000,
]  # fmt: skip


def check(text: str) -> list[str]:
    """The pieces of a text, after checking all that is promised of them."""
    end, found = 0, []
    for start, piece in split_text(text):
        assert 1 <= len(piece) <= CHUNK_CHARS
        assert not piece.isspace()
        assert text[start : start + len(piece)] == piece
        assert start >= end
        assert not text[end:start].strip(), "only blanks lie between two chunks"
        end = start + len(piece)
        found.append(piece)
    assert not text[end:].strip()
    return found


@given(st.lists(st.text(max_size=60) | st.sampled_from(PIECES), max_size=12).map("".join))
@example("")
@example("\x1f")
@example("a" + "\u00a0" * 1_300 + "b")
@example("\x1c" * 700 + "a" * 1_300)
def test_chunks_of_any_text_are_short_cover_all_of_it_in_order_and_know_their_place(text: str) -> None:
    check(text)


def test_a_text_with_paragraphs_is_cut_between_them() -> None:
    paragraphs = [f"Paragraph {number} " + "has some words. " * 20 for number in range(100)]
    chunks = check("\n\n".join(paragraphs))
    assert all(each.startswith("Paragraph") for each in chunks)
    assert all(len(each) >= CHUNK_CHARS_MIN / 2 for each in chunks[:-1])


def test_a_chunk_has_the_path_of_its_headings_below_the_title() -> None:
    sections = [Section("", "a"), Section("Install", "b"), Section("Manual > Use", "c"), Section("Manual", "d", 7, 3)]
    chunks = chunk(ParsedDocument("Manual", sections))
    assert [each.heading for each in chunks] == ["Manual", "Manual > Install", "Manual > Use", "Manual"]
    assert [(each.number, each.start, each.page) for each in chunks][-1] == (3, 7, 3)
    assert chunk(ParsedDocument("", [Section("", "a")]))[0].heading == ""


def test_a_lone_surrogate_is_cut_as_any_character() -> None:
    text = "\ud800" * 3_000
    assert sum(len(piece) for _, piece in split_text(text)) == 3_000


def test_a_document_above_the_limit_of_chunks_fails_with_what_to_do() -> None:
    document = ParsedDocument("", [Section("", "x" * 1_000)] * 11)
    assert len(chunk(document, chunks_max=11)) == 11
    with pytest.raises(ParseFailed, match=r"more than 10 chunks: split it, or raise parsing\.chunks_max"):
        chunk(document, chunks_max=10)


@pytest.mark.parametrize(
    "text", ["x", "word ", "\n", "a\n", "{'a': 1},", "\u0301", "one line of some words, and no more\n\n"]
)
def test_the_time_for_a_text_grows_with_its_length_and_not_faster(text: str) -> None:
    def measure(size: int) -> float:
        whole = text * (size // len(text))
        begun = time.process_time()
        for _ in split_text(whole):
            pass
        return time.process_time() - begun

    measure(50_000)
    assert measure(800_000) < 8 * measure(200_000) + 0.05  # quadratic: 16 times
