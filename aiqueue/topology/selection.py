"""Which of the known families and streams a topology declares: the setting `families`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Final, Generic, NamedTuple, NoReturn, TypeVar

from ..errors import TopologyError
from .files import read_optional
from .streamfile import Role, StreamFile, parse_cached

T = TypeVar("T")

DEFAULT: Final = "default"  # in the setting `families`: all that are declared without this setting
# Streams that are declared only beside one of these families. All other roles are always declared.
WITH_FAMILIES: Final[Mapping[Role, tuple[str, ...]]] = {
    "usage": ("gateway.requests",),
    "recent": ("gateway.requests",),
    "api_keys": ("gateway.requests",),
    "batches": ("gateway.batches",),
    "rag": ("rag.ingest", "rag.queries"),
}
# No family, but the subject of the answers to requests for the results of one.
ANSWERS: Final = {"agent.results": "agent.tasks"}
ANSWER_WITHIN_NS: Final = 60 * 10**9
_NEEDED: Final = {**ANSWERS, "gateway.batches": "gateway.requests"}


class Stated(NamedTuple, Generic[T]):
    """The value of a setting, and where it is stated: `file` and `key` as a TopologyError shows them."""

    value: T
    file: str
    key: str

    def refuse(self, problem: str, key: str = "") -> NoReturn:
        """Raise a TopologyError that names where the setting, or a key in it, is stated."""
        raise TopologyError(self.file, ".".join(filter(None, (self.key, key))), problem)


def parse_optional(profile: str, size: str) -> list[StreamFile]:
    """Return the bundled files of optional families, which are declared only by name."""
    return [parse_cached(file, text, profile, size) for file, text in read_optional()]


def choose(known: Sequence[StreamFile], optional: Sequence[StreamFile], stated: Stated[Sequence[str]]) -> set[str]:
    """Return the names of the families to declare, and those in ANSWERS that are stated.

    Raises TopologyError for a name that is no family, and for a family without the one that it needs.
    """
    default = {each.family["name"] for each in known if each.family}
    names = default | {each.family["name"] for each in optional}
    if not stated.value:
        stated.refuse("names no family: leave the setting out to declare the default ones")
    for name in stated.value:
        if name not in names and name not in ANSWERS and name != DEFAULT:
            stated.refuse(_describe_unknown(name, known, names))
    chosen = {each for each in stated.value if each != DEFAULT} | (default if DEFAULT in stated.value else set())
    for name, needed in _NEEDED.items():
        if name in chosen and needed not in chosen:
            what = "answers requests for its results" if name in ANSWERS else "stores jobs of it"
            stated.refuse(f"{name} needs {needed}, because it {what}: add {needed}")
    return chosen


def is_declared(each: StreamFile, chosen: set[str]) -> bool:
    """Whether a stream file is declared beside the chosen families."""
    if each.family:
        return each.family["name"] in chosen
    return each.role not in WITH_FAMILIES or not chosen.isdisjoint(WITH_FAMILIES[each.role])


def advise(name: object, left_out: Sequence[str], stated: Stated[Sequence[str]] | None) -> str:
    """Return which setting would declare a family that is not declared. Empty: no file knows this family.

    `left_out` are the families of the stream files that `stated` does not name.
    """
    is_optional = _is_optional(name)
    if stated is not None and (name in left_out or is_optional):
        return f"the setting families does not name {name} ({stated.file}): add it there"
    if is_optional:
        return f'{name} is optional: set families to ["{DEFAULT}", "{name}"]'
    return ""


def _is_optional(name: object) -> bool:
    if not isinstance(name, str):
        return False
    return name in ANSWERS or any(each.family["name"] == name for each in parse_optional("single", "medium"))


def _describe_unknown(name: str, known: Sequence[StreamFile], names: set[str]) -> str:
    for each in known:
        if each.family.get("journal") == f"ai.{name}":
            return f"{name!r} is no family: the results of {each.family['name']} are there; name that family"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted({*names, *ANSWERS}))}, and {DEFAULT}"
    return f"unknown family {name!r}; {hint}"
