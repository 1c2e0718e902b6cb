"""What a key of a TOML file is: its sentence and default, which the reference shows, and the check of its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .values import Check


class FileKey(NamedTuple):
    """A key of a table. `default`: as TOML, "none", or in words; "" is a key that must be given."""

    sentence: str
    default: str = ""


@dataclass(frozen=True, slots=True)
class CheckedKey:
    """A key whose value is checked by itself. `sentence` and `default` are those of a FileKey."""

    check: Check
    sentence: str
    default: str = ""

    def __call__(self, value: object) -> Any:
        """Return the value in the API's form. Raises ValueError."""
        return self.check(value)
