"""Tables of TOML files of users' own: gateway.toml and rag.toml. Every fault names its key."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, TypeVar

from .. import units
from ..errors import TopologyError

FILE_BYTES_MAX: Final = 1024 * 1024
TIME_MAX_S: Final = 24 * 3600.0
NAMES_MAX: Final = 32

T = TypeVar("T")


class WrongKey(Exception):
    """A wrong value in a file: its key, and what is wrong."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem


def list_tables(raw: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the tables ``[[name]]``, each with how messages call it, such as "model 2". Raises WrongKey."""
    given = raw.get(name, [])
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise WrongKey(name, f"must be tables: write [[{name}]]")
    return [(f"{name} {number}", table) for number, table in enumerate(given, 1)]


def add_new(known: dict[str, Any], where: str, key: str, name: str, value: Any) -> None:
    """Add a named value. Raises WrongKey if there is one of that name."""
    if name in known:
        raise WrongKey(f"{where}.{key}", f"there is one of the name {name} already")
    known[name] = value


def check_known(where: str, table: Mapping[str, Any], known: Collection[str], *, secrets: str = "") -> None:
    """Raise WrongKey for an unknown key. `secrets`: the advice where somebody writes a secret key."""
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            secret = secrets if "key" in key.lower() else ""
            raise WrongKey(".".join(filter(None, (where, key))), f"unknown key; {secret or hint}")


class TableReader:
    """Reads the values of one table. All methods raise WrongKey, without the values of the keys `hidden`."""

    def __init__(self, where: str, table: Mapping[str, Any], *, hidden: Collection[str] = ()) -> None:
        self._where, self._table, self._hidden = where, table, hidden

    def _wrong(self, key: str, expected: str) -> WrongKey:
        value = self._table.get(key)
        shown = "" if key in self._hidden else f", not {shown_value(value)}"
        return WrongKey(f"{self._where}.{key}", f"must be {expected}{shown}")

    def _missing(self, key: str, expected: str) -> WrongKey:
        return WrongKey(f"{self._where}.{key}", f"is missing: {expected}")

    def text(self, key: str, pattern: re.Pattern[str] | None = None, expected: str = "a text") -> str | None:
        value = self._table.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value or (pattern is not None and not pattern.fullmatch(value)):
            raise self._wrong(key, expected)
        return value

    def required(self, key: str, pattern: re.Pattern[str] | None = None, expected: str = "a text") -> str:
        value = self.text(key, pattern, expected)
        if value is None:
            raise self._missing(key, expected)
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        value = self._table.get(key, default)
        if value not in choices:
            expected = " or ".join(json.dumps(each) for each in choices)
            raise self._wrong(key, expected) if key in self._table else self._missing(key, expected)
        return value

    def table(self, key: str, *, known: Collection[str]) -> TableReader:
        """Return the reader of the table ``[key]``, empty if it is not given."""
        value = self._table.get(key, {})
        where = ".".join(filter(None, (self._where, key)))
        if not isinstance(value, dict):
            raise WrongKey(where, f"must be a table: write [{where}]")
        check_known(where, value, known)
        return TableReader(where, value)

    def size(self, key: str, default: int, most: int) -> int:
        value = self._table.get(key, default)
        try:
            found = units.size_bytes(value)
        except ValueError:
            found = 0
        if not 1 <= found <= most:
            raise self._wrong(key, f'a size up to {units.short_size(most)}, such as "64MiB"')
        return found

    def flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def count(self, key: str, most: int) -> int | None:
        value = self._table.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise self._wrong(key, f"a whole number from 1 to {most:,}")
        return value

    def amount(self, key: str, most: Decimal) -> Decimal | None:
        value = self._table.get(key)
        if value is None:
            return None
        try:
            amount = Decimal(str(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None
        except InvalidOperation:
            amount = None
        if amount is None or not amount.is_finite() or not 0 <= amount <= most:
            raise self._wrong(key, f"a number from 0 to {most:,}")
        return amount

    def names(self, key: str, pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
        value = self._table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) and pattern.fullmatch(each) for each in value):
            raise self._wrong(key, f"a list of {expected}")
        if len(value) > NAMES_MAX or len(set(value)) != len(value):
            raise self._wrong(key, f"a list of at most {NAMES_MAX} different names")
        return tuple(value)

    def duration(self, key: str, default: float) -> float:
        value = self._table.get(key, default)
        try:
            found = units.seconds(value)
        except ValueError:
            found = 0.0
        if not 0 < found <= TIME_MAX_S:
            raise self._wrong(key, f'a duration up to {units.short_duration(TIME_MAX_S)}, such as "30s"')
        return found


def load_file(
    path: str | Path | None, *, name: str, variable: str, streams: Path | None, parse: Callable[[str, str], T]
) -> T | None:
    """Return what `parse` makes of the path and text of a file: `path`, else that in the environment variable, else
    `name` in the directory `streams`. None: none of these is given.

    Raises TopologyError, in one line with file and key.
    """
    given = path or os.environ.get(variable)
    file = Path(given).expanduser() if given else streams / name if streams is not None else None
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise TopologyError(str(file), "", f"is above {FILE_BYTES_MAX:,} bytes")
        return parse(str(file), text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(str(file), "", f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_file(file: str, text: str, read: Callable[[str, dict[str, Any]], T]) -> T:
    """Return what `read` makes of the tables of a TOML file. Raises TopologyError, in one line with file and key."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TopologyError(file, "", f"is not TOML: {error}") from None
    try:
        return read(file, raw)
    except WrongKey as error:
        raise TopologyError(file, error.key, error.problem) from None


def shown_value(value: object) -> str:
    """Return a value as messages show it, at most 80 characters."""
    shown = json.dumps(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"
