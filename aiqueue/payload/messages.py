"""What a message is on the wire, and back: the body is written so that its own model reads an equal message from it.

A message that cannot come back is refused here, with the name of the field, instead of at the worker. Whether that has
to be tried is decided once for each class: a flat model of plain fields always comes back.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import pydantic
import pydantic_core

from .. import codec
from ..codec import secret_paths
from ..errors import DecodeError, EncodeError

MESSAGE_CHARS_MAX = 500

_Model = pydantic.BaseModel
_MODEL_VALIDATE = _Model.model_validate.__func__  # type: ignore[attr-defined]
_LAYOUT = "__aiq_layout__"  # where a class keeps its layout
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 63) - 1
_LEAVES: frozenset[Any] = frozenset({str, int, float, bool, bytes, type(None)})
_WHOLE: frozenset[Any] = frozenset({int})
_TEXT: frozenset[Any] = frozenset({str})
_HARMLESS = frozenset({"frozen", "title", "protected_namespaces", "use_attribute_docstrings", "json_schema_extra"})
M = TypeVar("M", bound=pydantic.BaseModel)


class Form(NamedTuple):
    """A way to write a message: with aliases or field names as keys, and with or without CBOR's own types."""

    by_alias: bool = True
    tagged: bool = False


class Layout:
    """What is known of a model class.

    - `flat`: by field, the types that its value may have, if all values of these types come back as they are; else
      None. `items`: the same for the items of a list, and the values of a map.
    - `forms`: how its messages may be written, the best first.
    - `is_strict`: whether it demands types that CBOR and JSON do not have. Then a body is also read as JSON.
    """

    __slots__ = ("flat", "forms", "has_aliases", "is_strict", "items", "overrides_validate")

    def __init__(self, model: type[_Model]) -> None:
        if not model.__pydantic_complete__:
            model.model_rebuild()
        nodes = list(schema_nodes(model.__pydantic_core_schema__))
        self.has_aliases = any("validation_alias" in each or "serialization_alias" in each for each in nodes)
        self.is_strict = any(each.get("strict") is True for each in nodes)
        self.overrides_validate = model.model_validate.__func__ is not _MODEL_VALIDATE  # type: ignore[attr-defined]
        self.flat: dict[str, frozenset[Any]] | None = None
        self.items: dict[str, frozenset[Any]] = {}
        if _is_plain_class(model):
            self.flat, self.items = _flat_fields(model)
        self.forms = [Form(), Form(tagged=True)]
        if self.has_aliases:  # a field may be read under another name than it is written
            self.forms += [Form(by_alias=False), Form(by_alias=False, tagged=True)]


def layout_of(model: type[_Model]) -> Layout:
    """Return the layout of a class, made when it is first needed."""
    found: Layout | None = model.__dict__.get(_LAYOUT)
    if found is None:
        found = Layout(model)
        setattr(model, _LAYOUT, found)
    return found


# -- writing


def encode_message(message: _Model) -> bytes:
    """Return the body of a message. Its secrets are in it. Raises EncodeError, which names the field, for a message
    that its own class would not read back as an equal one.
    """
    model = type(message)
    layout: Layout = model.__dict__.get(_LAYOUT) or layout_of(model)
    if layout.flat is not None:
        plain = _flat_values(message, layout)
        if plain is not None:
            return codec.dump(plain)
    problem = ""
    for form in layout.forms:
        plain = codec.to_plain(message, tagged=form.tagged, by_alias=form.by_alias)
        found = _find_problem(message, plain)
        if not found:
            if form is not layout.forms[0]:  # the next message will need it too
                layout.forms = [form, *(each for each in layout.forms if each is not form)]
            return codec.dump(plain)
        problem = problem or found
    raise EncodeError(f"a {_kind(model)} cannot be sent so that it arrives unchanged: {problem}")


def _flat_values(message: _Model, layout: Layout) -> dict[str, Any] | None:
    """Return the fields of a flat message. None: a value has not the type of its field, as after `model_construct`."""
    flat, values = layout.flat, message.__dict__
    assert flat is not None
    if len(values) != len(flat):
        return None
    try:
        for name, value in values.items():
            kind = type(value)
            if kind not in flat[name] or (kind is int and not _INT_MIN <= value <= _INT_MAX):
                return None
            if kind is list and not _are_items(value, layout.items[name]):
                return None
            if kind is dict and not (
                _TEXT.issuperset(map(type, value)) and _are_items(value.values(), layout.items[name])
            ):
                return None
    except KeyError:
        return None
    return values


def _are_items(values: Collection[Any], kinds: frozenset[Any]) -> bool:
    return kinds.issuperset(map(type, values)) and (
        kinds is not _WHOLE or not values or (min(values) >= _INT_MIN and max(values) <= _INT_MAX)
    )


def _find_problem(message: _Model, plain: Any) -> str:
    """Return why the model would not read an equal message from `plain`; empty if it would."""
    model = type(message)
    if not isinstance(plain, dict):
        return f"its body must be a map, and is a {type(plain).__name__}"
    try:
        again = parse_message(model, plain)
    except DecodeError as error:
        return f"the handler's model would refuse it ({error.reason})"
    if type(again) is model and _is_equal_quickly(message, again):
        return ""
    field = next(_differences(message, again, ""), None)
    if field is None:
        return ""
    info = model.__pydantic_fields__.get(field.partition(".")[0])
    why = "exclude=True keeps it from the body" if info is not None and info.exclude else _ADVICE
    return f"{field or 'the message'}: would arrive changed, {why}"


_ADVICE = "declare its exact type, or convert the value"


def _is_equal_quickly(one: _Model, two: _Model) -> bool:
    try:
        return one.__dict__ == two.__dict__ and one.__pydantic_extra__ == two.__pydantic_extra__
    except Exception:  # noqa: BLE001  (values may compare in any way, such as arrays; `_differences` looks closer)
        return False


def _differences(one: Any, two: Any, path: str) -> Iterator[str]:
    """Yield where two values differ, as the names of fields. Values that cannot be compared count as equal."""
    if isinstance(one, _Model):
        if type(one) is not type(two):
            yield path
            return
        fields, others = ({**each.__dict__, **(each.__pydantic_extra__ or {})} for each in (one, two))
        yield from _differences_of_maps(fields, others, path)
    elif isinstance(one, dict) and isinstance(two, dict):
        yield from _differences_of_maps(one, two, path)
    elif isinstance(one, list | tuple) and type(one) is type(two):
        if len(one) != len(two):
            yield path
        for number, pair in enumerate(zip(one, two, strict=False)):
            yield from _differences(*pair, _join(path, number))
    elif not _is_same(one, two):
        yield path


def _differences_of_maps(one: Mapping[Any, Any], two: Mapping[Any, Any], path: str) -> Iterator[str]:
    for key in one.keys() | two.keys():
        if key in one and key in two:
            yield from _differences(one[key], two[key], _join(path, key))
        else:
            yield _join(path, key)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_same(one: Any, two: Any) -> bool:
    try:
        if one == two or (one != one and two != two):  # noqa: PLR0124  (NaN)
            return True
        if type(one) is not type(two):
            return False
        if getattr(type(one), "__eq__", None) is object.__eq__:  # it compares identities: what it holds decides
            return bool(getattr(one, "__dict__", None) == getattr(two, "__dict__", None))
        # two times in zones of which one changes its offset just then are never equal
        return hasattr(one, "isoformat") and bool(one.isoformat() == two.isoformat())
    except Exception:  # noqa: BLE001  (values may compare in any way)
        return True


# -- reading


def parse_message(model: type[M], data: Mapping[str, Any]) -> M:
    """Validate `data` as a `model`. Raises DecodeError, which names the first invalid field, and no value."""
    layout: Layout = model.__dict__.get(_LAYOUT) or layout_of(model)
    try:
        if layout.overrides_validate:
            return model.model_validate(data)
        if layout.has_aliases or layout.is_strict:
            return _validate_leniently(model, layout, data)
        message: M = model.__pydantic_validator__.validate_python(data)  # what model_validate calls; saves time
        return message  # noqa: TRY300
    except pydantic.ValidationError as error:
        problem = first_problem(error, secret_paths.header_of_class(model), whole="the message")
        raise DecodeError(f"not a {_kind(model)}: {problem}") from None
    except Exception as error:  # noqa: BLE001  (a model's own validators may raise anything, and pydantic passes it on)
        raise DecodeError(f"not a {_kind(model)}: {error_line(error, MESSAGE_CHARS_MAX)}") from None


def _validate_leniently(model: type[M], layout: Layout, data: Mapping[str, Any]) -> M:
    """Validate by aliases and, where one is missing, by names. A strict model may read JSON's form of its types."""
    by_name = True if layout.has_aliases else None
    try:
        message: M = model.__pydantic_validator__.validate_python(data, by_alias=by_name, by_name=by_name)
        return message  # noqa: TRY300
    except pydantic.ValidationError:
        if not layout.is_strict:
            raise
        try:
            text = pydantic_core.to_json(data, inf_nan_mode="constants")
        except ValueError:  # bytes that are not UTF-8
            text = b""
        if not text:
            raise
    return cast("M", model.__pydantic_validator__.validate_json(text, by_alias=by_name, by_name=by_name))


def first_problem(error: pydantic.ValidationError, secrets: str, *, whole: str) -> str:
    """Return the first problem of a validation, and how many more there are. A secret's is not quoted.

    `secrets`: which fields are secret, in the form of `secret_paths`. `whole`: what was validated.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {_problem_text(first, secrets)}{more}"


def _problem_text(problem: Any, secrets: str) -> str:
    text = " ".join(problem["msg"].split()).removeprefix("Value error, ")  # which pydantic writes before a user's text
    hides = problem["type"] in _QUOTES_INPUT or (
        problem["type"] in _OF_USER and any(_may_lead(path, problem["loc"]) for path in secret_paths.paths_in(secrets))
    )
    return f"invalid ({problem['type']})" if hides else text


_QUOTES_INPUT = frozenset({"union_tag_invalid"})  # the types of pydantic's problems whose texts repeat the input
_OF_USER = frozenset({"value_error", "assertion_error"})  # and those whose texts a validator of the user's wrote


def _may_lead(path: secret_paths.Path, location: tuple[int | str, ...]) -> bool:
    """Return whether a validator at this location may have seen the secret of this path."""
    return all(step in (secret_paths.ANY, str(part)) for step, part in zip(path, location, strict=False))


def error_line(error: BaseException, limit: int) -> str:
    """Return the class and text of an error as one line. The inputs in a text of pydantic's are left out."""
    name = type(error).__name__
    return f"{name}: {text}" if (text := " ".join(error_text(error).split())[:limit]) else name


def error_text(error: BaseException) -> str:
    """Return the text of an error, without the input values that pydantic puts into it."""
    if not isinstance(error, pydantic.ValidationError):
        return codec.join_surrogates(str(error))
    lines = [f"{error.error_count()} validation error(s) for {error.title}"]
    for each in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in each["loc"])
        lines.append(
            f"{place}: {each['msg']} [type={each['type']}]" if place else f"{each['msg']} [type={each['type']}]"
        )
    return codec.join_surrogates("\n".join(lines))


def _kind(model: type[Any]) -> str:
    return getattr(model, "aiq_kind", "") or model.__name__


# -- classes


def schema_nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a core schema: all maps in it that may state how a value is validated."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo += [value for key, value in node.items() if key not in _NOT_SCHEMA]
        elif isinstance(node, list | tuple):
            todo += node


_NOT_SCHEMA = frozenset({"metadata", "serialization", "default", "expected", "strict_schema", "cls", "members"})


def _is_plain_class(model: type[_Model]) -> bool:
    """Return whether a class reads and writes its fields as pydantic does, without code of its own."""
    decorators = model.__pydantic_decorators__
    return (
        not model.__pydantic_root_model__
        and not model.__pydantic_generic_metadata__["parameters"]
        and model.__pydantic_post_init__ is None
        and model.__init__ is _Model.__init__
        and model.model_dump is _Model.model_dump
        and model.model_validate.__func__ is _MODEL_VALIDATE  # type: ignore[attr-defined]
        and not any(getattr(decorators, each.name) for each in dataclasses.fields(decorators))
        and all(key in _HARMLESS or not value for key, value in model.model_config.items() if key != "extra")
        and model.model_config.get("extra") in (None, "ignore", "forbid")
        and model.__get_pydantic_core_schema__.__func__ is _Model.__get_pydantic_core_schema__.__func__  # type: ignore[attr-defined]
    )


def _flat_fields(model: type[_Model]) -> tuple[dict[str, frozenset[Any]] | None, dict[str, frozenset[Any]]]:
    """Return `Layout.flat` and `Layout.items` of a plain class."""
    flat: dict[str, frozenset[Any]] = {}
    items: dict[str, frozenset[Any]] = {}
    for name, field in model.__pydantic_fields__.items():
        named = field.alias or field.validation_alias or field.serialization_alias
        if named or field.metadata or field.exclude or getattr(field, "exclude_if", None) or field.discriminator:
            return None, {}
        kinds: set[Any] = set()
        for part in get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,):
            origin, inner = get_origin(part) or part, get_args(part)
            if origin in (list, dict) and inner and name not in items:
                of = inner[-1]
                parts = frozenset(get_args(of)) if _is_union(of) else frozenset({of})
                if not (parts == _WHOLE or parts <= _LEAVES - _WHOLE) or (origin is dict and inner[0] is not str):
                    return None, {}
                items[name] = _WHOLE if parts == _WHOLE else parts
            elif part not in _LEAVES:
                return None, {}
            kinds.add(origin)
        flat[name] = frozenset(kinds)
    return flat, items


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
