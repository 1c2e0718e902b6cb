"""Builds the timeline of a job: what happened to it, from its journal, its dead letter and where it is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import headers, subjects
from ..connection import Stored
from ..enqueue import DeadLetter, ParkedJob, history_of
from ..journal import Entry, StreamItem
from ..units import short_size

SAME_S = 60.0  # a dead letter and the journal's `failed` of the same failure are not further apart
SKEW_S = 1.0  # between the clock of a worker, which stamps a history, and the server's
MAX_AGE_S = 400 * 86_400.0  # no job is kept for longer, so a time in an id that is further off is none

ENQUEUED_EVENTS = frozenset({"enqueued", "replayed"})
_MERGED_EVENTS = ("progress", "chunks", "step")  # events of one attempt that follow each other become one
_RETRY_KEY = re.compile(r"r\d{1,19}-(\d{9,11})-a\d{1,9}")  # a retry's parking id: worker/settlement.py, retry_move
_STREAM_ID = re.compile(r"s\d{1,19}-([0-9a-f]{1,16})")  # id of a plain publisher's job: attempt/decoding.py


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One thing that happened to a job.

    - `at`: when, in seconds since the epoch; None if it was not recorded. `after_s`: seconds since the event before.
    - `count`: how many progress entries, chunks or steps of one attempt in a row this event stands for. The event shows
      the last. The first was at `first_at`.
    - `until`: when a parked job, or a retry, is due.
    - `lost_chunks`: how many chunks before this event the server had no space for.

    `event` is one of:

    - **enqueued**, **replayed**
    - **parked**; **due**: the job's time has come
    - **delivered**: to a worker, which has written nothing yet
    - **started**: an attempt began. A first attempt writes no entry when it begins; entries that end it carry the time.
    - **progress**, **chunks**, **trial**
    - **step**: the result of a step was kept; **called**: an external call was about to be made
    - **retried**: an attempt failed and another follows; **attempt failed**: the same, known from the history only
    - **waits**: the job was parked until its children end
    - **moved**: a worker has moved the job to the lane of its limited key
    - **result**, **failed**, **cancelled**, **dead letter**
    - any other event of a journal
    """

    event: str
    """What happened, such as started, retried or result."""
    at: float | None
    text: str = ""
    """The same in words, such as the message of a progress."""
    run: int = 0
    """Run of the job: a sequence in the work stream."""
    attempt: int | None = None
    worker: str = ""
    """Name of the worker that did it; empty: none is known."""
    reason: str = ""
    """Why, in one word, of a failure; empty otherwise."""
    until: float | None = None
    count: int = 1
    first_at: float | None = None
    """When the first of `count` events was; None: there is one only."""
    lost_chunks: int = 0
    data: Any = None
    """What the event carries, such as a result."""
    dead_seq: int | None = None
    """Number of the dead letter that the event is about; None: it is about none."""
    after_s: float | None = None


def build_timeline(
    job_id: str,
    entries: Sequence[Entry],
    *,
    kept: Sequence[Entry] = (),
    stored: Stored | None,
    parked: Sequence[ParkedJob],
    letter: DeadLetter | None,
    delivered: bool = False,
    delivered_at: float | None = None,
    unique: str = "",
) -> tuple[TimelineEvent, ...]:
    """Return the events of a job, the oldest first. `delivered`: the stored job has been delivered at least once.
    `unique`: as of `JobStats`.

    Only **enqueued** and **delivered** events may have no time; any other event without a recorded time is left out.
    """
    events = _events_from_journal(entries)
    events += _events_from_journal([each for each in kept if each.event in ("step", "called")])
    first_s = entries[0].time if entries else float("inf")
    events += [event for event in _events_from_history(stored, parked, letter) if (event.at or 0.0) < first_s - SKEW_S]
    for each in parked:
        _add_parked(events, each)
    if stored is not None and headers.PARKED in stored.headers:
        run, _ = run_and_enqueued_at(stored)
        events.append(TimelineEvent("due", stored.time, "back in its lane", run))
    if letter is not None:
        _add_dead_letter(events, letter)
    keyed = _enqueued_events(job_id, entries, stored, parked, letter)
    if unique:
        keyed = [(at, _with_key(event, unique)) for at, event in keyed]
    if stored is not None and delivered and not any(entry.time >= stored.time for entry in entries):
        run, _ = run_and_enqueued_at(stored)
        text = "to a worker, which has written nothing yet"
        keyed.append((delivered_at or stored.time, TimelineEvent("delivered", delivered_at, text, run)))
    return _sort_events([*keyed, *((event.at or 0.0, event) for event in events)])


# -- from the journal


def _events_from_journal(entries: Sequence[Entry]) -> list[TimelineEvent]:
    events: list[TimelineEvent] = []
    for entry in entries:
        event = replace(event_of(entry), lost_chunks=entry.lost_chunks)
        if entry.started_at is not None and not any(_is_start_of(each, entry) for each in events):
            started_at = max(entry.started_at, entry.enqueued_at or 0.0)
            events.append(TimelineEvent("started", min(started_at, entry.time), run=entry.run, attempt=entry.attempt))
        last = events[-1] if events else None
        if last is not None and event.event in _MERGED_EVENTS and _merge_key(last) == _merge_key(event):
            events[-1] = replace(
                event,
                count=last.count + event.count,
                lost_chunks=last.lost_chunks + event.lost_chunks,
                first_at=last.first_at or last.at,
            )
        else:
            events.append(event)
        if isinstance(entry.data, dict) and entry.data.get("parked") and event.event == "retried":
            events.append(TimelineEvent("parked", entry.time, run=entry.run, until=event.until))
    return events


def _is_start_of(event: TimelineEvent, entry: Entry) -> bool:
    """Whether an event is the start of the attempt that wrote an entry."""
    return event.event == "started" and (event.run, event.attempt) == (entry.run, entry.attempt)


def _merge_key(event: TimelineEvent) -> tuple[str, int, int | None]:
    return event.event, event.run, event.attempt


def event_of(entry: Entry | StreamItem) -> TimelineEvent:
    """Return one entry of a journal as an event. Its data may be anything: other programs can write to a journal."""
    data = entry.data if isinstance(entry.data, dict) else {}
    event = TimelineEvent(entry.event or "?", entry.time, run=entry.run, attempt=entry.attempt or None)
    match entry.event:
        case "started":
            order = data.get("delivery")
            count = order[2] if isinstance(order, list) and len(order) == 3 else 0
            text = f"delivery {count}" if isinstance(count, int) and count > 1 else ""
            return replace(event, text=text, worker=_text_in(data, "worker"))
        case "progress":
            fraction = data.get("fraction")
            percent = f"{fraction:.0%}" if isinstance(fraction, int | float) else ""
            return replace(event, text=f"{percent} {_text_in(data, 'note')}".strip())
        case "chunk":
            return replace(event, event="chunks", count=len(entry.data) if isinstance(entry.data, list) else 1)
        case "step":
            text, document = _text_in(data, "name"), entry.document
            note = f" ({short_size(document.size)}, stored as a document)" if document is not None else ""
            return replace(event, text=text + note, data=data.get("document" if document is not None else "result"))
        case "called":
            return replace(event, data=data.get("data"))
        case "retry":
            return _retry_event(event, entry, data)
        case "failed" | "cancelled":
            text, reason = _text_in(data, "error"), _text_in(data, "reason")
            return replace(event, text=text, reason=reason, worker=last_worker(data))
        case _:  # of a large result, an entry has a reference, and a stream's item the result
            document = entry.document if isinstance(entry, Entry) else None
            text = f"{short_size(document.size)}, stored as a document" if document is not None else ""
            return replace(event, text=text, data=entry.data)


def _retry_event(event: TimelineEvent, entry: Entry | StreamItem, data: Mapping[str, Any]) -> TimelineEvent:
    """Return the event of a `retry`. A job that waits for its children, or that is moved to the lane of its limited
    key, writes one of the attempt before.
    """
    if key := _text_in(data, "limit_key"):
        return replace(event, event="moved", text=f"to the lane of its limited key {key}", attempt=entry.attempt + 1)
    if isinstance(data.get("children"), int):
        return replace(event, event="waits", text=f"for {data['children']:,} children", attempt=entry.attempt + 1)
    delay_s = data.get("delay_s")
    until = None
    if isinstance(delay_s, int | float) and 0 <= delay_s < MAX_AGE_S:
        until = entry.time + delay_s
    return replace(event, event="retried", text=_text_in(data, "error"), worker=last_worker(data), until=until)


def _text_in(data: Mapping[str, Any], name: str) -> str:
    found = data.get(name)
    return "" if found is None else str(found)


def last_worker(data: Mapping[str, Any]) -> str:
    """Return the worker of the newest attempt in an entry's history, empty without one."""
    history = data.get("history")
    newest = history[-1] if isinstance(history, list) and history else None
    return _text_in(newest, "worker") if isinstance(newest, dict) else ""


# -- from where the job is stored


def _events_from_history(
    stored: Stored | None, parked: Sequence[ParkedJob], letter: DeadLetter | None
) -> list[TimelineEvent]:
    """Return the failed attempts in the history of the job or its dead letter, which outlives the journal."""
    if letter is not None:
        history = letter.history[:-1]  # the last attempt is the dead letter's own event
    else:
        history = [item for each in _stored_messages(stored, parked) for item in history_of(each.headers)]
    events = []
    for item in history:
        at, number = item.get("at"), item.get("attempt")
        if isinstance(at, int | float):
            number = number if isinstance(number, int) else None
            error, worker = _text_in(item, "error"), _text_in(item, "worker")
            events.append(TimelineEvent("attempt failed", at, error, attempt=number, worker=worker))
    return events


def _add_parked(events: list[TimelineEvent], job: ParkedJob) -> None:
    """Add the event of a parked job. It replaces the journal's event for the same parking, which is the last one."""
    job_headers, at = job.stored.headers, job.stored.time
    if job.subject.is_due:
        events.append(TimelineEvent("due", at, "waits for a worker to move it to its lane", job.run))
    elif headers.WAITED in job_headers:
        events.append(TimelineEvent("parked", at, "its lane was full when it was due", job.run))
    elif headers.REASON in job_headers:
        text = "it failed, and there was no space for its dead letter"
        events.append(TimelineEvent("parked", at, text, job.run, reason=job_headers[headers.REASON], until=job.due_at))
    else:
        last = events[-1] if events else None
        if last is not None and (last.event, last.run) == ("parked", job.run):
            events.pop()
        events.append(TimelineEvent("parked", at, run=job.run, until=job.due_at))


def _add_dead_letter(events: list[TimelineEvent], letter: DeadLetter) -> None:
    """Add a dead letter to the journal's `failed` of the same failure, or as an event of its own if there is none."""
    for position, event in enumerate(events):
        same = event.event == "failed" and event.reason == letter.reason and event.at is not None
        if same and abs((event.at or 0.0) - letter.failed_at) < SAME_S:
            events[position] = replace(event, dead_seq=letter.seq, worker=letter.worker)
            return
    events.append(
        TimelineEvent(
            "dead letter", letter.failed_at, letter.error, attempt=letter.attempt or None, worker=letter.worker,
            reason=letter.reason, dead_seq=letter.seq,
        )
    )  # fmt: skip


# -- when the job was enqueued


def _stored_messages(stored: Stored | None, parked: Sequence[ParkedJob]) -> list[Stored]:
    return [each.stored for each in parked] + ([] if stored is None else [stored])


def _enqueued_events(
    job_id: str,
    entries: Sequence[Entry],
    stored: Stored | None,
    parked: Sequence[ParkedJob],
    letter: DeadLetter | None,
) -> list[tuple[float, TimelineEvent]]:
    """Return an **enqueued** or **replayed** event for each run of the job, and the time to sort it by.

    A stored job and a dead letter carry the time, and so do job ids and parking ids that the library has made. A run
    without a known time sorts before its first entry. A job that was enqueued with a delay gets a **parked** event too.
    """
    firsts: dict[int, Entry] = {}
    times: dict[int, float | None] = {}
    for entry in entries:
        first = firsts.setdefault(entry.run, entry)
        times[entry.run] = entry.enqueued_at or times.get(entry.run) or _time_in_id(entry.parking_id, entry, first)
    by_run: dict[int, TimelineEvent] = {}
    for position, (run, entry) in enumerate(firsts.items()):
        at = times[run] or (_time_in_id(job_id, entry, entry) if position == 0 else None)
        by_run[run] = TimelineEvent("enqueued", at, "again, under the same id" if position else "", run)
    for each in _stored_messages(stored, parked):
        run, at = run_and_enqueued_at(each)
        replayed = headers.number(each.headers.get(headers.REPLAY, "")) > 0
        by_run[run] = replace(by_run.get(run, TimelineEvent("enqueued", None, run=run)), at=at)
        if replayed:
            by_run[run] = replace(by_run[run], event="replayed", text="")
    if letter is not None:
        run = list(firsts)[-1] if firsts and stored is None and not parked else 0
        event = "replayed" if letter.replays else "enqueued"
        by_run[run] = TimelineEvent(event, letter.enqueued_at, run=run)
    keyed = [
        (firsts[run].time if event.at is None and run in firsts else event.at or 0.0, event)
        for run, event in by_run.items()
    ]
    # the parking id of a job that was enqueued with a delay was made at that moment
    keyed += [
        (event.at, TimelineEvent("parked", event.at, "until its time", run))
        for run, event in by_run.items()
        if event.at is not None and run in firsts and subjects.made_at(firsts[run].parking_id) == event.at
    ]
    return keyed


def _with_key(event: TimelineEvent, unique: str) -> TimelineEvent:
    """Return an **enqueued** event with the caller's key in its text."""
    if event.event not in ENQUEUED_EVENTS:
        return event
    return replace(event, text=f"{event.text}: {unique}" if event.text else f"as {unique}")


def run_and_enqueued_at(stored: Stored) -> tuple[int, float]:
    """Return the run of a stored or parked job, and when the run was enqueued.

    Unlike `headers.run`: a job that was enqueued with a delay and is still parked has no run (0), and its time is in
    its parking id.
    """
    job_headers = stored.headers
    if headers.PARKED not in job_headers:
        return stored.seq, stored.time
    own_seq = 0 if stored.subject.startswith(f"{subjects.PARKED}.") else stored.seq
    enqueued_at = headers.decimal(job_headers.get(headers.ENQUEUED, ""))
    enqueued_at = enqueued_at or subjects.made_at(headers.parking_id(job_headers))
    return headers.number(job_headers.get(headers.RUN, "")) or own_seq, enqueued_at or stored.time


def _time_in_id(made_id: str, entry: Entry, first: Entry) -> float | None:
    """Return when a job was enqueued by the time in its job id, or in the parking id of its `entry`.

    None if there is no time, or it cannot be the job's, whose first entry is `first`.
    """
    if dedup_key := _RETRY_KEY.fullmatch(made_id):
        at: float | None = float(dedup_key[1])
    elif stream_id := _STREAM_ID.fullmatch(made_id):
        at = int(stream_id[1], 16) / 1e6
    elif made_id == entry.parking_id and entry.event == "cancelled" and entry.run:
        at = None  # a queued job was cancelled by way of parking: the id was made at that moment
    else:
        at = subjects.made_at(made_id)
    return at if at is not None and first.time - MAX_AGE_S < at < first.time + SKEW_S else None


def _sort_events(keyed: list[tuple[float, TimelineEvent]]) -> tuple[TimelineEvent, ...]:
    """Return the events in the order of their keys, each with the time since the one before that has a time."""
    ordered: list[TimelineEvent] = []
    known: float | None = None
    for _, event in sorted(keyed, key=lambda each: each[0]):
        ordered.append(
            event if event.at is None or known is None else replace(event, after_s=max(0.0, event.at - known))
        )
        known = known if event.at is None else event.at
    return tuple(ordered)
