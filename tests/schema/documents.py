"""Documents of the tests' programs, and what a reader does with one: follow references, validate, make a sample."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from typer.testing import CliRunner

from aiqueue import codec
from aiqueue.cli.app import app

PROGRAMS = {
    "families alone": (),
    "every type": ("tests.schema.programs:worker", "tests.schema.programs:agents"),
    "the gateway": ("aiqueue.gateway:worker",),
    "retrieval": ("aiqueue.rag:worker",),
}


def print_schema(*arguments: str) -> dict[str, Any]:
    """What ``aiqueue schema`` prints."""
    done = CliRunner().invoke(app, ["schema", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def find(document: Any, reference: str) -> Any:
    """What a reference of this document leads to."""
    assert reference.startswith("#/"), reference
    for part in reference.removeprefix("#/").split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def problems(document: Mapping[str, Any], schema: Mapping[str, Any], value: Any) -> list[str]:
    """What is wrong with a value by a schema of an AsyncAPI document, which is one of draft-07."""
    checked = jsonschema.Draft7Validator({"allOf": [schema], "components": document["components"]})
    return [each.message for each in checked.iter_errors(to_json(value))]


def problems_2020(document: Mapping[str, Any], name: str, value: Any) -> list[str]:
    """What is wrong with a value by a definition of the document of JSON Schema."""
    checked = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": document["$defs"]})
    return [each.message for each in checked.iter_errors(to_json(value))]


def body(data: bytes, content_type: str = "") -> Any:
    """A body as plain data."""
    return codec.decode(data, content_type)


def to_json(value: Any) -> Any:
    """Plain data of CBOR as JSON has it: bytes are texts."""
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def sample(document: Any, schema: Any) -> Any:
    """A value that a schema asks for, with what is required alone: as a person would write one."""
    if "$ref" in schema:
        return sample(document, find(document, schema["$ref"]))
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    choices = [each["anyOf"][0] for each in schema.get("allOf", ()) if "required" in each.get("anyOf", [{}])[0]]
    parts = [sample(document, each) for each in schema.get("allOf", ()) if not choices]
    if schema.get("type") == "object" or "properties" in schema:
        known = schema.get("properties", {})
        required = [name for each in (schema, *choices) for name in each.get("required", ())]
        made = {name: sample(document, known[name]) for name in required}
        return {key: value for part in [*parts, made] for key, value in part.items()}
    if parts:
        return parts[0]
    if "anyOf" in schema:
        return sample(document, schema["anyOf"][0])
    return {"string": "hello", "integer": 1, "number": 1.5, "boolean": True, "array": []}[schema["type"]]
