"""Tables as CSV: a line for each row, in which each value has its column's name."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Final

from ..types import ParsedDocument, Section
from .sniffing import DocumentSource, decode_text

_DELIMITERS = ",;\t|"
_COLUMNS_MAX = 1_000
_NAME_CHARS_MAX = 80


class CsvParser:
    """The first row has the names of the columns, unless a number is among its values."""

    format: Final = "CSV"
    suffixes: Final = (".csv", ".tsv")
    content_types: Final = ("text/csv", "text/tab-separated-values", "application/csv")
    in_child: Final = False

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Say no: only its name or content type tells a table from text."""
        return False

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return one section. What is called CSV and cannot be read so is read as text, which is a problem."""
        text, problems = decode_text(content, source)
        delimiter = "\t" if PurePath(source.name).suffix.lower() == ".tsv" else _find_delimiter(text)
        try:
            shown = "\n".join(_lines(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)))
        except csv.Error as error:
            problem = f"it is not valid CSV ({error}): read as text"
            return ParsedDocument(source.stem, [Section("", text)], [problem, *problems])
        return ParsedDocument(source.stem, [Section("", shown)], problems)


def _find_delimiter(text: str) -> str:
    first = text.lstrip("\n").partition("\n")[0]
    return max(_DELIMITERS, key=first.count)


def _lines(rows: Iterable[list[str]]) -> Iterator[str]:
    names: list[str] | None = None
    for row in rows:
        cells = [" ".join(each.split()) for each in row[:_COLUMNS_MAX]]
        if len(row) > _COLUMNS_MAX:
            cells.append(" ".join(" ".join(row[_COLUMNS_MAX:]).split()))
        if not any(cells):
            continue
        if names is None:
            names = [each[:_NAME_CHARS_MAX] for each in cells] if not any(map(_is_number, cells)) else []
            if names:
                yield " | ".join(filter(None, names))
                continue
        yield "; ".join(_named(names, number, cell) for number, cell in enumerate(cells) if cell)


def _named(names: list[str], number: int, cell: str) -> str:
    name = names[number] if number < len(names) else ""
    return f"{name}: {cell}" if name else cell


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace(",", "").lstrip("+-").isdecimal()
