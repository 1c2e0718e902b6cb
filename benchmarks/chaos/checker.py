"""Compares what was acknowledged with what came of it. Pure: it is given all that was written down."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from . import records
from .nemesis import Fault
from .records import Line, Run

SETTLING_S = 0.05  # from the end of a run to the server's having its ack: till then it is in flight
PATIENCE_S = 0.5  # the same where it is only asked whether a fault can be the reason
RESULT, FINAL = "result", ("result", "failed", "cancelled")
ALL_AWAY = ("server-kill", "server-stop", "disk-full", "link-cut")  # of one server; from its workers' view
SHOWN = 10
SOON_S = 1.0


class Word(NamedTuple):
    """An entry of a job's journal: `mark` is the run that a result names."""

    event: str
    run: int
    mark: str


class Evidence(NamedTuple):
    """`journals`: of each job, its entries in order; None where workers keep none. `dead`: the jobs that are dead
    letters. `left`: jobs that are stored still.
    """

    enqueued: Sequence[Line]
    runs: Sequence[Run]
    faults: Sequence[Fault]
    journals: Mapping[int, Sequence[Word]] | None
    dead: Iterable[int]
    left: int


@dataclass
class Verdict:
    """`lost`: acknowledged, and neither completed nor a dead letter. `overwritten`: a run of a job has two final
    entries, or one behind its final one, or a result that no run of it has ended with. `repeats`: runs beyond the
    first; `unexplained` are those whose earlier run no fault has met. `in_flight`: runs that had begun and were not
    settled when a fault came. `double_effects`: jobs whose effect was made more than once.
    """

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    completed: int = 0
    dead: int = 0
    left: int = 0
    lost: list[int] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    repeats: int = 0
    unexplained: list[int] = field(default_factory=list)
    in_flight: int = 0
    double_effects: int = 0

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing overwritten, nothing left behind, and no run repeated without a reason."""
        return not (self.lost or self.overwritten or self.unexplained or self.left)

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "lost": len(self.lost), "overwritten": len(self.overwritten),
                "unexplained": len(self.unexplained), "sound": self.sound,
                "examples": [*map(str, self.lost[:SHOWN]), *self.overwritten[:SHOWN]]}  # fmt: skip


class Recovery(NamedTuple):
    """What the faults of one kind cost, in seconds. `silence`: the longest time without the end of any run that began
    with the fault or up to SOON_S after it was over. `after_back`: from when what was taken away was back to the next
    end of a run. `elsewhere`: how long a killed worker's jobs waited to be begun again.
    """

    kind: str
    times: int
    silence: list[float]
    after_back: list[float]
    elsewhere: list[float]


def check(found: Evidence) -> Verdict:
    """What came of the jobs."""
    said = Counter(line.what for line in found.enqueued)
    acked = {line.number for line in found.enqueued if line.what in (records.ACKED, records.DUPLICATE)}
    verdict = Verdict(
        acknowledged=len(acked), refused=said[records.REFUSED], unknown=said[records.UNKNOWN], left=found.left
    )
    runs: dict[int, list[Run]] = defaultdict(list)
    for run in found.runs:
        runs[run.number].append(run)
    dead = set(found.dead)
    ended = {number for number, each in runs.items() if any(run.end is not None for run in each)}
    if found.journals is not None:
        told = {number for number, words in found.journals.items() if any(word.event == RESULT for word in words)}
        ended &= told
        verdict.overwritten = _overwritten(found.journals, runs)
    verdict.dead = len(dead & acked)
    verdict.completed = len(ended & acked)
    verdict.lost = sorted(acked - ended - dead)
    verdict.double_effects = sum(sum(run.effect is not None for run in each) > 1 for each in runs.values())
    for number, each in runs.items():
        for place, _ in enumerate(each[1:], 1):
            verdict.repeats += 1
            if not any(_met(run, found.faults, PATIENCE_S) for run in each[:place]):
                verdict.unexplained.append(number)
    verdict.in_flight = sum(1 for run in found.runs if any(_in_flight(run, fault) for fault in found.faults))
    return verdict


def _overwritten(journals: Mapping[int, Sequence[Word]], runs: Mapping[int, Sequence[Run]]) -> list[str]:
    problems = []
    for number, words in journals.items():
        ended: set[int] = set()
        marks = {run.mark for run in runs.get(number, ()) if run.end is not None}
        for word in words:
            if word.run in ended:
                problems.append(f"job {number}: {word.event} behind the final entry of its run")
            if word.event in FINAL:
                ended.add(word.run)
            if word.event == RESULT and word.mark not in marks:
                problems.append(f"job {number}: the result names {word.mark}, which has not ended")
    return problems


def _met(run: Run, faults: Sequence[Fault], settling_s: float) -> bool:
    """Whether a fault has met this run between its start and its settling."""
    end = float("inf") if run.end is None else run.end + settling_s
    for fault in faults:
        if fault.victim and fault.victim != run.pid:
            continue
        if _ended_it(run, fault) or (run.start <= (fault.until or fault.at) and fault.at <= end):
            return True
    return False


def _ended_it(run: Run, fault: Fault) -> bool:
    """Whether a kill ended a run of its victim: also one that began between the note of the kill and the kill."""
    return fault.kind == "worker-kill" and fault.victim == run.pid and run.end is None


def _in_flight(run: Run, fault: Fault) -> bool:
    """Whether a run had begun and was not settled when the fault came. What begins while every server is away was
    delivered before.
    """
    if fault.victim and fault.victim != run.pid:
        return False
    if _ended_it(run, fault):
        return True
    last = fault.until if fault.until and fault.kind in ALL_AWAY else fault.at
    return run.start <= last and (run.end is None or fault.at <= run.end + SETTLING_S)


def recoveries(runs: Sequence[Run], faults: Sequence[Fault]) -> list[Recovery]:
    """How long each kind of fault was felt."""
    ends = sorted(run.end for run in runs if run.end is not None)
    by_number: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_number[run.number].append(run)
    kinds: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        kinds[fault.kind].append(fault)
    return [
        Recovery(
            kind,
            len(each),
            [_silence(ends, fault.at, (fault.until or fault.at) + SOON_S) for fault in each],
            [wait for fault in each if fault.until and (wait := _until_next(ends, fault.until)) is not None],
            [wait for fault in each for wait in _elsewhere(fault, runs, by_number)] if kind == "worker-kill" else [],
        )
        for kind, each in kinds.items()
    ]


def _until_next(ends: Sequence[float], at: float) -> float | None:
    place = bisect.bisect(ends, at)
    return ends[place] - at if place < len(ends) else None


def _silence(ends: Sequence[float], since: float, until: float) -> float:
    """The longest time between two ends, the first of them before `until`, as far as it lies behind `since`."""
    first, last = bisect.bisect(ends, since), bisect.bisect(ends, until) + 1
    return max((later - earlier for earlier, later in pairwise([since, *ends[first:last]])), default=0.0)


def _elsewhere(fault: Fault, runs: Sequence[Run], by_number: Mapping[int, Sequence[Run]]) -> list[float]:
    """How long the jobs that died with a worker waited for their next run."""
    waits = []
    for run in runs:
        if run.pid != fault.victim or run.end is not None:
            continue
        again = [other.start for other in by_number[run.number] if other.start > run.start]
        if again:
            waits.append(min(again) - fault.at)
    return waits
