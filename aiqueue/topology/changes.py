"""What a plan consists of, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import units
from .problems import Problem

if TYPE_CHECKING:
    from .stamps import Applied

Action = Literal["create", "update", "replace-needed", "delete-lanes"]

Storage = Literal["file", "memory"]
STORAGES: Mapping[Storage, str] = {"file": "file storage", "memory": "memory"}  # and their names

_NAMES_SHOWN = 3  # names listed before "and N more"
_DURATIONS = ("ack_wait", "duplicate_window", "inactive_threshold", "max_age")  # nanoseconds
_SIZES = ("max_bytes", "max_msg_size")


class FieldChange(NamedTuple):
    """A field that differs, with values in the API's form. `why`: what the change deletes, or why it is refused."""

    key: str
    """Name of the field in JetStream's API, such as max_bytes."""
    live: Any
    """Value on the server."""
    wanted: Any
    """Value that is declared."""
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a plan, to the stream itself, or to the consumers of its `lanes` if there are any.

    `loss`: which messages it would delete. `refused`: why the server cannot make the change in place, and what to do.
    `stop`: why the stream would store nothing more. `note`: what else to expect. Each is a sentence, or None.
    """

    stream: str
    action: Action
    """What apply does to the stream: create or update."""
    fields: tuple[FieldChange, ...] = ()
    """Fields that differ; of a new stream none."""
    lanes: tuple[str, ...] = ()
    """Names of the consumers that change; empty: the stream itself does."""
    loss: str | None = None
    refused: str | None = None
    note: str | None = None
    stop: str | None = None

    @property
    def lacks_subjects(self) -> bool:
        """Whether the stream differs in nothing but subjects that it lacks."""
        return bool(self.fields) and all(
            each.key == "subjects" and not set(each.live or ()) - set(each.wanted) for each in self.fields
        )

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
class StorageSum:
    """What streams set aside of one storage, in bytes, all copies included.

    `declared`: by the declared streams in all, `one_copy`: by one copy of each, which is what a server of a cluster
    holds at most. `added`: more than now, negative for less. `limit`: of the account, None if it has none; the server
    then has a limit of its own, which it does not tell. `free`: what is left of `limit` now.
    """

    storage: Storage
    declared: int
    one_copy: int
    added: int
    limit: int | None
    free: int | None

    def line(self) -> str:
        """Return the sum as one line."""
        change = f"{units.short_size(abs(self.added))} {'less' if self.added < 0 else 'more'} than now"
        copy = f" ({units.short_size(self.one_copy)} on each server)" if self.one_copy < self.declared else ""
        text = f"{STORAGES[self.storage]}: {units.short_size(self.declared)} set aside{copy}, {change}"
        if self.limit is None or self.free is None:
            return f"{text}; the account has no limit, and the server does not tell its own"
        return f"{text}; free: {units.short_size(self.free)} of {units.short_size(self.limit)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What apply would change, and the `problems` that it does not solve. Empty if the server matches the declaration
    and nothing disturbs it.

    `sums`: what the declared streams set aside. `shortages`: what the account lacks for the changes, so that apply
    makes none. `applied`: who applied the streams last, as far as they carry a stamp.
    """

    changes: tuple[Change, ...]
    problems: tuple[Problem, ...] = ()
    sums: tuple[StorageSum, ...] = ()
    shortages: tuple[Problem, ...] = ()
    applied: tuple[Applied, ...] = ()

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
        """A sentence for each change that cannot be made in place, and for each shortage."""
        return tuple(f"{each.stream}: {each.refused}" for each in self.changes if each.refused) + tuple(
            f"{each.stream}: {each.text}: {each.remedy}" for each in self.shortages
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """A sentence for each change after which a stream would store nothing more."""
        return tuple(f"{each.stream}: {each.stop}" for each in self.changes if each.stop)

    def lines(self) -> list[str]:
        """Return the plan as a text diff, one line per field, and a line for each shortage and problem."""
        changes = [line for change in self.changes for line in change.lines()]
        return changes + [problem.line() for problem in self.shortages + self.problems]

    def authors(self, service: str) -> list[str]:
        """Return who applied the streams last that would be changed, and what that means for `service`, as lines."""
        found: dict[str, list[str]] = {}
        for each in self.applied:
            if own := [change for change in self.changes if change.stream == each.stream]:
                lacks_subjects = all(change.lacks_subjects for change in own)
                found.setdefault(each.explain(service, lacks_subjects=lacks_subjects), []).append(each.stream)
        return [f"{', '.join(streams)}: {text}" for text, streams in found.items()]


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
