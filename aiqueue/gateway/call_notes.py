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

    A dead letter that is replayed is another run: it has all its attempts again, and knows the calls of the former. A
    rerun has no notes of the runs before it.

    - `calls`: the ids of calls that may have been begun, the oldest first.
    - `failures`: the kinds of errors, in this run, since it was parked. `waits`: how often its budget had no room then.
    - `parked`: the last month whose end it was parked for; "": none. `parked_at`: the attempt that was.
    - `gave_up`: why its model is not called any more in this run; "": it is. `fallbacks`: models that were begun then.
    """

    calls: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    waits: int = 0
    parked: str = ""
    parked_at: int = 0
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
                found.waits += is_own
            elif is_own and isinstance(note.get("parked"), str):
                found.parked, found.parked_at = note["parked"], int(note.get("attempt", 0))
                found.failures.clear()
                found.waits = 0
            elif is_own and isinstance(note.get("failed"), str):
                found.failures.append(note["failed"])
            elif is_own and isinstance(note.get("gave_up"), str):
                found.gave_up = note["gave_up"]
            elif is_own and isinstance(note.get("fallback"), str):
                found.fallbacks.append(note["fallback"])
        return found

    def unnoted(self, attempt: int) -> int:
        """Return how many earlier attempts, in this run since it was parked, have ended without a note: late ones, and
        such whose server did not answer, or whose worker has died.
        """
        return max(0, attempt - 1 - self.parked_at - len(self.failures) - self.waits)


async def note_call(job: Job[Any], call_id: str) -> None:
    """Note a call that is about to be made. Raises as `Job.called`."""
    await job.called({"call": call_id})


async def note_refusal(job: Job[Any], call_id: str) -> None:
    """Note that a call was not made, because the budget does not admit it. Raises as `Job.called`."""
    await job.called({"refused": call_id, "run": job.enqueued_at})


async def note_parking(job: Job[Any], month: str) -> None:
    """Note that this attempt is parked for the end of a month, "2026-11". Raises as `Job.called`."""
    await job.called({"parked": month, "attempt": job.attempt, "run": job.enqueued_at})


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
