"""Which parser reads a document, and the protocol of a user's own parsers."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol, runtime_checkable

from ...errors import LoadError, SettingsError
from ..errors import ParseFailed
from ..types import ParsedDocument, Section
from .csv_parser import CsvParser
from .html_parser import HtmlParser
from .json_parser import JsonParser
from .markdown_parser import MarkdownParser
from .pdf_parser import PdfParser
from .sniffing import HEAD, TITLE_CHARS_MAX, DocumentSource, clean, refuse_binary
from .text_parser import TextParser

_SILENT_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream", "text/plain"})
_PROBLEM_CHARS_MAX = 300


@runtime_checkable
class Parser(Protocol):
    """Reads one format. A parser has no state: it runs in several processes, and in threads.

    - `format`: its name, as "docx", in what users read.
    - `suffixes`: of names, in lower case, as ".docx". `content_types`: in lower case, without parameters.
    - `in_child`: whether it always runs in a child process, with limits. Say False only for code that no document can
      crash or block; large documents are read in a child in any case.
    - `recognises`: whether these first bytes (up to 64 KiB) are of this format whatever the document is called.
    - `parse`: return the document's parts in reading order. Raises ParseFailed, with a reason for the document's owner.
    """

    @property
    def format(self) -> str: ...
    @property
    def suffixes(self) -> Sequence[str]: ...
    @property
    def content_types(self) -> Sequence[str]: ...
    @property
    def in_child(self) -> bool: ...
    def recognises(self, head: bytes, source: DocumentSource) -> bool: ...
    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument: ...


@dataclass(frozen=True)
class Parsers:
    """The parsers of a process: `own`, the user's, come before those of aiqueue."""

    own: tuple[Parser, ...] = ()

    @classmethod
    def load(cls, names: Sequence[str]) -> Parsers:
        """Import the user's parsers, each a "module:attribute". Raises LoadError."""
        return cls(tuple(_load(each) for each in names))

    def find(self, head: bytes, source: DocumentSource) -> Parser:
        """Return the parser for a document that begins with these bytes. What the bytes show comes before the name.

        Raises ParseFailed for a binary format that no parser reads.
        """
        for parser in (*self.own, *_BUILT_IN):
            try:
                if parser.recognises(head, source):
                    return parser
            except Exception as error:
                raise ParseFailed(_raised(parser, error)) from error
        if (own := _by_claim(self.own, source)) is not None:
            return own
        refuse_binary(head)
        return _by_claim(_BUILT_IN, source) or _TEXT

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Parse a document in this process. Raises ParseFailed, and SettingsError if a package is not installed."""
        if not content:
            raise ParseFailed("it is empty (0 bytes)")
        parser = self.find(content[:HEAD], source)
        try:
            parsed = _clean(parser.parse(content, source))
            has_text = any(each.text and not each.text.isspace() for each in parsed.sections)
        except (ParseFailed, MemoryError):
            raise
        except ImportError as error:
            raise SettingsError(f"{parser.format} cannot be read: {error}: pip install 'aiqueue[rag]'") from None
        except Exception as error:  # a parser may raise anything, and none of it may end the process
            raise ParseFailed(_raised(parser, error)) from error
        if not has_text:
            detail = "; ".join(parsed.problems[:3]) or f"read as {parser.format}"
            raise ParseFailed(f"it holds no text ({detail})")
        return parsed


def _raised(parser: Parser, error: Exception) -> str:
    return f"the {parser.format} parser raised {type(error).__name__}: {str(error)[:200]}"


def _clean(parsed: ParsedDocument) -> ParsedDocument:
    sections = [
        Section(" ".join(clean(each.heading).split()), clean(each.text), each.start, each.page)
        for each in parsed.sections
    ]
    title = " ".join(clean(parsed.title).split())[:TITLE_CHARS_MAX]
    return ParsedDocument(title, sections, [clean(each)[:_PROBLEM_CHARS_MAX] for each in parsed.problems])


def _by_claim(parsers: Sequence[Parser], source: DocumentSource) -> Parser | None:
    """Return the parser of the content type, else of the name's suffix."""
    if (media := source.media_type) not in _SILENT_TYPES:
        for parser in parsers:
            if media in parser.content_types:
                return parser
    suffix = PurePath(source.name).suffix.lower()
    return next((each for each in parsers if suffix and suffix in each.suffixes), None)


def _load(name: str) -> Parser:
    try:
        found = pkgutil.resolve_name(name)
        found = found() if isinstance(found, type) else found
    except Exception as error:  # noqa: BLE001  (a module may raise anything)
        raise LoadError(f"parser {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not isinstance(found, Parser):
        raise LoadError(f"parser {name!r} is no Parser: see aiqueue.rag.Parser")
    return found


_TEXT: Parser = TextParser()
_BUILT_IN: tuple[Parser, ...] = (PdfParser(), HtmlParser(), MarkdownParser(), JsonParser(), CsvParser(), _TEXT)
