"""Plain text."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from ..types import ParsedDocument, Section
from .sniffing import DocumentSource, decode_text

_FIRST_LINE_MAX = 100  # characters of a first line that is taken for the title
_BINARY_SUFFIXES = frozenset(
    {".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".odt", ".png", ".jpg", ".zip"}
)


class TextParser:
    """Text without a structure that is known: one section."""

    format: Final = "text"
    suffixes: Final = (".txt", ".text", ".log", ".rst", ".adoc")
    content_types: Final = ("text/plain",)
    in_child: Final = False

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Say no: text is what nothing else recognises."""
        return False

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return the text. A name that promises a binary format is a problem."""
        text, problems = decode_text(content, source)
        suffix = PurePath(source.name).suffix.lower()
        if suffix in _BINARY_SUFFIXES:
            problems = [f"the name ends in {suffix}, but the content is text: read as text", *problems]
        return ParsedDocument(_first_line(text) or source.stem, [Section("", text)], problems)


def _first_line(text: str) -> str:
    """Return the first line if a blank line follows it, as after a title; else ""."""
    head = text[: 4 * _FIRST_LINE_MAX].lstrip()
    line, _, rest = head.partition("\n")
    is_title = len(line) <= _FIRST_LINE_MAX and rest.split("\n", 1)[0].strip() == "" and rest.strip() != ""
    return line.strip() if is_title else ""
