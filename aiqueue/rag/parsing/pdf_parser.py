"""PDF, read by pypdfium2: a section for each page, under the headings of its outline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from ..errors import ParseFailed
from ..types import ParsedDocument, Section
from .headings import HeadingPath
from .sniffing import DocumentSource

_OUTLINE_MAX = 10_000
_PROBLEMS_MAX = 100
_OBJECTS_MAX = 1_000  # of a page without text, looked at for an image
_SOFT_HYPHEN = re.compile("[\ufffe\u00ad]\\s*")  # pdfium's mark for a hyphen at the end of a line


class PdfParser:
    """PDF. A page that cannot be read, or that only shows an image, is a problem; the others are read."""

    format: Final = "PDF"
    suffixes: Final = (".pdf",)
    content_types: Final = ("application/pdf", "application/x-pdf")
    in_child: Final = True

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Whether it begins with %PDF-, or has that in its first KiB and is called a PDF."""
        named = source.media_type in self.content_types or source.name.lower().endswith(".pdf")
        return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"%PDF-") or (named and b"%PDF-" in head[:1024])

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return a section for each page with a text."""
        import pypdfium2  # noqa: PLC0415  (loaded where it is needed)

        if not self.recognises(content[:1024], source):
            return _parse_other(content, source)
        try:
            document = pypdfium2.PdfDocument(content)
        except pypdfium2.PdfiumError as error:
            raise ParseFailed(_reason(error.err_code)) from None
        try:
            return _read(document, source)
        finally:
            document.close()


def _parse_other(content: bytes, source: DocumentSource) -> ParsedDocument:
    """Read what is called a PDF and is none: it is text, since no binary format comes here."""
    from .text_parser import TextParser  # noqa: PLC0415

    return TextParser().parse(content, source)


def _reason(code: int | None) -> str:
    match code:
        case 4:  # FPDF_ERR_PASSWORD
            return "the PDF is encrypted: remove its password, for instance with `qpdf --decrypt IN OUT`"
        case 3:  # FPDF_ERR_FORMAT
            return "the PDF is damaged: open it and save it again, for instance with `qpdf IN OUT`"
    return f"the PDF cannot be opened (error {code} of pdfium): open it and save it again"


def _read(document: Any, source: DocumentSource) -> ParsedDocument:
    outline = _Outline(document)
    sections: list[Section] = []
    problems: list[str] = []
    start, count = 0, len(document)
    for number in range(count):
        heading = outline.heading_of(number)
        try:
            text, problem = _read_page(document, number)
        except RuntimeError as error:  # PdfiumError is one
            text, problem = "", str(error)
        if problem:
            problems.append(f"page {number + 1}: {problem}")
        if text.strip():
            sections.append(Section(heading, text, start, number + 1))
            start += len(text) + 1
    if not sections:
        pages = f"{count:,} {'page' if count == 1 else 'pages'}"
        hint = "they only show images: run OCR, for instance `ocrmypdf IN OUT`" if problems else "they are blank"
        raise ParseFailed(f"the PDF holds no text ({pages}; {hint})")
    if len(problems) > _PROBLEMS_MAX:
        problems = [*problems[:_PROBLEMS_MAX], f"and {len(problems) - _PROBLEMS_MAX:,} more pages"]
    return ParsedDocument(_title(document) or source.stem, sections, problems)


def _read_page(document: Any, number: int) -> tuple[str, str]:
    """Return the text of a page, and why there is none. Raises PdfiumError."""
    from pypdfium2 import raw  # noqa: PLC0415

    page = document[number]
    try:
        text_page = page.get_textpage()
        try:
            text = text_page.get_text_range()
        finally:
            text_page.close()
        text = _SOFT_HYPHEN.sub("", text.replace("\r\n", "\n"))
        if text.strip():
            return text, ""
        count = min(raw.FPDFPage_CountObjects(page), _OBJECTS_MAX)
        kinds = {raw.FPDFPageObj_GetType(raw.FPDFPage_GetObject(page, each)) for each in range(count)}
        has_image = bool(kinds & {raw.FPDF_PAGEOBJ_IMAGE, raw.FPDF_PAGEOBJ_FORM})
        return "", "it has no text, only an image: run OCR on it" if has_image else ""
    finally:
        page.close()


def _title(document: Any) -> str:
    title = str(document.get_metadata_value("Title") or "").strip()
    return "" if title.lower() in {"untitled", "title"} else title


class _Outline:
    """The bookmarks of a PDF. Pages must be asked for in their order."""

    def __init__(self, document: Any) -> None:
        self._marks = sorted(islice(_bookmarks(document), _OUTLINE_MAX), key=lambda each: each[0])
        self._next = 0
        self._path = HeadingPath()

    def heading_of(self, page: int) -> str:
        """Return the path at the first bookmark of the page; where there is none, the one that goes on from before."""
        heading = ""
        while self._next < len(self._marks) and self._marks[self._next][0] <= page:
            at, level, title = self._marks[self._next]
            self._path.enter(level + 1, title)
            if at == page and not heading:
                heading = self._path.text
            self._next += 1
        return heading or self._path.text


def _bookmarks(document: Any) -> Iterator[tuple[int, int, str]]:
    """Yield page, level and title of each bookmark. Damaged ones are left out."""
    try:
        for mark in document.get_toc():
            target = mark.get_dest()
            page = target.get_index() if target is not None else None
            if page is not None:
                yield page, mark.level, mark.get_title()
    except (RuntimeError, UnicodeDecodeError):  # the rest of a damaged outline
        return
