"""Why a job waits: the form of the answer, what it is decided from, and the remedy of each reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import JobState
from ..lanes import ActivePauses
from ..subjects import Lane
from ..topology import Family
from .limit_stats import LimitStats, LimitUse
from .lookup import JobStats
from .worker_stats import WorkerStats
from .workers import Holder

REMEDIES: Mapping[str, str] = {  # docs/operations/explain.md explains each reason
    "done": "`aiqueue inspect {job}` shows its result",
    "failed": "`aiqueue inspect {job}` shows its attempts; `aiqueue dead replay {dead}` runs it again",
    "cancelled": "enqueue it again if it is to run",
    "ended": "enqueue it again if it did not run",
    "unknown": "`aiqueue explain {job} --family FAMILY --tenant TENANT` reads more of the lane",
    "result_waits": "free storage: `aiqueue dead purge --older 7d`, or raise the account's limit; `aiqueue doctor` "
    "shows what is full",
    "no_answer": "`nats server report jetstream` shows the servers: start the one that is away. Without a majority of "
    "them nothing is stored or read",
    "delay": "`aiqueue reschedule {job} --now` starts it now",
    "retry": "`aiqueue inspect {job}` shows the error; `aiqueue reschedule {job} --now` starts the next attempt now",
    "retry_soon": "`aiqueue inspect {job}` shows the error",
    "budget": "raise the budget in gateway.toml, then `aiqueue reschedule {job} --now`",
    "children": "`aiqueue explain {child}` shows why a child has not ended",
    "due_no_forwarder": "run a worker, of any family: `aiqueue work MODULE:WORKER`",
    "due": "ask again in a second: `aiqueue explain {job}`",
    "lane_full": "run more workers (`aiqueue work`), or raise max_msgs_per_subject and run `aiqueue apply`",
    "dead_letters_full": "`aiqueue dead purge --older 7d`, or raise max_bytes of the stream of dead letters and run "
    "`aiqueue apply`",
    "unknown_kind": "run a worker with a handler for {kind}: `aiqueue work MODULE:WORKER`; if the kind is a mistake, "
    "`aiqueue cancel {job}`",
    "unknown_kind_hop": "wait, or `aiqueue reschedule {job} --now`",
    "undeclared_lane": "declare its lane in the stream file of {family}, `aiqueue apply`; or `aiqueue cancel {job}`",
    "running": "`aiqueue tail {job}` follows it, `aiqueue cancel {job}` stops it",
    "starting": "ask again in a second: `aiqueue explain {job}`",
    "waits_in_worker": "run more workers (`aiqueue work`), or raise the concurrency of {worker}",
    "quarantine": "`aiqueue inspect {job}` shows its attempts; a job that ends its process again is a dead letter",
    "claimed": "wait for the other one: `aiqueue inspect {job}` shows what it does",
    "paused": "`aiqueue resume {scope}` when it may go on",
    "lane_paused": "`nats consumer resume {stream} {consumer}`",
    "deadline": "enqueue it again with a later deadline; `aiqueue cancel {job}` removes this one",
    "stranded": "a running worker makes it a dead letter within a minute; then `aiqueue dead ls`",
    "worker_stalled": "mend the handler (a blocking call belongs into a plain function, or `asyncio.to_thread`), and "
    "restart the worker {worker}",
    "worker_lost": "wait until its lease ends; `aiqueue workers` shows who is alive",
    "delivered": "`aiqueue explain {job}` asks the workers who holds it",
    "lease": "wait until its lease ends; `aiqueue workers` shows who is alive",
    "no_worker": "run one that handles {family}: `aiqueue work MODULE:WORKER`",
    "no_worker_for_tenant": "run a worker that takes the jobs of {tenant}: add it to `tenants` of the `Worker`, then "
    "`aiqueue work MODULE:WORKER`",
    "workers_lost": "if the server was away, wait 10 s: they report again by themselves; else start them again: "
    "`aiqueue work MODULE:WORKER`",
    "workers_draining": "start new ones: `aiqueue work MODULE:WORKER`",
    "workers_disconnected": "do not restart them: they reconnect by themselves; `aiqueue doctor` checks the server",
    "workers_stalled": "`aiqueue workers` shows the line of code that blocks a worker: mend that, and restart the "
    "worker; one without such a line recovers by itself, so restart it only if it is stalled for a minute",
    "unserved": "`aiqueue workers` as a user who may read the workers' records",
    "limit": "wait; or allow twice as much for an hour: `aiqueue limits set {scope} --for 1h`",
    "lane_limit": "wait for one of them, run `aiqueue inspect {family} --tenant {tenant}`, or raise max_ack_pending in "
    "the stream file and run `aiqueue apply`",
    "priority": "run more workers (`aiqueue work MODULE:WORKER`), or enqueue it with a higher priority",
    "slots_busy": "run more workers (`aiqueue work MODULE:WORKER`), or raise their concurrency",
    "turn": "wait; `aiqueue inspect {family}` shows the lanes",
    "schedule_not_due": "`aiqueue schedule run {schedule}` enqueues a job now",
    "schedule_paused": "`aiqueue schedule resume {schedule}`",
    "schedule_skipped": "`aiqueue schedule backfill {schedule}` enqueues jobs of past ticks",
    "schedule_late": "run a worker: `aiqueue work MODULE:WORKER`; `aiqueue doctor` checks the schedules",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job waits, or what else it does: the one reason that counts most.

    - `reason`: a key of REMEDIES, such as "no_worker". `text`: the same in a sentence.
    - `state`: one of `aiqueue.JobState`.
    - `evidence`: what was read that shows it, a sentence each. `unknown`: what could not be read, and why.
    - `remedy`: what to do. `until`: when it ends by itself, seconds since the epoch; None: not known.
    """

    job_id: str
    family: str
    tenant: str
    state: JobState
    reason: str
    text: str
    evidence: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    remedy: str = ""
    until: float | None = None

    def __str__(self) -> str:
        """Return text and remedy on one line."""
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


class Found(NamedTuple):
    """What a rule has found. `values`: for the remedy."""

    reason: str
    text: str
    evidence: tuple[str, ...] = ()
    until: float | None = None
    values: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class LaneEvidence:
    """What is known of a lane and of who serves it. A field that is None could not be read: see `unknown`.

    - `consumer`: the server's information about the lane's consumer; empty: there is none.
    - `workers`: all that are alive. `pending`: jobs of each lane of the family that no worker holds.
    - `limits`: the rules that hold for the lane's key, with the use that counts for this lane.
    - `serving`: the workers that are there for its family and tenant. `said`: what was decided of its jobs from their
      lane alone, by whether they were delivered.
    """

    family: Family
    lane: Lane
    consumer: Mapping[str, Any] | None
    workers: tuple[WorkerStats, ...] | None
    pauses: ActivePauses | None
    pending: Mapping[Lane, int] | None
    limits: tuple[tuple[LimitStats, LimitUse], ...] = ()
    unknown: tuple[str, ...] = ()
    serving: tuple[WorkerStats, ...] = field(init=False)
    said: dict[bool, Found] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        name, tenant = self.family.name, self.lane.tenant
        serving = tuple(each for each in self.workers or () if each.serves_lane(name, tenant))
        object.__setattr__(self, "serving", serving)

    @property
    def is_pulled(self) -> bool:
        """Whether somebody asks for its jobs, or holds some."""
        consumer = self.consumer or {}
        return bool(consumer.get("num_waiting") or consumer.get("num_ack_pending"))


@dataclass(frozen=True, slots=True)
class JobEvidence:
    """What a decision is made from. Times are seconds since the epoch, by the server's clock.

    - `lane`: of a job that is in its lane or parked. `seq`: of its message in the work stream; 0: it has none there.
    - `place`: how many undelivered jobs of the lane are before it. `delivered`: it was, since the consumer was made.
    - `holder`: who holds a job of this id; None: nobody says so. `has_asked`: whether the workers were asked. `silent`:
      the worker whose record lists the job, and that did not answer either when it was asked by name.
    - `due`: the job is due, and waits for a forwarder. `has_forwarder`: whether a worker asks for due jobs.
    - `aside_since`: it is parked aside since then, because its kind was unknown or paused, for the `hops`th time.
    - `claimed_by`: another run of its id is under way. `stranded`: the server has given it up.
    - `error`: that of the last failed attempt.
    """

    stats: JobStats
    now: float
    lane: LaneEvidence | None = None
    seq: int = 0
    place: int | None = None
    delivered: bool = False
    holder: Holder | None = None
    has_asked: bool = False
    silent: WorkerStats | None = None
    deadline: float | None = None
    is_declared: bool = True
    due: bool = False
    has_forwarder: bool | None = None
    waited: int = 0
    dead_full: str = ""
    is_retry: bool = False
    aside_since: float | None = None
    hops: int = 0
    claimed_by: int = 0
    stranded: bool = False
    on_trial: bool = False
    error: str = ""
    unknown: tuple[str, ...] = ()
