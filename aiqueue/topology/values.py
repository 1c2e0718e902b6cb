"""Checks of single values in a stream file. Each returns the value in the API's form, or raises ValueError."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from .. import units

SIZES = ("small", "medium", "large")  # of a deployment: the setting `size`
_INT64_MAX = 2**63 - 1
_DURATION_MAX_S = 100 * 365 * 86400  # int64 nanoseconds end at 292 years
ITEMS_MAX = 32

Check = Callable[[object], Any]


def wrong(expected: str, value: object) -> NoReturn:
    """Raise ValueError: the value must be what is expected."""
    shown = repr(value)
    raise ValueError(f"must be {expected}, not {shown if len(shown) <= 80 else shown[:77] + '…'}")


def one_of(*words: str) -> Check:
    """Check one of these words."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            wrong(" or ".join(map(json.dumps, words)), value)
        return value

    return check


def matching(pattern: re.Pattern[str], expected: str) -> Check:
    """Check a text that matches a pattern as a whole."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            wrong(expected, value)
        return value

    return check


def list_of(item: Check, expected: str) -> Check:
    """Check a list of different items, and return a tuple."""

    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= ITEMS_MAX:
            wrong(f"a list of 1 to {ITEMS_MAX} {expected}", value)
        items = tuple(item(one) for one in value)
        if len(set(items)) < len(items):
            raise ValueError("contains an item twice")
        return items

    return check


def flag(value: object) -> bool:
    """Check true or false."""
    if not isinstance(value, bool):
        wrong("true or false", value)
    return value


def count(most: int = _INT64_MAX, *, unlimited: bool = False) -> Check:
    """Check a whole number from 1, or -1 if `unlimited`. Refuse zero, which the server treats as -1 or a default."""
    expected = "a whole number from 1" + (f" to {most}" if most < _INT64_MAX else "")
    expected += ", or -1 for no limit" if unlimited else ""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            wrong(expected, value)
        if not (1 <= value <= most or (unlimited and value == -1)):
            wrong(expected, value)
        return value

    return check


def size(value: object) -> int:
    """Check a size, 1048576, "1GiB" or -1, and return bytes."""
    expected = 'a size above 0 such as 1048576 or "1GiB", or -1 for no limit'
    if isinstance(value, bool) or not isinstance(value, str | int):
        wrong(expected, value)
    try:
        size = units.size_bytes(value)
    except (ValueError, OverflowError):
        wrong(expected, value)
    if not (0 < size <= _INT64_MAX or value == -1):
        wrong(expected, value)
    return size


def by_size(value: object) -> int | dict[str, int]:
    """Check a size in bytes that is the same in each of SIZES, or a table with one for each."""
    if not isinstance(value, dict):
        return size(value)
    if value.keys() != set(SIZES):
        wrong(f"a size, or a table with a size for {', '.join(SIZES)}", value)
    return {name: size(value[name]) for name in SIZES}


def nanoseconds(least_s: float, *, zero: bool = False) -> Check:
    """Check a duration such as "30s" and return nanoseconds. Refuse a bare number, nanoseconds in JetStream."""
    expected = f'a duration such as "30s", at least {units.short_duration(least_s)}'
    expected += ', or "0s" for no limit' if zero else ""

    def check(value: object) -> int:
        if not isinstance(value, str):
            wrong(expected, value)
        try:
            seconds = units.seconds(value)
        except ValueError:
            wrong(expected, value)
        if not (least_s <= seconds <= _DURATION_MAX_S or (zero and seconds == 0)):
            wrong(expected, value)
        return round(seconds * 1_000_000_000)

    return check
