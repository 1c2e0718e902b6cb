"""A schedule as it is stored: what it does, and how far it is. One CBOR map in the bucket AI_SCHEDULES."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Self, get_args

from .. import codec, subjects
from ..errors import DecodeError
from ..job import KIND
from .recurrence import TICKS_END_MS, Recurrence, to_ms

FORMAT = 1  # a document of a higher one is left to newer workers
ANY_ROUTE = "-"
BOUND_MAX = 10_000
JOB_ID_MAX = 64
HASH_CHARS = 12
Misfire = Literal["skip", "once", "all"]
Overlap = Literal["run", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is to do, as a caller states it. `Schedules.add` checks it.

    - `id`: a token, once in its `tenant`.
    - `body`: the message of each of its jobs, CBOR of at most 64 KiB. None: the code of `owner` makes the message of
      each tick.
    - `deadline_s`: a job that has not started so long after its tick was enqueued becomes a dead letter.
    - `headers`: sent with each job. `secrets`: the header that names the secret fields, "" for none.
    - `misfire`: what becomes of ticks that are more than `grace_s` late: "skip" them, enqueue the newest "once", or
      "all", at most the newest `bound`.
    - `overlap`: what becomes of a tick while the job of the one before has not ended: "run", or "skip".
    - `owner`: which service declares it; "" for one that a client has added. `generation`: of the declaration.
    """

    tenant: str
    id: str
    recurrence: Recurrence
    family: str
    kind: str
    body: bytes | None
    priority: str = subjects.NORMAL
    deadline_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    secrets: str = ""
    misfire: Misfire = "once"
    bound: int = 100
    grace_s: float = 10.0
    overlap: Overlap = "run"
    owner: str = ""
    generation: int = 0


class SchedulePause(NamedTuple):
    """Since when a schedule is paused (seconds since the epoch), by whom, and why."""

    since: float
    by: str = ""
    reason: str = ""


class FiredTick(NamedTuple):
    """The last tick that has a job: its time in ms, the job with its family and its sequence there, and when it was
    stored.
    """

    tick_ms: int
    job_id: str
    family: str
    seq: int
    at: float


class Missed(NamedTuple):
    """The last time that ticks were missed: from and to which (ms), how many, how many of them have jobs, and when that
    was decided. `more`: there were more than were counted.
    """

    from_ms: int
    to_ms: int
    ticks: int
    fired: int
    at: float
    more: bool = False


@dataclass(frozen=True, slots=True)
class ScheduleDocument:
    """A stored schedule. The fields of `ScheduleSpec` mean the same here. Ticks are whole milliseconds since the epoch,
    other times are seconds since the epoch.

    - `recurrence_document`: how it recurs, see `Recurrence.to_document`. `recurrence` parses it.
    - `version`: grows with each change of what the schedule does.
    - `next_ms`: its next tick; None if there is none. A paused schedule keeps the one at which it was paused.
    - `waiting_ms`: a tick that a worker had in time, and whose lane was full. If it is the next one, it is not missed.
    - `last`: the last tick with a job. `missed`: the last misfire.
    - `fired`: jobs of ticks. `misfired`: missed ticks without a job. `skipped`: ticks without a job because the former
      one had not ended. `failed`: ticks whose message could not be made. `error`: why, until a later tick has a job.
    - `extra`: fields of newer versions, which are kept. `seq`: of the stored message.
    """

    tenant: str
    id: str
    recurrence_document: Mapping[str, Any]
    family: str
    kind: str
    body: bytes | None
    priority: str
    deadline_s: float | None
    headers: Mapping[str, str]
    secrets: str
    misfire: Misfire
    bound: int
    grace_s: float
    overlap: Overlap
    owner: str
    generation: int
    version: int
    created_at: float
    updated_at: float
    paused: SchedulePause | None = None
    next_ms: int | None = None
    waiting_ms: int | None = None
    last: FiredTick | None = None
    missed: Missed | None = None
    fired: int = 0
    misfired: int = 0
    skipped: int = 0
    failed: int = 0
    error: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    seq: int = 0

    @property
    def name(self) -> str:
        """For people, and for the hash of its jitter: ``acme.daily-report``."""
        return f"{self.tenant}.{self.id}"

    @property
    def recurrence(self) -> Recurrence:
        """Raises BadInput: of a newer version, or this host lacks its time zone."""
        return Recurrence.from_document(self.recurrence_document)

    @property
    def route(self) -> str:
        """Whose workers make its jobs: the owner's, or any."""
        return ANY_ROUTE if self.body is not None else self.owner

    @property
    def fingerprint(self) -> str:
        """The same for schedules that do the same."""
        spec = [
            sorted(dict(self.recurrence_document).items()), self.family, self.kind, self.body, self.priority,
            self.deadline_s, sorted(self.headers.items()), self.secrets, self.misfire, self.bound, self.grace_s,
            self.overlap, self.owner,
        ]  # fmt: skip
        return hashlib.sha256(codec.dump(spec)).hexdigest()[:32]

    @classmethod
    def of_spec(cls, spec: ScheduleSpec, now: float) -> Self:
        """Return a new schedule, with its first tick after `now`, seconds since the epoch."""
        document = cls(
            spec.tenant, spec.id, spec.recurrence.to_document(), spec.family, spec.kind, spec.body, spec.priority,
            spec.deadline_s, dict(spec.headers), spec.secrets, spec.misfire, spec.bound, spec.grace_s, spec.overlap,
            spec.owner, spec.generation, 1, now, now,
        )  # fmt: skip
        return replace(document, next_ms=next_ms(spec.recurrence, now))

    def encode(self) -> bytes:
        """Return the stored form."""
        fields = {
            **self.extra,
            "v": FORMAT,
            "recurrence": dict(self.recurrence_document),
            "family": self.family,
            "kind": self.kind,
            "body": self.body,
            "priority": self.priority,
            "deadline": self.deadline_s,
            "headers": dict(self.headers),
            "secrets": self.secrets,
            "misfire": self.misfire,
            "bound": self.bound,
            "grace": self.grace_s,
            "overlap": self.overlap,
            "owner": self.owner,
            "generation": self.generation,
            "version": self.version,
            "created": self.created_at,
            "updated": self.updated_at,
            "paused": self.paused and self.paused._asdict(),
            "next": self.next_ms,
            "last": self.last and self.last._asdict(),
            "missed": self.missed and self.missed._asdict(),
            "fired": self.fired,
            "misfired": self.misfired,
            "skipped": self.skipped,
            "failed": self.failed,
            "error": self.error,
        }
        if self.waiting_ms is not None:
            fields["waiting"] = self.waiting_ms
        return codec.dump(fields)

    @classmethod
    def decode(cls, tenant: str, schedule_id: str, body: bytes, seq: int) -> Self:
        """Return the schedule that is stored. Raises DecodeError: damaged, or of a newer format."""
        read = codec.decode(body, codec.CBOR)
        if not isinstance(read, dict) or not isinstance(read.get("v"), int):
            raise DecodeError(f"the document of schedule {tenant}.{schedule_id} is damaged: add the schedule again")
        if read["v"] > FORMAT:
            raise DecodeError(f"schedule {tenant}.{schedule_id} is of format {read['v']}: update aiqueue on this host")
        try:
            return cls._of_fields(tenant, schedule_id, dict(read), seq)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__} {error}"[:200]
            raise DecodeError(f"the document of schedule {tenant}.{schedule_id} is damaged ({problem})") from None

    @classmethod
    def _of_fields(cls, tenant: str, schedule_id: str, read: dict[str, Any], seq: int) -> Self:
        del read["v"]
        take = read.pop
        misfire, overlap = take("misfire"), take("overlap")
        if misfire not in get_args(Misfire) or overlap not in get_args(Overlap):
            raise ValueError("an unknown policy")
        for name, is_right in _CHECKS.items():
            if not is_right(read.get(name, _DEFAULTS[name]) if name in _DEFAULTS else read[name]):
                raise ValueError(f"a wrong {name}")
        if not subjects.TOKEN.fullmatch(tenant) or not subjects.TOKEN.fullmatch(schedule_id):
            raise ValueError("a wrong name")
        if read["body"] is None and not read["owner"]:
            raise ValueError("no message and no owner")
        return cls(
            tenant, schedule_id,
            take("recurrence"), take("family"), take("kind"), take("body"), take("priority"), take("deadline"),
            take("headers"), take("secrets"), misfire, take("bound"), take("grace"), overlap, take("owner"),
            take("generation"), take("version"), take("created"), take("updated"),
            paused=_part(SchedulePause, take("paused", None)),
            next_ms=take("next", None),
            waiting_ms=take("waiting", None),
            last=_part(FiredTick, take("last", None)),
            missed=_part(Missed, take("missed", None)),
            fired=take("fired", 0), misfired=take("misfired", 0), skipped=take("skipped", 0),
            failed=take("failed", 0), error=take("error", ""),
            extra=read, seq=seq,
        )  # fmt: skip


def _part(kind: Any, read: Any) -> Any:
    """Return a part of a document without the fields that this version does not know."""
    if read is None:
        return None
    found = kind(**{name: read[name] for name in kind._fields if name in read})
    for name, value in found._asdict().items():
        if not (isinstance(value, str) if name in _TEXTS else _is_number(value)):
            raise ValueError(f"a wrong {name}")
    return found


def _is_number(value: Any, low: float = 0, high: float = 2**63) -> bool:
    return isinstance(value, int | float) and low <= value <= high


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_header(name: Any, value: Any) -> bool:
    """Whether a caller may set this header: none of those that decide what a stream does with a job."""
    reserved = ("nats-", "aiq-", "content-type")
    return isinstance(name, str) and isinstance(value, str) and not name.lower().startswith(reserved)


# What workers do with a document they do on behalf of who wrote it: a family of three tokens is another tenant's lane.
_TEXTS = ("by", "reason", "job_id", "family")  # of the parts of a document; their other fields are numbers
_DEFAULTS: Mapping[str, Any] = {"next": None, "error": "", "fired": 0, "misfired": 0, "skipped": 0, "failed": 0}
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "recurrence": lambda value: isinstance(value, dict),
    "family": lambda value: isinstance(value, str) and subjects.FAMILY.fullmatch(value) is not None,
    "kind": lambda value: isinstance(value, str) and KIND.fullmatch(value) is not None,
    "body": lambda value: isinstance(value, bytes | None),
    "priority": lambda value: isinstance(value, str) and subjects.PRIORITY.fullmatch(value) is not None,
    "deadline": lambda value: value is None or _is_number(value),
    "headers": lambda value: isinstance(value, dict) and all(_is_header(*each) for each in value.items()),
    "secrets": lambda value: isinstance(value, str),
    "bound": lambda value: type(value) is int and 1 <= value <= BOUND_MAX,
    "grace": _is_number,
    "owner": lambda value: value == "" or (isinstance(value, str) and subjects.TOKEN.fullmatch(value) is not None),
    "generation": _is_count,
    "version": _is_count,
    "created": _is_number,
    "updated": _is_number,
    "next": lambda value: value is None or (_is_count(value) and value < TICKS_END_MS),
    "error": lambda value: isinstance(value, str),
    **dict.fromkeys(("fired", "misfired", "skipped", "failed"), _is_count),
}


def next_ms(recurrence: Recurrence, after: float) -> int | None:
    """Return the first tick after a time in seconds, in milliseconds."""
    found = recurrence.next_after(after)
    return None if found is None else to_ms(found)


def tick_job_id(schedule_id: str, tick_ms: int, suffix: str = "") -> str:
    """Return the id of a tick's job: the same whoever enqueues it. At most 64 characters, so a long id is cut, and its
    hash follows.
    """
    at = datetime.fromtimestamp(tick_ms // 1000, UTC).strftime("%Y%m%dT%H%M%S")
    tail = f"-{at}{tick_ms % 1000:03}Z{suffix}" if tick_ms % 1000 else f"-{at}Z{suffix}"
    if len(schedule_id) + len(tail) > JOB_ID_MAX:
        head = schedule_id[: JOB_ID_MAX - len(tail) - HASH_CHARS - 1]
        schedule_id = f"{head}_{subjects.hashed(schedule_id)[:HASH_CHARS]}"
    return f"{schedule_id}{tail}"
