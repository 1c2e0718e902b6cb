"""Reads the records of running workers, and asks them which of them holds a job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import subjects
from ..connection import Connection
from ..errors import BadInput, NotFound, Unavailable
from ..job import ANY_KIND
from ..lanes import Pause, Record, WorkerRecords
from ..topology import Topology
from .pauses import read_pauses_if_allowed

SILENT_S = 11.0  # a worker that is well writes every 5 s
ASK_S = 0.25  # how long the holder of a job is waited for
TEXT_MAX = 300
LIST_MAX = 10_000
NUMBER_MAX = 2**62

WorkerState = Literal["running", "draining", "stalled", "disconnected", "silent"]
HeldState = Literal["waiting", "starting", "running", "result", "absent"]
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
    - `kinds`: those that it has handlers for, by family; ``*`` stands for every kind. Empty while it drains.
      `tenants`: whose jobs it takes; None: all.
    - `jobs`: the oldest of those that run, at most 5, the oldest first.
    - `rss_bytes`: the memory of its process; None: not known. `pid`, `started_at`, `version`: of the process; 0 or ""
      where a former version has written the record.
    - `heard_at`: when the record was stored. `answers`: it tells which jobs it holds.
    - `heeds_pauses`, `heeds_limits`: see `aiqueue doctor`. `pauses`: those that concern its families and tenants.
    """

    name: str
    state: WorkerState
    host: str
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
    kinds: Mapping[str, tuple[str, ...]]
    tenants: tuple[str, ...] | None
    jobs: tuple[RunningJob, ...]
    rss_bytes: int | None
    stalled_s: float = 0.0
    blocked_at: str = ""
    answers: bool = False
    heeds_pauses: bool = False
    heeds_limits: bool = False
    pauses: tuple[Pause, ...] = ()

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


@dataclass(frozen=True, slots=True)
class Holder:
    """Which worker holds a job, and how, as the worker says. Times are seconds since the epoch.

    - `state`: "waiting" (for a slot), "starting" (it has a slot, and its handler was not called yet, or has returned),
      "running", "result" (the job has ended, and its result waits for room on the server), or "absent" (it does not
      hold the job, and was asked by name).
    - `since`: when the job was delivered, for the `deliveries`th time. `started_at`: when its handler was called.
    - `runs_in`: "loop", "thread" or "process"; "" where there is no handler. `suspect`: it is tried apart from others,
      because workers were lost with it. `seq`: of its message in the work stream.
    """

    worker: str
    host: str
    pid: int
    state: HeldState
    since: float | None = None
    started_at: float | None = None
    attempt: int | None = None
    deliveries: int = 0
    runs_in: str = ""
    timeout_s: float | None = None
    suspect: bool = False
    seq: int = 0


async def read_workers(
    connection: Connection, topology: Topology, *, family: str | None = None, tenant: str | None = None
) -> list[WorkerStats]:
    """Return the workers that are alive, or died less than 20 s ago, sorted by name: those of a family and a tenant, or
    all (None). Pauses are left out where this user may not read them.

    Raises Unavailable, NotFound (the stream is missing), AccessDenied, UnknownFamily, InvalidToken.
    """
    if family is not None and topology.family(family).role != "work":
        raise BadInput(f"family {family} has inboxes and no workers: `aiqueue inbox ls` shows who serves them")
    if tenant is not None:
        subjects.token("tenant", tenant)
    records = WorkerRecords(connection, topology)
    await connection.clock.ensure(topology.presence_stream.name)
    try:
        heard = await records.read_heard()
    except NotFound:
        raise NotFound(f"there is no stream {topology.presence_stream.name}: run `aiqueue apply` first") from None
    pauses = await read_pauses_if_allowed(connection, topology) if heard else []
    found = parse_workers(heard, connection.clock.now(), pauses)
    return [
        each
        for each in found
        if (family is None or family in each.families)
        and (tenant is None or each.tenants is None or tenant in each.tenants)
    ]


def parse_workers(heard: Iterable[tuple[Record, float]], now: float, pauses: Sequence[Pause] = ()) -> list[WorkerStats]:
    """Return the workers of records, sorted by name. Records may hold anything: other programs can write there."""
    found = [_parse_worker(record, heard_at, now, pauses) for record, heard_at in heard]
    return sorted(found, key=lambda each: (each.name, each.host, each.pid))


def _parse_worker(record: Record, heard_at: float, now: float, pauses: Sequence[Pause]) -> WorkerStats:
    plain = record.get("kinds")
    kinds = {_text(name): _texts(each) for name, each in plain.items()} if isinstance(plain, dict) else {}
    families = _texts(record.get("families")) or tuple(kinds)  # a former version has written no families
    tenants = None if record.get("tenants") is None else _texts(record["tenants"])
    state = _STATES.get(_text(record.get("state")), "running")
    concerning = (
        each
        for each in pauses
        if each.family in families and (None in (tenants, each.tenant) or each.tenant in (tenants or ()))
    )
    jobs = record.get("jobs")
    running = [_parse_job(each) for each in jobs if isinstance(each, dict)] if isinstance(jobs, list) else []
    rss_bytes = _whole(record.get("rss_bytes"))
    return WorkerStats(
        name=_text(record.get("worker")) or "?", state="silent" if now - heard_at > SILENT_S else state,
        host=_text(record.get("host")), pid=_whole(record.get("pid")), version=_text(record.get("version")),
        started_at=_number(record.get("started")), heard_at=heard_at, slots=_whole(record.get("slots")),
        running=_whole(record.get("running")), waiting=_whole(record.get("waiting")),
        done=_whole(record.get("done")), lanes=_whole(record.get("lanes")), families=families, kinds=kinds,
        tenants=tenants, jobs=tuple(sorted(running, key=lambda each: -each.age_s)), rss_bytes=rss_bytes or None,
        stalled_s=_number(record.get("stalled_s")), blocked_at=_text(record.get("blocked_at")),
        answers=record.get("answers") is True, heeds_pauses=record.get("heeds_pauses") is True,
        heeds_limits=record.get("key_lanes") is True, pauses=tuple(concerning) if pauses else (),
    )  # fmt: skip


def _parse_job(plain: Mapping[str, Any]) -> RunningJob:
    get = plain.get
    family, tenant, priority, seq = get("family"), get("tenant"), get("priority"), get("seq")
    job_id, kind, age_s = get("job_id"), get("kind"), get("delivered_s")
    if (
        type(family) is type(tenant) is type(priority) is type(job_id) is type(kind) is str
        and (type(seq) is int and type(age_s) is float)
        and len(family + tenant + job_id + kind) <= TEXT_MAX
    ):
        return RunningJob(family, tenant, priority, seq, job_id, kind, age_s)  # as usual: thousands have to be quick
    return RunningJob(
        _text(family), _text(tenant), _text(priority), _whole(seq), _text(job_id), _text(kind), _number(age_s)
    )


async def ask_holder(
    connection: Connection, family: str, tenant: str, job_id: str, *, worker: str | None = None, within_s: float = ASK_S
) -> Holder | None:
    """Return which worker holds a job; None: no worker says so within this time, in seconds. `worker`: this one answers
    also if it does not hold the job: "absent".

    Raises AccessDenied: this user may not ask.
    """
    named = {} if worker is None else {"worker": worker}
    body = json.dumps({"tenant": tenant, "job_id": job_id, **named}).encode()
    try:
        reply = await connection.request(f"{subjects.HOLDS}.{family}", body, timeout_s=within_s)
        plain = json.loads(reply.data)
    except (Unavailable, ValueError, RecursionError):
        return None
    state = plain.get("state") if isinstance(plain, dict) else None
    if state not in ("waiting", "starting", "running", "result", "absent"):
        return None
    return Holder(
        _text(plain.get("worker")), _text(plain.get("host")), _whole(plain.get("pid")), state,
        _number(plain.get("since")) or None, _number(plain.get("started_at")) or None,
        _whole(plain.get("attempt")) or None, _whole(plain.get("deliveries")), _text(plain.get("runs_in")),
        _number(plain.get("timeout_s")) or None, plain.get("suspect") is True, _whole(plain.get("seq")),
    )  # fmt: skip


def _text(value: Any) -> str:
    return value[:TEXT_MAX] if type(value) is str else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(each) for each in value[:LIST_MAX]) if isinstance(value, list) else ()


def _number(value: Any) -> float:
    is_number = type(value) is float or type(value) is int
    return float(value) if is_number and 0 <= value < NUMBER_MAX else 0.0  # NaN, too, is none of these


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < NUMBER_MAX else int(_number(value))
