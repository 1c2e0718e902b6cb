"""The errors: what happened, what to do next, where each is imported from, and what raises it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.errors import AIQueueError

from . import markdown
from .api import Name, list_names, members
from .sentences import first_paragraph, is_sentence, join_lines, own_doc, sentences_of

MODULES = (
    "aiqueue", "aiqueue.errors", "aiqueue.schedules", "aiqueue.gateway", "aiqueue.rag",
)  # fmt: skip
"""Where public errors are imported from; the first one that has an error is named."""
INTERNAL = ("StreamCut", "WorkerFailed")
"""Errors that no caller gets: the doors of the gateway and the command line turn them into their own."""
_RAISES = re.compile(r"\b[Rr]aises?\b")


@dataclass(frozen=True)
class PublicError:
    """An error class: where it is imported from, what it says of itself, and the calls whose docstrings name it."""

    kind: type[Exception]
    module: str
    text: str
    raised_by: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.kind.__name__


def list_errors(callables: Sequence[Name], modules: Sequence[str] = MODULES) -> list[PublicError]:
    """Return the public errors, parents before children. `callables`: names whose docstrings say what they raise."""
    found: dict[type[Exception], str] = {}
    for module in modules:
        for each in list_names(module):
            is_error = isinstance(each.thing, type) and issubclass(each.thing, Exception)
            if is_error and (issubclass(each.thing, AIQueueError) or each.name.endswith("Error")):
                found.setdefault(each.thing, module)
    by = _raised_by(callables)
    return [
        PublicError(kind, found[kind], join_lines(own_doc(kind)), tuple(by.get(kind.__name__, ())))
        for kind in _ordered(found)
    ]


def _ordered(found: Mapping[type[Exception], str]) -> Iterator[type[Exception]]:
    def below(parent: type[Any]) -> Iterator[type[Exception]]:
        for kind in found:
            if kind.__bases__[0] is parent:
                yield kind
                yield from below(kind)

    roots = [kind for kind in found if kind.__bases__[0] not in found]
    for root in roots:
        yield root
        yield from below(root)


def _raised_by(callables: Sequence[Name]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in callables:
        docs = [(each.name, each.text)]
        docs += [(f"{each.name}.{one.name}", one.text) for one in members(each.thing) if not one.is_field]
        for path, doc in docs:
            raised = " ".join(one for one in sentences_of(doc) if _RAISES.search(one))
            for name in re.findall(r"\b[A-Z]\w+", raised):
                if path not in found.setdefault(name, []) and path != name:
                    found[name].append(path)
    return found


def unlisted(listed: Sequence[PublicError], internal: Sequence[str] = INTERNAL) -> list[str]:
    """Name each class below AIQueueError that has a public name, and is neither listed nor internal."""
    for each in pkgutil.walk_packages(aiqueue.__path__, "aiqueue."):
        if each.name != "aiqueue.__main__":
            _load(each.name)
    known = {each.kind for each in listed}

    def below(kind: type[Any]) -> Iterator[type[Any]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    found = [each for each in below(AIQueueError) if each.__module__.startswith("aiqueue.") and each not in known]
    return sorted(
        each.__name__ for each in found if not each.__name__.startswith("_") and each.__name__ not in internal
    )


def _load(module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "aiqueue").startswith("aiqueue"):
            raise  # any other is what an extra installs


def gaps(errors: Sequence[PublicError], remedies: Mapping[str, str]) -> list[str]:
    """Name each error without a sentence or a remedy of its own, and each remedy of no error."""
    found = [each.name for each in errors if not is_sentence(first_paragraph(own_doc(each.kind)), each.name)]
    found += [f"{each.name}: remedy" for each in errors if not is_sentence(remedies.get(each.name, ""), each.name)]
    return found + [f"{name}: no such error" for name in sorted(remedies.keys() - {each.name for each in errors})]


def _raisers(error: PublicError, errors: Sequence[PublicError]) -> str:
    """Return what raises an error: calls that say so, what raises its parent, or the rooms that make one."""
    if error.raised_by:
        return ", ".join(map(markdown.code, error.raised_by))
    parent = next((each for each in errors if each.kind is error.kind.__bases__[0] and each.raised_by), None)
    if parent is not None and parent.name not in _GENERAL:
        return f"what raises [{parent.name}](#{parent.name.lower()})"
    return ", ".join(markdown.code(each) for each in rooms_that_make(error.name)) or "its subclasses"


_GENERAL = ("AIQueueError", "BadInput")


def rooms_that_make(name: str) -> list[str]:
    """Return the rooms of aiqueue whose code makes an instance of a class."""
    root = Path(aiqueue.__path__[0])
    made = re.compile(rf"(?<!class )\b{name}\(")
    found = [file.relative_to(root) for file in sorted(root.rglob("*.py")) if made.search(file.read_text("utf-8"))]
    return list(dict.fromkeys(f"aiqueue.{each.parts[0].removesuffix('.py')}" for each in found))


def draw(errors: Sequence[PublicError]) -> str:
    """Return the tree of the errors, as text."""
    kinds = {each.kind for each in errors}

    def lines(kind: type[Any], lead: str) -> Iterator[str]:
        children = [each.kind for each in errors if each.kind.__bases__[0] is kind]
        for child in children:
            is_last = child is children[-1]
            yield f"{lead}{'└── ' if is_last else '├── '}{child.__name__}"
            yield from lines(child, lead + ("    " if is_last else "│   "))

    roots = [each.kind for each in errors if each.kind.__bases__[0] not in kinds]
    return "\n".join(line for root in roots for line in (root.__name__, *lines(root, "")))


def render(errors: Sequence[PublicError], remedies: Mapping[str, str]) -> str:
    """Return the page."""
    others = [each.name for each in errors if not issubclass(each.kind, AIQueueError)]
    outside = f", except {' and '.join(map(markdown.code, others))}" if others else ""
    opening = (
        f"All errors of aiqueue are below `aiqueue.AIQueueError`{outside}. `str(error)` is one line. "
        "`error.retryable`: the same call can succeed later."
    )
    parts = [
        opening,
        "```text\n" + draw(errors) + "\n```",
    ]
    for each in errors:
        also = [base.__name__ for base in each.kind.__bases__[1:]]
        retryable = isinstance(vars(each.kind).get("retryable"), property) or getattr(each.kind, "retryable", False)
        facts = [
            f"- What to do next: {markdown.sentence(remedies[each.name])}",
            f"- Import: `from {each.module} import {each.name}`" + (f"; also a {', '.join(also)}" if also else ""),
            "- The same call can succeed later." if retryable else "",
            f"- Raised by: {_raisers(each, errors)}.",
        ]
        parts += [f"## {each.name}", markdown.from_docstring(each.text), "\n".join(filter(None, facts))]
    return markdown.page("Errors", *parts)
