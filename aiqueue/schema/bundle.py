"""One JSON Schema of all messages and results, draft 2020-12."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput
from .kinds import Selection, component_names
from .payloads import DEFINITIONS, describe_payloads

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_json_schema(selected: Selection, *, title: str, version: str) -> dict[str, Any]:
    """Return a schema that takes a message of any of these kinds, with a definition for each message and result.

    ``#/$defs/message.{family}.{kind}`` is the body of a message without an envelope, ``#/$defs/result.{family}.{kind}``
    the result, if its class declares a type. `version`: of aiqueue. Raises BadInput without a kind, and for a class
    that has no schema.
    """
    kinds = [each for group in selected.values() for each in group if each.model is not None]
    if not kinds:
        raise BadInput("there is no class of a message to describe: name a program that has some, such as app:worker")
    names, found = component_names(selected), describe_payloads(kinds)
    definitions = {
        **found.definitions,
        **{f"message.{names[key]}": schema for key, schema in found.messages.items()},
        **{f"result.{names[key]}": schema for key, schema in found.results.items()},
    }
    return {
        "$schema": DIALECT,
        "$comment": f"made by aiqueue {version}",
        "title": title,
        "description": (
            "The bodies of messages without an envelope, and of results. In CBOR, bytes are byte strings, and whole "
            "numbers above 64 bits are texts."
        ),
        "anyOf": [{"$ref": f"{DEFINITIONS}message.{names[key]}"} for key in found.messages],
        "$defs": dict(sorted(definitions.items())),
    }
