"""Values of attributes. What is in a message or an answer may be of any length, and not even text that UTF-8 can hold:
an exporter that cannot encode one loses all spans that it has gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TEXT_MAX: Final = 1_024  # characters
ITEMS_MAX: Final = 32  # of a list


def bounded(value: Any) -> Any:
    """Return a value that any exporter can encode, cut to TEXT_MAX and ITEMS_MAX."""
    if isinstance(value, str):
        return value[:TEXT_MAX].encode(errors="replace").decode()
    return [bounded(each) for each in value[:ITEMS_MAX]] if isinstance(value, list) else value


def bounded_all(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return attributes with bounded values."""
    return {name: bounded(value) for name, value in (attributes or {}).items()}
