"""Reads one ``streams/*.toml`` file.

Every key is checked against the tables below. Values come out in nanoseconds and bytes, as the API has them.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from .. import subjects, units
from ..errors import TopologyError
from ..job import KIND

Role = Literal["work", "inbox", "journal", "dead", "parked", "stranded", "documents", "presence"]
PROFILES = ("single", "cluster")
_ROLES = tuple(each for each in get_args(Role) if each != "work")

_JOURNAL = re.compile(rf"ai\.{subjects.TOKEN.pattern}\.{subjects.TOKEN.pattern}")
_RESERVED = ("dead", "parked")  # ai.dead.… and ai.parked.… are aiqueue's own
_INT64_MAX = 2**63 - 1
_DURATION_MAX_S = 100 * 365 * 86400  # int64 nanoseconds end at 292 years
_ITEMS_MAX = 32

Check = Callable[[object], Any]


def _wrong(expected: str, value: object) -> NoReturn:
    shown = repr(value)
    raise ValueError(f"must be {expected}, not {shown if len(shown) <= 80 else shown[:77] + '…'}")


def _one_of(*words: str) -> Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            _wrong(" or ".join(map(json.dumps, words)), value)
        return value

    return check


def _matching(pattern: re.Pattern[str], expected: str) -> Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            _wrong(expected, value)
        return value

    return check


def _list_of(item: Check, expected: str) -> Check:
    def check(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= _ITEMS_MAX:
            _wrong(f"a list of 1 to {_ITEMS_MAX} {expected}", value)
        items = tuple(item(one) for one in value)
        if len(set(items)) < len(items):
            raise ValueError("says the same twice")
        return items

    return check


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        _wrong("true or false", value)
    return value


def _count(most: int = _INT64_MAX, *, unlimited: bool = False) -> Check:
    """A whole number from 1; -1 where `unlimited`. The server takes zero for -1 or for a default."""
    expected = "a whole number from 1" + (f" to {most}" if most < _INT64_MAX else "")
    expected += ", or -1 for no limit" if unlimited else ""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            _wrong(expected, value)
        if not (1 <= value <= most or (unlimited and value == -1)):
            _wrong(expected, value)
        return value

    return check


def _size(value: object) -> int:
    """Bytes of 1048576, "1GiB", or -1."""
    expected = 'a size above 0 such as 1048576 or "1GiB", or -1 for no limit'
    if isinstance(value, bool) or not isinstance(value, str | int):
        _wrong(expected, value)
    try:
        size = units.size_bytes(value)
    except (ValueError, OverflowError):
        _wrong(expected, value)
    if not (0 < size <= _INT64_MAX or value == -1):
        _wrong(expected, value)
    return size


def _nanoseconds(least_s: float, *, zero: bool = False) -> Check:
    """Nanoseconds of "30s". A bare number is refused: JetStream's own files would mean nanoseconds by it."""
    expected = f'a duration such as "30s", at least {units.short_duration(least_s)}'
    expected += ', or "0s" for no limit' if zero else ""

    def check(value: object) -> int:
        if not isinstance(value, str):
            _wrong(expected, value)
        try:
            seconds = units.seconds(value)
        except ValueError:
            _wrong(expected, value)
        if not (least_s <= seconds <= _DURATION_MAX_S or (zero and seconds == 0)):
            _wrong(expected, value)
        return round(seconds * 1_000_000_000)

    return check


_WEIGHT_MIN, _WEIGHT_MAX = 0.01, 100.0

_kind = _matching(KIND, "a kind: 1 to 128 characters of A-Z a-z 0-9 _ . : -")
_subject = _matching(re.compile(r"[A-Za-z0-9_*>-]+(\.[A-Za-z0-9_*>-]+)*"), "a subject")
_word = _matching(subjects.TOKEN, "1 to 64 characters of A-Z a-z 0-9 _ -")


def _family_name(value: object) -> str:
    expected = 'two words such as "gateway.requests", each of 1 to 32 characters of a-z 0-9 _ -'
    name: str = _matching(subjects.FAMILY, expected)(value)
    if name.partition(".")[0] in _RESERVED:
        raise ValueError(f"{name!r}: the words {', '.join(_RESERVED)} are aiqueue's own; choose another component")
    return name


def _priorities(value: object) -> tuple[str, ...]:
    one = _matching(subjects.PRIORITY, "priorities of 1 to 16 characters of a-z 0-9")
    priorities: tuple[str, ...] = _list_of(one, "priorities, the highest first")(value)
    if subjects.NORMAL not in priorities:
        raise ValueError(f'must contain "{subjects.NORMAL}", where jobs on the bare subject go')
    return priorities


def _aliases(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _ITEMS_MAX:
        _wrong(
            f'a table of at most {_ITEMS_MAX} message types, such as {{ llm_request = "gateway.request" }}',
            value,
        )
    return {_kind(message_type): _kind(kind) for message_type, kind in value.items()}


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _WEIGHT_MIN <= value <= _WEIGHT_MAX:
        _wrong(f"a number from {_WEIGHT_MIN:g} to {_WEIGHT_MAX:g}", value)
    return float(value)


def _tenants(value: object) -> dict[str, dict[str, Any]]:
    expected = "a table of tenants, such as { acme = { weight = 3, max_ack_pending = 50 } }"
    if not isinstance(value, dict):
        _wrong(expected, value)
    checks: dict[str, Check] = {"weight": _weight, "max_ack_pending": _count()}
    tenants = {}
    for tenant, terms in value.items():
        if not isinstance(terms, dict) or not terms or not terms.keys() <= checks.keys():
            _wrong(expected, value)
        tenants[_word(tenant)] = {key: checks[key](each) for key, each in terms.items()}
    return tenants


_INBOX_FAMILY: dict[str, Check] = {
    "name": _family_name,
    "default_kind": _kind,
    "aliases": _aliases,
    "schema_versions": _list_of(_matching(re.compile(r"[!-~]{1,16}"), 'a version such as "1.0"'), "versions"),
}
_WORK_FAMILY: dict[str, Check] = _INBOX_FAMILY | {
    "priorities": _priorities,
    "lanes": _one_of("tenant", "shared"),
    "lane_storage": _one_of("file", "memory"),
    "journal": _matching(_JOURNAL, 'three words that begin with ai, such as "ai.rag.results"'),
    "journal_ttl": _nanoseconds(60),
    "chunk_ttl": _nanoseconds(1),  # the server takes no shorter one
    "key": _word,
    "claim": _flag,
    "reply_within": _nanoseconds(1),
    "tenants": _tenants,
}
_STREAM: dict[str, Check] = {
    "name": _word,
    "retention": _one_of("limits", "interest", "workqueue"),
    "storage": _one_of("file", "memory"),
    "discard": _one_of("old", "new"),
    "discard_new_per_subject": _flag,
    "max_msgs": _count(unlimited=True),
    "max_msgs_per_subject": _count(unlimited=True),
    "max_msg_size": _size,
    "max_bytes": _size,
    "max_age": _nanoseconds(0.1, zero=True),
    "max_consumers": _count(),  # -1 does not lift the server's default limit of 1,000
    "duplicate_window": _nanoseconds(0.1),
    "num_replicas": _count(5),
    "compression": _one_of("none", "s2"),
    "allow_atomic": _flag,
    "allow_direct": _flag,
    "allow_msg_schedules": _flag,
    "allow_msg_ttl": _flag,
    "allow_rollup_hdrs": _flag,
    "deny_delete": _flag,
}
_REPUBLISH: dict[str, Check] = {"src": _subject, "dest": _subject, "headers_only": _flag}
_CONSUMER: dict[str, Check] = {
    "ack_wait": _nanoseconds(1),  # below, an ordinary pause of a worker costs it its jobs
    "max_ack_pending": _count(),
    "max_deliver": _count(unlimited=True),
    "inactive_threshold": _nanoseconds(1),
}

# What a role cannot do without: filled in where unstated, refused where different.
_FIXED: dict[Role, dict[str, Any]] = {
    "work": {"retention": "workqueue", "discard": "new", "discard_new_per_subject": True},
    "inbox": {"retention": "workqueue", "discard": "new", "discard_new_per_subject": True},
    "journal": {"retention": "limits", "allow_direct": True, "allow_msg_ttl": True},
    "dead": {"retention": "limits", "allow_direct": True},
    # Schedules exclude discard = "new": any limit here would drop jobs that were acknowledged.
    "parked": {
        "retention": "workqueue",
        "discard": "old",
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_bytes": -1,
        "max_age": 0,
        "allow_direct": True,
        "allow_msg_schedules": True,
        "allow_msg_ttl": True,
    },
    "stranded": {"retention": "workqueue", "allow_direct": True},
    "documents": {
        "retention": "limits",
        "discard": "new",
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
    },
    "presence": {
        "retention": "limits",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "deny_delete": True,
    },
}
_QUEUE: dict[str, Any] = {
    "max_msgs_per_subject": 100_000,
    "max_bytes": 2**30,
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
}
# Stated for every stream, so that a limit set by another hand shows as drift.
_COMMON: dict[str, Any] = {"storage": "file", "num_replicas": 1, "max_msgs": -1, "max_age": 0}
_CONSUMER_DEFAULTS: dict[str, Any] = {
    "ack_wait": 30 * 10**9,
    "max_ack_pending": 1_000,
    "max_deliver": 10_000,
    "inactive_threshold": 300 * 10**9,
}


@dataclass(frozen=True, slots=True)
class Declared:
    """What one file declares, under one profile.

    `family` and `consumer` are empty for a stream without a family: documents, say. `stream` and
    `consumer` are in the API's form, and complete but for the computed subjects.
    """

    file: str
    role: Role
    family: Mapping[str, Any]
    stream: Mapping[str, Any]
    consumer: Mapping[str, Any]


def read(file: str, text: str, profile: str = "single") -> Declared:
    """The declaration in `text`; `file` is its name for messages. Every profile is checked, not just this.

    Raises TopologyError, naming file and key.
    """
    raw = _parse(file, text)
    _known(file, "", raw, ("role", "family", "stream", "consumer", "profile"))
    role: Role = _value(file, "role", raw["role"], _one_of(*_ROLES)) if "role" in raw else "work"
    families = role in ("work", "inbox")
    for key in ("family", "consumer"):
        if key in raw and not families:
            raise TopologyError(file, key, f"is for streams of a family; a {role} stream has none")
    family: dict[str, Any] = {}
    if families:
        family = _table(file, "family", raw.get("family"), _INBOX_FAMILY if role == "inbox" else _WORK_FAMILY)
        _present(file, "family", family, "name", "default_kind")
    stream = _stream(file, "stream", raw.get("stream"), _STREAM)
    _present(file, "stream", stream, "name")
    consumer = _table(file, "consumer", raw.get("consumer", {}), _CONSUMER)
    overrides = _profiles(file, raw.get("profile", {}), with_consumer=families)
    merged = {}
    for each, (stream_over, consumer_over) in overrides.items():
        whole = _COMMON | _DEFAULTS[role] | _FIXED[role] | stream | stream_over
        _coherent(file, each, role, whole, stream_over)
        merged[each] = (whole, _CONSUMER_DEFAULTS | consumer | consumer_over if families else {})
    return Declared(file, role, family, *merged[profile])


def _parse(file: str, text: str) -> dict[str, Any]:
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


def _known(file: str, prefix: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        if key in ("subjects", "subject_transform"):
            hint = "it is computed from the families' names and priorities; leave it out"
        raise TopologyError(file, _dotted(prefix, key), f"unknown key; {hint}")


def _value(file: str, key: str, value: object, check: Check) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise TopologyError(file, key, str(error)) from None


def _table(file: str, prefix: str, given: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    if given is None:
        raise TopologyError(file, prefix, f"is missing: the file needs a table [{prefix}]")
    if not isinstance(given, dict):
        raise TopologyError(file, prefix, "must be a table")
    _known(file, prefix, given, tuple(checks))
    return {key: _value(file, _dotted(prefix, key), value, checks[key]) for key, value in given.items()}


def _stream(file: str, prefix: str, given: object, checks: Mapping[str, Check]) -> dict[str, Any]:
    """As _table, for a stream's keys, of which republish is a table itself."""
    config = _table(file, prefix, given, {**checks, "republish": lambda value: value})
    if "republish" in config:
        config["republish"] = _table(file, f"{prefix}.republish", config["republish"], _REPUBLISH)
        _present(file, f"{prefix}.republish", config["republish"], "src", "dest")
    return config


def _present(file: str, prefix: str, table: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in table:
            raise TopologyError(file, f"{prefix}.{key}", "is missing")


def _profiles(file: str, given: object, *, with_consumer: bool) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What each profile overrides in [stream] and [consumer]."""
    tables = _table(file, "profile", given, dict.fromkeys(PROFILES, lambda value: value))
    overrides = {}
    for profile in PROFILES:
        prefix = f"profile.{profile}"
        parts: dict[str, Check] = {"stream": lambda value: value}
        if with_consumer:
            parts["consumer"] = lambda value: value
        table = _table(file, prefix, tables.get(profile, {}), parts)
        nameless = {key: check for key, check in _STREAM.items() if key != "name"}
        overrides[profile] = (
            _stream(file, f"{prefix}.stream", table.get("stream", {}), nameless),
            _table(file, f"{prefix}.consumer", table.get("consumer", {}), _CONSUMER),
        )
    return overrides


def _coherent(file: str, profile: str, role: Role, stream: Mapping[str, Any], overridden: Mapping[str, Any]) -> None:
    """Refuses what the server would refuse at apply, or what would break a promise of the role."""

    def refuse(key: str, problem: str) -> NoReturn:
        raise TopologyError(file, f"profile.{profile}.stream.{key}" if key in overridden else f"stream.{key}", problem)

    if role == "documents" and not stream["name"].startswith(subjects.OBJECTS):
        refuse("name", f"must begin with {subjects.OBJECTS} for a documents stream: it is an object store's")
    if role == "presence" and not stream["name"].startswith(subjects.BUCKET):
        refuse("name", f"must begin with {subjects.BUCKET} for a presence stream: it is a bucket's")
    if stream.get("allow_msg_schedules") and stream.get("discard") == "new":
        refuse("allow_msg_schedules", 'cannot go with discard = "new": the server refuses schedules there')
    for key, needed in _FIXED[role].items():
        if stream[key] != needed:
            refuse(key, f"must be {json.dumps(needed)} for a {role} stream")
    if stream.get("discard_new_per_subject"):
        if stream.get("discard") != "new":
            refuse("discard_new_per_subject", 'needs discard = "new"')
        if stream.get("max_msgs_per_subject", -1) < 1:
            refuse("max_msgs_per_subject", "must be at least 1 with discard_new_per_subject")
    if 0 < stream["max_age"] < stream.get("duplicate_window", 0):
        refuse("duplicate_window", "must not be longer than max_age")
