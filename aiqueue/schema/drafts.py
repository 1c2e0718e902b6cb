"""From JSON Schema 2020-12, which pydantic writes, to draft-07, which is the schema of AsyncAPI."""

from __future__ import annotations

from typing import Any

from .payloads import DEFINITIONS

COMPONENTS = "#/components/schemas/"
# what holds a schema, a list of them, or a map of them. All other keywords have data, which is not to be changed.
_ONE = frozenset({
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
})  # fmt: skip
_LIST = frozenset({"allOf", "anyOf", "oneOf"})
_MAP = frozenset({"patternProperties", "properties"})
# later drafts' (but for `prefixItems`), and OpenAPI's `discriminator`, which has another form in AsyncAPI
_DROPPED = frozenset({"contentSchema", "discriminator", "prefixItems"})


def to_draft07(schema: Any) -> Any:
    """Return a schema as AsyncAPI has it. References lead to the components of the document.

    A keyword beside ``$ref`` would not count there, so the reference is wrapped. The items of a tuple are `items`.
    """
    if not isinstance(schema, dict):  # true, false
        return schema
    made = {key: _converted(key, value) for key, value in schema.items() if key not in _DROPPED}
    if "prefixItems" in schema:
        rest = made.pop("items", None)
        made["items"] = [to_draft07(each) for each in schema["prefixItems"]]
        if rest is not None:
            made["additionalItems"] = rest
    if isinstance(reference := made.get("$ref"), str):
        reference = reference.replace(DEFINITIONS, COMPONENTS, 1) if reference.startswith(DEFINITIONS) else reference
        del made["$ref"]
        made = {**made, "allOf": [{"$ref": reference}, *made.get("allOf", ())]} if made else {"$ref": reference}
    return made


def _converted(key: str, value: Any) -> Any:
    if key in _ONE:
        return to_draft07(value)
    if key in _LIST and isinstance(value, list):
        return [to_draft07(each) for each in value]
    if key in _MAP and isinstance(value, dict):
        return {name: to_draft07(each) for name, each in value.items()}
    return value
