"""Whether what a command has printed has the keys that are declared for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .json_keys import differences


def command_of(arguments: Sequence[str], outputs: Mapping[str, Any]) -> str | None:
    """Return the command that arguments of aiqueue run, by its words at their start; None: it prints no JSON."""
    if "--json" not in arguments or "--help" in arguments:
        return None
    found = [each for each in outputs if tuple(arguments[: len(each.split())]) == tuple(each.split())]
    return max(found, key=len) if found else None


def problems_of(arguments: Sequence[str], stdout: str, outputs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Name what a command's output has that is not declared, and what it lacks. Text that is no JSON has none."""
    command = command_of(arguments, outputs)
    if command is None:
        return []
    forms = outputs[command]
    values = _value(stdout) or (_lines(stdout) if any(each.lines for each in forms) else [])
    found: list[str] = []
    for value in values:
        tried = sorted((differences(value, each.type, command) for each in forms), key=len)
        same_shape = [each for each in tried if not any(one.startswith(f"{command}: ") for one in each)]
        found += (same_shape or tried)[0]
    return found


def _value(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return []


def _lines(text: str) -> list[Any]:
    return [value for line in text.splitlines() if line.startswith("{") for value in _value(line)]
