"""Outputs about jobs and dead letters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from ...inspect import Explanation, FamilyStats, JobStats, LaneStats, ListedJob, ListedOutcome


class EnqueuedJson(TypedDict):
    """A job that `enqueue` has stored."""

    job_id: str
    family: str
    tenant: str
    priority: str
    duplicate: bool
    """Whether a job of this id was stored before: nothing new was stored."""
    due: NotRequired[float]
    """With --delay and --at: when the job starts, in seconds since the epoch."""
    result: NotRequired[Any]
    """With --wait: what the handler has returned; null also if it stores no result."""
    error: NotRequired[str]
    """With --wait: why there is no result, in one line."""
    waits_for: NotRequired[str]
    """With --wait, after a timeout: why the job waits, as `aiqueue explain` names it, such as no_worker."""
    evidence: NotRequired[list[str]]
    """With `waits_for`: what shows it, a sentence each."""


class CancelJson(TypedDict):
    """What became of a cancellation."""

    job_id: str
    cancelled: bool
    """Whether the job is cancelled, now or before."""
    detail: str
    """How the job was found, in words."""


class RescheduleJson(TypedDict):
    """A job with a new time."""

    job_id: str
    due: float | None
    """When the job starts, in seconds since the epoch; null: now."""


class EntryJson(TypedDict):
    """An entry of a job's journal."""

    family: str
    tenant: str
    job_id: str
    event: str
    """What the entry says: started, progress, chunk, result, failed, cancelled, gap, restart and others."""
    attempt: int
    run: int
    """Run of the job that wrote it: a sequence in the work stream."""
    time: float
    """When the entry was stored, in seconds since the epoch."""
    data: Any
    """What the event carries, such as a chunk or the result."""
    final: bool
    """Whether the entry ends the job."""
    cursor: NotRequired[str]
    """Of one job's output: where to go on, for --after."""


class DeadLetterJson(TypedDict):
    """A dead letter without its body."""

    seq: int
    """Number of the dead letter, which the other commands take."""
    job_id: str
    unique: str
    """Key of the caller, of which `job_id` is a hash; empty: the id is the key, or none is known."""
    kind: str
    family: str
    tenant: str
    priority: str
    key: str
    """Value of the limited key of the job's lane; empty: none."""
    reason: str
    """Why the job failed, in one word, such as attempts or rejected."""
    error: str
    """What the last attempt raised, in one line."""
    attempt: int
    worker: str
    """Name of the worker that gave the job up."""
    enqueued_at: float | None
    failed_at: float
    """When the dead letter was stored, in seconds since the epoch."""
    replays: int
    """How often the job was replayed before."""
    history: list[Any]
    """What is known of the attempts, the oldest first."""
    size_bytes: int
    """Size of the job's body in bytes."""


class ShownLetterJson(DeadLetterJson):
    """A dead letter with its body."""

    headers: Mapping[str, str]
    payload: NotRequired[Any]
    """The message as plain data, its secrets masked."""
    body_base64: NotRequired[bytes | None]
    """Body that cannot be decoded, in base64; null: the setting redact hides it."""


class LetterErrorJson(TypedDict):
    """A dead letter that stays as it was."""

    seq: int
    """Number of the dead letter."""
    error: str
    """Why nothing was done with it, in one line."""


class ReplayedJson(TypedDict):
    """What became of dead letters that were replayed."""

    replayed: int
    """How many jobs were enqueued again."""
    errors: list[LetterErrorJson]
    """The dead letters that were not."""


class PurgedJson(TypedDict):
    """What became of dead letters that were deleted."""

    deleted: int
    """How many were deleted."""
    errors: list[LetterErrorJson]
    """The dead letters that were not."""


class ListedJobsJson(TypedDict):
    """A page of jobs."""

    jobs: list[ListedJob]
    """The jobs, the oldest first."""
    cursor: str
    """Where to go on, for --cursor; empty: there is no more."""
    searched: int
    """How many stored jobs were looked at."""
    unreadable: int
    """How many may match and are left out: their messages are documents, or cannot be decoded."""
    missing: list[str]
    """Streams that do not exist."""
    behind: list[str]
    """Streams with which the server that answered is behind, in a cluster: jobs of them may have ended."""


class OutcomesJson(TypedDict):
    """A page of jobs that have ended."""

    outcomes: list[ListedOutcome]
    """The jobs, the newest first."""
    cursor: str
    """Where to go on, for --cursor; empty: there is no more."""
    searched: int
    """How many entries of journals were looked at."""


class DryRunJson(TypedDict):
    """What an act would be for."""

    act: str
    """What would be done: cancel, replay, purge, run_now or move."""
    matched: int
    """How many jobs match."""
    until: str
    """Give this as --until, and jobs that are stored from now on are left out."""
    searched: int
    """How many stored jobs were looked at."""
    unreadable: int
    """How many may match and are left out: their messages are documents, or cannot be decoded."""
    missing: tuple[str, ...]
    """Streams that do not exist."""
    behind: tuple[str, ...]
    """Streams with which the server that answered is behind, in a cluster: jobs of them may have ended."""


class EndedJobJson(TypedDict):
    """A job that did not wait for the act."""

    job_id: str
    why: str
    """What became of the job meanwhile."""


class FailedJobJson(TypedDict):
    """A job for which the act failed."""

    job_id: str
    error: str
    """Why, in one line."""


class DoneJson(TypedDict):
    """What became of an act on jobs."""

    act: str
    """What was done: cancel, replay, purge, run_now or move."""
    matched: int
    """How many jobs matched."""
    done: int
    """How many jobs it was done to."""
    ended: list[EndedJobJson]
    """Jobs that ended, started or were gone meanwhile."""
    failed: list[FailedJobJson]
    """Jobs that stay as they were, and why."""
    until: str
    """Give this as --until to go on with the same jobs."""
    unreadable: int
    """How many may match and were left out: their messages are documents, or cannot be decoded."""
    missing: tuple[str, ...]
    """Streams that do not exist."""
    behind: tuple[str, ...]
    """Streams with which the server that answered is behind, in a cluster: jobs of them may have ended."""
    unaudited: str
    """Why the act is not in the audit, in one line; empty: the audit has it."""


@dataclass(frozen=True)
class InspectedJob(JobStats):
    """A job, and why it waits."""

    explanation: Explanation | None = None
    """Why the job waits, or what else it does; null: the job has ended."""


class InspectedAgainJson(TypedDict):
    """A view at one moment: one of the last four keys."""

    at: float
    """When this was read, in seconds since the epoch."""
    families: NotRequired[list[FamilyStats]]
    """All families, without an argument."""
    lanes: NotRequired[list[LaneStats]]
    """The lanes of a family or tenant."""
    job: NotRequired[InspectedJob]
    """The job that was named."""
    error: NotRequired[str]
    """Why nothing could be read, in one line."""
