"""Which fields of a message or result are secret, and how tools that see its body mask them.

A field is secret if its type is pydantic's SecretStr, SecretBytes or Secret, also inside other types. The header
Aiq-Secret names the secret fields by paths, so that a tool can mask them without the model. A path is a list of steps,
each a key or `ANY`, which stands for all items of a list or all values of a map.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin, is_typeddict
from urllib.parse import quote, unquote

import pydantic

ANY = "*"
WHOLE = "/"  # the header for a body that is secret as a whole
MASK = "**********"  # what pydantic shows for a secret
HEADER_CHARS_MAX = 2_000
REDACTED_CHARS_MIN = 4  # a shorter secret would mask parts of common words in an error text

Path = tuple[str, ...]
Secret = (pydantic.SecretStr, pydantic.SecretBytes, pydantic.Secret)

_PATHS = "__aiq_secret_paths__"  # where a model class keeps its paths


def header_of(paths: Iterable[Path]) -> str:
    """Return paths as the value of a header; empty for none.

    Each path starts with a slash, its keys are percent-encoded, and a space separates two paths. If that exceeds 2,000
    characters, each path is cut to fewer steps, which masks more.
    """
    found = set(paths)
    while found:
        text = " ".join(
            sorted("/" + "/".join(step if step == ANY else quote(step, "") for step in path) for path in found)
        )
        if len(text) <= HEADER_CHARS_MAX:
            return text
        longest = max(len(path) for path in found)
        found = {path[: longest - 1] for path in found}
    return ""


def paths_in(header: str) -> tuple[Path, ...]:
    """Return the paths in a header's value. The path ``/`` stands for the whole body."""
    return tuple(
        () if text == WHOLE else tuple(ANY if step == ANY else unquote(step) for step in text.strip("/").split("/"))
        for text in header.split()
    )


def within_list(header: str) -> str:
    """Return the header of a list from the header of its items."""
    return header_of((ANY, *path) for path in paths_in(header))


def within_data(header: str) -> str:
    """Return the header of an envelope, whose message may be in its field `data` or beside it."""
    found = paths_in(header)
    return header_of([*found, *(("data", *path) for path in found)])


def of_items(header: str) -> str:
    """Return the header of an item from the header of its list. A path that does not lead into a list masks all."""
    return header_of(path[1:] if path[:1] == (ANY,) else () for path in paths_in(header))


def merge(*parts: str) -> str:
    """Return one header with the paths of several."""
    given = [each for each in parts if each]
    return given[0] if len(given) == 1 else header_of(path for each in given for path in paths_in(each))


# -- what tools show


def mask(data: Any, header: str) -> Any:
    """Return plain data with the fields that the header names replaced by asterisks. `data` is not changed.

    Where a path leads into a text, such as JSON text, the text is masked, unless it is all of `data`.
    """
    for path in paths_in(header) if header else ():
        if not path or not isinstance(data, str | bytes):
            data = _mask_one(data, path)
    return data


def _mask_one(data: Any, path: Path) -> Any:
    if not path:
        return None if data is None else MASK
    step, rest = path[0], path[1:]
    if isinstance(data, dict):
        return {key: _mask_one(value, rest) if step in (ANY, key) else value for key, value in data.items()}
    if isinstance(data, list):  # an index is not a step, so any step leads into a list
        return [_mask_one(item, rest if step == ANY else path) for item in data]
    return MASK if isinstance(data, str | bytes) else data


def redact(text: str, data: Any, header: str) -> str:
    """Return `text` without the secrets of `data`: an exception may repeat them."""
    for secret in sorted(set(_texts_at(data, paths_in(header))), key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1]):
            text = text.replace(form, MASK)
    return text


def _texts_at(data: Any, paths: Iterable[Path]) -> Iterator[str]:
    """Yield all texts below the paths that are long enough to be recognised, and the lines of those."""
    for path in paths:
        for value in _values_at(data, path):
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            yield from (each for each in (text, *text.splitlines()) if len(each.strip()) >= REDACTED_CHARS_MIN)


def _values_at(data: Any, path: Path) -> Iterator[Any]:
    inner: Iterable[Any]
    if isinstance(data, dict):
        inner = data.values() if not path or path[0] == ANY else [data[path[0]]] if path[0] in data else []
        for value in inner:
            yield from _values_at(value, path[1:])
    elif isinstance(data, list):
        for value in data:
            yield from _values_at(value, path[1:] if path[:1] == (ANY,) else path)
    elif not path and data is not None and not isinstance(data, bool):
        yield data


# -- which fields are secret


def header_of_class(model: type[Any]) -> str:
    """Return the header for a message of this class, whatever its values; empty for a class without secrets."""
    found = model.__dict__.get(_PATHS)
    if found is None:
        found = header_of_type(model)
        setattr(model, _PATHS, found)
    return str(found)


def header_of_type(annotation: Any) -> str:
    """Return the header for values of a type, as far as its annotations show; empty for a type without secrets."""
    return header_of(_paths_of_type(annotation, ()))


def header_of_value(value: Any) -> str:
    """Return the header for any value: plain data with secrets and models in it."""
    return header_of(_paths_of_value(value))


def _paths_of_value(value: Any) -> Iterator[Path]:
    if isinstance(value, Secret):
        yield ()
    elif isinstance(value, pydantic.BaseModel) or dataclasses.is_dataclass(value):
        yield from paths_in(header_of_class(type(value)))
        for key, inner in {**_fields_of(value), **(getattr(value, "__pydantic_extra__", None) or {})}.items():
            for path in _paths_of_value(inner):
                yield from ((name, *path) for name in _names(type(value), key))
    elif isinstance(value, Mapping):
        yield from ((str(key), *path) for key, inner in value.items() for path in _paths_of_value(inner))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from {(ANY, *path) for inner in value for path in _paths_of_value(inner)}


def _fields_of(value: Any) -> dict[str, Any]:
    if isinstance(value, pydantic.BaseModel):
        return {"root": value.__dict__["root"]} if isinstance(value, pydantic.RootModel) else value.__dict__
    return {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}


def _paths_of_type(annotation: Any, seen: tuple[Any, ...]) -> Iterator[Path]:
    """Yield the paths of all secrets in values of a type, as far as its annotations show.

    A model inside itself is one secret, because its paths have no end.
    """
    origin = get_origin(annotation) or annotation
    if isinstance(annotation, typing.TypeVar):
        for bound in (annotation.__bound__, *annotation.__constraints__):
            yield from _paths_of_type(bound, seen)
    elif type(annotation).__name__ in ("NewType", "TypeAliasType"):  # the latter is a `type` statement's
        inner = annotation.__supertype__ if isinstance(annotation, typing.NewType) else annotation.__value__
        yield from _paths_of_type(inner, seen)
    elif isinstance(origin, type) and issubclass(origin, Secret):
        yield ()
    elif (fields := _field_types(origin)) is not None:
        yield from _paths_of_fields(annotation, fields, seen)
    elif origin in (Union, types.UnionType, typing.Annotated):
        for each in get_args(annotation):
            yield from _paths_of_type(each, seen)
    elif isinstance(origin, type) and issubclass(origin, Iterable | Mapping):
        yield from {(ANY, *path) for each in get_args(annotation) for path in _paths_of_type(each, seen)}
    else:  # Json[T], Callable, and generic classes: where in the value T is, is not known
        yield from {() for each in get_args(annotation) for _ in _paths_of_type(each, seen)}


def _paths_of_fields(owner: Any, fields: Mapping[str, Any], seen: tuple[Any, ...]) -> Iterator[Path]:
    if owner in seen:
        if _has_secrets(owner):
            yield ()
        return
    found = [
        (name, *path)
        for field, annotation in fields.items()
        for path in _paths_of_type(annotation, (*seen, owner))
        for name in _names(owner, field)
    ]
    decorators = getattr(owner, "__pydantic_decorators__", None)
    if found and (getattr(decorators, "model_serializers", None) or getattr(owner, "__pydantic_root_model__", False)):
        found = [()] if decorators.model_serializers else [path[1:] for path in found]  # type: ignore[union-attr]
    elif issubclass(owner, tuple) if isinstance(owner, type) else False:
        found = [(ANY, *path[1:]) for path in found]  # a NamedTuple travels as a list
    yield from dict.fromkeys(found)


def _has_secrets(owner: Any) -> bool:
    """Return whether a recursive type mentions a secret anywhere."""
    todo, known = [owner], set[Any]()
    while todo:
        annotation = todo.pop()
        try:
            if annotation in known:
                continue
            known.add(annotation)
        except TypeError:  # Annotated metadata may be unhashable
            continue
        origin = get_origin(annotation) or annotation
        if isinstance(origin, type) and issubclass(origin, Secret):
            return True
        todo += [*(_field_types(origin) or {}).values(), *get_args(annotation)]
    return False


def _field_types(origin: Any) -> Mapping[str, Any] | None:
    """Return the fields of a model, dataclass, TypedDict or NamedTuple with their types; None for other types."""
    if not isinstance(origin, type):
        return None
    if issubclass(origin, pydantic.BaseModel):
        fields = {name: field.annotation for name, field in origin.model_fields.items()}
        extra = typing.cast("Any", origin).__annotations__.get("__pydantic_extra__")
        return fields if extra is None else {**fields, ANY: _resolved(origin).get("__pydantic_extra__", extra)}
    if (
        dataclasses.is_dataclass(origin)
        or is_typeddict(origin)
        or (issubclass(origin, tuple) and hasattr(origin, "_fields"))
    ):
        return _resolved(origin)
    return None


def _resolved(owner: type[Any]) -> dict[str, Any]:
    """Return the annotations of a class as types; as they are written where a name is not known."""
    try:
        return typing.get_type_hints(owner)
    except Exception:  # noqa: BLE001  (an annotation may be any expression)
        return dict(getattr(owner, "__annotations__", {}))


def _names(owner: Any, field: str) -> tuple[str, ...]:
    """Return the keys under which a field may be written: its name, and its aliases."""
    info = getattr(get_origin(owner) or owner, "__pydantic_fields__", {}).get(field)
    if info is None:
        return (field,)
    validation = info.validation_alias
    choices = validation.choices if isinstance(validation, pydantic.AliasChoices) else [validation]
    read = [each.path[0] if isinstance(each, pydantic.AliasPath) else each for each in choices]
    aliases = [info.alias, info.serialization_alias, *read]
    return tuple(dict.fromkeys([field, *(each for each in aliases if isinstance(each, str))]))
