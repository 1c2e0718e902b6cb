"""The declared families and streams, from all ``streams/*.toml`` files. Plain values: asks no server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from .. import subjects
from ..errors import TopologyError, UnknownFamily
from . import overlay
from .family import Family, check_retention, lane_name, make_family, require_disjoint
from .files import LIMITS_FILE, bundled_directory, list_directories, list_files, read_text
from .selection import ANSWER_WITHIN_NS, ANSWERS, WITH_FAMILIES, Stated, advise, choose, is_declared
from .streamfile import PROFILES, REPEATED, Role, StreamFile, parse_cached
from .values import SIZES

if TYPE_CHECKING:
    from ..config import Settings

__all__ = [
    "LIMITS_FILE", "Family", "Stated", "StreamSpec", "Topology", "bundled_directory", "lane_name", "list_directories",
]  # fmt: skip

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A declared stream. `config` has the form of the JetStream API (nanoseconds, bytes), with declared fields only."""

    name: str
    role: Role
    file: str
    config: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Topology:
    """All declared families and streams, for one profile and size.

    `stated` is the setting `families`, None if all default ones are declared; `left_out` are the families of the stream
    files that it does not name.
    """

    profile: str
    """"single" for one server, "cluster" for three."""
    size: str
    """"small", "medium" or "large"."""
    families: Mapping[str, Family] = field(hash=False)
    streams: Mapping[str, StreamSpec] = field(hash=False)
    """Declared streams, by name."""
    stated: Stated[Sequence[str]] | None = field(default=None, hash=False)
    left_out: Sequence[str] = field(default=(), hash=False)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the topology that the settings declare. Raises TopologyError."""
        families, laid_over = settings.families, settings.overlay
        return cls.load(
            *([settings.streams] if settings.streams else ()),
            profile=settings.profile,
            size=settings.size,
            families=None if families is None else Stated(families, *settings.place("families")),
            laid_over=Stated(laid_over, *settings.place("overlay")) if laid_over else None,
        )

    @classmethod
    def load(cls, *directories: Path, **chosen: Any) -> Self:
        """Load the bundled files, then those of `directories`, which add families but cannot change bundled ones.

        `chosen` are the options of `build`. Raises TopologyError.
        """
        files = [path for root in list_directories(*directories) for path in list_files(root)]
        return cls.build(((str(path), read_text(path)) for path in files), **chosen)

    @classmethod
    def build(
        cls,
        files: Iterable[tuple[str, str]],
        *,
        profile: str = "single",
        size: str = "medium",
        families: Stated[Sequence[str]] | None = None,
        laid_over: Stated[Mapping[str, Any]] | None = None,
    ) -> Self:
        """Build the topology from (file name, TOML text) pairs, in this order.

        - `profile`: "single" (one server) or "cluster" (three replicas). `size`: how large the streams may grow.
        - `families`: the families to declare, optional ones too. None: those of the files.
        - `laid_over`: tables of `overlay`, by family or by role, whose keys replace those of the files.

        Raises TopologyError.
        """
        for key, value, known in (("profile", profile, PROFILES), ("size", size, SIZES)):
            if value not in known:
                raise TopologyError("topology", key, f"unknown {key} {value!r}; known: {', '.join(known)}")
        declared = [parse_cached(file, text, profile, size) for file, text in files]
        default = {each.family["name"] for each in declared if each.family}
        optional = overlay.parse_needed(declared, families, laid_over, profile=profile, size=size)
        chosen = default if families is None else choose(declared, optional, families)
        if laid_over is not None:
            declared, optional = overlay.lay_over(declared, optional, laid_over, size=size)
        declared = [_answering(each, chosen) for each in [*declared, *optional] if is_declared(each, chosen)]
        with overlay.placed(declared, laid_over):
            found = _make_families(declared)
            streams: dict[str, StreamSpec] = {}
            for each in declared:
                _add(streams, _make_stream_spec(each, found), each.file, "stream.name")
            for role in get_args(Role):
                if role not in ("work", "inbox"):
                    _require_one_stream(role, streams, may_lack=role in WITH_FAMILIES)
            kept_ns = next(each for each in streams.values() if each.role == "journal").config["max_age"]
            for family in found.values():
                check_retention(family, kept_ns / _NS)
        return cls(profile, size, found, streams, families, tuple(sorted(default - chosen)))

    @property
    def work_families(self) -> tuple[Family, ...]:
        """The families with lanes, in the order of their files."""
        return tuple(each for each in self.families.values() if each.role == "work")

    @property
    def journal_stream(self) -> StreamSpec:
        """Stream of the journals: results, progress and chunks."""
        return self._by_role("journal")

    @property
    def dead_stream(self) -> StreamSpec:
        """Stream of the dead letters."""
        return self._by_role("dead")

    @property
    def stranded_stream(self) -> StreamSpec:
        """Stream of the server's notices of jobs that had their last delivery."""
        return self._by_role("stranded")

    @property
    def parked_stream(self) -> StreamSpec:
        """Stream of the jobs that wait for a time."""
        return self._by_role("parked")

    @property
    def documents_stream(self) -> StreamSpec:
        """Stream of the documents: bodies that are too large for a message."""
        return self._by_role("documents")

    @property
    def presence_stream(self) -> StreamSpec:
        """Bucket of the agents, and of the workers that run."""
        return self._by_role("presence")

    @property
    def checkpoints_stream(self) -> StreamSpec:
        """Stream of what steps have returned, and of children."""
        return self._by_role("checkpoints")

    @property
    def limits_stream(self) -> StreamSpec:
        """Bucket of the use of limited keys, of overrides and pauses."""
        return self._by_role("limits")

    @property
    def usage_stream(self) -> StreamSpec:
        """Stream of what calls of models have cost."""
        return self._by_role("usage")

    @property
    def recent_stream(self) -> StreamSpec:
        """Stream of the requests that clients may repeat."""
        return self._by_role("recent")

    @property
    def rag_stream(self) -> StreamSpec:
        """Stream of the hosts on which documents are."""
        return self._by_role("rag")

    @property
    def ticks_stream(self) -> StreamSpec:
        """Stream of the ticks of schedules that are to come."""
        return self._by_role("ticks")

    @property
    def schedules_stream(self) -> StreamSpec:
        """Bucket of the schedules."""
        return self._by_role("schedules")

    @property
    def api_keys_stream(self) -> StreamSpec:
        """Bucket of the API keys of the gateway."""
        return self._by_role("api_keys")

    @property
    def batches_stream(self) -> StreamSpec:
        """Bucket of the gateway's files and batches."""
        return self._by_role("batches")

    @property
    def audit_stream(self) -> StreamSpec:
        """Stream of what operators have done."""
        return self._by_role("audit")

    @property
    def metrics_stream(self) -> StreamSpec:
        """Stream of the counters of the history."""
        return self._by_role("metrics")

    @property
    def inbox_family(self) -> Family:
        """The family of agents' mail. Raises UnknownFamily."""
        for each in self.families.values():
            if each.role == "inbox":
                return each
        raise self._unknown("agent.message")

    def family(self, name: str) -> Family:
        """Return the family of this name. Raises UnknownFamily, which lists the declared ones."""
        try:
            return self.families[name]
        except (KeyError, TypeError):  # TypeError: a list, or something else that cannot be a key
            raise self._unknown(name) from None

    def family_of_kind(self, kind: str) -> Family | None:
        """Return the family whose default_kind is `kind`, None if there is none."""
        return next((each for each in self.families.values() if each.default_kind == kind), None)

    def has(self, role: Role) -> bool:
        """Whether a stream of the role is declared. Some are only beside the families that use them."""
        return any(each.role == role for each in self.streams.values())

    def advice(self, name: object) -> str:
        """Return which setting would declare a family that is not declared. Empty: no file knows this family."""
        return advise(name, self.left_out, self.stated)

    def _by_role(self, role: Role) -> StreamSpec:
        for each in self.streams.values():
            if each.role == role:
                return each
        raise self._unknown(WITH_FAMILIES[role][0])

    def _unknown(self, name: str) -> UnknownFamily:
        advice = self.advice(name)
        return UnknownFamily(name, tuple(sorted(self.families)), f"; {advice}" if advice else "")


_METRICS = (  # as the room metrics builds them
    "ai.metrics.minute.*.*.*.*.*", "ai.metrics.hour.*.*.*.*.*", "ai.metrics.total.*.*.*.*",
    "ai.metrics.tenant.*.*.*.*.*", "ai.metrics.flush.*",
)  # fmt: skip
_SUBJECTS: Mapping[Role, list[str]] = {  # of streams that no name or family decides on
    "dead": [subjects.dead("*.*")],
    "checkpoints": [subjects.checkpoints("*.*", "*", "*", "*")],
    "parked": [subjects.parked(is_due=False), subjects.parked(is_due=True)],
    "ticks": [subjects.tick("*", "*", "*", "*"), subjects.tick("*", "*", "*")],
    "usage": subjects.usage_filters(),
    "recent": [subjects.recent("*", "*")],
    "rag": [f"{subjects.RAG_STORES}.>"],
    "audit": [f"{subjects.AUDIT}.*"],
    "metrics": list(_METRICS),
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
            config["subjects"] = [subjects.journal(root, "*", "*") for root in roots] or [config["name"]]
        case "stranded":
            work = [each.stream for each in families.values() if each.role == "work"]
            config["subjects"] = [subjects.stranded(each) for each in work] or [config["name"]]
        case "presence" | "schedules" | "limits" | "api_keys" | "batches":
            config["subjects"] = [subjects.bucket(config["name"])]
            if dest := REPEATED.get(declared.role):
                config["republish"] = {"src": subjects.bucket(config["name"]), **dest}
        case "documents":
            config["subjects"] = [subjects.objects(config["name"], kind, ">") for kind in "CMR"]
        case _:
            config["subjects"] = _SUBJECTS[declared.role]
    return StreamSpec(config["name"], declared.role, declared.file, config)


def _make_families(declared: Iterable[StreamFile]) -> dict[str, Family]:
    """Return the families of the stream files. Raises TopologyError if two of them do not go together."""
    families: dict[str, Family] = {}
    for each in declared:
        if each.family:
            family = make_family(each)
            _add(families, family, each.file, "family.name")
    require_disjoint(families)
    return families


def _answering(declared: StreamFile, chosen: set[str]) -> StreamFile:
    """Return a stream file whose family answers requests if the subject of its answers is among the chosen names."""
    name = declared.family.get("name")
    if name is None or "reply_within" in declared.family or not any(ANSWERS.get(each) == name for each in chosen):
        return declared
    return replace(declared, family={**declared.family, "reply_within": ANSWER_WITHIN_NS})


def _add(known: dict[str, Any], declared: Family | StreamSpec, file: str, key: str) -> None:
    if (other := known.setdefault(declared.name, declared)) is not declared:
        raise TopologyError(file, key, f"{declared.name!r} is already declared in {other.file}")


def _require_one_stream(role: str, streams: Mapping[str, StreamSpec], *, may_lack: bool) -> None:
    found = [each for each in streams.values() if each.role == role]
    if not found and not may_lack:
        raise TopologyError("topology", "role", f"no file declares the {role} stream")
    if len(found) > 1:
        raise TopologyError(found[1].file, "role", f"the {role} stream is already declared in {found[0].file}")
