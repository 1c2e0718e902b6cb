"""What the record of a worker says. Records are read in another program's words: whatever stands there is listed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from pydantic_core import CoreSchema, SchemaValidator, ValidationError
from pydantic_core import core_schema as schemas

from ..job import ANY_KIND
from ..lanes import Pause

SILENT_S = 11.0  # a worker that is well writes every 5 s
LATE_S = 7.0
TEXT_MAX = 300
LIST_MAX = 10_000
NUMBER_MAX = 2**62

WorkerState = Literal["running", "draining", "stalled", "disconnected", "silent"]
_STATES: Mapping[str, WorkerState] = {
    "ok": "running", "draining": "draining", "stalled": "stalled", "disconnected": "disconnected",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker runs, as its record says. `age_s`: since its delivery, in seconds. `seq`: in its stream.

    `job_id`, `kind`: "" where the headers of the job do not say them.
    """

    family: str
    tenant: str
    priority: str
    seq: int
    job_id: str
    kind: str
    age_s: float


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker, as its record says, which it writes every 5 s. Times are seconds since the epoch.

    - `state`: "running"; "draining" (it takes no more jobs, and ends when those that run have ended); "stalled" (for
      `stalled_s` seconds: its event loop is blocked, at `blocked_at`, or no job arrives although lanes hold some);
      "disconnected"; "silent" (nothing was heard of it for SILENT_S: it was killed, or is cut off, and is not listed
      any more from 20 s on).
    - `slots`, `running`: how many jobs it can run at once, and how many have a slot. `waiting`: jobs that it holds, and
      that have none yet. `done`: deliveries that it has run. `lanes`: how many it pulls on.
      `in_line`: how many lanes more stand in line, by family, because it has too many with jobs.
    - `kinds`: those that it has handlers for, by family; ``*`` stands for every kind. Empty while it drains.
      `tenants`: whose jobs it takes; None: all.
    - `jobs`: the oldest of those that run, at most 5, the oldest first.
    - `rss_bytes`: the memory of its process; None: not known. `pid`, `started_at`, `version`: of the process; 0 or ""
      where a former version has written the record.
    - `heard_at`: when the record was stored. `answers`: it tells which jobs it holds.
    - `heeds_pauses`, `heeds_limits`: see `aiqueue doctor`. `pauses`: those that concern its families and tenants.
    """

    name: str
    """Name of the worker, by default host and process id."""
    state: WorkerState
    host: str
    """Host on which the worker runs."""
    pid: int
    version: str
    started_at: float
    heard_at: float
    slots: int
    running: int
    waiting: int
    done: int
    lanes: int
    families: tuple[str, ...]
    """Families whose jobs it takes."""
    kinds: Mapping[str, tuple[str, ...]]
    tenants: tuple[str, ...] | None
    """Tenants whose jobs it takes; None: all."""
    jobs: tuple[RunningJob, ...]
    rss_bytes: int | None
    stalled_s: float = 0.0
    """For how many seconds it has been stalled; 0: it is not."""
    blocked_at: str = ""
    """Line of code that blocks the event loop; empty: nothing does."""
    answers: bool = False
    heeds_pauses: bool = False
    heeds_limits: bool = False
    pauses: tuple[Pause, ...] = ()
    in_line: Mapping[str, int] = field(default_factory=dict)
    """How many lanes stand in line, by family, because too many have jobs."""
    limits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rules of the limits.toml that the worker has read, as text, by family with a `limit_key`."""
    late_s: float = 0.0
    """For how many seconds nothing was heard of a worker that should have written its record; 0: it is not late."""

    @property
    def oldest(self) -> RunningJob | None:
        """The job that runs longest."""
        return self.jobs[0] if self.jobs else None

    @property
    def is_busy(self) -> bool:
        """Whether all of its slots are taken."""
        return self.running >= self.slots

    def serves_lane(self, family: str, tenant: str) -> bool:
        """Return whether it is there for the jobs of a tenant; ``*``: of any."""
        return family in self.families and (self.tenants is None or tenant == "*" or tenant in self.tenants)

    def knows(self, family: str, kind: str) -> bool:
        """Return whether it has a handler for a kind."""
        known = self.kinds.get(family, ())
        return kind in known or ANY_KIND in known


def parse_workers(heard: Iterable[tuple[bytes, float]], now: float, pauses: Sequence[Pause] = ()) -> list[WorkerStats]:
    """Return the workers of records, sorted by name. Each record comes with the time at which it was stored.

    Other programs can write records: what is no JSON object is left out, and a field that is wrong counts as absent.
    """
    parse, found = _schema().validate_json, []
    for record, heard_at in heard:
        try:
            worker = parse(record)
        except ValidationError:
            continue
        _complete(worker, heard_at, now, pauses)
        found.append(worker)
    return sorted(found, key=_identity)


_identity = operator.attrgetter("name", "host", "pid")
_age_of = operator.attrgetter("age_s")
_set = object.__setattr__  # nobody else has the worker yet


def _complete(worker: WorkerStats, heard_at: float, now: float, pauses: Sequence[Pause]) -> None:
    """Set what depends on more than one field, or on more than the record."""
    _set(worker, "heard_at", heard_at)
    if not worker.name:
        _set(worker, "name", "?")
    if not worker.rss_bytes:  # not known
        _set(worker, "rss_bytes", None)
    state = _STATES.get(cast("str", worker.state), "running")
    _set(worker, "state", "silent" if now - heard_at > SILENT_S else state)
    _set(worker, "late_s", now - heard_at if now - heard_at > LATE_S else 0.0)
    if not worker.families:  # a former version has written none
        _set(worker, "families", tuple(worker.kinds))
    if len(worker.jobs) > 1:
        _set(worker, "jobs", tuple(sorted(worker.jobs, key=_age_of, reverse=True)))
    _set(worker, "pauses", tuple(each for each in pauses if _concerns(each, worker)) if pauses else ())


def _concerns(pause: Pause, worker: WorkerStats) -> bool:
    served = worker.tenants
    return pause.family in worker.families and (served is None or pause.tenant is None or pause.tenant in served)


@cache
def _schema() -> SchemaValidator:
    """Return what makes a WorkerStats of a record, a thousand of them in half the time that Python code takes."""
    texts, text = _field(_tuple_of(_TEXT), _as_texts, tuple), _field(_TEXT, as_text, str)
    whole, number = _field(_WHOLE, as_whole, int), _field(_NUMBER, as_number, float)
    flag = _field(schemas.bool_schema(strict=True), lambda value: value is True, bool)
    job = _dataclass(
        RunningJob, {"age_s": "delivered_s"},
        dict.fromkeys(("family", "tenant", "priority", "job_id", "kind"), text) | {"seq": whole, "age_s": number},
    )  # fmt: skip
    jobs = _tuple_of(job)
    validate_jobs = SchemaValidator(jobs).validate_python

    def as_jobs(value: Any) -> Any:
        found = [each for each in value if type(each) is dict] if type(value) is list else []
        return validate_jobs(found[:LIST_MAX])

    fields: dict[str, CoreSchema] = {
        "name": text, "state": text, "host": text, "pid": whole, "version": text, "started_at": number,
        "slots": whole, "running": whole, "waiting": whole, "done": whole, "lanes": whole, "families": texts,
        "kinds": _field(schemas.dict_schema(_TEXT, _tuple_of(_TEXT)), _as_kinds, dict),
        "tenants": _field(schemas.nullable_schema(_tuple_of(_TEXT)), _as_texts, lambda: None),
        "jobs": _field(jobs, as_jobs, tuple), "rss_bytes": whole, "stalled_s": number, "blocked_at": text,
        "answers": flag, "heeds_pauses": flag, "heeds_limits": flag,
        "limits": _field(schemas.dict_schema(_TEXT, _tuple_of(_TEXT)), _as_kinds, dict),
        "in_line": _field(schemas.dict_schema(_TEXT, _WHOLE), _as_lines, dict),
    }  # fmt: skip
    names = {"name": "worker", "started_at": "started", "heeds_limits": "key_lanes"}
    return SchemaValidator(_dataclass(WorkerStats, names, fields))


_TEXT = schemas.str_schema(strict=True, max_length=TEXT_MAX)
_WHOLE = schemas.int_schema(strict=True, ge=0, lt=NUMBER_MAX)
_NUMBER = schemas.float_schema(strict=True, ge=0, lt=NUMBER_MAX, allow_inf_nan=False)


def _field(usual: CoreSchema, otherwise: Callable[[Any], Any], absent: Callable[[], Any]) -> CoreSchema:
    """Return the schema of a field that is mostly as `usual`. If it is not, `otherwise` makes a value of it."""
    plain = schemas.no_info_plain_validator_function(otherwise)
    either = schemas.union_schema([usual, plain], mode="left_to_right")
    return schemas.with_default_schema(either, default_factory=absent)


def _tuple_of(item: CoreSchema) -> CoreSchema:
    return schemas.tuple_schema([item], variadic_item_index=0, max_length=LIST_MAX)


def _dataclass(cls: type, names: Mapping[str, str], fields: Mapping[str, CoreSchema]) -> CoreSchema:
    """`names`: what fields are called in records, where that is another name."""
    arguments = [
        schemas.dataclass_field(name, schema, validation_alias=names.get(name)) for name, schema in fields.items()
    ]
    return schemas.dataclass_schema(
        cls, schemas.dataclass_args_schema(cls.__name__, arguments), list(fields), slots=True, frozen=True
    )


def _as_kinds(value: Any) -> dict[str, tuple[str, ...]]:
    return {as_text(name): _as_texts(each) for name, each in value.items()} if type(value) is dict else {}


def _as_lines(value: Any) -> dict[str, int]:
    return {as_text(name): as_whole(lanes) for name, lanes in value.items()} if type(value) is dict else {}


def _as_texts(value: Any) -> tuple[str, ...]:
    return tuple(map(as_text, value[:LIST_MAX])) if type(value) is list else ()


def as_text(value: Any) -> str:
    """Return a text, cut where it is too long, and "" for anything else."""
    return value[:TEXT_MAX] if type(value) is str else ""


def as_number(value: Any) -> float:
    """Return a number, and 0 for what is none, negative, too large or not finite."""
    is_number = type(value) is float or type(value) is int
    return float(value) if is_number and 0 <= value < NUMBER_MAX else 0.0  # NaN, too, is none of these


def as_whole(value: Any) -> int:
    """As `as_number`, without decimals."""
    return value if type(value) is int and 0 <= value < NUMBER_MAX else int(as_number(value))
