"""The keys of stream files, limits.toml, gateway.toml and rag.toml, from the tables that check them.

What a value must be is taken from the error that a wrong one causes, so that the page says what the code says.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aiqueue.errors import AIQueueError

from . import markdown
from .sentences import is_sentence

REQUIRED = "required"
_EXPECTED = re.compile(r"must be (.+?)(?:, not .*)?$", re.DOTALL)


class Key(Protocol):
    """What the tables of keys have."""

    @property
    def sentence(self) -> str: ...

    @property
    def default(self) -> str: ...


@dataclass(frozen=True)
class Table:
    """A table of a file: how it is written, such as ``[[model]]``, and its keys.

    `with_value` returns the text of a valid file in which one key of the table has another value, as TOML; None: the
    key is left out.
    """

    name: str
    keys: Mapping[str, Key]
    with_value: Callable[[str, str | None], str] | None = None
    about: str = ""


def gaps(tables: list[Table]) -> list[str]:
    """Name each key that has no sentence of its own."""
    return [
        f"{each.name} {name}"
        for each in tables
        for name, key in each.keys.items()
        if not is_sentence(key.sentence, name)
    ]


def expected(read: Callable[[str], Any], text: str) -> str:
    """Return what the value must be, from the error for a file with a wrong one. "": the error does not say."""
    try:
        read(text)
    except (AIQueueError, ValueError) as error:
        found = _EXPECTED.search(str(error))
        return found[1] if found else ""
    return ""


def rows(tables: list[Table], read: Callable[[str], Any]) -> Iterator[tuple[Table, list[tuple[str, str, str, str]]]]:
    """Return the rows of each table: key, values, default, meaning."""
    for table in tables:
        found = []
        for name, key in table.keys.items():
            values = expected(read, table.with_value(name, "[[1]]")) if table.with_value else expected_of(key)
            found.append((markdown.code(name), _shown(values), shown_default(key.default), key.sentence))
        yield table, found


def expected_of(key: Any) -> str:
    """Return what the value of a key with a check must be."""
    return expected(key.check, object()) if hasattr(key, "check") else ""  # type: ignore[arg-type]


def _shown(values: str) -> str:
    return re.sub(r'"[^"]*"', lambda found: markdown.code(found[0]), values)


def shown_default(default: str) -> str:
    """Return a default as the page shows it: what is TOML as code."""
    if not default:
        return REQUIRED
    return markdown.code(default) if is_toml(default) else default


def is_toml(default: str) -> bool:
    """Whether a default is a value in TOML, and no words."""
    try:
        tomllib.loads(f"key = {default}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def section(table: Table, found: list[tuple[str, str, str, str]]) -> str:
    """Return the section of a table."""
    heading = f"## `{table.name}`" if table.name else ""
    body = markdown.table(("key", "values", "default", "meaning"), found)
    return "\n\n".join(each for each in (heading, table.about, body) if each)
