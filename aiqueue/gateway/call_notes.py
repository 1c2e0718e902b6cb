"""What earlier executions of a job's handler have noted of its calls: see `Job.called`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from ..job import Job

SAME_RUN_S: Final = 0.01  # times of one run differ by rounding only


@dataclass(slots=True)
class CallNotes:
    """The calls that were begun, and in this run of the job: how many have failed, and how, and whether it gave up.

    A job that is replayed or rerun is another run: it has all its attempts again, and knows the calls of the former.

    `calls`: the ids of calls that may have been begun, the oldest first. `failures`: the kinds of errors, of this run.
    `gave_up`: why its model is not called any more in this run; "": it is. `fallbacks`: models that were begun then.
    """

    calls: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gave_up: str = ""
    fallbacks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, notes: Iterable[Any], run: float) -> CallNotes:
        """Return what notes say to the run that was enqueued at `run`. What is no note of a call is passed over."""
        found = cls()
        for note in notes:
            if not isinstance(note, dict):
                continue
            call, at = note.get("call"), note.get("run")
            is_own = isinstance(at, int | float) and abs(at - run) < SAME_RUN_S
            if isinstance(call, str):
                found.calls.append(call)
            elif note.get("refused") in found.calls:
                found.calls.remove(note["refused"])
            elif is_own and isinstance(note.get("failed"), str):
                found.failures.append(note["failed"])
            elif is_own and isinstance(note.get("gave_up"), str):
                found.gave_up = note["gave_up"]
            elif is_own and isinstance(note.get("fallback"), str):
                found.fallbacks.append(note["fallback"])
        return found


async def note_call(job: Job[Any], call_id: str) -> None:
    """Note a call that is about to be made. Raises as `Job.called`."""
    await job.called({"call": call_id})


async def note_refusal(job: Job[Any], call_id: str) -> None:
    """Note that a call was not made, because the budget does not admit it. Raises as `Job.called`."""
    await job.called({"refused": call_id})


async def note_failure(job: Job[Any], kind: str) -> None:
    """Note that a call of this run has failed in this way. Raises as `Job.called`."""
    await job.called({"failed": kind, "run": job.enqueued_at})


async def note_giving_up(job: Job[Any], why: str) -> None:
    """Note that this run does not call the job's model any more. Raises as `Job.called`."""
    await job.called({"gave_up": why, "run": job.enqueued_at})


async def note_fallback(job: Job[Any], model: str) -> None:
    """Note that a fallback is about to be enqueued: its answer counts, also if gateway.toml changes meanwhile. Raises
    as `Job.called`.
    """
    await job.called({"fallback": model, "run": job.enqueued_at})
