"""The public names: where each is imported from, and its sentences."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, is_typeddict

import pydantic

from . import markdown
from .sentences import attribute_sentences, first_sentence, is_sentence, module_texts, own_doc, sentence_about

ROOT_PACKAGE = "aiqueue"
LINE_MAX = 100


@dataclass(frozen=True)
class Member:
    """A method, property or field of a public class."""

    name: str
    text: str
    is_field: bool


@dataclass(frozen=True)
class Name:
    """A public name: the module to import it from, what it is, its docstring or the text below it."""

    module: str
    name: str
    thing: Any
    text: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def find(module: str, name: str) -> Name:
    """Return a public name of a module."""
    home = importlib.import_module(module)
    try:
        thing = getattr(home, name)
    except AttributeError:
        thing = importlib.import_module(f"{module}.{name}")  # a module that its package imports on demand
    return Name(module, name, thing, _text(home, name, thing))


def list_names(module: str) -> list[Name]:
    """Return the public names of a module: those of `__all__`, or without one the classes that it defines."""
    home = importlib.import_module(module)
    own = [name for name, each in vars(home).items() if inspect.isclass(each) and each.__module__ == module]
    names = getattr(home, "__all__", None) or [each for each in own if not each.startswith("_")]
    return [find(module, each) for each in names]


def _text(home: Any, name: str, thing: Any) -> str:
    if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
        return own_doc(thing)
    for each in _homes(home, name):
        texts = module_texts(Path(inspect.getsourcefile(each) or "").read_text(encoding="utf-8"))
        if name in texts:
            return texts[name]
    kind = type(thing)
    return own_doc(kind) if kind.__module__.startswith(ROOT_PACKAGE) else ""


def _homes(home: Any, name: str) -> Iterator[Any]:
    """Return the modules that may define a name: the one that offers it, and those below it."""
    yield home
    in_module = getattr(home, "_MODULE_OF", {}).get(name)
    if in_module:
        yield importlib.import_module(f"{home.__name__}.{in_module}")
    package = getattr(home, "__path__", None)
    for file in sorted(Path(package[0]).rglob("*.py")) if package and home.__name__ != ROOT_PACKAGE else ():
        source = file.read_text(encoding="utf-8")
        if file.stem != "__init__" and re.search(rf"^{name}(: .+)? = ", source, re.MULTILINE):
            inner = file.relative_to(package[0]).with_suffix("").parts if package else ()
            yield importlib.import_module(".".join((home.__name__, *inner)))


def members(kind: Any) -> list[Member]:
    """Return the public methods, properties and fields of a class, those that it inherits from aiqueue's too."""
    if not inspect.isclass(kind):
        return []
    found: dict[str, Member] = {}
    texts = attribute_sentences(kind)

    def told(name: str) -> str:
        """Return what stands below the name, or the first sentence of the class's docstring that names it."""
        return texts.get(name) or next(filter(None, (sentence_about(own_doc(each), name) for each in kind.__mro__)), "")

    for each in reversed(kind.__mro__):
        if not each.__module__.startswith((ROOT_PACKAGE, "tests")):
            continue
        for name, value in vars(each).items():
            if not name.startswith("_") and _is_method(value):
                text = own_doc(value) or told(name) or inspect.getdoc(getattr(kind, name)) or ""
                found[name] = Member(name, text, is_field=False)
    for name in _fields(kind):
        found[name] = Member(name, told(name), is_field=True)
    return list(found.values())


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, staticmethod | classmethod | property)


def _fields(kind: type[Any]) -> list[str]:
    if dataclasses.is_dataclass(kind):
        names = [each.name for each in dataclasses.fields(kind)]
    elif issubclass(kind, pydantic.BaseModel):
        names = list(kind.model_fields)
    elif is_typeddict(kind):
        names = list(kind.__annotations__)
    else:
        names = list(getattr(kind, "_fields", ()))
    return [each for each in names if not each.startswith("_")]


def gaps(names: Sequence[Name]) -> list[str]:
    """Name each public name, method, property and field that has no sentence of its own."""
    found = []
    for each in names:
        if not is_sentence(first_sentence(each.text), each.name):
            found.append(each.path)
        found += [f"{each.path}.{one.name}" for one in members(each.thing) if not is_sentence(one.text, one.name)]
    return found


@dataclass(frozen=True)
class Group:
    """A page of the API: its file, title and opening, and the names under each heading, as "module.Name"."""

    file: str
    title: str
    opening: str
    names: Mapping[str, Sequence[str]]

    def listed(self) -> list[Name]:
        """Return the names of the page."""
        return [find(*each.rsplit(".", 1)) for some in self.names.values() for each in some]


def render(group: Group) -> str:
    """Return a page: a table of each heading's names, and behind it what is said of each."""
    parts = [group.opening]
    for heading, paths in group.names.items():
        found = [find(*each.rsplit(".", 1)) for each in paths]
        rows = [(markdown.code(each.name), markdown.sentence(first_sentence(each.text))) for each in found]
        parts += [f"## {heading}", markdown.table(("name", "what it is"), rows)]
        parts += [part for each in found for part in _section(each)]
    return markdown.page(group.title, *parts)


def _section(name: Name) -> Iterator[str]:
    """Return what is said of a name: signature, docstring, fields and methods."""
    yield f"### {name.name}"
    yield f"`from {name.module} import {name.name}`"
    if inspect.isclass(name.thing) or inspect.isroutine(name.thing):
        yield "```text\n" + signature(name.thing, name.name) + "\n```"
    yield paragraphs(name.text)
    found = members(name.thing)
    fields = [(markdown.code(each.name), markdown.sentence(each.text)) for each in found if each.is_field and each.text]
    yield markdown.table(("field", "meaning"), fields)
    for each in found:
        if not each.is_field:
            thing = inspect.getattr_static(name.thing, each.name)
            shown = each.name if isinstance(thing, property) else signature(getattr(name.thing, each.name), each.name)
            yield f"#### {name.name}.{each.name}"
            yield "```text\n" + shown + "\n```"
            yield paragraphs(each.text)


def signature(thing: Any, name: str) -> str:
    """Return how a class or function is called: its parameters, and defaults that are plain values."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return name
    shown, has_star = [], False
    for each in parameters:
        if each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not has_star:
            shown.append("*")
        has_star = has_star or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        is_plain = isinstance(each.default, str | int | float | bool | tuple | None)
        default = "" if each.default is each.empty else f"={each.default!r}" if is_plain else "=…"
        shown.append(f"{star}{each.name}{default}")
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= LINE_MAX else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def paragraphs(doc: str) -> str:
    """Return a docstring as Markdown: what is indented below ``::`` is code."""
    found: list[str] = []
    for each in inspect.cleandoc(doc).split("\n\n"):
        if each.startswith("    ") and found:
            code = textwrap.dedent(each).rstrip()
            if found[-1].endswith("\n```"):  # a blank line in the same code
                found[-1] = found[-1].removesuffix("\n```") + f"\n\n{code}\n```"
            else:
                found[-1] = found[-1].removesuffix("::").rstrip() + (":" if found[-1].endswith("::") else "")
                found.append(f"```text\n{code}\n```")
        else:
            found.append(markdown.from_docstring(each))
    return "\n\n".join(each for each in found if each.strip(":"))


def render_index(groups: Sequence[Group]) -> str:
    """Return the page that leads to the others."""
    rows = [
        (f"[{each.title}]({each.file})", ", ".join(markdown.code(one.name) for one in each.listed())) for each in groups
    ]
    opening = "Names that begin with an underscore, and modules that are not listed here, may change without notice."
    return markdown.page("API", opening, markdown.table(("page", "names"), rows))
