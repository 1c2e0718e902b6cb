"""The keys of stream files: what each means, and the check of its value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from .. import subjects
from ..job import KIND
from .file_keys import CheckedKey
from .values import ITEMS_MAX, Check, by_size, count, flag, list_of, matching, nanoseconds, one_of, size, wrong

_JOURNAL = re.compile(rf"ai\.{subjects.TOKEN.pattern}\.{subjects.TOKEN.pattern}")
_FLUSHES = "metrics.flush"  # its lanes would have the subjects of `metrics.metric_subjects.flush`
_RESERVED = ("dead", "parked", "ticks")  # ai.dead.…, ai.parked.… and ai.ticks.… are used by aiqueue itself

_WEIGHT_MIN, _WEIGHT_MAX = 0.01, 100.0
_BY_ROLE = "by role"  # `streamfile.FIXED` and `DEFAULTS`

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


INBOX_FAMILY: Final[Mapping[str, CheckedKey]] = {
    "name": CheckedKey(
        _family_name, "Name of the family. Its jobs, or its mail, have the subjects `ai.{name}.{tenant}`."
    ),
    "default_kind": CheckedKey(_kind, "Kind of a body that names none."),
    "aliases": CheckedKey(_aliases, "Kinds by the `message_type` of an envelope.", "none"),
    "schema_versions": CheckedKey(
        list_of(matching(re.compile(r"[!-~]{1,16}"), 'a version such as "1.0"'), "versions"),
        "Versions of the envelope that are accepted.",
        '["1.0", "1"]',
    ),
}
WORK_FAMILY: Final[Mapping[str, CheckedKey]] = {
    **INBOX_FAMILY,
    "priorities": CheckedKey(_priorities, "Priorities, the highest first.", '["high", "normal", "low"]'),
    "lanes": CheckedKey(
        one_of("tenant", "shared"),
        'Whose jobs have a lane of their own: `"tenant"`, each tenant and priority; `"shared"`, each priority.',
        '"tenant"',
    ),
    "lane_storage": CheckedKey(
        one_of("file", "memory"),
        "Where the server stores a lane's consumer. Memory is cheaper, but a restarted server redelivers the jobs that "
        "were in flight. The jobs themselves are not affected.",
        '"file"',
    ),
    "journal": CheckedKey(
        matching(_JOURNAL, 'three words that begin with ai, such as "ai.rag.results"'),
        "Prefix of the subjects of the journals, where results are.",
        "`ai.{name}-results`",
    ),
    "journal_ttl": CheckedKey(
        nanoseconds(60),
        "How long a job's result is kept: at least twice the `ack_wait`, and at most the journals' `max_age`.",
        "the journals' `max_age`",
    ),
    "chunk_ttl": CheckedKey(  # at least the server's minimum
        nanoseconds(1),
        "How long a job's chunks and progress are kept, at most the journals' `max_age`.",
        "`journal_ttl`",
    ),
    "key": CheckedKey(_word, "Field, and header, in which callers give a job's id.", "none"),
    "limit_key": CheckedKey(
        _word, 'Field of the message whose values have limits, such as `model`. Not with `lanes = "shared"`.', "none"
    ),
    "header_fields": CheckedKey(
        list_of(_word, "fields of the message"),
        "Fields of the message that a header of the same name may state. Where the body has one too, both must agree.",
        "none",
    ),
    "claim": CheckedKey(
        flag,
        "Whether only one of several messages with the same id runs. The rule ends when the id's journal expires.",
        "false",
    ),
    "fingerprint": CheckedKey(
        _fingerprint,
        "If given, a message of a known id with another body is refused. `ignore` names fields that do not count. "
        "Needs `claim = true`.",
        "none",
    ),
    "reply_within": CheckedKey(
        nanoseconds(1),
        "Deadline of a request that names none. If given, responders answer requests for this family.",
        "none",
    ),
    "tenants": CheckedKey(
        _tenants,
        "Settings of single tenants. `weight`: share of the slots beside other tenants, 0.01 to 100, by default 1. "
        "`max_ack_pending`: instead of that of `[consumer]`.",
        "none",
    ),
}
STREAM: Final[Mapping[str, CheckedKey]] = {
    "name": CheckedKey(_word, "Name of the stream on the server."),
    "retention": CheckedKey(
        one_of("limits", "interest", "workqueue"), "When a message is deleted: at a limit, or once read.", _BY_ROLE
    ),
    "storage": CheckedKey(one_of("file", "memory"), "Where messages are stored. It cannot be changed later.", _BY_ROLE),
    "discard": CheckedKey(
        one_of("old", "new"), "What a full stream does: delete the oldest message, or refuse the new one.", _BY_ROLE
    ),
    "discard_new_per_subject": CheckedKey(
        flag, 'Whether `max_msgs_per_subject` refuses messages, too. Needs `discard = "new"`.', _BY_ROLE
    ),
    "max_msgs": CheckedKey(count(unlimited=True), "Maximum of messages in the stream. -1: no limit.", _BY_ROLE),
    "max_msgs_per_subject": CheckedKey(
        count(unlimited=True),
        "Maximum of messages of one subject, which in a work stream is a lane: above it enqueue raises `LaneFull`. "
        "-1: no limit.",
        _BY_ROLE,
    ),
    "max_msg_size": CheckedKey(
        size, "Maximum size of a message with its headers. -1: the server's `max_payload`.", _BY_ROLE
    ),
    "max_bytes": CheckedKey(
        by_size,
        "Maximum size of the stream, which the server sets aside: above it enqueue raises `StreamFull`. "
        '-1: no limit. A table has a value for each `size`: `{ small = "16MiB", medium = "256MiB", large = "1GiB" }`.',
        _BY_ROLE,
    ),
    "max_age": CheckedKey(nanoseconds(0.1, zero=True), 'How long a message is kept. `"0s"`: no limit.', _BY_ROLE),
    "max_consumers": CheckedKey(  # -1 would not lift the server's default limit of 1,000
        count(),
        "Maximum of consumers, which in a work stream is that of the lanes that have jobs at the same time.",
        _BY_ROLE,
    ),
    "duplicate_window": CheckedKey(
        nanoseconds(0.1),
        "How long the server remembers a message's id and drops another of that id. At most `max_age`.",
        _BY_ROLE,
    ),
    "num_replicas": CheckedKey(count(5), "On how many servers of a cluster each message is stored.", _BY_ROLE),
    "compression": CheckedKey(one_of("none", "s2"), "How the server compresses what it stores.", _BY_ROLE),
    "allow_atomic": CheckedKey(flag, "Whether several messages may be stored in one batch, all or none.", _BY_ROLE),
    "allow_direct": CheckedKey(flag, "Whether each server of the stream answers reads, not only its leader.", _BY_ROLE),
    "allow_msg_counter": CheckedKey(
        flag, "Whether each subject is a counter, which a server never takes back. Only for the role metrics.", _BY_ROLE
    ),
    "allow_msg_schedules": CheckedKey(
        flag, 'Whether messages may be delayed. The server refuses it with `discard = "new"`.', _BY_ROLE
    ),
    "allow_msg_ttl": CheckedKey(flag, "Whether a message may have a time to live of its own.", _BY_ROLE),
    "allow_rollup_hdrs": CheckedKey(flag, "Whether a message may replace all former ones of its subject.", _BY_ROLE),
    "deny_delete": CheckedKey(
        flag,
        "Whether no message can be deleted by itself. A server never takes that back. Refused where jobs end.",
        _BY_ROLE,
    ),
}
REPUBLISH: Final[Mapping[str, CheckedKey]] = {
    "src": CheckedKey(_subject, "Subjects whose messages are published again."),
    "dest": CheckedKey(_subject, "Subject under which they are published again."),
    "headers_only": CheckedKey(flag, "Whether they are published without their bodies.", "false"),
}
CONSUMER: Final[Mapping[str, CheckedKey]] = {
    "ack_wait": CheckedKey(  # shorter, and an ordinary pause of a worker would lose its leases
        nanoseconds(1), "Length of a lease: so long after a worker's last sign of life its jobs go to others.", '"30s"'
    ),
    "max_ack_pending": CheckedKey(count(), "Maximum of jobs of one lane in flight, over all workers.", "1_000"),
    "max_deliver": CheckedKey(
        count(unlimited=True),
        "Maximum of deliveries of one job. After them, workers make it a dead letter with the reason `stranded`. "
        "-1: no limit.",
        "10_000",
    ),
    "inactive_threshold": CheckedKey(
        nanoseconds(1), "Idle time after which the server deletes a lane's consumer. The lane's jobs stay.", '"5m"'
    ),
}
