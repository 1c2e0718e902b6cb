"""A declared family: the kind of queue that a stream file's table ``[family]`` describes. Plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import subjects
from ..errors import BadInput, TopologyError
from .files import bundled_directory
from .streamfile import StreamFile

_NS = 1_000_000_000
_SCHEMA_VERSIONS = ("1.0", "1")
_PRIORITIES = ("high", "normal", "low")


@dataclass(frozen=True, slots=True)
class Family:
    """A declared family: the stream of its jobs, how messages are recognised, its lanes, journal and limits.

    An inbox family (``role == "inbox"``) has mailboxes instead of lanes, and neither priorities nor a journal.
    `replicas` and `max_msgs_per_subject` are those of its stream; the latter is the capacity of one lane or mailbox.
    """

    name: str
    role: Literal["work", "inbox"]
    file: str
    stream: str
    default_kind: str
    priorities: tuple[str, ...]  # highest first
    lanes: Literal["tenant", "shared"]
    lane_storage: Literal["file", "memory"]
    journal: str | None
    journal_ttl_s: float | None  # retention of results; None: that of the journal stream
    chunk_ttl_s: float | None  # retention of chunks and progress; None: that of the journal stream
    key: str | None  # the message field, and header, that contains the caller's job id
    limit_key: str | None  # the message field by whose values limits are told apart; None: the family has no limits
    header_fields: tuple[str, ...]  # message fields that a header of the same name may state, and must not contradict
    aliases: Mapping[str, str] = field(hash=False)  # a foreign envelope's message_type -> kind
    schema_versions: tuple[str, ...]
    ack_wait_s: float
    max_ack_pending: int
    max_deliver: int
    inactive_threshold_s: float
    max_msgs_per_subject: int
    replicas: int
    claim: bool  # of several messages with one id, only one is run
    fingerprint: tuple[str, ...] | None  # an id is of one body, in which these fields do not count; None: of any
    reply_within_s: float | None  # how long a responder waits for a result; None: the family has no responder
    tenants: Mapping[str, Mapping[str, Any]] = field(hash=False)  # tenant -> weight, max_ack_pending, if declared

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight for the fair share within a priority, among tenants with queued jobs. Default 1."""
        weight: float = self.tenants.get(tenant, {}).get("weight", 1.0)
        return weight

    def wished(self, priority: str, requested: str) -> str:
        """Return the priority of a job in a lane of `priority` whose header requests another one. Only in the lane of
        the bare subject a header counts.
        """
        return requested if priority == subjects.NORMAL and requested in self.priorities else priority

    def is_demotion(self, priority: str, wished: str) -> bool:
        """Return whether a job in a lane of `priority` has to move for that it `wished` for another one.

        Only downwards: at the head of its lane, moving up gains nothing.
        """
        return self.priorities.index(wished) > self.priorities.index(priority)

    def advise_to_set(self, key: str) -> str:
        """Return what to do to set a key of the family, for an error."""
        if bundled_directory() in Path(self.file).parents:
            return f'set {key} in aiqueue.toml, below [overlay."{self.name}".family]'
        return f"set {key} in {self.file}"

    def takes_keys(self, listed: Collection[str]) -> bool:
        """Return whether a stream that takes these subjects takes this family's jobs into lanes of limited keys."""
        return subjects.lane(self.name, "*", subjects.NORMAL, "*") in listed

    def lane_name(self, tenant: str, priority: str, key: str = "") -> str:
        """Return the durable name of a lane's consumer: ``acme-normal``, or ``normal`` if all tenants share the lane.
        That of a limited key ends with ``=`` and the hashed key.

        Raises InvalidToken for the tenant, BadInput for a priority that the family does not have.
        """
        return lane_name(*self._lane(tenant, priority, key)[1:])

    def lane_of(self, consumer: str) -> subjects.Lane | None:
        """Return the lane of a consumer's name (tenant ``*``: all), None for a name that `lane_name` never returns."""
        name, equals, key = consumer.partition("=")
        tenant, dash, priority = name.rpartition("-")
        if equals and not (self.limit_key and subjects.TOKEN.fullmatch(key)):
            return None
        if priority not in self.priorities or bool(dash) == (self.lanes == "shared"):
            return None
        if dash and not subjects.TOKEN.fullmatch(tenant):
            return None
        return subjects.Lane(self.name, tenant or "*", priority, key)

    def lane_config(self, tenant: str, priority: str, key: str = "") -> dict[str, Any]:
        """Return the configuration of a lane's consumer for the JetStream API. Raises what `lane_name` raises.

        Without num_replicas: a work queue's consumer must have as many replicas as its stream.
        """
        lane = self._lane(tenant, priority, key)
        return {
            "durable_name": lane_name(*lane[1:]),
            "filter_subject": subjects.lane(*lane),
            "ack_policy": "explicit",
            "mem_storage": self.lane_storage == "memory",
            **self.lane_limits(lane.tenant),
        }

    def lane_limits(self, tenant: str) -> dict[str, int]:
        """Return the part of `lane_config` that can be changed while the lane is in use. Durations are nanoseconds."""
        declared = self.tenants.get(tenant, {})
        return {
            "ack_wait": round(self.ack_wait_s * _NS),
            "max_ack_pending": declared.get("max_ack_pending", self.max_ack_pending),
            "max_deliver": self.max_deliver,
            "inactive_threshold": round(self.inactive_threshold_s * _NS),
        }

    def _lane(self, tenant: str, priority: str, key: str) -> subjects.Lane:
        if priority not in self.priorities:
            known = f"it has {', '.join(self.priorities)}" if self.priorities else "it is an inbox and has no lanes"
            raise BadInput(f"{self.name} has no priority {priority!r}: {known}")
        if self.lanes == "shared":
            return subjects.Lane(self.name, "*", priority)
        return subjects.Lane(self.name, subjects.token("tenant", tenant), priority, key)


def lane_name(tenant: str, priority: str, key: str = "") -> str:
    """Return the consumer's name of a lane, of one tenant or shared (tenant ``*``), perhaps of a limited key.

    A priority contains no "-" and the name of a tenant's lane always does, so names never collide.
    """
    name = priority if tenant == "*" else f"{tenant}-{priority}"
    return f"{name}={key}" if key else name


def make_family(declared: StreamFile) -> Family:
    """Return the family that a stream file declares."""
    given, work = declared.family, declared.role == "work"
    return Family(
        name=given["name"],
        role="work" if work else "inbox",
        file=declared.file,
        stream=declared.stream["name"],
        default_kind=given["default_kind"],
        priorities=given.get("priorities", _PRIORITIES) if work else (),
        lanes=given.get("lanes", "tenant"),
        lane_storage=given.get("lane_storage", "file"),
        journal=given.get("journal", f"ai.{given['name']}-results") if work else None,
        journal_ttl_s=_seconds(given.get("journal_ttl")),
        chunk_ttl_s=_seconds(given.get("chunk_ttl", given.get("journal_ttl"))),
        key=given.get("key"),
        limit_key=given.get("limit_key"),
        header_fields=given.get("header_fields", ()),
        aliases=given.get("aliases", {}),
        schema_versions=given.get("schema_versions", _SCHEMA_VERSIONS),
        ack_wait_s=declared.consumer["ack_wait"] / _NS,
        max_ack_pending=declared.consumer["max_ack_pending"],
        max_deliver=declared.consumer["max_deliver"],
        inactive_threshold_s=declared.consumer["inactive_threshold"] / _NS,
        max_msgs_per_subject=declared.stream["max_msgs_per_subject"],
        replicas=declared.stream["num_replicas"],
        claim=given.get("claim", False),
        fingerprint=given.get("fingerprint"),
        reply_within_s=given["reply_within"] / _NS if "reply_within" in given else None,
        tenants=given.get("tenants", {}),
    )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / _NS


def check_retention(family: Family, kept_s: float) -> None:
    """Refuse TTLs that would have no effect, or that would let an ended job run again."""
    ttl_s, chunk_s = family.journal_ttl_s, family.chunk_ttl_s
    if ttl_s is not None and ttl_s < 2 * family.ack_wait_s:
        problem = "must be at least twice the ack_wait, because a job whose ack was lost is redelivered"
        raise TopologyError(family.file, "family.journal_ttl", problem)
    for key, value in (("journal_ttl", ttl_s), ("chunk_ttl", chunk_s)):
        if value is not None and 0 < kept_s < value:
            raise TopologyError(
                family.file, f"family.{key}", f"must not exceed max_age of the journal stream, {kept_s:g} s"
            )
    if ttl_s is not None and chunk_s is not None and chunk_s > ttl_s:
        raise TopologyError(family.file, "family.chunk_ttl", "must not exceed journal_ttl")


def require_disjoint(families: Mapping[str, Family]) -> None:
    """Refuse a journal or default kind that two families share, and a journal on a family's subjects."""
    journals: dict[str, Family] = {}
    kinds: dict[str, Family] = {}
    for family in families.values():
        other = kinds.setdefault(family.default_kind, family)
        if other is not family:
            problem = f"{family.default_kind!r} is already the default kind of {other.name} in {other.file}"
            raise TopologyError(family.file, "family.default_kind", problem)
        if family.journal is None:
            continue
        other = journals.setdefault(family.journal, family)
        if other is not family:
            problem = f"{family.journal!r} is already the journal of {other.name} in {other.file}"
            raise TopologyError(family.file, "family.journal", problem)
        taken = families.get(family.journal.removeprefix("ai."))
        if taken:
            problem = f"{family.journal!r} is the subject of family {taken.name} in {taken.file}"
            raise TopologyError(family.file, "family.journal", problem)
