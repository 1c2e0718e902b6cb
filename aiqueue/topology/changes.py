"""What a plan consists of, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .. import units
from .problems import Problem

Action = Literal["create", "update", "replace-needed", "delete-lanes"]

_NAMES_SHOWN = 3  # names listed before "and N more"
_DURATIONS = ("ack_wait", "duplicate_window", "inactive_threshold", "max_age")  # nanoseconds
_SIZES = ("max_bytes", "max_msg_size")


class FieldChange(NamedTuple):
    """A field that differs, with values in the API's form. `why`: what the change deletes, or why it is refused."""

    key: str
    live: Any
    wanted: Any
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a plan, to the stream itself, or to the consumers of its `lanes` if there are any.

    `loss`: which messages it would delete. `refused`: why the server cannot make the change in place, and what to do.
    `note`: what else to expect. Each is a sentence, or None.
    """

    stream: str
    action: Action
    fields: tuple[FieldChange, ...] = ()
    lanes: tuple[str, ...] = ()
    loss: str | None = None
    refused: str | None = None
    note: str | None = None

    def lines(self) -> list[str]:
        """Return the change as text, one line per field. Lines start with ``+``, ``~``, ``-`` or, if refused, ``!``."""
        why = self.refused or self.note
        tail = f"  ({why})" if why else ""
        if self.action == "create":
            return [f"{'!' if self.refused else '+'} create stream {self.stream}{tail}"]
        if self.action == "delete-lanes":
            return [f"- {self.stream} {_format_lanes(self.lanes)}: delete{tail}"]
        if self.lanes:
            return [f"~ {self.stream} {_format_lanes(self.lanes)}.{_format_field(each)}" for each in self.fields]
        sign = "!" if self.refused else "~"
        return [f"{sign} {self.stream}.{_format_field(each)}" for each in self.fields]


@dataclass(frozen=True, slots=True)
class Plan:
    """What apply would change, and the `problems` that it does not solve. Empty if the server matches the declaration
    and nothing disturbs it.
    """

    changes: tuple[Change, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def drift(self) -> bool:
        """Whether apply has something to do."""
        return bool(self.changes)

    @property
    def losses(self) -> tuple[str, ...]:
        """A sentence for each change that would delete messages."""
        return tuple(f"{each.stream}: {each.loss}" for each in self.changes if each.loss)

    @property
    def refusals(self) -> tuple[str, ...]:
        """A sentence for each change that cannot be made in place."""
        return tuple(f"{each.stream}: {each.refused}" for each in self.changes if each.refused)

    def lines(self) -> list[str]:
        """Return the plan as a text diff, one line per field, and a line for each problem."""
        changes = [line for change in self.changes for line in change.lines()]
        return changes + [problem.line() for problem in self.problems]


def _format_lanes(lanes: tuple[str, ...]) -> str:
    shown = ", ".join(lanes[:_NAMES_SHOWN])
    more = f" and {len(lanes) - _NAMES_SHOWN} more" if len(lanes) > _NAMES_SHOWN else ""
    return f"{'lane' if len(lanes) == 1 else 'lanes'} {shown}{more}"


def _format_field(field: FieldChange) -> str:
    why = f"  ({field.why})" if field.why else ""
    if isinstance(field.wanted, list):
        removed = [f"- {each}" for each in field.live or () if each not in field.wanted]
        added = [f"+ {each}" for each in field.wanted if each not in (field.live or ())]
        return f"{field.key}: {', '.join(removed + added)}{why}"
    return f"{field.key}: {format_value(field.key, field.live)} -> {format_value(field.key, field.wanted)}{why}"


def format_value(key: str, value: Any) -> str:
    """Format a value: durations, sizes, "unlimited"."""
    if isinstance(value, bool) or value is None:
        return "true" if value else "false" if value is False else "unset"
    if isinstance(value, int) and key.startswith("max_") and value <= 0:
        return "unlimited"
    if key in _DURATIONS:
        return units.short_duration(value / 1_000_000_000)
    if key in _SIZES:
        return units.short_size(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each)
    return str(value)
