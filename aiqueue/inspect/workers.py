"""Reads the records of running workers, and asks them which of them holds a job."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    in_line: Mapping[str, int] = field(default_factory=dict)

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
    connection: Connection, topology: Topology, *, family: str | None = None, tenant: str | None = None,
    with_pauses: bool = True,
) -> list[WorkerStats]:  # fmt: skip
    """Return the workers that are alive, or died less than 20 s ago, sorted by name: those of a family and a tenant, or
    all (None). Pauses are left out where this user may not read them, and without `with_pauses`.

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
    pauses = await read_pauses_if_allowed(connection, topology) if heard and with_pauses else []
    found = parse_workers(heard, connection.clock.now(), pauses)
    return [
        each
        for each in found
        if (family is None or family in each.families)
        and (tenant is None or each.tenants is None or tenant in each.tenants)
    ]


def parse_workers(heard: Iterable[tuple[Record, float]], now: float, pauses: Sequence[Pause] = ()) -> list[WorkerStats]:
    """Return the workers of records, sorted by name. Records may hold anything: other programs can write there."""
    seen: dict[tuple[Any, ...], tuple[str, ...]] = {}
    found = [_parse_worker(record, heard_at, now, pauses, seen) for record, heard_at in heard]
    return sorted(found, key=lambda each: (each.name, each.host, each.pid))


def _parse_worker(
    record: Record, heard_at: float, now: float, pauses: Sequence[Pause], seen: dict[tuple[Any, ...], tuple[str, ...]]
) -> WorkerStats:
    """`seen`: lists of names that other records had, too. Most workers have the same."""
    get = record.get
    plain, jobs, served = get("kinds"), get("jobs"), get("tenants")
    kinds = {_text(name): _texts(each, seen) for name, each in plain.items()} if type(plain) is dict else {}
    families = _texts(get("families"), seen) or tuple(kinds)  # a former version has written no families
    tenants = None if served is None else _texts(served, seen)
    running = [_parse_job(each) for each in jobs if type(each) is dict] if type(jobs) is list else []
    if len(running) > 1:
        running.sort(key=_age_of, reverse=True)
    in_line = get("in_line")
    lines = {_text(name): _whole(lanes) for name, lanes in in_line.items()} if in_line and type(in_line) is dict else {}
    concerning: tuple[Pause, ...] = ()
    if pauses:
        concerning = tuple(
            each
            for each in pauses
            if each.family in families and (None in (tenants, each.tenant) or each.tenant in (tenants or ()))
        )
    return WorkerStats(
        _text(get("worker")) or "?",
        "silent" if now - heard_at > SILENT_S else _STATES.get(_text(get("state")), "running"),
        _text(get("host")), _whole(get("pid")), _text(get("version")), _number(get("started")), heard_at,
        _whole(get("slots")), _whole(get("running")), _whole(get("waiting")), _whole(get("done")),
        _whole(get("lanes")), families, kinds, tenants, tuple(running), _whole(get("rss_bytes")) or None,
        _number(get("stalled_s")), _text(get("blocked_at")), get("answers") is True, get("heeds_pauses") is True,
        get("key_lanes") is True, concerning, lines,
    )  # fmt: skip


def _parse_job(plain: Mapping[str, Any]) -> RunningJob:
    get = plain.get
    return RunningJob(
        _text(get("family")), _text(get("tenant")), _text(get("priority")), _whole(get("seq")), _text(get("job_id")),
        _text(get("kind")), _number(get("delivered_s")),
    )  # fmt: skip


_age_of = operator.attrgetter("age_s")


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


def _texts(value: Any, seen: dict[tuple[Any, ...], tuple[str, ...]]) -> tuple[str, ...]:
    if type(value) is not list:
        return ()
    names = tuple(value)
    try:
        if names not in seen:
            seen[names] = tuple(map(_text, names[:LIST_MAX]))
        return seen[names]
    except TypeError:  # not a list of texts
        return tuple(map(_text, names[:LIST_MAX]))


def _number(value: Any) -> float:
    is_number = type(value) is float or type(value) is int
    return float(value) if is_number and 0 <= value < NUMBER_MAX else 0.0  # NaN, too, is none of these


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < NUMBER_MAX else int(_number(value))
