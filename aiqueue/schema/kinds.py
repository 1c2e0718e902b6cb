"""Which families and kinds a document describes, and their names in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from ..job import ANY_KIND, Message
from ..topology import Topology


@dataclass(frozen=True, slots=True)
class HandledKind:
    """A kind of message that a program handles. `source`: where it does so, such as ``app:worker``.

    `model`: the class of the messages; None: of any form, and `name` is ANY_KIND where a handler of every kind gets
    them. `keeps_result`: whether the result is stored. `is_sent`: whether programs send it; only aiqueue sends bounces.
    `agents`: who handles it, in an inbox family.
    """

    family: str
    name: str
    model: type[Message[Any]] | None
    source: str = ""
    keeps_result: bool = True
    is_sent: bool = True
    agents: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The kind in a text."""
        return f"every kind of {self.family}" if self.name == ANY_KIND else f"kind {self.name!r} of {self.family}"


Selection = Mapping[str, Sequence[HandledKind]]


def select(
    topology: Topology,
    kinds: Iterable[HandledKind],
    *,
    sources: Sequence[str],
    families: Sequence[str] | None,
    names: Sequence[str] | None,
) -> Selection:
    """Return the kinds to describe, by family, in the order of the families' files.

    `kinds` are those of the programs `sources`. Without programs, each family has messages of any form. `families` and
    `names`: only these; None: all. Raises UnknownFamily, and BadInput for what selects nothing.
    """
    for name in families or ():
        topology.family(name)
    if not sources:
        if names is not None:
            raise BadInput(f"kinds are known from code: name the program of {_listed(names)}, such as app:worker")
        return {name: [HandledKind(name, ANY_KIND, None)] for name in topology.families if name in (families or [name])}
    handled = list(kinds)
    _refuse_missing(handled, sources, families, names)
    found: dict[str, list[HandledKind]] = {}
    for each in _merge(handled, families, names):
        topology.family(each.family)  # raises for one that is not declared
        found.setdefault(each.family, []).append(each)
    if not found:
        raise BadInput(f"{_listed(names or ())} is no kind of {_listed(families or ())}: leave one of the options out")
    return {name: found[name] for name in topology.families if name in found}


def component_names(selected: Selection) -> dict[tuple[str, str], str]:
    """Return a name for each kind, by family and kind, in the characters that AsyncAPI allows: ``agent.tasks.ask``."""
    used: dict[str, tuple[str, str]] = {}
    for key in sorted((each.family, each.name) for kinds in selected.values() for each in kinds):
        family, kind = key
        name = f"{family}.{'any' if kind == ANY_KIND else kind.replace(':', '_')}"
        if name in used:  # "a:b" beside "a_b"
            name += f"-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
        used[name] = key
    return {key: name for name, key in used.items()}


def _merge(
    kinds: Iterable[HandledKind], families: Sequence[str] | None, names: Sequence[str] | None
) -> list[HandledKind]:
    """Return each kind that is selected once, sorted. Raises BadInput for one that is two classes."""
    merged: dict[tuple[str, str], HandledKind] = {}
    for each in kinds:
        if (families is not None and each.family not in families) or (names is not None and each.name not in names):
            continue
        known = merged.setdefault((each.family, each.name), each)
        if known.model is not each.model:
            classes = f"{_class_name(known)} in {known.source}, and {_class_name(each)} in {each.source}"
            raise BadInput(f"{each.what} is two classes, {classes}: give each a document of its own")
        agents = tuple(dict.fromkeys((*known.agents, *each.agents)))
        keeps_result = known.keeps_result or each.keeps_result
        merged[each.family, each.name] = replace(known, keeps_result=keeps_result, agents=agents)
    return sorted(merged.values(), key=lambda each: (each.family, each.name))


def _refuse_missing(
    kinds: Sequence[HandledKind], sources: Sequence[str], families: Sequence[str] | None, names: Sequence[str] | None
) -> None:
    handled = list(dict.fromkeys(each.family for each in kinds))
    programs = _listed(sources)
    if not kinds:
        raise BadInput(f"{programs} has no handlers: register one with @worker.handle(YourMessage)")
    if missing := [each for each in families or () if each not in handled]:
        raise BadInput(
            f"{programs} handles nothing of {_listed(missing)}, but of {_listed(handled)}: name another program, or "
            "none for the family alone"
        )
    known = list(dict.fromkeys(each.name for each in kinds))
    if missing := [each for each in names or () if each not in known]:
        raise BadInput(f"{programs} has no handler for kind {_listed(missing)}: it has {_listed(known)}")


def _class_name(kind: HandledKind) -> str:
    return f"{kind.model.__module__}.{kind.model.__qualname__}" if kind.model else "any"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
