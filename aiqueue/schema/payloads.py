"""The JSON Schemas of messages and results, draft 2020-12: what pydantic says of the classes, where that is the wire.

A message has the schema of what its class reads, a result of what is stored of it. pydantic's answer is changed where
aiqueue writes or reads otherwise, and where a schema would show a secret or fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import pydantic
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

from ..codec import secret_paths
from ..errors import BadInput
from ..job import Message
from ..payload import error_text
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
    inputs: list[tuple[tuple[str, str, str], JsonSchemaMode, pydantic.TypeAdapter[Any]]] = []
    for each in kinds:
        if each.model is None:
            continue
        each.model.model_rebuild()  # raises for a class that is still undefined
        inputs.append(((each.family, each.name, "message"), "validation", pydantic.TypeAdapter(each.model)))
        if each.keeps_result and each.model.aiq_result is not Any:
            result = pydantic.TypeAdapter(each.model.aiq_result)
            inputs.append(((each.family, each.name, "result"), "serialization", result))
    if not inputs:
        return PayloadSchemas({}, {}, {})
    made, shared = pydantic.TypeAdapter.json_schemas(
        inputs, ref_template=f"{DEFINITIONS}{{model}}", schema_generator=WireJsonSchema
    )
    found = PayloadSchemas({}, {}, dict(shared.get("$defs", {})))
    for ((family, kind, what), _), schema in made.items():
        (found.messages if what == "message" else found.results)[family, kind] = schema
    json.dumps([*found.messages.values(), *found.results.values(), found.definitions], allow_nan=False)
    return found


class WireJsonSchema(GenerateJsonSchema):
    """What pydantic says of a class, where that is the wire."""

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Say nothing: what is left out of a schema, such as a default that JSON cannot state, is no problem."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        """Return the schema of a type that pydantic cannot describe, such as one with validators alone: any value."""
        return {}

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """Leave out the pattern: it refuses "1E+10", which is a decimal, and which aiqueue writes."""
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

    def model_fields_schema(self, schema: Any) -> JsonSchemaValue:
        return self._as_written(schema, super().model_fields_schema(_without_computed(schema)))

    def typed_dict_schema(self, schema: Any) -> JsonSchemaValue:
        return self._as_written(schema, super().typed_dict_schema(_without_computed(schema)))

    def dataclass_args_schema(self, schema: Any) -> JsonSchemaValue:
        return self._as_written(schema, super().dataclass_args_schema(_without_computed(schema)))

    def _as_written(self, schema: Any, found: JsonSchemaValue) -> JsonSchemaValue:
        """Add the names under which aiqueue may write a field whose class reads it under another one: it reads both."""
        fields = schema["fields"]
        named = fields.items() if isinstance(fields, dict) else [(each["name"], each) for each in fields]
        properties: dict[str, Any] | None = found.get("properties")
        if self.mode != "validation" or not properties:
            return found
        for name, field in named:
            read, written = _read_name(field, name), field.get("serialization_alias", name)
            others = [each for each in dict.fromkeys((written, name)) if each not in properties]
            if read == written or read not in properties or not others:
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


def _read_name(field: Any, name: str) -> str:
    """Return the name under which pydantic lists a field that is read: its alias, or the first of several."""
    alias = field.get("validation_alias", name)
    paths: Iterable[Any] = [[alias]] if isinstance(alias, str) else alias
    return next((path[0] for path in paths if len(path) == 1 and isinstance(path[0], str)), name)


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
