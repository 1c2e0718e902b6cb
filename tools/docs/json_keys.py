"""The keys of what commands print with --json, from the declared types, and whether a real output has these keys."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

import pydantic

from . import markdown
from .sentences import attribute_sentences, first_paragraph, is_sentence, own_doc

SCALARS: Mapping[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "true or false", bytes: "text in base64",
    type(None): "null", Any: "any value", object: "any value",
}  # fmt: skip
LISTS = (list, tuple, Sequence, set, frozenset)
MAPS = (dict, Mapping)
_CONSTANT = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")


@dataclass(frozen=True)
class Key:
    """A key of an output: its path, such as ``jobs[].tenant``, what its value is, and its sentence."""

    path: str
    values: str
    text: str


def fields_of(kind: Any) -> dict[str, Any] | None:
    """Return the keys of a class that is printed as an object, with their types; None: it is no such class."""
    if not isinstance(kind, type):
        return None
    is_object = dataclasses.is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields")
    if issubclass(kind, pydantic.BaseModel):
        names = list(kind.model_fields)
    elif dataclasses.is_dataclass(kind):
        names = [each.name for each in dataclasses.fields(kind)]
    elif is_object:
        names = list(getattr(kind, "_fields", kind.__annotations__))
    else:
        return None
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in (hints if is_typeddict(kind) else names)}


def _unwrap(kind: Any) -> Any:
    while get_origin(kind) in (NotRequired, Required) or hasattr(kind, "__metadata__"):
        kind = get_args(kind)[0]
    return kind


def parts_of(kind: Any) -> list[Any]:
    """Return the types of a union, or the one type."""
    kind = _unwrap(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return [part for each in get_args(kind) for part in parts_of(each)]
    return [kind]


def list_keys(kind: Any, common: Mapping[str, str], path: str = "", above: tuple[Any, ...] = ()) -> Iterator[Key]:
    """Return the keys of an output, those of objects in it too. `common`: sentences of keys that have no other.

    `above`: the classes that the output is part of; one of these in itself, such as children of children, ends there.
    """
    for part in parts_of(kind):
        origin, inner = get_origin(part) or part, get_args(part)
        if origin in LISTS and inner:
            yield from list_keys(inner[0], common, f"{path}[]", above)
        elif origin in MAPS and inner:
            yield from list_keys(inner[1], common, f"{path}.{{}}", above)
        elif part not in above and (fields := fields_of(part)) is not None:
            texts = attribute_sentences(part)
            for name, value in fields.items():
                here = f"{path}.{name}" if path else name
                text = _with_values(texts.get(name) or common.get(name, ""), part)
                yield Key(here.lstrip("."), shown(value), text)
                yield from list_keys(value, common, here, (*above, part))


def _with_values(text: str, kind: type[Any]) -> str:
    """Return a text with the values of the constants that it names, and null for None."""

    def value(found: re.Match[str]) -> str:
        known = getattr(sys.modules[kind.__module__], found[0], None)
        return f"{known:,}" if isinstance(known, int | float) else found[0]

    return re.sub(r"\bNone\b", "null", _CONSTANT.sub(value, text))


def shown(kind: Any) -> str:
    """Return a type in words."""
    return " or ".join(dict.fromkeys(_word(each) for each in parts_of(kind)))


def _word(kind: Any) -> str:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " or ".join(markdown.code(str(each)) for each in inner)
    if origin in LISTS:
        return f"list of {shown(inner[0])}" if inner else "list"
    if origin in MAPS:
        return f"object of {shown(inner[1])}" if inner and inner[1] is not Any else "object"
    return SCALARS.get(kind, "object" if fields_of(kind) is not None else "text")


def gaps(outputs: Mapping[str, Sequence[Any]], common: Mapping[str, str]) -> list[str]:
    """Name each key that has no sentence of its own, with one command that prints it."""
    found: dict[str, str] = {}
    for command, forms in outputs.items():
        for form in forms:
            for each in list_keys(form.type, common):
                if not is_sentence(each.text, re.split(r"[.\]]", each.path)[-1]):
                    found.setdefault(f"{command}: {each.path}", "")
    return list(found)


def differences(value: Any, kind: Any, path: str = "") -> list[str]:
    """Name where a value has keys that its type does not declare, lacks declared ones, or is of another type."""
    tried = [_differences(value, each, path) for each in parts_of(kind)]
    return next((each for each in tried if not each), min(tried, key=len))


def _differences(value: Any, kind: Any, path: str) -> list[str]:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    fields = fields_of(kind)
    if fields is not None:
        if not isinstance(value, Mapping):
            return [f"{path}: {type(value).__name__}, not an object"]
        optional = {name for name, hint in fields.items() if get_origin(hint) is NotRequired}
        found = [f"{path}.{each}: not declared" for each in value.keys() - fields.keys()]
        found += [f"{path}.{each}: missing" for each in fields.keys() - value.keys() - optional]
        shared = [each for each in fields if each in value]
        return found + [one for each in shared for one in differences(value[each], fields[each], f"{path}.{each}")]
    if origin in LISTS:
        if not isinstance(value, list):
            return [f"{path}: {type(value).__name__}, not a list"]
        is_mixed = origin is tuple and len(inner) > 1 and inner[1] is not Ellipsis
        if is_mixed or not inner:
            return []
        return [one for at, each in enumerate(value) for one in differences(each, inner[0], f"{path}[{at}]")]
    if origin in MAPS:
        if not isinstance(value, Mapping):
            return [f"{path}: {type(value).__name__}, not an object"]
        return (
            [one for name, each in value.items() for one in differences(each, inner[1], f"{path}.{name}")]
            if inner
            else []
        )
    return _scalar_differences(value, kind, origin, inner, path)


def _scalar_differences(value: Any, kind: Any, origin: Any, inner: tuple[Any, ...], path: str) -> list[str]:
    if kind in (Any, object):
        return []
    if origin is Literal:
        return [] if value in inner else [f"{path}: {value!r} is none of {inner}"]
    if kind is float:
        return [] if isinstance(value, int | float) and not isinstance(value, bool) else [f"{path}: no number"]
    if kind is int:
        return [] if isinstance(value, int) and not isinstance(value, bool) else [f"{path}: no whole number"]
    if kind in (bool, type(None)):
        return [] if isinstance(value, kind) else [f"{path}: {value!r} is not {SCALARS[kind]}"]
    return [] if isinstance(value, str) else [f"{path}: no text"]


def render(outputs: Mapping[str, Sequence[Any]], common: Mapping[str, str]) -> str:
    """Return the page."""
    opening = (
        "`--json` prints one JSON value to stdout, or, where so stated, one object a line. New keys may be added: "
        "ignore those that you do not know. Times are seconds since the epoch unless a key says otherwise. NaN and "
        "infinity are null. Errors go to stderr as text, and the exit code says whether there was one."
    )
    parts = [opening]
    for command, forms in outputs.items():
        parts.append(f"## aiqueue {command}")
        for form in forms:
            parts += _form(form, common)
    return markdown.page("JSON outputs", *parts)


def _form(form: Any, common: Mapping[str, str]) -> Iterator[str]:
    kinds = [each for each in parts_of(form.type) if each is not type(None)]
    first = kinds[0]
    is_list = (get_origin(first) or first) in LISTS
    about = get_args(first)[0] if is_list else first
    what = "One object a line" if form.lines else "A list" if is_list else "An object"
    when = f", {form.when}" if form.when else ""
    said = first_paragraph(own_doc(about)) if isinstance(about, type) and about not in SCALARS else ""
    yield f"{what}{when}. {markdown.sentence(said)}".strip()
    rows = [
        (markdown.code(each.path.removeprefix("[].")), each.values, markdown.sentence(each.text))
        for each in list_keys(form.type, common)
    ]
    yield markdown.table(("key", "value", "meaning"), rows)
