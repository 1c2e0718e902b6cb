"""What JSON is too costly to be read, found without reading it: a megabyte of ``{},`` takes 30 MB and half a second, in
which a process does nothing else, and integers of thousands of digits take more.
"""

from __future__ import annotations

from typing import Final

VALUES_MAX: Final = 500_000  # an embedding of 300,000 tokens is the largest request that providers take
DIGITS_MAX: Final = 310  # a double has 309 before the point
_MARKS: Final = (b",", b"[", b"{")
_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG: Final = b"0" * (DIGITS_MAX + 1)


def find_excess(text: bytes) -> str:
    """Return what JSON has too much of, such as "more than 500,000 values" (names of fields aside); "": nothing. Takes
    some ms for a megabyte.
    """
    has_many, has_long = _count(text) > VALUES_MAX, _LONG in text.translate(_DIGITS)
    if not has_many and not has_long:
        return ""
    many, long = f"more than {VALUES_MAX:,} values", f"a number of more than {DIGITS_MAX} digits"
    if has_many and b"\0" in text:  # no UTF-8
        return many
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is escaped
    if text.count(b'"') > 4 * VALUES_MAX:  # two for a text, which may have a name
        return many
    outside = b"".join(text.split(b'"')[::2])  # of texts
    if _count(outside) > VALUES_MAX:
        return many
    return long if _LONG in outside.translate(_DIGITS) else ""


def _count(text: bytes) -> int:
    return sum(map(text.count, _MARKS))
