"""The JSON Schemas of messages and results, draft 2020-12: what pydantic says of the classes, where that is the wire.

A message has the schema of what its class reads, a result of what is stored of it. pydantic's answer is changed where
aiqueue writes or reads otherwise, and where a schema would show a secret or fail.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import pydantic
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

from ..codec import secret_paths
from ..errors import BadInput
from ..job import Message
from ..payload import error_text, schema_nodes
from .kinds import HandledKind

DEFINITIONS = "#/$defs/"
ERROR_CHARS_MAX = 300


class PayloadSchemas(NamedTuple):
    """The schemas of kinds, by family and kind, and the definitions that they refer to by ``#/$defs/{name}``.

    A kind whose result is any data, or is not kept, is not in `results`.
    """

    messages: dict[tuple[str, str], dict[str, Any]]
    results: dict[tuple[str, str], dict[str, Any]]
    definitions: dict[str, dict[str, Any]]


def describe_payloads(kinds: Sequence[HandledKind]) -> PayloadSchemas:
    """Return the schemas of these kinds. Raises BadInput, which names the first kind that has none."""
    try:
        return _generate(kinds)
    except Exception:  # a class may have code of its own for its schema
        for each in kinds:
            try:
                _generate([each])
            except Exception as error:
                problem = " ".join(error_text(error).split())[:ERROR_CHARS_MAX]
                model = cast("type[Any]", each.model)
                raise BadInput(
                    f"{each.what}: no JSON Schema can be made of class {model.__module__}.{model.__qualname__} or of "
                    f"its result ({type(error).__name__}: {problem}): correct it, or select other kinds with --kind"
                ) from error
        raise


def _generate(kinds: Sequence[HandledKind]) -> PayloadSchemas:
    inputs: list[tuple[tuple[str, str, str], JsonSchemaMode, Any]] = []
    generator = WireJsonSchema(ref_template=f"{DEFINITIONS}{{model}}")
    for each in kinds:
        if each.model is None:
            continue
        each.model.model_rebuild()  # raises for a class that is still undefined
        core_schema = each.model.__pydantic_core_schema__
        inputs.append(((each.family, each.name, "message"), "validation", core_schema))
        generator.written_by_name |= _classes_written_by_name(core_schema)
        if each.keeps_result and each.model.aiq_result is not Any:
            result = pydantic.TypeAdapter(each.model.aiq_result)
            result.rebuild()
            inputs.append(((each.family, each.name, "result"), "serialization", result.core_schema))
    if not inputs:
        return PayloadSchemas({}, {}, {})
    made, definitions = generator.generate_definitions(cast("Any", inputs))
    found = PayloadSchemas({}, {}, cast("dict[str, Any]", definitions))
    for ((family, kind, what), _), schema in made.items():
        (found.messages if what == "message" else found.results)[family, kind] = schema
    json.dumps([*found.messages.values(), *found.results.values(), found.definitions], allow_nan=False)
    return found


class WireJsonSchema(GenerateJsonSchema):
    """What pydantic says of a class, where that is the wire.

    `written_by_name`: the classes whose fields aiqueue may write under their names, beside their aliases.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.written_by_name: set[Any] = set()
        self._classes: list[Any] = []  # that which is described, within those in which it is

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Say nothing: what is left out of a schema, such as a default that JSON cannot state, is no problem."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        """Return the schema of a type that pydantic cannot describe, such as one with validators alone: any value."""
        return {}

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """Leave out the pattern that pydantic 2.12 and 2.13 state: it refuses "1E+10", which aiqueue may write."""
        found = super().decimal_schema(schema)
        for each in (found, *found.get("anyOf", ())):
            each.pop("pattern", None)
        return found

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """Leave out a default that is masked, because a part of it is secret, or that JSON cannot state."""
        found = super().default_schema(schema)
        if "default" in found and not _is_shown(found["default"]):
            found = {key: value for key, value in found.items() if key != "default"}
        return found

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        with self._within(schema["cls"]):
            return super().model_schema(schema)

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        with self._within(schema["cls"]):
            return super().dataclass_schema(schema)

    def typed_dict_schema(self, schema: Any) -> JsonSchemaValue:
        with self._within(schema.get("cls")):
            return self._as_written(schema, super().typed_dict_schema(_without_computed(schema)))

    def model_fields_schema(self, schema: Any) -> JsonSchemaValue:
        return self._as_written(schema, super().model_fields_schema(_without_computed(schema)))

    def dataclass_args_schema(self, schema: Any) -> JsonSchemaValue:
        return self._as_written(schema, super().dataclass_args_schema(_without_computed(schema)))

    @contextlib.contextmanager
    def _within(self, described: Any) -> Iterator[None]:
        self._classes.append(described)
        try:
            yield
        finally:
            self._classes.pop()

    def _as_written(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        """Add the names under which aiqueue may write a field whose class reads it under another one: it reads both."""
        properties: dict[str, Any] | None = found.get("properties")
        if self.mode != "validation" or not properties or self._classes[-1] not in self.written_by_name:
            return found
        for name, field in _fields_of(schema):
            read, written = _names_of(name, field)
            others = [each for each in dict.fromkeys((written, name)) if each not in properties]
            if read not in properties or not others:
                continue
            properties.update(dict.fromkeys(others, properties[read]))
            if read in found.get("required", ()):
                found["required"].remove(read)
                choices = [{"required": [each]} for each in (read, *others)]
                found.setdefault("allOf", []).append({"anyOf": choices})
        if found.get("required") == []:
            del found["required"]
        return found


def _without_computed(schema: Any) -> Any:
    """Return a class's schema without the computed fields, which aiqueue does not write."""
    return {**schema, "computed_fields": []}


def _classes_written_by_name(core_schema: Any) -> set[Any]:
    """Return the classes in a message whose fields aiqueue may write under their names: all of them, if any field is
    read under another name than it is written, so that the message would not come back by its aliases.
    """
    nodes = list(schema_nodes(core_schema))
    names = (_names_of(name, field) for node in nodes for name, field in _fields_of(node))
    if all(read == written for read, written in names):
        return set()
    return {node["cls"] for node in nodes if "cls" in node}


def _fields_of(schema: Any) -> Iterable[tuple[str, Any]]:
    """Return the fields of a node of a core schema by name; none for a node that is no class's fields."""
    if schema.get("type") in ("model-fields", "typed-dict"):
        return cast("dict[str, Any]", schema["fields"]).items()
    return [(each["name"], each) for each in schema["fields"]] if schema.get("type") == "dataclass-args" else ()


def _names_of(name: str, field: Any) -> tuple[str, str]:
    """Return under which name pydantic lists a field that is read (its alias, or the first of several), and under which
    one it is written.
    """
    alias, written = field.get("validation_alias", name), field.get("serialization_alias", name)
    if isinstance(alias, str):
        return alias, written
    read = (path[0] for path in alias if isinstance(path, list) and [*map(type, path)] == [str])
    return next(read, name), written


def _is_shown(default: Any) -> bool:
    if isinstance(default, dict):
        return all(map(_is_shown, default.values()))
    if isinstance(default, list | tuple):
        return all(map(_is_shown, default))
    if isinstance(default, float):
        return math.isfinite(default)
    return not (isinstance(default, str) and secret_paths.MASK in default)


def title_of(model: type[Message[Any]]) -> str:
    """Return the name of a message's class, for people."""
    return model.model_config.get("title") or model.__name__
