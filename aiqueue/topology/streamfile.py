"""Parses and checks one ``streams/*.toml`` file.

Every key is checked against the tables below. Values are returned in nanoseconds and bytes, as in the JetStream API.
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
from ..job import KIND
from .values import ITEMS_MAX, Check, by_size, count, flag, list_of, matching, nanoseconds, one_of, size, wrong

Role = Literal[
    "work", "inbox", "journal", "dead", "parked", "stranded", "documents", "presence", "checkpoints", "limits",
    "usage", "recent", "rag", "ticks", "schedules", "api_keys", "batches", "audit", "metrics",
]  # fmt: skip
PROFILES = ("single", "cluster")
_ROLES = tuple(each for each in get_args(Role) if each != "work")

_JOURNAL = re.compile(rf"ai\.{subjects.TOKEN.pattern}\.{subjects.TOKEN.pattern}")
_FLUSHES = "metrics.flush"  # its lanes would have the subjects of `metrics.metric_subjects.flush`
_RESERVED = ("dead", "parked", "ticks")  # ai.dead.…, ai.parked.… and ai.ticks.… are used by aiqueue itself

_WEIGHT_MIN, _WEIGHT_MAX = 0.01, 100.0

_kind = matching(KIND, "a kind: 1 to 128 characters of A-Z a-z 0-9 _ . : -")
_subject = matching(re.compile(r"[A-Za-z0-9_*>-]+(\.[A-Za-z0-9_*>-]+)*"), "a subject")
_word = matching(subjects.TOKEN, "1 to 64 characters of A-Z a-z 0-9 _ -")


def _family_name(value: object) -> str:
    expected = 'two words such as "gateway.requests", each of 1 to 32 characters of a-z 0-9 _ -'
    name: str = matching(subjects.FAMILY, expected)(value)
    if name.partition(".")[0] in _RESERVED:
        raise ValueError(f"{name!r}: {', '.join(_RESERVED)} are reserved for aiqueue; choose another component")
    if name == _FLUSHES:
        raise ValueError(f"{name!r} is reserved for aiqueue; choose another name")
    return name


def _priorities(value: object) -> tuple[str, ...]:
    one = matching(subjects.PRIORITY, "priorities of 1 to 16 characters of a-z 0-9")
    priorities: tuple[str, ...] = list_of(one, "priorities, highest first")(value)
    if subjects.NORMAL not in priorities:
        raise ValueError(f'must contain "{subjects.NORMAL}", the lane of jobs on the bare subject')
    return priorities


def _aliases(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > ITEMS_MAX:
        wrong(
            f'a table of at most {ITEMS_MAX} message types, such as {{ llm_request = "gateway.request" }}',
            value,
        )
    return {_kind(message_type): _kind(kind) for message_type, kind in value.items()}


def _fingerprint(value: object) -> tuple[str, ...]:
    """Check which bodies count as the same, and return the fields that do not count."""
    if not isinstance(value, dict) or not value.keys() <= {"ignore"}:
        wrong('a table such as { ignore = ["timestamp"] }, or {} if all fields count', value)
    return tuple(list_of(_word, "fields of the message")(value["ignore"])) if "ignore" in value else ()


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _WEIGHT_MIN <= value <= _WEIGHT_MAX:
        wrong(f"a number from {_WEIGHT_MIN:g} to {_WEIGHT_MAX:g}", value)
    return float(value)


def _tenants(value: object) -> dict[str, dict[str, Any]]:
    expected = "a table of tenants, such as { acme = { weight = 3, max_ack_pending = 50 } }"
    if not isinstance(value, dict):
        wrong(expected, value)
    checks: dict[str, Check] = {"weight": _weight, "max_ack_pending": count()}
    tenants = {}
    for tenant, limits in value.items():
        if not isinstance(limits, dict) or not limits or not limits.keys() <= checks.keys():
            wrong(expected, value)
        tenants[_word(tenant)] = {key: checks[key](each) for key, each in limits.items()}
    return tenants


_INBOX_FAMILY: dict[str, Check] = {
    "name": _family_name,
    "default_kind": _kind,
    "aliases": _aliases,
    "schema_versions": list_of(matching(re.compile(r"[!-~]{1,16}"), 'a version such as "1.0"'), "versions"),
}
_WORK_FAMILY: dict[str, Check] = _INBOX_FAMILY | {
    "priorities": _priorities,
    "lanes": one_of("tenant", "shared"),
    "lane_storage": one_of("file", "memory"),
    "journal": matching(_JOURNAL, 'three words that begin with ai, such as "ai.rag.results"'),
    "journal_ttl": nanoseconds(60),
    "chunk_ttl": nanoseconds(1),  # the server's minimum
    "key": _word,
    "limit_key": _word,
    "header_fields": list_of(_word, "fields of the message"),
    "claim": flag,
    "fingerprint": _fingerprint,
    "reply_within": nanoseconds(1),
    "tenants": _tenants,
}
_STREAM: dict[str, Check] = {
    "name": _word,
    "retention": one_of("limits", "interest", "workqueue"),
    "storage": one_of("file", "memory"),
    "discard": one_of("old", "new"),
    "discard_new_per_subject": flag,
    "max_msgs": count(unlimited=True),
    "max_msgs_per_subject": count(unlimited=True),
    "max_msg_size": size,
    "max_bytes": by_size,
    "max_age": nanoseconds(0.1, zero=True),
    "max_consumers": count(),  # -1 would not lift the server's default limit of 1,000
    "duplicate_window": nanoseconds(0.1),
    "num_replicas": count(5),
    "compression": one_of("none", "s2"),
    "allow_atomic": flag,
    "allow_direct": flag,
    "allow_msg_counter": flag,
    "allow_msg_schedules": flag,
    "allow_msg_ttl": flag,
    "allow_rollup_hdrs": flag,
    "deny_delete": flag,
}
_REPUBLISH: dict[str, Check] = {"src": _subject, "dest": _subject, "headers_only": flag}
_CONSUMER: dict[str, Check] = {
    "ack_wait": nanoseconds(1),  # shorter, and an ordinary pause of a worker would lose its leases
    "max_ack_pending": count(),
    "max_deliver": count(unlimited=True),
    "inactive_threshold": nanoseconds(1),
}

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
_FIXED: dict[Role, dict[str, Any]] = {
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
    "metrics": _NEWEST | {"discard": "old", "allow_atomic": True, "allow_msg_counter": True},
}
NEWEST_ONLY: tuple[Role, ...] = (
    "presence", "limits", "usage", "recent", "rag", "schedules", "api_keys", "batches", "metrics",
)  # fmt: skip
# What a role must not have, in a file as on the server: `problems` says what each would stop.
FATAL_FLAGS: Mapping[str, tuple[Role, ...]] = {
    "deny_delete": ("work", "inbox", "parked", "ticks", "dead", "documents"),  # which no server takes back
    "discard_new_per_subject": NEWEST_ONLY,
    "allow_msg_counter": tuple(each for each in get_args(Role) if each != "metrics"),  # nor this one
}
_QUEUE: dict[str, Any] = {
    "max_msgs_per_subject": 100_000,
    "max_bytes": {"small": 2**26, "medium": 2**30, "large": 2**32},
    "max_consumers": 10_000,
    "duplicate_window": 600 * 10**9,
    "allow_direct": True,
}
_DEFAULTS: dict[Role, dict[str, Any]] = {
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
    "metrics": {},
}
# What the server repeats, so that all processes hear at once what one of them has stored.
REPEATED: Mapping[Role, dict[str, Any]] = {
    "limits": {"dest": f"{subjects.LIMITS}.>"},
    "api_keys": {"dest": f"{subjects.API_KEYS}.>", "headers_only": True},
}
# Stated for every stream, so that a limit set from outside shows as drift.
_COMMON: dict[str, Any] = {"storage": "file", "num_replicas": 1, "max_msgs": -1, "max_age": 0}
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
    role: Role = _check_value(file, "role", raw["role"], one_of(*_ROLES)) if "role" in raw else "work"
    families = role in ("work", "inbox")
    for key in ("family", "consumer"):
        if key in raw and not families:
            raise TopologyError(file, key, f"is only for streams of a family; a {role} stream has no family")
    family: dict[str, Any] = {}
    if families:
        family = _check_table(file, "family", raw.get("family"), _INBOX_FAMILY if role == "inbox" else _WORK_FAMILY)
        _require_keys(file, "family", family, "name", "default_kind")
        _check_family(family, lambda key: (file, f"family.{key}"))
    stream = _check_stream_table(file, "stream", raw.get("stream"), _STREAM)
    _require_keys(file, "stream", stream, "name")
    consumer = _check_table(file, "consumer", raw.get("consumer", {}), _CONSUMER)
    overrides = _check_profiles(file, raw.get("profile", {}), with_consumer=families)
    merged = {}
    for each, (stream_over, consumer_over) in overrides.items():
        config = _pick_size(_COMMON | _DEFAULTS[role] | _FIXED[role] | stream | stream_over, size)
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
        checks = (_INBOX_FAMILY if declared.role == "inbox" else _WORK_FAMILY) | fixed
        for key, value in _check_table(file, f"{prefix}.family", tables.get("family", {}), checks).items():
            family[key] = _merge(family.get(key), value)
        _check_family(family, lambda key: (file, f"{prefix}.family.{key}"))
        consumer = {**consumer, **_check_table(file, f"{prefix}.consumer", tables.get("consumer", {}), _CONSUMER)}
    checks = _STREAM | fixed | {"republish": _unchangeable}
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
        config["republish"] = _check_table(file, f"{prefix}.republish", config["republish"], _REPUBLISH)
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
        nameless = {key: check for key, check in _STREAM.items() if key != "name"}
        overrides[profile] = (
            _check_stream_table(file, f"{prefix}.stream", table.get("stream", {}), nameless),
            _check_table(file, f"{prefix}.consumer", table.get("consumer", {}), _CONSUMER),
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
    for key, needed in _FIXED[role].items():
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
