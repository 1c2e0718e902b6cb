"""Filters by metadata, `where`: read once into conditions, which each store turns into SQL with bound values only.

`{"lang": "en", "year": {"gte": 2020, "lt": 2024}, "tag": {"in": ["a", "b"]}}`: all conditions must hold. A key is a key
of the document's metadata. A scalar means equality; the operators are eq, ne, in, gt, gte, lt, lte. A value that is a
list matches if one of its items does. Text is compared with text, numbers with numbers (gt … lte: by code point, by
value), booleans with booleans. None is equal to a missing key and to null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from ...errors import BadInput
from ..types import Where
from .texts import clean

Operator = Literal["eq", "ne", "in", "gt", "gte", "lt", "lte"]
Scalar = str | int | float | bool | None
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_COMPARISONS: Mapping[Operator, str] = {"eq": "=", "ne": "=", "in": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
CONDITIONS_MAX = 32
VALUES_MAX = 256
METADATA_BYTES_MAX = 64 * 1024  # as `json_of` writes it
METADATA_DEPTH_MAX = 16


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison: `values` are several for `in` only. With `ne` no item of the document's value may be equal."""

    key: str
    operator: Operator
    values: tuple[Scalar, ...]


def parse_where(where: Where | None) -> list[Condition]:
    """Return the conditions of a filter. Raises BadInput, which names the key."""
    if where is None:
        return []
    if not isinstance(where, Mapping):
        raise BadInput(f"where: give a mapping of metadata keys, not {type(where).__name__}")
    conditions = []
    for key, wanted in where.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise BadInput(f"where: key {str(key)[:80]!r} must be 1 to 64 characters of A-Z a-z 0-9 _ . -")
        if not isinstance(wanted, Mapping):
            conditions.append(Condition(key, "eq", (_scalar(key, wanted),)))
            continue
        if not wanted:
            raise BadInput(f"where: {key}: give a value or an operator: {', '.join(get_args(Operator))}")
        conditions += [_condition(key, operator, value) for operator, value in wanted.items()]
    if len(conditions) > CONDITIONS_MAX:
        raise BadInput(f"where: {len(conditions)} conditions: at most {CONDITIONS_MAX} are allowed")
    return conditions


def _condition(key: str, operator: Any, value: Any) -> Condition:
    if operator not in get_args(Operator):
        raise BadInput(f"where: {key}: operator {str(operator)[:80]!r} is none of {', '.join(get_args(Operator))}")
    if operator == "in":
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) > VALUES_MAX:
            raise BadInput(f"where: {key}: give `in` a list of at most {VALUES_MAX} values")
        return Condition(key, "in", tuple(_scalar(key, each) for each in value))
    scalar = _scalar(key, value)
    if operator not in ("eq", "ne") and (scalar is None or isinstance(scalar, bool)):
        raise BadInput(f"where: {key}: {operator} compares texts or numbers, not {json.dumps(value)}")
    return Condition(key, operator, (scalar,))


def _scalar(key: str, value: Any) -> Scalar:
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadInput(f"where: {key}: a value must be a text, a finite number of 64 bits, true, false or null")


def json_of(value: Any) -> str:
    """Return a value as the JSON whose size counts. Raises TypeError, ValueError, RecursionError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Return the metadata as JSON. Raises BadInput if it is no JSON of at most 64 KiB and 16 levels."""
    try:
        text = json_of(_cleaned(metadata, METADATA_DEPTH_MAX))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"metadata cannot be stored as JSON: {error}") from None
    if len(text.encode()) > METADATA_BYTES_MAX:
        raise BadInput(f"metadata of {len(text.encode()):,} bytes: at most {METADATA_BYTES_MAX:,} are allowed")
    return text


def _cleaned(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return float(value)
    if isinstance(value, Mapping | list | tuple):
        if not depth:
            raise ValueError(f"nested deeper than {METADATA_DEPTH_MAX} levels")
        if isinstance(value, Mapping):
            return {clean(str(key)): _cleaned(item, depth - 1) for key, item in value.items()}
        return [_cleaned(item, depth - 1) for item in value]
    return value


def matches(metadata: Mapping[str, Any], conditions: Sequence[Condition]) -> bool:
    """Whether the conditions hold, as both SQL forms decide it."""
    return all(_holds(metadata.get(each.key), each) for each in conditions)


def _holds(value: Any, condition: Condition) -> bool:
    items = value if isinstance(value, list) else [value]
    if value is None or value == []:
        items = [None]
    found = any(_compare(item, wanted, condition.operator) for item in items for wanted in condition.values)
    return found is not (condition.operator == "ne")


def _compare(item: Any, wanted: Scalar, operator: Operator) -> bool:
    if _type(item) != _type(wanted):
        return False
    match operator:
        case "gt":
            return bool(item > wanted)
        case "gte":
            return bool(item >= wanted)
        case "lt":
            return bool(item < wanted)
        case "lte":
            return bool(item <= wanted)
        case _:
            return bool(item == wanted)


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "null" if value is None else "other"


def _by_type(condition: Condition) -> list[tuple[str, list[Scalar]]]:
    """Return the values of a condition that are of one type together: SQL does not grow with their number."""
    found: dict[str, list[Scalar]] = {}
    for each in condition.values:
        found.setdefault(_type(each), []).append(each)
    return list(found.items())


_SQLITE_TYPES = {"text": "'text'", "number": "'integer', 'real'", "boolean": "'true', 'false'"}


def sqlite_where(conditions: Sequence[Condition], column: str = "metadata") -> tuple[str, list[Any]]:
    """Return an SQL expression over a JSON column, beginning with AND, and its values. "" for no conditions."""
    sql, values = "", list[Any]()
    for each in conditions:
        alternatives = []
        for kind, wanted in _by_type(each):
            path = f'$."{each.key}"'
            if kind == "null":
                alternatives.append(
                    f"(coalesce(json_type({column}, ?), 'null') = 'null' OR (json_type({column}, ?) = 'array'"
                    f" AND (json_array_length({column}, ?) = 0"
                    f" OR EXISTS (SELECT 1 FROM json_each({column}, ?) WHERE type = 'null'))))"
                )
                values += [path] * 4
                continue
            types, compared, bound = _SQLITE_TYPES[kind], f"{_COMPARISONS[each.operator]} ?", wanted[0]
            if each.operator == "in":
                compared, bound = "IN (SELECT value FROM json_each(?))", json_of(wanted)
            alternatives.append(  # a scalar is compared where it is: json_each takes three times as long
                f"CASE coalesce(json_type({column}, ?), '') WHEN 'array' THEN EXISTS (SELECT 1 FROM"
                f" json_each({column}, ?) WHERE type IN ({types}) AND value {compared}) ELSE json_type({column}, ?)"
                f" IN ({types}) AND json_extract({column}, ?) {compared} END"
            )
            values += [path, path, bound, path, path, bound]
        joined = " OR ".join(alternatives) or "FALSE"
        sql += f" AND {'NOT ' if each.operator == 'ne' else ''}coalesce(({joined}), FALSE)"
    return sql, values


_POSTGRES_VALUES = {  # the type in JSON, an item as SQL compares it, and the type of what is given for it
    "text": ("string", "(item #>> '{}') COLLATE \"C\"", "text"),
    "number": ("number", "(item #>> '{}')::numeric", "numeric"),
    "boolean": ("boolean", "(item #>> '{}')::boolean", "boolean"),
}


def postgres_where(conditions: Sequence[Condition], column: str = "metadata") -> tuple[str, list[Any]]:
    """Return the same over a jsonb column, with %s for each value."""
    sql, values = "", list[Any]()
    for each in conditions:
        alternatives = []
        items = f"jsonb_array_elements(CASE jsonb_typeof({column} -> %s) WHEN 'array' THEN {column} -> %s"
        items += f" ELSE jsonb_build_array({column} -> %s) END) AS item"
        for kind, wanted in _by_type(each):
            if kind == "null":
                alternatives.append(
                    f"coalesce(jsonb_typeof({column} -> %s), 'null') = 'null' OR {column} -> %s = '[]'::jsonb"
                    f" OR EXISTS (SELECT 1 FROM {items} WHERE item = 'null'::jsonb)"
                )
                values += [each.key] * 5
                continue
            name, value, cast = _POSTGRES_VALUES[kind]
            given = [Decimal(repr(one)) if kind == "number" else one for one in wanted]
            is_list = each.operator == "in"
            compared = f"= ANY(%s::{cast}[])" if is_list else f"{_COMPARISONS[each.operator]} %s::{cast}"
            alternatives.append(
                f"EXISTS (SELECT 1 FROM {items}"
                f" WHERE CASE jsonb_typeof(item) WHEN '{name}' THEN {value} {compared} ELSE FALSE END)"
            )
            values += [*[each.key] * 3, given if is_list else given[0]]
        joined = " OR ".join(f"({each})" for each in alternatives) or "FALSE"
        sql += f" AND {'NOT ' if each.operator == 'ne' else ''}coalesce(({joined}), FALSE)"
    return sql, values
