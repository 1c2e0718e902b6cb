"""What the provider's log says. Pure: it is given all that was written down."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Span = tuple[float, float]
DIP_S = 0.1  # a process that has let go of places for less than this has held them all the time


@dataclass(slots=True)
class Call:
    """A call as the provider has seen it. `used`: what it cost. `end`: None if it goes on when the log ends. Times are
    monotonic seconds; `sent`: when its job was enqueued.
    """

    at: float
    pid: int
    status: int
    tenant: str
    key: str
    used: float
    number: int
    sent: float
    attempt: int
    end: float | None = None


class Life(NamedTuple):
    """When a process was connected to the provider."""

    pid: int
    since: float
    until: float


class Log(NamedTuple):
    calls: list[Call]
    lives: list[Life]

    def of(self, *, key: str | None = None, tenant: str | None = None) -> list[Call]:
        """The calls that were not refused, in the order of their arrival."""
        return [
            each
            for each in self.calls
            if each.status == 200 and key in (None, each.key) and tenant in (None, each.tenant)
        ]


def read(path: Path) -> Log:
    """Read a log, up to its last whole line."""
    calls: dict[int, Call] = {}
    lives: list[Life] = []
    since: dict[int, float] = {}
    with path.open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                break
            what, at, *fields = json.loads(line)
            if what == "call":
                pid, number, *rest = fields
                calls[number] = Call(at, pid, *rest)
            elif what == "end":
                calls[fields[0]].end = at
            elif what == "hello":
                since[fields[0]] = at
            else:
                lives.append(Life(fields[0], since.pop(fields[0]), at))
    lives += [Life(pid, at, math.inf) for pid, at in since.items()]
    return Log(sorted(calls.values(), key=lambda call: call.at), lives)


def worst(
    calls: Sequence[Call], window_s: float, since: float = -math.inf, until: float = math.inf
) -> tuple[int, float]:
    """The most calls, and the most cost, in any window that ends with a call between `since` and `until`."""
    return worst_window([(each.at, each.used) for each in calls], window_s, since, until)


def worst_window(
    calls: Sequence[tuple[float, float]], window_s: float, since: float = -math.inf, until: float = math.inf
) -> tuple[int, float]:
    """As `worst`, of the times of calls and their costs, in this order."""
    first, cost, most, highest = 0, 0.0, 0, 0.0
    for last, (at, used) in enumerate(calls):
        cost += used
        while calls[first][0] <= at - window_s:
            cost -= calls[first][1]
            first += 1
        if since <= at <= until:
            most, highest = max(most, last - first + 1), max(highest, cost)
    return most, highest


def rate(calls: Iterable[Call], since: float, until: float) -> float:
    """Calls a second between two times."""
    return sum(since < each.at <= until for each in calls) / (until - since)


def used(
    calls: Iterable[Call], window_s: float, since: float, until: float, *,
    requests: float = math.inf, cost: float = math.inf, without: Sequence[Span] = (),
) -> float:  # fmt: skip
    """The part of these limits that was used: the mean over all windows that end between two times, but not in the
    spans `without`, each by the limit of which it used most.

    The calls of one moment may take a whole limit: a count between two times would depend on how many such moments lie
    between them. Not a number if no window ends between the two times.
    """
    changes = [(at, each.used * sign, sign) for each in calls for at, sign in ((each.at, 1), (each.at + window_s, -1))]
    changes += [(at, 0.0, 0) for span in [(since, until), *without] for at in span]
    taken, count, former, total, seconds = 0.0, 0, -math.inf, 0.0, 0.0
    for at, used_, one in sorted(changes):
        if since <= former and at <= until and not any(a <= former and at <= b for a, b in without):
            total += max(count / requests, taken / cost) * (at - former)
            seconds += at - former
        taken, count, former = taken + used_, count + one, at
    return total / seconds if seconds else math.nan


def shares(calls: Iterable[Call], since: float, until: float, by_cost: bool) -> dict[str, float]:
    """Each tenant's share of the calls between two times, or of their cost."""
    found: Counter[str] = Counter()
    for each in calls:
        if since < each.at <= until:
            found[each.tenant] += each.used if by_cost else 1  # type: ignore[assignment]
    total = sum(found.values()) or 1
    return {tenant: share / total for tenant, share in found.items()}


def most_open(calls: Iterable[Call], log_end: float = math.inf) -> int:
    """The most calls that were open at once."""
    changes = sorted((at, change) for call in calls for at, change in ((call.at, 1), (call.end or log_end, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def longest_majority(log: Log, limit: int) -> float:
    """The longest time, in seconds, in which one process held more than half of `limit` calls open while another one
    was there. Dips of less than DIP_S count as held.
    """
    held: dict[int, list[Span]] = {}
    by_pid: dict[int, list[Call]] = defaultdict(list)
    for call in log.of():
        by_pid[call.pid].append(call)
    for pid, calls in by_pid.items():
        others = [(each.since, each.until) for each in log.lives if each.pid != pid]
        spans = _joined(_above(calls, limit / 2), DIP_S)
        held[pid] = [
            (max(a, c), min(b, d)) for a, b in spans for c, d in _joined(sorted(others), 0) if c < b and d > a
        ]  # fmt: skip
    return max((b - a for spans in held.values() for a, b in spans), default=0.0)


def _above(calls: Iterable[Call], level: float) -> list[Span]:
    """The spans in which more than `level` calls were open."""
    changes = [(at, change) for call in calls if call.end for at, change in ((call.at, 1), (call.end, -1))]
    spans, now, since = [], 0, 0.0
    for at, change in sorted(changes):
        before, now = now, now + change
        if before <= level < now:
            since = at
        elif now <= level < before:
            spans.append((since, at))
    return spans


def _joined(spans: Iterable[Span], gap_s: float) -> list[Span]:
    found: list[Span] = []
    for a, b in spans:
        if found and a - found[-1][1] <= gap_s:
            found[-1] = found[-1][0], max(b, found[-1][1])
        else:
            found.append((a, b))
    return found


def waits(calls: Iterable[Call], since: float = -math.inf, until: float = math.inf) -> list[float]:
    """Milliseconds from the enqueueing of a job, between two times, to its call."""
    return [(each.at - each.sent) * 1000 for each in calls if since <= each.sent < until]


def p95(values: Sequence[float]) -> float:
    """The 95th percentile; infinity if there are too few values."""
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else math.inf


class Pause(NamedTuple):
    """What became of a key after a 429 with a Retry-After. `late`: how many milliseconds after the first 429 the last
    call of the pause came, 0 if none came. `resumed`: how many seconds after its end the first call came.
    """

    refused: int
    late_ms: float
    resumed_s: float


def pause(calls: Sequence[Call], retry_after_s: float) -> Pause:
    """Judge the calls of one key, of which one was refused. Raises ValueError if none was."""
    refused = [each for each in calls if each.status == 429]
    if not refused:
        raise ValueError("no call was refused")
    begun, end = refused[0].at, refused[0].at + retry_after_s
    within = [each.at for each in calls if begun < each.at < end]
    after = [each.at for each in calls if each.at >= end]
    return Pause(
        len(refused), (within[-1] - begun) * 1000 if within else 0.0, min(after) - end if after else math.inf
    )  # fmt: skip


def accounts(calls: Iterable[Call], expected: int) -> tuple[int, int]:
    """How many of the numbers 0 to `expected` were never called, and how many more than once."""
    seen = Counter(each.number for each in calls)
    return sum(number not in seen for number in range(expected)), sum(count > 1 for count in seen.values())


def above(calls: Iterable[Call], window_s: float, limit: int) -> Mapping[str, int]:
    """The keys that had more calls in a window than `limit`, and how many."""
    by_key: dict[str, list[Call]] = defaultdict(list)
    for each in calls:
        by_key[each.key].append(each)
    found = {key: worst(each, window_s)[0] for key, each in by_key.items()}
    return {key: most for key, most in found.items() if most > limit}
