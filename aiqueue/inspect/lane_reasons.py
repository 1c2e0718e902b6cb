"""Decides why a job that is in its lane, or that is paused, waits. Plain functions, the first that applies decides."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..lanes import Pause
from ..subjects import Lane
from ..units import short_duration
from .explanation import Found, JobEvidence, LaneEvidence
from .limit_stats import LimitStats, LimitUse
from .worker_stats import WorkerStats

PAUSED_NS = 5_000_000_000  # a shorter pause of a consumer is a worker's, which is about to remove it
NAMES_MAX = 3
_PLACES = {"loop": "in its event loop", "thread": "in a thread", "process": "in a child process"}


def count(number: int, one: str, does: str = "") -> str:
    """Return a number with its noun and verb: "1 job", "1,200 jobs", "1 worker serves", "2 workers serve"."""
    if number == 1:
        return f"1 {one}{f' {does}s' if does else ''}"
    return f"{number:,} {one}s{f' {does}' if does else ''}"


def describe_age(found: JobEvidence, at: float | None) -> str:
    """Return how long ago a time is, such as "3m10s"."""
    return "?" if not at else short_duration(max(0.0, found.now - at))


def describe_lane(found: JobEvidence) -> tuple[str, ...]:
    """Return sentences about the job's lane: how many jobs wait there, and its place among them."""
    lane = found.lane
    if lane is None:
        return ()
    said = []
    if found.place == 0:
        said.append("it is the next one of its lane")
    elif found.place is not None:
        said.append(f"{count(found.place, 'job')} of its lane {'is' if found.place == 1 else 'are'} before it")
    if lane.consumer:
        at_most = lane.consumer.get("config", {}).get("max_ack_pending", 0)
        bound = f" of at most {at_most:,}" if at_most > 0 else ""
        flight = f"{lane.consumer.get('num_ack_pending', 0):,} in flight{bound}"
        said.append(f"lane {lane.lane}: {lane.consumer.get('num_pending', 0):,} waiting, {flight}")
    elif lane.consumer is not None:
        why = "its turn has not come" if lane.serving else "no worker serves it"
        said.append(f"lane {lane.lane} has no consumer at the moment: {why}")
    return tuple(said)


def _names(workers: Sequence[WorkerStats]) -> str:
    more = f" and {len(workers) - NAMES_MAX:,} more" if len(workers) > NAMES_MAX else ""
    return ", ".join(each.name for each in workers[:NAMES_MAX]) + more


def _held(found: JobEvidence) -> Found | None:
    """A worker says that it holds the job."""
    holder = found.holder
    if holder is None or (found.seq and holder.seq and holder.seq != found.seq):
        return None
    who = f"worker {holder.worker} on {holder.host}, pid {holder.pid}"
    evidence: tuple[str, ...] = (
        f"delivered {count(holder.deliveries, 'time')}, last {describe_age(found, holder.since)} ago",
    )
    values = {"worker": holder.worker}
    if holder.suspect or found.on_trial:
        text = f"{who} tries it apart from other jobs, one at a time, because workers were lost with it"
        return Found("quarantine", text, evidence, None, values)
    if holder.state == "waiting":
        return Found("waits_in_worker", f"it waits in {who} for a slot", evidence, None, values)
    if holder.state == "starting":
        for rule in (_paused, _limited):  # its worker is about to give it back
            if (other := rule(found)) is not None:
                return other._replace(evidence=(*evidence, *other.evidence))
        text = f"{who} has given it a slot, and is about to call its handler, or to store its outcome"
        return Found("starting", text, evidence, None, values)
    where = _PLACES.get(holder.runs_in, "")
    attempt = f"attempt {holder.attempt} " if holder.attempt else ""
    text = f"it runs: {attempt}for {describe_age(found, holder.started_at)}, by {who}{f', {where}' if where else ''}"
    until = None
    if holder.timeout_s and holder.started_at:
        until = holder.started_at + holder.timeout_s
        evidence += (f"its handler has a timeout of {short_duration(holder.timeout_s)}",)
    return Found("running", text, evidence, until, values)


def _claimed(found: JobEvidence) -> Found | None:
    holder = found.holder
    other = found.claimed_by or (holder.seq if holder is not None and found.seq not in (0, holder.seq) else 0)
    if not other:
        return None
    text = f"another job of its id is under way (run {other}), and only one of them runs"
    evidence = (f"worker {holder.worker} on {holder.host} runs that one",) if holder is not None else ()
    return Found("claimed", text, evidence)


def _retry_soon(found: JobEvidence) -> Found | None:
    stats = found.stats
    if stats.state != "retrying" or not stats.next_attempt_at:
        return None
    left = short_duration(max(0.0, stats.next_attempt_at - found.now))
    text = f"attempt {stats.attempt or '?'} has failed, and the next one starts in {left}"
    return Found("retry_soon", text, (found.error,) if found.error else (), stats.next_attempt_at)


def pause_of_job(found: JobEvidence) -> Pause | None:
    """Return the pause that holds for a job, as far as was read; None: none is known."""
    stats, pause = found.stats, found.stats.pause
    if pause is None and found.lane is not None and found.lane.pauses is not None:
        lane = found.lane.lane
        pause = found.lane.pauses.of_job(lane.family, stats.tenant, stats.kind or "", lane.key)
    return pause


def _paused(found: JobEvidence) -> Found | None:
    if (pause := pause_of_job(found)) is None:
        return None
    until = f", until in {short_duration(max(0.0, pause.until - found.now))}" if pause.until is not None else ""
    text = f"{pause}, since {describe_age(found, pause.since)}{until}"
    return Found("paused", text, describe_lane(found), pause.until, {"scope": pause.scope.arguments})


def _lane_paused(found: JobEvidence) -> Found | None:
    lane = found.lane
    if lane is None or not lane.consumer or lane.consumer.get("pause_remaining", 0) <= PAUSED_NS:
        return None
    left = short_duration(lane.consumer["pause_remaining"] / 1e9)
    name = str(lane.consumer.get("name", ""))
    values = {"stream": lane.family.stream, "consumer": shlex.quote(name)}
    text = f"somebody has paused the consumer of its lane, {name}, for another {left}"
    return Found("lane_paused", text, describe_lane(found), None, values)


def _deadline(found: JobEvidence) -> Found | None:
    if found.deadline is None or found.now < found.deadline:
        return None
    ago = describe_age(found, found.deadline)
    text = f"its deadline has passed {ago} ago: it becomes a dead letter when a worker gets it"
    return Found("deadline", text, describe_lane(found))


def _stranded(found: JobEvidence) -> Found | None:
    if not found.stranded:
        return None
    at_most = (found.lane.consumer or {}).get("config", {}).get("max_deliver", 0) if found.lane is not None else 0
    times = f"{at_most:,} times" if at_most else "too often"
    text = f"the server has delivered it {times}, and gives it to nobody any more"
    return Found("stranded", text, ("the stream of max deliveries has a notice about it",))


def _lost_holder(found: JobEvidence) -> Found | None:
    """A worker's record lists the job, and the worker does not answer."""
    each = found.silent
    if each is None:
        return None
    heard, values = f"it was last heard of {describe_age(found, each.heard_at)} ago", {"worker": each.name}
    if each.state == "stalled" and each.blocked_at:
        text = f"worker {each.name} holds it, and its event loop is blocked for {short_duration(each.stalled_s)}"
        return Found("worker_stalled", text, (f"at {each.blocked_at}", heard), None, values)
    if each.answers or each.state == "silent":
        busy = "" if each.state == "silent" else ", or is too busy to answer"
        text = f"worker {each.name} on {each.host} has had it, and does not answer: it was killed, or is cut off{busy}"
        return Found("worker_lost", text, (heard, _lease(found)), None, values)
    text = f"worker {each.name} on {each.host} holds it, as its record says; a former version, or one without the "
    text += "permission, says no more"
    return Found("running", text, (heard,), None, values)


def _lease(found: JobEvidence) -> str:
    return f"its lease lasts {_lease_at_most(found)}: then it is delivered again"


def _lease_at_most(found: JobEvidence) -> str:
    assert found.lane is not None
    return f"at most {short_duration(found.lane.family.ack_wait_s)}"


def _unserved(found: JobEvidence) -> Found | None:
    """Nobody is there for the job. Workers that do not announce themselves are seen by what they ask for."""
    lane = found.lane
    if lane is None:
        return None
    where, said = f"{lane.family.name}", describe_lane(found)
    if lane.workers is None:
        return None if lane.is_pulled else Found("unserved", "nobody asks for jobs of its lane at the moment", said)
    of_family = [each for each in lane.workers if where in each.families]
    serving = lane.serving
    if not serving and lane.consumer and lane.consumer.get("num_waiting"):
        return None
    if not of_family:
        others = (
            f"{count(len(lane.workers), 'worker')} of other families: none serves it"
            if lane.workers
            else "no worker is alive"
        )
        if lane.consumer and (flight := lane.consumer.get("num_ack_pending")):
            held = f"{count(flight, 'job')} of its lane {'is' if flight == 1 else 'are'} in flight"
            others += f"; {held}, with workers that are lost, or that may not announce themselves"
        return Found("no_worker", f"no worker of {where} is running", (others, *said))
    if not serving:
        tenants = sorted({name for each in of_family for name in each.tenants or ()})
        text = f"no worker takes jobs of tenant {lane.lane.tenant}"
        served = f"{count(len(of_family), 'worker', 'serve')} {', '.join(tenants[:5])}"
        return Found("no_worker_for_tenant", text, (served, *said), None, {"tenant": lane.lane.tenant})
    return _unable(found, lane, serving)


def _unable(found: JobEvidence, lane: LaneEvidence, serving: Sequence[WorkerStats]) -> Found | None:
    """The workers that are there cannot take it: they are lost, drain, hang, or do not know its kind."""
    said = describe_lane(found)
    heard = [each for each in serving if each.state != "silent"]
    if not heard:
        ago = describe_age(found, max(each.heard_at for each in serving))
        return Found("workers_lost", f"its workers were last heard of {ago} ago: {_names(serving)}", said)
    able = [each for each in heard if each.state not in ("draining", "stalled", "disconnected")]
    if not able and all(each.state == "draining" for each in heard):
        return Found("workers_draining", f"all of its workers drain, and take no more jobs: {_names(heard)}", said)
    if not able and all(each.state != "stalled" for each in heard):
        text = f"no server answered its workers when they last reported: {_names(heard)}"
        return Found("workers_disconnected", text, said)
    if not able:
        at = tuple(f"{each.name}: {each.blocked_at or 'it gets no jobs'}" for each in heard if each.state == "stalled")
        text = f"all of its workers are stalled, disconnected, or drain: {_names(heard)}"
        return Found("workers_stalled", text, (*at[:NAMES_MAX], *said))
    kind = found.stats.kind
    if kind and not any(each.knows(lane.family.name, kind) for each in able):
        known = sorted({name for each in able for name in each.kinds.get(lane.family.name, ())})
        knows = f"{count(len(able), 'worker', 'know')} {', '.join(known[:5]) or 'no kinds'} of its family"
        return Found("unknown_kind", f"no worker that is alive knows its kind, {kind}", (knows, *said))
    return None


class _Reached(NamedTuple):
    """A rule that has no room for the job. `figures`: its limits that are reached, by the names of `limits set`."""

    rule: LimitStats
    use: LimitUse
    figures: Mapping[str, float]
    line: str


def _find_reached(found: JobEvidence) -> list[_Reached]:
    """Return the rules of the job's key that have no room for it.

    The job's own cost is known to its worker only. So a limit of cost that is used in part counts as reached if nothing
    else is: workers have free slots, and leave the job where it is.
    """
    reached, in_part = list[_Reached](), list[_Reached]()
    for rule, use in found.lane.limits if found.lane is not None else ():
        used = {
            name: (spent, limit)
            for name, spent, limit in (
                ("requests", use.requests, rule.requests), ("cost", use.cost, rule.cost),
                ("in-flight", use.in_flight, rule.in_flight),
            )
            if limit is not None and (spent >= limit or (name == "cost" and spent > 0))
        }  # fmt: skip
        if used:
            parts = [
                f"{name.replace('-', ' ')} {spent:,.10g} of {limit:,.10g}" for name, (spent, limit) in used.items()
            ]
            line = f"{rule}: {', '.join(parts)} are used ({rule.limit})"
            full = any(spent >= limit for spent, limit in used.values())
            (reached if full else in_part).append(
                _Reached(rule, use, {name: limit for name, (_, limit) in used.items()}, line)
            )
    return [*reached, *in_part] if reached or _busy(found) is None else []


def _tell_room(found: JobEvidence, each: _Reached) -> tuple[str | None, float | None]:
    """Return a sentence about when a rule has room again, and that time. None: it cannot be known."""
    use = each.use
    if "in-flight" in each.figures:
        return "there is room when a job of the key ends: when that is cannot be known", None
    if "cost" in each.figures and use.cost_free_at and use.cost_all_free_at:
        first, last = (short_duration(max(0.0, at - found.now)) for at in (use.cost_free_at, use.cost_all_free_at))
        when = f"in {first}" if first == last else f"in {first} (the first) to {last} (all of it)"
        return f"the cost stops counting {when}; how much of that the job needs, only its worker knows", None
    if use.requests_free_at and math.isfinite(use.requests_free_at):
        left = short_duration(max(0.0, use.requests_free_at - found.now))
        return f"there is room for another request in {left}", use.requests_free_at
    return None, None


def _limited(found: JobEvidence) -> Found | None:
    reached = _find_reached(found)
    if not reached:
        return None
    rule, use, figures, _ = reached[0]
    whom = {None: "", "*": " --each-tenant"}.get(rule.tenant, f" --tenant {rule.tenant}")
    raised = "".join(f" --{name} {_twice(limit)}" for name, limit in figures.items())
    full = any(limit <= getattr(use, name.replace("-", "_")) for name, limit in figures.items())
    state = "is reached" if full else "seems to have no room for the job's cost"
    text = f"the limit of {rule.family} for {use.key!r} {state}: {rule.limit}, {rule.whom}"
    room = [_tell_room(found, each) for each in reached]
    times = [at for _, at in room if at is not None]
    until = max(times) if len(times) == len(room) and not found.place else None  # else others may take the room
    lines = (*(each.line for each in reached), *(said for said, _ in room if said), *describe_lane(found))
    return Found("limit", text, lines, until, {"scope": f"{rule.family} {shlex.quote(rule.key)}{whom}{raised}"})


def _twice(limit: float) -> str:
    return f"{2 * limit:.0f}" if limit == int(limit) else f"{2 * limit:.10g}"


def _lane_limit(found: JobEvidence) -> Found | None:
    consumer = found.lane.consumer if found.lane is not None else None
    if not consumer or found.delivered:
        return None
    at_most, held = consumer.get("config", {}).get("max_ack_pending", 0), consumer.get("num_ack_pending", 0)
    if not 0 < at_most <= held:
        return None
    text = f"its lane is at its limit: {held:,} of at most {at_most:,} jobs are in flight (max_ack_pending)"
    return Found("lane_limit", text, (*describe_lane(found), *_slots(found)))


def _delivered(found: JobEvidence) -> Found | None:
    if not found.delivered or found.lane is None:
        return None
    since = (
        f"; its last event was {describe_age(found, found.stats.timeline[-1].at)} ago" if found.stats.timeline else ""
    )
    mute = [each for each in found.lane.serving if not each.answers]
    if not found.has_asked:
        return Found("delivered", "it was delivered to a worker, and has not ended", describe_lane(found))
    evidence = [f"no worker says that it holds it{since}", _lease(found)]
    if mute:
        evidence.append(f"{_names(mute)}: does not answer, for its version or its permissions")
    if blocked := [each for each in found.lane.serving if each.blocked_at]:
        evidence.append(f"{_names(blocked)}: the event loop is blocked, so it may hold the job and cannot say so")
    text = (
        "it was delivered to a worker and is not settled: the worker has gone, gave it back, or is too busy to answer; "
        "it is delivered again"
    )
    return Found("lease", text, tuple(evidence))


def _busy_again(found: JobEvidence) -> Found | None:
    """It was delivered, and was given back or is to be tried again; those who could get it have no free slot. Not if
    one of them may hold it and cannot say so.
    """
    if not found.delivered or not found.has_asked or found.lane is None:
        return None
    if any(not each.answers or each.blocked_at or each.state == "silent" for each in found.lane.serving):
        return None
    busy = _busy(found)
    if busy is None:
        return None
    failed = (f"attempt {found.stats.attempt or '?'} has failed: {found.error}",) if found.error else ()
    again = f"no worker holds it: it waits for a slot, or for the end of its lease ({_lease_at_most(found)})"
    return busy._replace(evidence=(*failed, again, *busy.evidence))


def _slots(found: JobEvidence) -> tuple[str, ...]:
    """Return sentences about the slots of the workers that serve the job, and what runs there longest."""
    able = _able(found)
    if not able:
        return ()
    used, slots = sum(each.running for each in able), sum(each.slots for each in able)
    heard = describe_age(found, min(each.heard_at for each in able))
    said = [f"{count(len(able), 'worker', 'serve')} it: {used:,} of {count(slots, 'slot')} in use, {heard} ago"]
    oldest = max((each.oldest for each in able if each.oldest is not None), key=lambda each: each.age_s, default=None)
    if oldest is not None:
        said.append(f"the oldest running job is {oldest.kind} {oldest.job_id}, for {short_duration(oldest.age_s)}")
    return tuple(said)


def _able(found: JobEvidence) -> list[WorkerStats]:
    serving = found.lane.serving if found.lane is not None else ()
    kind, family = found.stats.kind or "", found.stats.family
    return [each for each in serving if each.state == "running" and (not kind or each.knows(family, kind))]


def _others(found: JobEvidence) -> tuple[dict[Lane, int], dict[Lane, int]]:
    """Return the jobs that wait in lanes of higher priorities, and in other lanes of the same one."""
    lane = found.lane
    if lane is None or lane.pending is None:
        return {}, {}
    rank = {name: at for at, name in enumerate(lane.family.priorities)}
    own = rank.get(lane.lane.priority, 0)
    waiting = {each: jobs for each, jobs in lane.pending.items() if jobs and each != lane.lane}
    higher = {each: jobs for each, jobs in waiting.items() if rank.get(each.priority, own) < own}
    return higher, {each: jobs for each, jobs in waiting.items() if rank.get(each.priority) == own}


def _busy(found: JobEvidence) -> Found | None:
    able = _able(found)
    if not able or not all(each.is_busy for each in able):
        return None
    said = (*_slots(found), *describe_lane(found))
    higher, _ = _others(found)
    if higher:
        jobs = sum(higher.values())
        lanes = f"{count(jobs, 'job')} in {count(len(higher), 'lane')}"
        text = (
            f"all slots are in use, and {lanes} of higher priority {'goes' if jobs == 1 else 'go'} first (an estimate)"
        )
        return Found("priority", text, said)
    used = sum(each.slots for each in able)
    text = f"all {used:,} slots of its workers are in use" if used != 1 else "the one slot of its worker is in use"
    return Found("slots_busy", text, said)


def _turn(found: JobEvidence) -> Found:
    """What is left: workers are there and have slots, so its turn comes. How soon is an estimate."""
    higher, others = _others(found)
    said = [*describe_lane(found), *_slots(found)]
    if higher:
        said.append(f"{count(sum(higher.values()), 'job')} of higher priority in {count(len(higher), 'lane')}")
    if others:
        weight = found.lane.family.weight(found.stats.tenant) if found.lane is not None else 1.0
        said.append(
            f"{count(sum(others.values()), 'job')} of its priority in {count(len(others), 'other lane')}; lanes "
            f"take turns by weight, this tenant's is {weight:g}"
        )
    waits_for_pull = found.lane is not None and not found.lane.is_pulled and found.lane.serving
    in_line = [each for each in _able(found) if each.in_line.get(found.stats.family)] if waits_for_pull else []
    if waits_for_pull and not in_line:
        said.append("no worker asks for jobs of its lane right now: it is found within a second")
    if in_line:
        lanes = count(sum(each.in_line[found.stats.family] for each in in_line), "lane")
        said.append(f"{lanes} of its family in line, at {_names(in_line)}")
        text = "it waits for its turn: its lane stands in line, for workers have more lanes with jobs than they pull on"
    elif found.place:
        are = "is" if found.place == 1 else "are"
        text = f"it waits for its turn: {count(found.place, 'job')} of its lane {are} before it"
    elif higher or others:
        text = "it waits for its turn: other lanes are served before it (an estimate)"
    else:
        text = "it is the next one of its lane, and nothing is in its way: it is about to be delivered"
    return Found("turn", text, tuple(said))


LANE_RULES: Sequence[Callable[[JobEvidence], Found | None]] = (
    _held, _claimed, _paused, _retry_soon, _lane_paused, _deadline, _stranded, _lost_holder, _unserved, _limited,
    _lane_limit, _busy_again, _delivered, _busy, _turn,
)  # fmt: skip
