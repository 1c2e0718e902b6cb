"""Decides why a job waits: from what was read of it to the one reason that counts most. Plain functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from ..units import short_duration
from .explanation import REMEDIES, Explanation, Found, JobEvidence
from .lane_reasons import LANE_RULES, count, describe_age, describe_lane, pause_of_job

BUDGET = re.compile(r"has a budget of \S+ for \d{4}-\d{2}\b")  # gateway/budgets.py, BudgetSpent
Rule = Callable[[JobEvidence], Found | None]


def decide(found: JobEvidence) -> Explanation:
    """Return the reason that counts most."""
    return describe(found, choose(found))


def choose(found: JobEvidence) -> Found:
    """Ask the rules in order: the first that applies decides."""
    return next(filter(None, (rule(found) for rule in RULES)))


def describe(found: JobEvidence, result: Found) -> Explanation:
    """Return what a rule has found of this job, with the remedy. Sentences are one line each, whatever names hold."""
    stats, lane = found.stats, found.lane
    values = {
        "job": shlex.quote(stats.job_id), "family": stats.family, "tenant": stats.tenant,
        "kind": stats.kind or "its kind", "dead": str(stats.dead_seq or "SEQ"), **result.values,
    }  # fmt: skip
    remedy = REMEDIES[result.reason].format(**values)
    if "aiqueue reschedule" in remedy and (pause := pause_of_job(found)) is not None:  # due, it would go on waiting
        remedy = f"it is paused, so first `aiqueue resume {pause.scope.arguments}`; then {remedy}"
    return Explanation(
        stats.job_id, stats.family, stats.tenant, stats.state, result.reason, _line(result.text),
        tuple(map(_line, result.evidence)), (*found.unknown, *(lane.unknown if lane is not None else ())),
        _line(remedy), result.until,
    )  # fmt: skip


def _line(text: str) -> str:
    return " ".join(text.split())


# -- jobs that are over


def _result_waits(found: JobEvidence) -> Found | None:
    if found.holder is None or found.holder.state != "result":
        return None
    where = f"worker {found.holder.worker} on {found.holder.host}, pid {found.holder.pid}"
    text = f"it has ended, and its result waits in {where} for room on the server"
    return Found("result_waits", text, ("the worker has acknowledged the job, to make room for its result",))


def _over(found: JobEvidence) -> Found | None:
    stats = found.stats
    failure = stats.failure or {}
    texts = {
        "done": "it has ended with a result",
        "failed": f"it has failed ({failure.get('reason') or '?'}): {failure.get('error') or 'no error is known'}",
        "cancelled": "it was cancelled" + (f", and {stats.note}" if stats.note else ""),
        "ended": stats.note or "it is over, and has left no outcome",
        "unknown": stats.note or "it is not among the stored jobs that were read",
    }
    if stats.state not in texts:
        return None
    evidence = (f"dead letter {stats.dead_seq}",) if stats.state == "failed" and stats.dead_seq else ()
    return Found(stats.state, texts[stats.state], evidence)


# -- parked jobs


def _due(found: JobEvidence) -> Found | None:
    if not found.due:
        return None
    if found.has_forwarder:
        return Found("due", "it is due, and a worker is about to move it to its lane")
    if found.has_forwarder is None:
        return Found("due", "it is due, and waits for a worker to move it to its lane")
    text = "it is due, and no worker runs that would move it to its lane"
    return Found("due_no_forwarder", text, ("nobody asks for due jobs of the stream of parked jobs",))


def _lane_full(found: JobEvidence) -> Found | None:
    if not found.waited:
        return None
    limit = found.lane.family.max_msgs_per_subject if found.lane is not None else None
    bound = f", which holds at most {limit:,} jobs" if limit else ""
    text = (
        f"it is due, and its lane has not taken it {count(found.waited, 'time')}{bound}: it is full, or its stream away"
    )
    return Found("lane_full", text, describe_lane(found), _at(found))


def _dead_letters_full(found: JobEvidence) -> Found | None:
    if not found.dead_full:
        return None
    text = f"it has failed ({found.dead_full}), and there was no space for its dead letter"
    return Found("dead_letters_full", text, (), _at(found))


def _children(found: JobEvidence) -> Found | None:
    stats = found.stats
    if stats.state != "waiting":
        return None
    going = [each for each in stats.children if each.state not in ("done", "failed", "cancelled", "ended")]
    text = f"it waits for its children: {len(going):,} of {stats.child_count:,} have not ended"
    shown = tuple(f"{each.name} ({each.job_id}) is {each.state.replace('_', ' ')}" for each in going[:3])
    more = (f"and {len(going) - 3:,} more",) if len(going) > 3 else ()
    child = shlex.quote(going[0].job_id) if going else "CHILD"
    return Found("children", text, (*shown, *more), None, {"child": child})


def _aside(found: JobEvidence) -> Found | None:
    """Parked aside, because its kind is paused or unknown."""
    if found.aside_since is None:
        return None
    kind, lane = found.stats.kind or "?", found.lane
    if lane is not None and lane.pauses is not None and lane.pauses.of_job(lane.lane.family, found.stats.tenant, kind):
        return None  # it is paused: decided below
    since = short_duration(max(0.0, found.now - found.aside_since))
    evidence: tuple[str, ...] = (f"parked aside {count(found.hops, 'time')}, first {since} ago",)
    if lane is None or lane.workers is None:
        return Found("unknown_kind", f"a worker did not know its kind, {kind}", evidence, _at(found))
    knowing = [each for each in lane.serving if each.knows(lane.family.name, kind) and each.state == "running"]
    if not knowing:
        others = sorted({name for each in lane.serving for name in each.kinds.get(lane.family.name, ())})
        evidence += (f"{count(len(lane.serving), 'worker', 'know')} {', '.join(others[:5]) or 'no kinds'}",)
        return Found("unknown_kind", f"no worker that is alive knows its kind, {kind}", evidence, _at(found))
    left = short_duration(max(0.0, (found.stats.next_attempt_at or 0.0) - found.now))
    text = f"a worker that does not know its kind, {kind}, has put it aside: it comes back in {left}"
    return Found("unknown_kind_hop", text, (*evidence, f"{knowing[0].name} knows the kind"), _at(found))


def _parked(found: JobEvidence) -> Found | None:
    """Until its time: a delay, or the wait for the next attempt. A pause of it counts afterwards."""
    stats = found.stats
    if stats.state not in ("parked", "retrying") or found.seq or found.aside_since is not None:
        return None
    at = stats.next_attempt_at or 0.0
    when = (
        f"is due in {short_duration(at - found.now)}"
        if at > found.now
        else f"has been due for {describe_age(found, at)}"
    )
    paused = (f"{pause}",) if (pause := pause_of_job(found)) is not None else ()
    if not found.is_retry:
        of = f" of schedule {stats.schedule}" if stats.schedule else ""
        return Found("delay", f"it was enqueued with a delay{of}, and {when}", paused, at)
    if BUDGET.search(found.error):
        return Found("budget", f"the budget has no room for it, and the next try {when}", (found.error, *paused), at)
    text = f"attempt {stats.attempt or '?'} has failed, and the next one {when}"
    return Found("retry", text, ((found.error,) if found.error else ()) + paused, at)


def _undeclared(found: JobEvidence) -> Found | None:
    if found.is_declared:
        return None
    return Found("undeclared_lane", "it is in a lane that its family does not declare: no worker will run it")


def _at(found: JobEvidence) -> float | None:
    return found.stats.next_attempt_at


RULES: Sequence[Rule] = (
    _result_waits, _over, _due, _lane_full, _dead_letters_full, _children, _aside, _parked, _undeclared, *LANE_RULES,
)  # fmt: skip
