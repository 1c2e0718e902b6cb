"""The children of a job: read from what its run keeps, as a tree of bounded size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from .. import headers
from ..connection import Stored
from ..enqueue import DeadLetter
from ..errors import JobState, NotFound
from ..journal import CANCELLED, FAILED, RESULT, ChildEnd, ChildRecord, Entry, children_of_entry
from ..subjects import ParentRun

CHILDREN_SHOWN = 100  # jobs of one tree that are looked up or listed

_STATE_OF: dict[str, JobState] = {RESULT: "done", FAILED: "failed", CANCELLED: "cancelled"}  # of a child that has ended


@dataclass(frozen=True, slots=True)
class ChildStats:
    """A child of a job. `state`: one of `aiqueue.JobState`. `children`: its own, if it has not ended."""

    name: str
    """Name of the child in its parent."""
    job_id: str
    family: str
    kind: str
    state: JobState
    children: tuple[ChildStats, ...] = ()


Describe = Callable[[ChildRecord], Awaitable[tuple[JobState, tuple[ChildStats, ...]]]]


class TreeBudget:
    """How many more jobs of one tree may be listed."""

    def __init__(self) -> None:
        self.left = CHILDREN_SHOWN


def find_parent(messages: Sequence[Stored | DeadLetter | None]) -> str | None:
    """Return the id of the job that has enqueued a job, by what is stored of the latter; None: none, or not known."""
    parents = [ParentRun.parse(each.headers.get(headers.PARENT, "")) for each in messages if each is not None]
    return next((each.job_id for each in parents if each is not None), None)


async def describe_children(
    kept: Sequence[Entry], describe: Describe, budget: TreeBudget
) -> tuple[tuple[ChildStats, ...], int]:
    """Return the children of a job by what its runs keep, as far as the budget allows, and how many there are.

    `describe`: returns state and children of a child that has not ended.
    """
    records: dict[str, ChildRecord] = {}
    ends: dict[str, JobState] = {}
    for entry in kept:
        if entry.event == "children":
            records.update({each.name: each for each in children_of_entry(entry)})
        elif entry.event == "ended" and isinstance(entry.data, dict):
            plain = entry.data.get("ends")
            found = [ChildEnd.from_plain(each) for each in plain] if isinstance(plain, list) else []
            ends.update({end.job_id: _STATE_OF.get(end.event, "ended") for end in found if end is not None})
    shown = []
    for record in records.values():
        if budget.left <= 0:
            break
        budget.left -= 1
        state = ends.get(record.job_id)
        children: tuple[ChildStats, ...] = ()
        if state is None:
            try:
                state, children = await describe(record)
            except NotFound:
                state = "unknown"
        shown.append(ChildStats(record.name, record.job_id, record.family, record.kind, state, children))
    return tuple(shown), len(records)
