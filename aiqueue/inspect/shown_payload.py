"""What lists show of a message: without its secrets, after the user's own hook, and cut to a bounded size."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..config import Redact

log = logging.getLogger(__name__)

TEXT_MAX = 200  # characters of one text
ITEMS_MAX = 20  # items of one list, and fields of one map
VALUES_MAX = 200  # values of one message
DEPTH_MAX = 8
KEY_MAX = 80  # characters of a field's name


def redact_data(redact: Redact | None, family: str, kind: str, data: Any) -> tuple[Any, str]:
    """Return what the hook makes of a message's data, or None and why nothing may be shown."""
    if redact is None:
        return data, ""
    if not isinstance(data, Mapping):
        return None, "not shown: the redact hook is for messages with fields"
    try:
        return redact(family, kind, dict(data)), ""
    except Exception as error:  # noqa: BLE001  (a user's function; its message may repeat what it was to hide)
        log.warning("the redact hook has failed for %s of %s: %s", kind, family, type(error).__name__)
        return None, f"not shown: the redact hook raised {type(error).__name__}"


def show_payload(redact: Redact | None, family: str, kind: str, data: Mapping[str, Any]) -> tuple[Any, str]:
    """Return what may be shown of a message's data, secrets masked before, or None and why nothing may be shown."""
    shown, problem = redact_data(redact, family, kind, data)
    return (None, problem) if problem else (cut(shown), "")


def cut(value: Any) -> Any:
    """Return plain data of at most VALUES_MAX values, with an ellipsis for what is left out."""
    return _cut(value, DEPTH_MAX, [VALUES_MAX])


def _cut(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if isinstance(value, str):
        return _cut_text(value, TEXT_MAX)
    if isinstance(value, bytes | bytearray):
        return f"… {len(value):,} bytes"
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() <= TEXT_MAX * 3 else f"… a number of {value.bit_length():,} bits"
    if not isinstance(value, dict | list | tuple):
        return value
    if depth <= 0 or left[0] <= 0:
        return f"… {len(value):,} {'fields' if isinstance(value, dict) else 'items'}"
    if isinstance(value, dict):
        shown: dict[str, Any] = {}
        for key in value:
            if len(shown) == ITEMS_MAX or left[0] <= 0:
                shown["…"] = f"{len(value) - len(shown):,} more"
                break
            shown[_cut_text(str(key), KEY_MAX)] = _cut(value[key], depth - 1, left)
        return shown
    items: list[Any] = []
    for each in value:
        if len(items) == ITEMS_MAX or left[0] <= 0:
            items.append(f"… {len(value) - len(items):,} more")
            break
        items.append(_cut(each, depth - 1, left))
    return items


def _cut_text(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
