"""The declared families and streams, from all ``streams/*.toml`` files. Plain values: asks no server."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

from .. import subjects
from ..errors import BadInput, TopologyError, UnknownFamily
from . import streamfile
from .streamfile import PROFILES, REPEATED, Role, StreamFile

_NS = 1_000_000_000
_SCHEMA_VERSIONS = ("1.0", "1")
_PRIORITIES = ("high", "normal", "low")
LIMITS_FILE = "limits.toml"  # no stream file: the rules of limits
_OTHER_FILES = (LIMITS_FILE, "gateway.toml", "rag.toml")  # which lie beside the streams
_parse_file = lru_cache(maxsize=64)(streamfile.parse_file)  # each client of a process finds the same files


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
        """Return what to do to set a key of the family, for an error. A bundled family cannot be changed."""
        if Path(self.file).parent == bundled_directory():
            return f"declare a family of your own with {key}, because a bundled one cannot be changed"
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


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A declared stream. `config` has the form of the JetStream API (nanoseconds, bytes), with declared fields only."""

    name: str
    role: Role
    file: str
    config: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Topology:
    """All declared families and streams, for one profile."""

    profile: str
    families: Mapping[str, Family] = field(hash=False)
    streams: Mapping[str, StreamSpec] = field(hash=False)

    @classmethod
    def load(cls, *directories: Path, profile: str = "single") -> Self:
        """Load the bundled files, then those of `directories`, which add families but cannot change bundled ones.

        `profile` is "single" (one server) or "cluster" (three replicas). Raises TopologyError.
        """
        files = [path for root in list_directories(*directories) for path in _list_files(root)]
        return cls.build(((str(path), _read_text(path)) for path in files), profile=profile)

    @classmethod
    def build(cls, files: Iterable[tuple[str, str]], *, profile: str = "single") -> Self:
        """Build the topology from (file name, TOML text) pairs, in this order. Raises TopologyError."""
        if profile not in PROFILES:
            raise TopologyError("topology", "profile", f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
        declared = [_parse_file(file, text, profile) for file, text in files]
        families: dict[str, Family] = {}
        for each in declared:
            if each.family:
                family = _make_family(each)
                _add(families, family, each.file, "family.name")
        _require_disjoint(families)
        streams: dict[str, StreamSpec] = {}
        for each in declared:
            _add(streams, _make_stream_spec(each, families), each.file, "stream.name")
        for role in get_args(Role):
            if role not in ("work", "inbox"):
                _require_one_stream(role, streams)
        kept_ns = next(each for each in streams.values() if each.role == "journal").config["max_age"]
        for family in families.values():
            _check_retention(family, kept_ns / _NS)
        return cls(profile, families, streams)

    @property
    def work_families(self) -> tuple[Family, ...]:
        """The families with lanes, in the order of their files."""
        return tuple(each for each in self.families.values() if each.role == "work")

    @property
    def journal_stream(self) -> StreamSpec:
        return self._by_role("journal")

    @property
    def dead_stream(self) -> StreamSpec:
        return self._by_role("dead")

    @property
    def stranded_stream(self) -> StreamSpec:
        return self._by_role("stranded")

    @property
    def parked_stream(self) -> StreamSpec:
        return self._by_role("parked")

    @property
    def documents_stream(self) -> StreamSpec:
        return self._by_role("documents")

    @property
    def presence_stream(self) -> StreamSpec:
        return self._by_role("presence")

    @property
    def checkpoints_stream(self) -> StreamSpec:
        return self._by_role("checkpoints")

    @property
    def limits_stream(self) -> StreamSpec:
        return self._by_role("limits")

    @property
    def usage_stream(self) -> StreamSpec:
        return self._by_role("usage")

    @property
    def recent_stream(self) -> StreamSpec:
        return self._by_role("recent")

    @property
    def rag_stream(self) -> StreamSpec:
        return self._by_role("rag")

    @property
    def ticks_stream(self) -> StreamSpec:
        return self._by_role("ticks")

    @property
    def schedules_stream(self) -> StreamSpec:
        return self._by_role("schedules")

    @property
    def api_keys_stream(self) -> StreamSpec:
        return self._by_role("api_keys")

    @property
    def batches_stream(self) -> StreamSpec:
        return self._by_role("batches")

    @property
    def inbox_family(self) -> Family:
        """The family of agents' mail. Raises UnknownFamily."""
        for each in self.families.values():
            if each.role == "inbox":
                return each
        raise UnknownFamily("agent.message", tuple(sorted(self.families)))

    def family(self, name: str) -> Family:
        """Return the family of this name. Raises UnknownFamily, which lists the declared ones."""
        try:
            return self.families[name]
        except (KeyError, TypeError):  # TypeError: a list, or something else that cannot be a key
            raise UnknownFamily(name, tuple(sorted(self.families))) from None

    def family_of_kind(self, kind: str) -> Family | None:
        """Return the family whose default_kind is `kind`, None if there is none."""
        return next((each for each in self.families.values() if each.default_kind == kind), None)

    def _by_role(self, role: Role) -> StreamSpec:
        return next(each for each in self.streams.values() if each.role == role)


def bundled_directory() -> Path:
    """Return the directory of the bundled files: inside the package if installed, else in the root of the checkout."""
    here = Path(__file__).resolve().parent.parent
    for directory in (here / "streams", here.parent / "streams"):
        if directory.is_dir():
            return directory
    raise TopologyError(str(here / "streams"), "", "the bundled stream files are missing: reinstall aiqueue")


def list_directories(*directories: Path) -> list[Path]:
    """Return the directories of stream files and rules of limits: the bundled one, and the given ones."""
    bundled = bundled_directory()
    return [bundled, *(each for each in directories if each.resolve() != bundled.resolve())]


def _list_files(directory: Path) -> list[Path]:
    """List the stream files of a directory, sorted by name. Skips hidden files, which editors create, and the rules of
    limits, models of the gateway and settings of retrieval, which lie beside the streams.
    """
    if not directory.is_dir():
        raise TopologyError(str(directory), "", "no such directory")
    files = sorted(path for path in directory.glob("*.toml") if not path.name.startswith("."))
    if not files:
        raise TopologyError(str(directory), "", "contains no *.toml file")
    return [path for path in files if path.name not in _OTHER_FILES]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TopologyError(str(path), "", f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TopologyError(str(path), "", f"is not UTF-8 (byte {error.start})") from None


def _make_family(declared: StreamFile) -> Family:
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


_SUBJECTS: Mapping[Role, list[str]] = {  # of streams that no name or family decides on
    "dead": [subjects.dead("*.*")],
    "checkpoints": [subjects.checkpoints("*.*", "*", "*", "*")],
    "parked": [subjects.parked(is_due=False), subjects.parked(is_due=True)],
    "ticks": [subjects.tick("*", "*", "*", "*"), subjects.tick("*", "*", "*")],
    "usage": subjects.usage_filters(),
    "recent": [subjects.recent("*", "*")],
    "rag": [f"{subjects.RAG_STORES}.>"],
}


def _make_stream_spec(declared: StreamFile, families: Mapping[str, Family]) -> StreamSpec:
    """Return the stream with its computed subjects, and for work streams the transform of the bare subject."""
    config = dict(declared.stream)
    match declared.role:
        case "work":
            family = families[declared.family["name"]]
            bare = f"ai.{family.name}.*"
            # One subject per priority: a wildcard would store jobs under priorities that no worker consumes.
            config["subjects"] = [bare, *(subjects.lane(family.name, "*", each) for each in family.priorities)]
            if family.limit_key:
                config["subjects"] += [subjects.lane(family.name, "*", each, "*") for each in family.priorities]
            normal = subjects.lane(family.name, "{{wildcard(1)}}", subjects.NORMAL)
            config["subject_transform"] = {"src": bare, "dest": normal}
        case "inbox":
            config["subjects"] = [f"ai.{declared.family['name']}.*", f"ai.{declared.family['name']}.*.*"]
        case "journal":
            # Five tokens only. On the bare subjects responders answer; a stream there would answer with its PubAck.
            roots = [each.journal for each in families.values() if each.journal]
            config["subjects"] = [subjects.journal(root, "*", "*") for root in roots]
        case "stranded":
            work = [each.stream for each in families.values() if each.role == "work"]
            config["subjects"] = [subjects.stranded(each) for each in work]
        case "presence" | "schedules" | "limits" | "api_keys" | "batches":
            config["subjects"] = [subjects.bucket(config["name"])]
            if dest := REPEATED.get(declared.role):
                config["republish"] = {"src": subjects.bucket(config["name"]), **dest}
        case "documents":
            config["subjects"] = [subjects.objects(config["name"], kind, ">") for kind in "CMR"]
        case _:
            config["subjects"] = _SUBJECTS[declared.role]
    return StreamSpec(config["name"], declared.role, declared.file, config)


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / _NS


def _check_retention(family: Family, kept_s: float) -> None:
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


def _add(known: dict[str, Any], declared: Family | StreamSpec, file: str, key: str) -> None:
    if (other := known.setdefault(declared.name, declared)) is not declared:
        raise TopologyError(file, key, f"{declared.name!r} is already declared in {other.file}")


def _require_disjoint(families: Mapping[str, Family]) -> None:
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


def _require_one_stream(role: str, streams: Mapping[str, StreamSpec]) -> None:
    found = [each for each in streams.values() if each.role == role]
    if not found:
        raise TopologyError("topology", "role", f"no file declares the {role} stream")
    if len(found) > 1:
        raise TopologyError(found[1].file, "role", f"the {role} stream is already declared in {found[0].file}")
