"""What happened to a job, in one order: put together from its journal, its dead letter and where it is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import headers, subjects
from ..connection import Stored
from ..enqueue import DeadLetter, Waiting, history_of
from ..journal import Entry, StreamItem

SAME_S = 60.0  # a dead letter, and the journal's word about it, are not further apart
SKEW_S = 1.0  # between a worker's clock, by which a history is told, and the server's
KEPT_S = 400 * 86_400.0  # no job is kept for longer: an id that tells an older time tells none

BORN = frozenset({"enqueued", "replayed"})
_ROWS = ("progress", "chunks")  # of which many follow each other
_HOP = re.compile(r"r\d{1,19}-(\d{9,11})-a\d{1,9}")  # the word of a retry's parking: see settlement.hop_of
_BY_PLACE = re.compile(r"s\d{1,19}-([0-9a-f]{1,16})")  # the id of a plain publisher's job: see runner


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened to a job. `at` is in seconds since the epoch, None where nobody has noted it; `after_s`:
    since the step before. Of `count` progress entries or chunks in a row, since `first_at`, the last one is told.
    `until` is when a parked job, or a retry, is due; `lost` chunks before it found no room.

    `event`: **enqueued**, **replayed**, **parked**, **due** (its time has come), **delivered** (to a worker, which has
    said nothing yet), **started** (an attempt began), **progress**, **chunks**, **trial**, **retried** (an attempt
    failed and another one is to come), **attempt failed** (the same, as a history tells it), **result**, **failed**,
    **cancelled**, **dead letter**, or whatever else the journal says. An ordinary job's first attempt writes nothing
    when it begins: it is known by what it says later.
    """

    event: str
    at: float | None
    says: str = ""
    run: int = 0
    attempt: int | None = None
    worker: str = ""
    reason: str = ""
    until: float | None = None
    count: int = 1
    first_at: float | None = None
    lost: int = 0
    data: Any = None
    dead_seq: int | None = None
    after_s: float | None = None


def timeline(
    job_id: str,
    entries: Sequence[Entry],
    *,
    stored: Stored | None,
    parked: Sequence[Waiting],
    letter: DeadLetter | None,
    delivered: bool = False,
    delivered_at: float | None = None,
) -> tuple[Step, ...]:
    """The steps, the oldest first. `delivered`: the stored job has left the queue at least once. What nobody has noted
    is left out, but that the job was enqueued, and delivered.
    """
    steps = _of_journal(entries)
    first_s = entries[0].time if entries else float("inf")
    steps += [step for step in _of_history(stored, parked, letter) if (step.at or 0.0) < first_s - SKEW_S]
    for each in parked:
        _add_parked(steps, each)
    if stored is not None and headers.PARKED in stored.headers:
        run, _ = _born(stored)
        steps.append(Step("due", stored.time, "back in its lane", run))
    if letter is not None:
        _add_letter(steps, letter)
    placed = _births(job_id, entries, stored, parked, letter)
    if stored is not None and delivered and not any(entry.time >= stored.time for entry in entries):
        run, _ = _born(stored)
        says = "to a worker, which has said nothing yet"
        placed.append((delivered_at or stored.time, Step("delivered", delivered_at, says, run)))
    return _in_order([*placed, *((step.at or 0.0, step) for step in steps)])


# -- what the journal says


def _of_journal(entries: Sequence[Entry]) -> list[Step]:
    steps: list[Step] = []
    for entry in entries:
        step = replace(step_of(entry), lost=entry.lost)
        if entry.begun is not None and not any(_begins(each, entry) for each in steps):
            begun = max(entry.begun, entry.enqueued_at or 0.0)
            steps.append(Step("started", min(begun, entry.time), run=entry.run, attempt=entry.attempt))
        last = steps[-1] if steps else None
        if last is not None and step.event in _ROWS and _voice(last) == _voice(step):
            steps[-1] = replace(
                step, count=last.count + step.count, lost=last.lost + step.lost, first_at=last.first_at or last.at
            )
        else:
            steps.append(step)
        if isinstance(entry.data, dict) and entry.data.get("parked") and step.event == "retried":
            steps.append(Step("parked", entry.time, run=entry.run, until=step.until))
    return steps


def _begins(step: Step, entry: Entry) -> bool:
    return step.event == "started" and (step.run, step.attempt) == (entry.run, entry.attempt)


def _voice(step: Step) -> tuple[str, int, int | None]:
    return step.event, step.run, step.attempt


def step_of(entry: Entry | StreamItem) -> Step:
    """What one entry of a journal says."""
    told = entry.data if isinstance(entry.data, dict) else {}
    step = Step(entry.event or "?", entry.time, run=entry.run, attempt=entry.attempt or None)
    match entry.event:
        case "started":
            delivery = told.get("delivery")
            count = delivery[2] if isinstance(delivery, list) and len(delivery) == 3 else 0
            says = f"delivery {count}" if isinstance(count, int) and count > 1 else ""
            return replace(step, says=says, worker=_text(told, "worker"))
        case "progress":
            fraction = told.get("fraction")
            shown = f"{fraction:.0%}" if isinstance(fraction, int | float) else ""
            return replace(step, says=f"{shown} {_text(told, 'note')}".strip())
        case "chunk":
            return replace(step, event="chunks", count=len(entry.data) if isinstance(entry.data, list) else 1)
        case "retry":
            delay_s = told.get("delay_s")
            until = None
            if isinstance(delay_s, int | float) and 0 <= delay_s < KEPT_S:  # a stranger may have written anything
                until = entry.time + delay_s
            return replace(step, event="retried", says=_text(told, "error"), worker=_worker(told), until=until)
        case "failed" | "cancelled":
            says, reason = _text(told, "error"), _text(told, "reason")
            return replace(step, says=says, reason=reason, worker=_worker(told))
        case _:
            return replace(step, data=entry.data)


def _text(told: Mapping[str, Any], name: str) -> str:
    found = told.get(name)
    return "" if found is None else str(found)


def _worker(told: Mapping[str, Any]) -> str:
    """Who made the newest attempt of a history."""
    history = told.get("history")
    newest = history[-1] if isinstance(history, list) and history else None
    return _text(newest, "worker") if isinstance(newest, dict) else ""


# -- what the places say where it is


def _of_history(stored: Stored | None, parked: Sequence[Waiting], letter: DeadLetter | None) -> list[Step]:
    """Attempts that the job, or its dead letter, brings along: a journal is not kept for as long."""
    if letter is not None:
        history = letter.history[:-1]  # the last one is how it died
    else:
        history = [item for each in _places(stored, parked) for item in history_of(each.headers)]
    steps = []
    for told in history:
        at, number = told.get("at"), told.get("attempt")
        if isinstance(at, int | float):
            number = number if isinstance(number, int) else None
            steps.append(Step("attempt failed", at, _text(told, "error"), attempt=number, worker=_text(told, "worker")))
    return steps


def _add_parked(steps: list[Step], job: Waiting) -> None:
    told, at = job.stored.headers, job.stored.time
    if job.place.due:
        steps.append(Step("due", at, "a worker is to bring it to its lane", job.run))
    elif headers.WAITED in told:
        steps.append(Step("parked", at, "its lane was full when it was due", job.run))
    elif headers.REASON in told:
        says = "it ended badly, and there was no room for its dead letter"
        steps.append(Step("parked", at, says, job.run, reason=told[headers.REASON], until=job.due))
    else:
        last = steps[-1] if steps else None
        if last is not None and (last.event, last.run) == ("parked", job.run):
            steps.pop()  # the journal said for when it was to be parked; here it is
        steps.append(Step("parked", at, run=job.run, until=job.due))


def _add_letter(steps: list[Step], letter: DeadLetter) -> None:
    """The dead letter is written before the journal says so: the two are one step."""
    for place, step in enumerate(steps):
        same = step.event == "failed" and step.reason == letter.reason and step.at is not None
        if same and abs((step.at or 0.0) - letter.failed_at) < SAME_S:
            steps[place] = replace(step, dead_seq=letter.seq, worker=letter.worker)
            return
    steps.append(
        Step(
            "dead letter", letter.failed_at, letter.error, attempt=letter.attempt or None, worker=letter.worker,
            reason=letter.reason, dead_seq=letter.seq,
        )
    )  # fmt: skip


# -- when it was enqueued


def _places(stored: Stored | None, parked: Sequence[Waiting]) -> list[Stored]:
    return [each.stored for each in parked] + ([] if stored is None else [stored])


def _births(
    job_id: str,
    entries: Sequence[Entry],
    stored: Stored | None,
    parked: Sequence[Waiting],
    letter: DeadLetter | None,
) -> list[tuple[float, Step]]:
    """When each run of the job was enqueued, and before what it stands where that is not known. A stored job says it, a
    dead letter does, and so do ids and words of parkings that the library has made.
    """
    firsts: dict[int, Entry] = {}
    told: dict[int, float | None] = {}
    for entry in entries:
        firsts.setdefault(entry.run, entry)
        told[entry.run] = entry.enqueued_at or told.get(entry.run) or _told_by(entry.word, entry, firsts[entry.run])
    births: dict[int, Step] = {}
    for place, (run, entry) in enumerate(firsts.items()):
        at = told[run] or (_told_by(job_id, entry, entry) if place == 0 else None)
        births[run] = Step("enqueued", at, "again, under the same id" if place else "", run)
    for each in _places(stored, parked):
        run, at = _born(each)
        replayed = headers.number(each.headers.get(headers.REPLAY, "")) > 0
        births[run] = replace(births.get(run, Step("enqueued", None, run=run)), at=at)
        if replayed:
            births[run] = replace(births[run], event="replayed", says="")
    if letter is not None:
        run = list(firsts)[-1] if firsts and stored is None and not parked else 0
        event = "replayed" if letter.replays else "enqueued"
        births[run] = Step(event, letter.enqueued_at, run=run)
    placed = [
        (firsts[run].time if step.at is None and run in firsts else step.at or 0.0, step)
        for run, step in births.items()
    ]
    # what was enqueued with a delay has been parked since then, under a word with a time in it
    placed += [
        (step.at, Step("parked", step.at, "until its time", run))
        for run, step in births.items()
        if step.at is not None and run in firsts and subjects.made_at(firsts[run].word) == step.at
    ]
    return placed


def _born(stored: Stored) -> tuple[int, float]:
    """Which run a stored job is, and since when. One that was enqueued with a delay has no run while it is parked."""
    told = stored.headers
    if headers.PARKED not in told:
        return stored.seq, stored.time
    here = 0 if stored.subject.startswith(f"{subjects.PARKED}.") else stored.seq
    enqueued_at = headers.decimal(told.get(headers.ENQUEUED, "")) or subjects.made_at(headers.word(told))
    return headers.number(told.get(headers.RUN, "")) or here, enqueued_at or stored.time


def _told_by(word: str, entry: Entry, first: Entry) -> float | None:
    """The time in an id, or in the word of a parking, where it can be that of the job, whose `first` entry is given."""
    if move := _HOP.fullmatch(word):
        at: float | None = float(move[1])
    elif by_place := _BY_PLACE.fullmatch(word):
        at = int(by_place[1], 16) / 1e6
    elif word == entry.word and entry.event == "cancelled" and entry.run:
        at = None  # a queued job was taken out: the word is of that moment
    else:
        at = subjects.made_at(word)
    return at if at is not None and first.time - KEPT_S < at < first.time + SKEW_S else None


def _in_order(steps: list[tuple[float, Step]]) -> tuple[Step, ...]:
    told: list[Step] = []
    known: float | None = None
    for _, step in sorted(steps, key=lambda each: each[0]):
        told.append(step if step.at is None or known is None else replace(step, after_s=max(0.0, step.at - known)))
        known = known if step.at is None else step.at
    return tuple(told)
