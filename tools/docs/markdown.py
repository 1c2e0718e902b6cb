"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTE = "<!-- Written by `python -m tools.docs reference`. Change the code that it is made of, not this page. -->"


def page(title: str, *parts: str) -> str:
    """Return a page: its title, a note that it is generated, and its parts."""
    return "\n\n".join([f"# {title}", NOTE, *(each.strip("\n") for each in parts if each.strip())]) + "\n"


def cell(text: str) -> str:
    """Return a text as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, "" without rows."""
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines]) if lines else ""


def code(text: str) -> str:
    """Return a text as code, "" for none."""
    if not text:
        return ""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def from_docstring(text: str) -> str:
    """Return the text of a docstring as Markdown: double backquotes become single ones."""
    return text.replace("``", "`")


def sentence(text: str) -> str:
    """Return a text with a capital at its start and a stop at its end."""
    text = from_docstring(" ".join(text.split()))
    if not text:
        return ""
    text = text[0].upper() + text[1:] if text[0].isascii() else text
    return text if text.endswith((".", "!", "?", "…", ":")) else f"{text}."
