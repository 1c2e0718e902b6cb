"""Outputs about schedules."""

from __future__ import annotations

from typing import Any, TypedDict


class SchedulePauseJson(TypedDict):
    """A pause of a schedule."""

    since: float
    """When the pause began, in seconds since the epoch."""
    by: str
    """Who has paused the schedule."""
    reason: str
    """Why it is paused, as the operator said; empty: nothing was said."""


class ScheduleJson(TypedDict):
    """A schedule, without its message. Times are seconds since the epoch."""

    id: str
    """Id of the schedule, unique in its tenant."""
    tenant: str
    when: str
    """When the schedule fires, in words."""
    problem: str
    """Why this host cannot tell its times, in one line; empty: it can."""
    recurrence: dict[str, Any]
    """When the schedule fires, as it is stored."""
    family: str
    kind: str
    priority: str
    deadline_s: float | None
    """Seconds after its tick in which a job must start, else the job is a dead letter; null: no deadline."""
    misfire: str
    """What becomes of ticks that come too late: skip, once or all."""
    bound: int
    """With misfire all: how many of the newest ticks are made up for."""
    grace_s: float
    """How many seconds late a tick may come before it is missed."""
    overlap: str
    """What becomes of a tick while the former job has not ended: run or skip."""
    owner: str
    """Worker whose code declares the schedule; empty: nobody's code does."""
    generation: int
    """Number of the deployment that declared the schedule."""
    version: int
    """Number that grows with each change of what the schedule does."""
    message_by_owner: bool
    """Whether the owner's code makes the message of each tick."""
    created_at: float
    """When the schedule was added."""
    updated_at: float
    """When the schedule was changed last."""
    paused: SchedulePauseJson | None
    """The pause of the schedule; null: it is not paused."""
    next_at: float | None
    """When the next tick is; null: there is none."""
    last_at: float | None
    """When the last tick was; null: there was none."""
    last_job: str | None
    """Id of the last job; null: there was none."""
    last_outcome: str | None
    """What became of the last job, such as done or failed; null: not known."""
    last_error: str | None
    """Why the last job failed, in one line; null: it did not, or that is not known."""
    fired: int
    """How many jobs were enqueued."""
    misfired: int
    """How many ticks were missed."""
    skipped: int
    """How many ticks were skipped because the former job had not ended."""
    failed: int
    """How many ticks could not be made a job."""
    error: str | None
    """Why the last of these could not be made a job, in one line; null: none."""
    missed: dict[str, Any] | None
    """Ticks that were missed last: from, to, ticks, fired, at, more; null: none were."""


class ShownScheduleJson(ScheduleJson):
    """A schedule with its message."""

    next_times: list[str]
    """The next five ticks, as ISO 8601 with offsets."""
    message: Any
    """The message as plain data; null: the owner's code makes it for each tick."""


class AddedScheduleJson(TypedDict):
    """A schedule that was added or changed."""

    id: str
    """Id of the schedule."""
    tenant: str
    action: str
    """What was done: added, changed or unchanged."""
    next_at: float | None
    """When the next tick is, in seconds since the epoch; null: there is none."""
    when: str
    """When the schedule fires, in words."""


class RemovedScheduleJson(TypedDict):
    """What became of a schedule."""

    removed: bool
    """Whether there was such a schedule."""


class UndeclaredJson(TypedDict):
    """A schedule that no version of its owner's code declares any more."""

    id: str
    """Id of the schedule."""
    tenant: str
    declared_at: float | None
    """When the code declared the schedule last, in seconds since the epoch; null: not known."""


class PrunedJson(TypedDict):
    """Schedules that their owner declares no more."""

    owner: str
    """Worker whose code declared them."""
    removed: bool
    """Whether they were removed, which --yes asks for."""
    schedules: list[UndeclaredJson]
    """The schedules, or those that would be removed."""


class PausedScheduleJson(TypedDict):
    """A schedule that was paused."""

    id: str
    """Id of the schedule."""
    tenant: str
    paused: SchedulePauseJson | None
    """The pause of the schedule."""


class ResumedScheduleJson(TypedDict):
    """A schedule that fires again."""

    id: str
    """Id of the schedule."""
    tenant: str
    next_at: float | None
    """When the next tick is, in seconds since the epoch; null: there is none."""


class AskedJobJson(TypedDict):
    """A job of a schedule that was asked for."""

    job_id: str
    tick: float
    """Tick that the job is for, in seconds since the epoch."""
    duplicate: bool
    """Whether the tick has a job already, so that nothing was stored."""
    by_owner: bool
    """Whether a worker of the owner makes the message, and enqueues the job then."""
