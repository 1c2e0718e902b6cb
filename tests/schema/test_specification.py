"""The documents are valid by the specifications' own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aiqueue.schema import ASYNCAPI

from .. import npm
from .documents import PROGRAMS, find, print_schema, references

HERE = Path(__file__).parent
VERSIONS = (ASYNCAPI, "3.1.0")


@pytest.fixture(scope="module")
def specification() -> Any:
    """The schema of a version of AsyncAPI, by its authors."""
    if problem := npm.problem(HERE):
        pytest.skip(f"the schema of AsyncAPI is not there: {problem}")

    def load(version: str) -> jsonschema.Draft7Validator:
        schema = json.loads((HERE / f"node_modules/@asyncapi/specs/schemas/{version}.json").read_text())
        return jsonschema.Draft7Validator(schema)

    return load


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    return {name: print_schema(*targets) for name, targets in PROGRAMS.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_are_valid_by_the_schema_of_asyncapi(specification: Any, documents: Any, version: str) -> None:
    validator = specification(version)
    for name, document in documents.items():
        found = list(validator.iter_errors({**document, "asyncapi": version}))
        assert not found, f"{name}: {found[0].json_path}: {found[0].message[:300]}"


def test_with_servers_too(specification: Any) -> None:
    url = "nats://user:secret@one:4222,tls://two:4222,wss://three/path"
    document = print_schema("--url", url)
    assert document["servers"]
    specification(ASYNCAPI).validate(document)


def test_a_wrong_document_would_be_found(specification: Any, documents: Any) -> None:
    for wrong in ({"channels": {"a": {"address": 1}}}, {"operations": {"a": {"action": "publish"}}}, {"info": {}}):
        assert not specification(ASYNCAPI).is_valid({**documents["every type"], **wrong})
    wrong = json.loads(json.dumps(documents["every type"]))
    wrong["components"]["schemas"]["Tree"]["discriminator"] = {"propertyName": "sort"}
    assert not specification(ASYNCAPI).is_valid(wrong)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_the_schema_of_asyncapi_cannot_say_holds_too(documents: Any, name: str) -> None:
    document = documents[name]
    for reference in references({key: document[key] for key in ("channels", "operations", "components")}):
        find(document, reference)
    for channel in document["channels"].values():
        in_address = [part[1:-1] for part in (channel["address"] or "").split(".") if part.startswith("{")]
        assert sorted(channel.get("parameters", {})) == sorted(in_address)
    used = set()
    for operation in document["operations"].values():
        reply = operation.get("reply", {})
        for part in filter(None, (operation, reply)):
            channel = part["channel"]["$ref"]
            assert part["messages"]
            assert all(each["$ref"].startswith(f"{channel}/messages/") for each in part["messages"])
            used.add(channel.removeprefix("#/channels/"))
    assert used == set(document["channels"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_schema_of_a_document_is_a_schema(documents: Any, name: str) -> None:
    for schema in documents[name]["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)
    for message in documents[name]["components"]["messages"].values():
        jsonschema.Draft7Validator.check_schema(message["headers"])


@pytest.mark.parametrize("targets", [each for each in PROGRAMS.values() if each])
def test_the_document_of_json_schema_is_one_of_2020_12(targets: tuple[str, ...]) -> None:
    document = print_schema(*targets, "--format", "json-schema")
    jsonschema.Draft202012Validator.check_schema(document)
    for reference in references(document["$defs"]):
        find(document, reference)
    assert document["anyOf"]
