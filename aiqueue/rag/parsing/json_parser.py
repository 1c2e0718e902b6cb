"""JSON and JSON lines: a line for each value, with the names that lead to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from ..types import ParsedDocument, Section
from .sniffing import TITLE_CHARS_MAX, DocumentSource, decode_text

_NAMES_MAX = 3  # names before a value: the lowest ones, so that no document grows by its depth
_NAME_CHARS_MAX = 80
_TITLES = ("title", "name", "subject", "headline")
_LINES = (".jsonl", ".ndjson")


class JsonParser:
    """A document whose top is an object has a section for each of its members that holds others."""

    format: Final = "JSON"
    suffixes: Final = (".json", *_LINES)
    content_types: Final = ("application/json", "application/x-ndjson", "application/jsonl", "application/ld+json")
    in_child: Final = False

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Say no: a text that looks like JSON is read as text unless it is called JSON."""
        return False

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return the values as text. What is called JSON and is none is read as text, which is a problem."""
        text, problems = decode_text(content, source)
        try:
            value = _load(text)
        except ValueError as error:
            problem = f"it is not valid JSON ({error}): read as text"
            return ParsedDocument(source.stem, [Section("", text)], [problem, *problems])
        except RecursionError:
            problem = "its values are nested too deeply: read as text"
            return ParsedDocument(source.stem, [Section("", text)], [problem, *problems])
        return ParsedDocument(_title_of(value) or source.stem, list(_sections(value)), problems)


def _load(text: str) -> Any:
    """Return the value, or the list of the values of JSON lines. Numbers stay as they are written."""
    try:
        return _loads(text)
    except ValueError:
        lines = [each for each in text.split("\n") if each.strip()]
        if len(lines) < 2:
            raise
        try:
            return [_loads(each) for each in lines]
        except ValueError:
            pass
        raise


def _loads(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str)


def _title_of(value: Any) -> str:
    if isinstance(value, dict):
        for name in _TITLES:
            if isinstance(value.get(name), str) and value[name].strip():
                return " ".join(value[name].split())[:TITLE_CHARS_MAX]
    return ""


def _sections(value: Any) -> Iterator[Section]:
    parts: list[tuple[str, Any]] = [("", value)]
    if isinstance(value, dict):
        plain = {name: each for name, each in value.items() if not isinstance(each, dict | list)}
        parts = [("", plain), *((name, each) for name, each in value.items() if isinstance(each, dict | list))]
    start = 0
    for name, part in parts:
        text = "\n".join(_lines(part))
        if text:
            yield Section(" ".join(name[:_NAME_CHARS_MAX].split()), text, start)
            start += len(text) + 1


def _lines(value: Any) -> Iterator[str]:
    """Yield "name: value" for each value. Objects in a list are parted by a blank line. Does not recurse."""
    todo: list[tuple[tuple[str, ...], Any, bool]] = [((), value, False)]
    while todo:
        names, each, parted = todo.pop()
        if parted:
            yield ""
        if isinstance(each, dict):
            inner = [((*names, " ".join(name[:_NAME_CHARS_MAX].split()))[-_NAMES_MAX:], v) for name, v in each.items()]
            todo += [(path, v, False) for path, v in reversed(inner)]
        elif isinstance(each, list) and any(isinstance(item, dict | list) for item in each):
            todo += [(names, item, True) for item in reversed(each)]
        else:
            label = ".".join(names)
            shown = ", ".join(map(_scalar, each)) if isinstance(each, list) else _scalar(each)
            yield f"{label}: {shown}" if label else shown


def _scalar(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
    return str(value)
