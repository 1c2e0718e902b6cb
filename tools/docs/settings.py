"""The settings: name, variable, type, default, limits and sentence, from their model."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from aiqueue import units

from . import links, markdown
from .sentences import attribute_sentences, is_sentence

PREFIX = "AIQUEUE_"
_MORE_OF: Mapping[str, str] = {
    "url": "`NATS_URL` is read, too, if `AIQUEUE_URL` is not set.",
    "size": f"See [sizes]({links.FAMILIES}#sizes).",
    "families": f"See [families]({links.FAMILIES}#families).",
    "overlay": f"See [overlay]({links.FAMILIES}#overlay).",
    "claim_check": f"See [documents]({links.DOCUMENTS}).",
    "generation": f"See [rolling deploys]({links.SCHEDULES}#rolling-deploys).",
    "embedded": f"See [the embedded server]({links.CONFIGURATION}#the-embedded-server).",
    "redact": f"See [lists]({links.OPERATORS}#lists).",
    "traces": f"See [tracing]({links.TRACING}#switch-it-on).",
    "trace_ratio": f"See [what is sampled]({links.TRACING}#what-is-sampled).",
    "metrics": f"See [history]({links.HISTORY}).",
}


@dataclass(frozen=True)
class Setting:
    """A setting, all for people."""

    name: str
    variable: str
    values: str
    default: str
    text: str


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def list_settings(model: type[pydantic.BaseModel]) -> list[Setting]:
    """Return the fields of a model of settings, in its order. The text of a field without one is ""."""
    texts = attribute_sentences(model)
    return [
        Setting(name, variable_of(name), _values(field), _default(field), texts.get(name, ""))
        for name, field in model.model_fields.items()
    ]


def gaps(model: type[pydantic.BaseModel]) -> list[str]:
    """Name each setting that has no sentence of its own."""
    return [each.name for each in list_settings(model) if not is_sentence(each.text, each.name)]


def _values(field: Any) -> str:
    kinds = [each for each in _parts(field.annotation) if each is not type(None)]
    choices = [markdown.code(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    metadata = [*field.metadata, *(note for kind in kinds for note in getattr(kind, "__metadata__", ()))]
    bounds = {each: getattr(note, each) for note in metadata for each in _SIGNS if hasattr(note, each)}
    words = choices or list(dict.fromkeys(_word(kind, metadata) for kind in kinds))
    limits = [f"{_SIGNS[each]} {bound:,}" for each, bound in bounds.items() if bound is not None]
    return ", ".join([" or ".join(words), *limits])


_SIGNS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def _parts(kind: Any) -> Iterator[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        for each in get_args(kind):
            yield from _parts(each)
    else:
        yield kind


def _word(kind: Any, metadata: list[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    checks = {getattr(getattr(each, "func", None), "__name__", "") for each in metadata}
    if "_duration" in checks:
        return "duration"
    if "_size" in checks:
        return "size"
    plain = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text", Path: "path"}
    if kind in plain:
        return plain[kind]
    if kind is pydantic.SecretStr:
        return "secret text"
    origin = get_origin(kind) or kind
    return {tuple: "list of texts", dict: "tables"}.get(origin, "function")


def _default(field: Any) -> str:
    value, values = field.default, _values(field)
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return markdown.code(str(value).lower())
    if values.startswith("duration"):
        return markdown.code(units.short_duration(value))
    if values.startswith("size"):
        return markdown.code(units.short_size(value).replace(".0", "").replace(" ", ""))
    return markdown.code(str(value))


def render(model: type[pydantic.BaseModel]) -> str:
    """Return the page."""
    rows = [
        (
            markdown.code(each.name),
            markdown.code(each.variable),
            each.values,
            each.default,
            " ".join([markdown.sentence(each.text), _MORE_OF.get(each.name, "")]),
        )
        for each in list_settings(model)
    ]
    return markdown.page(
        "Settings",
        f"Where a setting is taken from: [configuration]({links.CONFIGURATION}#settings). Each is also a key of "
        "`aiqueue.toml` and an argument of `aiqueue.connect` and `aiqueue.Settings`.",
        markdown.table(("setting", "environment variable", "values", "default", "meaning"), rows),
        'A duration is a number of seconds or a text such as `"30s"`; a size is a number of bytes or a text such as '
        '`"1GiB"`. In the environment, a list is separated by commas, and `none` takes away what `aiqueue.toml` says.',
    )
