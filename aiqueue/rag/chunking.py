"""Chunks: the pieces of a document that are embedded and found."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Final

from .errors import ParseFailed
from .parsing.headings import SEPARATOR
from .types import Chunk, ParsedDocument

if TYPE_CHECKING:
    from semantic_text_splitter import TextSplitter

CHUNK_CHARS: Final = 1_200
CHUNK_CHARS_MIN: Final = 700  # a chunk is filled up to here before the splitter looks for a good place to end it
CHUNKS_MAX: Final = 50_000
# The splitter's time grows with the square of a text: it gets slices, cut where the text has a break.
_SLICE = 16 * 1024
_SLICE_WITHOUT_LINES = 4 * 1024


def chunk(document: ParsedDocument, *, chunks_max: int = CHUNKS_MAX) -> list[Chunk]:
    """Return the chunks of a document in reading order: at most 1,200 characters each, none of them blank.

    A chunk never spans two sections. Its `heading` is the path of headings, with the document's title first. Takes time
    in proportion to the text. Raises ParseFailed above `chunks_max` chunks.
    """
    chunks: list[Chunk] = []
    for section in document.sections:
        heading = _heading_path(document.title, section.heading)
        for start, text in split_text(section.text):
            if len(chunks) == chunks_max:
                raise ParseFailed(f"it makes more than {chunks_max:,} chunks: split it, or raise parsing.chunks_max")
            chunks.append(Chunk(len(chunks), text, heading, section.start + start, section.page))
    return chunks


def split_text(text: str) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text, with the position of each. Only blanks lie between them."""
    for begin, end in _slices(text):
        yield from _split_slice(text[begin:end], begin)


def _split_slice(text: str, offset: int) -> Iterator[tuple[int, str]]:
    bare = text.strip()
    if len(bare) <= CHUNK_CHARS:
        if bare:
            yield offset + text.index(bare), bare
        return
    splitter = _splitter()
    try:
        pieces = splitter.chunk_indices(text)
    except UnicodeEncodeError:  # lone surrogates, which a parser of the user's may have left
        pieces = splitter.chunk_indices(text.encode("utf-8", "replace").decode())
    for start, piece in pieces:
        for cut in range(0, len(piece), CHUNK_CHARS):  # one cut, but for what the splitter cannot split
            part = piece[cut : cut + CHUNK_CHARS]
            if not part.isspace():
                yield offset + start + cut, part


@cache
def _splitter() -> TextSplitter:
    from semantic_text_splitter import TextSplitter  # noqa: PLC0415  (loaded where it is needed)

    return TextSplitter((CHUNK_CHARS_MIN, CHUNK_CHARS))


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """Yield the slices of a text: they end at a blank line, else at a line's end, else at a blank, else anywhere."""
    begin = 0
    while len(text) - begin > _SLICE:
        end = _last_break(text, begin + _SLICE // 2, begin + _SLICE)
        end = end or _last_blank(text, begin + _SLICE_WITHOUT_LINES // 2, begin + _SLICE_WITHOUT_LINES)
        yield begin, end
        begin = end
    yield begin, len(text)


def _last_break(text: str, low: int, high: int) -> int:
    """Return the end of the last blank line, else of the last line, within these positions; 0: none."""
    at = text.rfind("\n\n", low, high)
    return at + 2 if at >= 0 else text.rfind("\n", low, high) + 1


def _last_blank(text: str, low: int, high: int) -> int:
    at = text.rfind(" ", low, high)
    return at + 1 if at >= 0 else high


def _heading_path(title: str, heading: str) -> str:
    if not title or heading == title or heading.startswith(title + SEPARATOR):
        return heading or title
    return f"{title}{SEPARATOR}{heading}" if heading else title
