"""Outputs about streams, workers, limits, documents and agents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from ...inspect import LimitStats, RunningJob, WorkerStats
from ...lanes import Pause
from ...topology import changes as plans
from ...topology import problems as faults
from ...topology import stamps


@dataclass(frozen=True)
class ListedWorker(WorkerStats):
    """A worker, and the job that it has run for longest."""

    oldest: RunningJob | None = None  # a property there, which `asdict` leaves out
    """The job that runs longest; null: none runs."""


class ResumeJson(TypedDict):
    """What became of a pause."""

    resumed: bool
    """Whether there was such a pause, which has ended."""
    left: list[Pause]
    """Pauses of the family that go on."""


class UnsetJson(TypedDict):
    """What became of an override."""

    removed: bool
    """Whether there was such an override."""
    now: LimitStats | None
    """Rule of exactly this key and tenant that holds now, a declared one; null: none, and a pattern's may hold."""


class StorageJson(TypedDict):
    """What streams set aside of one storage, in bytes, all copies included."""

    declared: int
    """Bytes of the declared streams in all."""
    one_copy: int
    """Bytes of one copy of each stream, which is what a server of a cluster holds at most."""
    added: int
    """Bytes more than now; negative for less."""
    limit: int | None
    """Limit of the account in bytes; null: it has none. The server then has one of its own, which it does not tell."""
    free: int | None
    """What is left of the limit now, in bytes; null: there is no limit."""


class AppliedJson(TypedDict):
    """What `apply` has changed."""

    changes: list[plans.Change]
    """One for each stream that is created or changed."""
    sum: dict[str, StorageJson]
    """What the streams set aside, by storage: file, memory."""
    problems: list[faults.Problem]
    """What `apply` does not solve, and room that is missing."""
    applied: list[stamps.Applied]
    """Who applied the streams that differ."""


class PlanJson(AppliedJson):
    """What `apply` would change."""

    drift: bool
    """Whether there is anything to apply."""
    overrides: list[LimitStats]
    """Limits that operators have set in place of declared ones."""


class HealthJson(TypedDict):
    """The last report of a worker, or of a pool of workers."""

    state: Literal["starting", "ok", "draining", "disconnected", "stalled", "stale"]
    """What the worker does; stale: no report within the time."""
    healthy: bool
    """Whether the worker is alive; with --ready, whether it takes jobs now."""
    time: float
    """When the report was written, in seconds since the epoch."""
    pid: int
    """Id of the process that wrote the report."""
    worker: str
    """Name of the worker."""
    slots: NotRequired[int]
    """How many jobs may run at once."""
    running: NotRequired[int]
    """How many jobs have a slot now."""
    waiting: NotRequired[int]
    """How many jobs the worker holds that have no slot yet."""
    done: NotRequired[int]
    """How many deliveries were run since the start."""
    last_delivery: NotRequired[float | None]
    """When a job arrived last, in seconds since the epoch; null: none has."""
    connected: NotRequired[bool]
    """Whether the server is connected."""
    stalled_s: NotRequired[float]
    """For how many seconds no job has arrived although lanes hold some; 0: that is not so."""
    lanes: NotRequired[int]
    """How many lanes the worker pulls on."""
    processes: NotRequired[list[dict[str, Any]]]
    """Of a pool: the report of each of its workers."""


class CountsJson(TypedDict):
    """What was counted in an interval."""

    done: int
    """Jobs that succeeded."""
    failed: int
    """Attempts that failed, those that are retried too."""
    retried: int
    """Attempts after which the job is tried again."""
    dead: int
    """Jobs that became dead letters."""
    cancelled: int
    """Jobs that were cancelled."""
    run_s: float
    """Seconds that attempts ran, together."""
    wait_s: float
    """Seconds that jobs waited for their first attempt, together."""


class PointJson(TypedDict):
    """An interval of a series."""

    at: float
    """When the interval begins, in seconds since the epoch."""
    length_s: float
    """Length of the interval in seconds."""
    workers: float | None
    """How many workers counted, on average; null: not known."""
    counts: CountsJson | None
    """What was counted; null: nothing is stored of the interval."""


class PercentilesJson(TypedDict):
    """Percentiles in seconds, from a histogram; null: nothing was counted."""

    p50_s: float | None
    """Seconds within which half of the jobs were."""
    p95_s: float | None
    """Seconds within which 95 of 100 jobs were."""
    p99_s: float | None
    """Seconds within which 99 of 100 jobs were."""


class SeriesJson(TypedDict):
    """The history of a family, or of a kind or tenant of one."""

    family: str
    name: str
    """Kind or tenant of the series; empty: all of the family."""
    wait: PercentilesJson
    """How long jobs waited for their first attempt."""
    run: PercentilesJson
    """How long attempts ran."""
    points: list[PointJson]
    """The intervals, oldest first."""


class HistoryJson(TypedDict):
    """What became of jobs over time."""

    level: str
    """Length of the intervals: minute, hour or day."""
    now: float
    """Time of the server when the counters were read, in seconds since the epoch."""
    since_s: float
    """How many seconds back the history goes."""
    series: list[SeriesJson]
    """One for each family, kind or tenant."""


class DocumentJson(TypedDict):
    """A document, and what keeps it."""

    tenant: str
    sha256: str
    """SHA-256 of the content, in hex, which names the document."""
    size: int
    """Size of the content in bytes."""
    name: str | None
    """Name of the file, as it was given."""
    content_type: str | None
    """Media type of the content, as it was given."""
    touched_at: float
    """When the document was stored or used last, in seconds since the epoch."""
    jobs: int
    """How many stored jobs have it as their body."""
    puts: int
    """How many calls of put keep it for a time."""
    results: int
    """How many results of jobs it is."""
    steps: int
    """How many steps of jobs have returned it."""


class InboxJson(TypedDict):
    """An inbox and its agent."""

    tenant: str
    agent: str
    """Name of the agent."""
    card: dict[str, Any] | None
    """What the agent says of itself: kinds, capabilities, description; null: it is not registered."""
    online: bool
    """Whether a process serves the inbox."""
    online_since: float | None
    """Since when a process serves the inbox, in seconds since the epoch; null: none does."""
    unread: int
    """How many mails are unread."""
    oldest_at: float | None
    """When the oldest unread mail was stored, in seconds since the epoch; null: there is none, or it was not read."""


class MailJson(TypedDict):
    """A mail in an inbox."""

    seq: int
    """Sequence of the mail in its stream."""
    stored_at: float
    """When the mail was stored, in seconds since the epoch."""
    mail_id: str
    """Id by which a reply names the mail."""
    kind: str
    tenant: str
    target: str | None
    """Agent that the mail is for."""
    sender: str | None
    """Agent that has sent the mail; null: none, so that it cannot be answered."""
    conversation: str
    """Conversation that the mail is part of; mail of one is handled in order."""
    correlation: str | None
    """Mail that this one answers; null: none."""
    deadline: float | None
    """When the mail expires, in seconds since the epoch; null: never."""
    sent_at: float
    """When the mail was sent, in seconds since the epoch."""
    headers: Mapping[str, str]
    message: Any
    """The message as plain data; null: it cannot be decoded."""


class NotSentJson(TypedDict):
    """A mail that was not sent; attributes of the error stand beside these keys."""

    error: str
    """Class of the error, such as InboxFull."""
    message: str
    """What happened, in one line."""
    retryable: bool
    """Whether the same call can succeed later."""
