"""Markdown: its headings part it. The text of a section stays as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..types import ParsedDocument, Section
from .headings import HeadingPath
from .sniffing import TITLE_CHARS_MAX, DocumentSource, decode_text

# A line that may begin or end something: an ATX heading, a fence, or the line under a setext heading.
_MARK = re.compile(r"^ {0,3}(?:(#{1,6})(?:[ \t]+([^\n]*))?|(`{3,}|~{3,})([^\n]*)|(=+|-+)[ \t]*)$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"---[ \t]*\n(?:[^\n]*\n){0,200}?(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
_FRONT_TITLE = re.compile(r"^title:[ \t]*([^\n]+)$", re.MULTILINE)
_HEADING_MAX = 500  # characters of a line that is taken for a heading


class _Mark(NamedTuple):
    """A heading: where its lines begin and end, its level and its title."""

    start: int
    end: int
    level: int
    title: str


class MarkdownParser:
    """Markdown, with ATX and setext headings, fences and a front matter, whose `title` is the document's."""

    format: Final = "Markdown"
    suffixes: Final = (".md", ".markdown", ".mdown", ".mkd")
    content_types: Final = ("text/markdown", "text/x-markdown")
    in_child: Final = False

    def recognises(self, head: bytes, source: DocumentSource) -> bool:
        """Say no: only its name or content type tells Markdown from text."""
        return False

    def parse(self, content: bytes, source: DocumentSource) -> ParsedDocument:
        """Return a section for each heading with a text. A heading without one is a section of its own."""
        text, problems = decode_text(content, source)
        front = _FRONT_MATTER.match(text)
        begin = front.end() if front else 0
        named = _FRONT_TITLE.search(text, 0, begin)
        title = named[1].strip(" \t\"'") if named else ""
        path, sections = HeadingPath(), []
        marks = list(_find_headings(text, begin))
        first = marks[0].start if marks else len(text)
        sections.append(Section("", text[begin:first], begin))
        for number, mark in enumerate(marks):
            following = marks[number + 1] if number + 1 < len(marks) else None
            end = following.start if following else len(text)
            path.enter(mark.level, mark.title)
            title = title or mark.title
            if not text[mark.end : end].isspace() and mark.end < end:
                sections.append(Section(path.text, text[mark.end : end], mark.end))
            elif following is None or following.level <= mark.level:
                sections.append(Section(path.text, text[mark.start : mark.end], mark.start))
        return ParsedDocument((title or source.stem)[:TITLE_CHARS_MAX], sections, problems)


def _find_headings(text: str, begin: int) -> Iterator[_Mark]:
    fence, last_end = "", begin
    for found in _MARK.finditer(text, begin):
        hashes, title, opening, info, rule = found.groups()
        if fence:
            if opening and opening.startswith(fence) and not info.strip():
                fence = ""
                last_end = found.end()
        elif opening:
            if opening[0] == "~" or "`" not in info:
                fence = opening
        elif hashes:
            yield _Mark(found.start(), found.end(), len(hashes), _without_closing(title or "")[:_HEADING_MAX])
            last_end = found.end()
        elif rule and (mark := _setext(text, last_end, found.start(), found.end(), rule)) is not None:
            yield mark
            last_end = found.end()


def _setext(text: str, begin: int, rule_start: int, rule_end: int, rule: str) -> _Mark | None:
    """Return the heading that a rule underlines: one line of text, with a blank line or nothing before it."""
    end = rule_start - 1
    start = max(text.rfind("\n", max(begin, end - _HEADING_MAX), max(end, 0)) + 1, begin)
    line = text[start:end] if 0 < end - start <= _HEADING_MAX else ""
    if len(rule) < 2 or not line.strip() or line.startswith(("    ", "\t", *"><|-*+")):
        return None
    before = text[text.rfind("\n", max(begin, start - 1 - _HEADING_MAX), max(start - 1, 0)) + 1 : max(start - 1, 0)]
    if start > begin and before.strip():
        return None
    return _Mark(start, rule_end, 1 if rule[0] == "=" else 2, line.strip())


def _without_closing(title: str) -> str:
    """Return the title without the hashes that may close it."""
    title = title.strip()
    bare = title.rstrip("#")
    return bare.rstrip() if not bare or bare[-1] in " \t" else title
