"""Parses and checks one ``streams/*.toml`` file.

Every key is checked against the tables of `stream_keys`. Values are returned in nanoseconds and bytes, as in the
JetStream API.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NoReturn, get_args

from .. import subjects
from ..errors import TopologyError
from .stream_keys import CONSUMER, INBOX_FAMILY, REPUBLISH, STREAM, WORK_FAMILY
from .values import Check, one_of

Role = Literal[
    "work", "inbox", "journal", "dead", "parked", "stranded", "documents", "presence", "checkpoints", "limits",
    "usage", "recent", "rag", "ticks", "schedules", "api_keys", "batches", "audit", "metrics",
]  # fmt: skip
PROFILES = ("single", "cluster")
ROLES: tuple[Role, ...] = get_args(Role)
_NAMED_ROLES = tuple(each for each in ROLES if each != "work")

_NEWEST: dict[str, Any] = {"retention": "limits", "discard": "new", "max_msgs_per_subject": 1, "allow_direct": True}
_BUCKET: dict[str, Any] = _NEWEST | {"allow_rollup_hdrs": True, "allow_msg_ttl": True}
# The server refuses schedules with discard = "new". So no limits: with "old" they would drop what was acknowledged.
_WAITING: dict[str, Any] = {
    "retention": "workqueue",
    "discard": "old",
    "max_msgs": -1,
    "max_msgs_per_subject": -1,
    "max_bytes": -1,
    "max_age": 0,
    "allow_direct": True,
    "allow_msg_schedules": True,
    "allow_msg_ttl": True,
}
_BUCKETS: tuple[Role, ...] = ("presence", "limits", "schedules", "api_keys", "batches")
# What a role requires: used if a key is missing, and any other value is refused.
FIXED: dict[Role, dict[str, Any]] = {
    "work": {"retention": "workqueue", "discard": "new", "discard_new_per_subject": True},
    "inbox": {"retention": "workqueue", "discard": "new", "discard_new_per_subject": True},
    "journal": {"retention": "limits", "allow_direct": True, "allow_msg_ttl": True},
    "dead": {"retention": "limits", "allow_direct": True},
    "parked": _WAITING,
    "ticks": _WAITING,
    "stranded": {"retention": "workqueue", "allow_direct": True},
    "documents": {
        "retention": "limits",
        "discard": "new",
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
    },
    "presence": _BUCKET | {"deny_delete": True},
    "checkpoints": {"retention": "limits", "discard": "new", "allow_direct": True},
    "limits": _BUCKET,
    "usage": _NEWEST,
    "recent": _NEWEST | {"discard": "old"},
    "rag": _NEWEST,
    "schedules": _BUCKET,
    "api_keys": _BUCKET,
    "batches": _BUCKET,
    "audit": {"retention": "limits", "allow_direct": True, "deny_delete": True},
    "metrics": {
        "retention": "limits",
        "discard": "old",
        "allow_direct": True,
        "allow_atomic": True,
        "allow_msg_counter": True,
    },
}
NEWEST_ONLY: tuple[Role, ...] = (
    "presence", "limits", "usage", "recent", "rag", "schedules", "api_keys", "batches", "metrics",
)  # fmt: skip
# What a role must not have, in a file as on the server: `problems` says what each would stop.
FATAL_FLAGS: Mapping[str, tuple[Role, ...]] = {
    "deny_delete": ("work", "inbox", "parked", "ticks", "dead", "documents"),  # which no server takes back
    "discard_new_per_subject": NEWEST_ONLY,
    "allow_msg_counter": tuple(each for each in ROLES if each != "metrics"),  # nor this one
}
_QUEUE: dict[str, Any] = {
    "max_msgs_per_subject": 100_000,
    "max_bytes": {"small": 2**26, "medium": 2**30, "large": 2**32},
    "max_consumers": 10_000,
    "duplicate_window": 600 * 10**9,
    "allow_direct": True,
}
DEFAULTS: dict[Role, dict[str, Any]] = {
    "work": _QUEUE | {"allow_atomic": True},
    "inbox": _QUEUE,
    "journal": {},
    "dead": {},
    "parked": {"max_consumers": 100, "duplicate_window": 600 * 10**9},
    "stranded": {"max_consumers": 100},
    "documents": {},
    "presence": {},
    "checkpoints": {},
    "limits": {},
    "usage": {},
    "recent": {},
    "rag": {},
    "ticks": {"max_consumers": 1_000, "duplicate_window": 120 * 10**9},
    "schedules": {},
    "api_keys": {},
    "batches": {},
    "audit": {},
    "metrics": {"max_msgs_per_subject": 2},
}
# What the server repeats, so that all processes hear at once what one of them has stored.
REPEATED: Mapping[Role, dict[str, Any]] = {
    "limits": {"dest": f"{subjects.LIMITS}.>"},
    "api_keys": {"dest": f"{subjects.API_KEYS}.>", "headers_only": True},
}
# Stated for every stream, so that a limit set from outside shows as drift.
COMMON: dict[str, Any] = {"storage": "file", "num_replicas": 1, "max_msgs": -1, "max_age": 0}
_CONSUMER_DEFAULTS: dict[str, Any] = {
    "ack_wait": 30 * 10**9,
    "max_ack_pending": 1_000,
    "max_deliver": 10_000,
    "inactive_threshold": 300 * 10**9,
}


@dataclass(frozen=True, slots=True)
class StreamFile:
    """The contents of one file, for one profile and size.

    `family` and `consumer` are empty for a stream without a family, such as documents. `stream` and `consumer` have
    the form of the JetStream API, and are complete except for the computed subjects.
    """

    file: str
    role: Role
    family: Mapping[str, Any]
    stream: Mapping[str, Any]
    consumer: Mapping[str, Any]


def parse_file(file: str, text: str, profile: str = "single", size: str = "medium") -> StreamFile:
    """Parse `text`; `file` is its name for errors. All profiles and sizes are checked, also those not used.

    Raises TopologyError, which names file and key.
    """
    raw = _parse_toml(file, text)
    _require_known_keys(file, "", raw, ("role", "family", "stream", "consumer", "profile"))
    role: Role = _check_value(file, "role", raw["role"], one_of(*_NAMED_ROLES)) if "role" in raw else "work"
    families = role in ("work", "inbox")
    for key in ("family", "consumer"):
        if key in raw and not families:
            raise TopologyError(file, key, f"is only for streams of a family; a {role} stream has no family")
    family: dict[str, Any] = {}
    if families:
        family = _check_table(file, "family", raw.get("family"), INBOX_FAMILY if role == "inbox" else WORK_FAMILY)
        _require_keys(file, "family", family, "name", "default_kind")
        _check_family(family, lambda key: (file, f"family.{key}"))
    stream = _check_stream_table(file, "stream", raw.get("stream"), STREAM)
    _require_keys(file, "stream", stream, "name")
    consumer = _check_table(file, "consumer", raw.get("consumer", {}), CONSUMER)
    overrides = _check_profiles(file, raw.get("profile", {}), with_consumer=families)
    merged = {}
    for each, (stream_over, consumer_over) in overrides.items():
        config = _pick_size(COMMON | DEFAULTS[role] | FIXED[role] | stream | stream_over, size)
        paths = {key: f"profile.{each}.stream.{key}" for key in stream_over}
        _check_stream(role, config, lambda key, paths=paths: (file, paths.get(key, f"stream.{key}")))  # type: ignore[misc]
        merged[each] = (config, _CONSUMER_DEFAULTS | consumer | consumer_over if families else {})
    return StreamFile(file, role, family, *merged[profile])


parse_cached = lru_cache(maxsize=64)(parse_file)  # each client of a process finds the same files


def lay_over(declared: StreamFile, given: object, *, file: str, prefix: str, size: str) -> StreamFile:
    """Return a stream file with the tables of an overlay in it: tables merge key by key, other values replace.

    `file` and `prefix` say where the overlay is, for errors. Raises TopologyError.
    """
    has_family = declared.role in ("work", "inbox")
    parts = ("family", "stream", "consumer") if has_family else ("stream",)
    if isinstance(given, dict) and "role" in given:
        _check_value(file, f"{prefix}.role", given["role"], _unchangeable)
    tables = _check_table(file, prefix, given, dict.fromkeys(parts, lambda value: value))
    fixed: dict[str, Check] = {"name": _unchangeable}
    family, consumer = dict(declared.family), declared.consumer
    if has_family:
        checks: dict[str, Check] = {**(INBOX_FAMILY if declared.role == "inbox" else WORK_FAMILY), **fixed}
        for key, value in _check_table(file, f"{prefix}.family", tables.get("family", {}), checks).items():
            family[key] = _merge(family.get(key), value)
        _check_family(family, lambda key: (file, f"{prefix}.family.{key}"))
        consumer = {**consumer, **_check_table(file, f"{prefix}.consumer", tables.get("consumer", {}), CONSUMER)}
    checks = {**STREAM, **fixed, "republish": _unchangeable}
    stream = _check_table(file, f"{prefix}.stream", tables.get("stream", {}), checks)
    config = _pick_size({**declared.stream, **stream}, size)
    _check_stream(declared.role, config, lambda key: (file, f"{prefix}.stream.{key}"))
    return replace(declared, family=family, stream=config, consumer=consumer)


def _unchangeable(_: object) -> NoReturn:
    raise ValueError("cannot be changed by an overlay: all programs on the server rely on it")


def _merge(former: Any, value: Any) -> Any:
    """Return a value of an overlay in place of the former one; tables are merged key by key."""
    if not (isinstance(former, dict) and isinstance(value, dict)):
        return value
    return former | {key: _merge(former.get(key), each) for key, each in value.items()}


def _pick_size(config: dict[str, Any], size: str) -> dict[str, Any]:
    """Return a stream with the max_bytes of one size, where it has one for each."""
    limit = config.get("max_bytes")
    return config | {"max_bytes": limit[size]} if isinstance(limit, dict) else config


def _parse_toml(file: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = f"is not TOML: {error}"
        where = re.search(r"at line (\d+)", str(error))
        lines = text.splitlines()
        if where and int(where[1]) <= len(lines):
            problem += f": {lines[int(where[1]) - 1].strip()[:100]}"
        raise TopologyError(file, "", problem) from None
    except RecursionError:
        raise TopologyError(file, "", "is nested too deeply") from None


def _dotted(prefix: str, key: str) -> str:
    shown = key if subjects.TOKEN.fullmatch(key) else json.dumps(key)
    return f"{prefix}.{shown}" if prefix else shown


def _require_known_keys(file: str, prefix: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        if key in ("subjects", "subject_transform"):
            hint = "it is computed from the families' names and priorities; remove it"
        raise TopologyError(file, _dotted(prefix, key), f"unknown key; {hint}")


def _check_value(file: str, key: str, value: object, check: Check) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise TopologyError(file, key, str(error)) from None


def _check_table(file: str, prefix: str, given: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    if given is None:
        raise TopologyError(file, prefix, f"is missing: add a table [{prefix}] to the file")
    if not isinstance(given, dict):
        raise TopologyError(file, prefix, "must be a table")
    _require_known_keys(file, prefix, given, tuple(checks))
    return {key: _check_value(file, _dotted(prefix, key), value, checks[key]) for key, value in given.items()}


def _check_stream_table(file: str, prefix: str, given: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Check a table of stream keys, like `_check_table`; its key republish is a table itself."""
    config = _check_table(file, prefix, given, {**checks, "republish": lambda value: value})
    if "republish" in config:
        config["republish"] = _check_table(file, f"{prefix}.republish", config["republish"], REPUBLISH)
        _require_keys(file, f"{prefix}.republish", config["republish"], "src", "dest")
    return config


def _require_keys(file: str, prefix: str, table: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in table:
            raise TopologyError(file, f"{prefix}.{key}", "is missing")


def _check_profiles(
    file: str, given: object, *, with_consumer: bool
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what each profile overrides in [stream] and [consumer]."""
    tables = _check_table(file, "profile", given, dict.fromkeys(PROFILES, lambda value: value))
    overrides = {}
    for profile in PROFILES:
        prefix = f"profile.{profile}"
        parts: dict[str, Check] = {"stream": lambda value: value}
        if with_consumer:
            parts["consumer"] = lambda value: value
        table = _check_table(file, prefix, tables.get(profile, {}), parts)
        nameless = {key: check for key, check in STREAM.items() if key != "name"}
        overrides[profile] = (
            _check_stream_table(file, f"{prefix}.stream", table.get("stream", {}), nameless),
            _check_table(file, f"{prefix}.consumer", table.get("consumer", {}), CONSUMER),
        )
    return overrides


def _check_family(family: Mapping[str, Any], place: Callable[[str], tuple[str, str]]) -> None:
    """Refuse keys that do not go together. `place`: the file and key of a key of the table, for errors."""
    if "limit_key" in family and family.get("lanes") == "shared":
        problem = 'cannot be combined with lanes = "shared": an exhausted key would hold up all others'
        raise TopologyError(*place("limit_key"), problem)
    if "fingerprint" in family and not family.get("claim"):
        raise TopologyError(*place("fingerprint"), "requires claim = true: other families run an id again")


def _check_stream(role: Role, stream: Mapping[str, Any], place: Callable[[str], tuple[str, str]]) -> None:
    """Refuse what the server would refuse at apply, and what the role does not allow. `place` as in `_check_family`."""

    def refuse(key: str, problem: str) -> NoReturn:
        raise TopologyError(*place(key), problem)

    if role == "documents" and not stream["name"].startswith(subjects.OBJECTS):
        refuse("name", f"must start with {subjects.OBJECTS} for a documents stream, which is an object store")
    if role in _BUCKETS and not stream["name"].startswith(subjects.BUCKET):
        refuse("name", f"must start with {subjects.BUCKET} for a {role} stream, which is a key-value bucket")
    if role in REPEATED and "republish" in stream:
        refuse("republish", f"is computed for a stream with the role {role}; remove it")
    if stream.get("allow_msg_schedules") and stream.get("discard") == "new":
        refuse("allow_msg_schedules", 'cannot be combined with discard = "new": the server refuses it')
    if role == "metrics" and stream["max_msgs_per_subject"] not in (1, 2):  # 1: of former versions
        refuse("max_msgs_per_subject", "must be 2 for a metrics stream")
    for key, needed in FIXED[role].items():
        if stream[key] != needed:
            refuse(key, f"must be {json.dumps(needed)} for a {role} stream")
    for key, roles in FATAL_FLAGS.items():
        if role in roles and stream.get(key):
            refuse(key, f"must be false for a {role} stream")
    if stream.get("discard_new_per_subject"):
        if stream.get("discard") != "new":
            refuse("discard_new_per_subject", 'requires discard = "new"')
        if stream.get("max_msgs_per_subject", -1) < 1:
            refuse("max_msgs_per_subject", "must be at least 1 with discard_new_per_subject")
    if 0 < stream["max_age"] < stream.get("duplicate_window", 0):
        refuse("duplicate_window", "must not be longer than max_age")
