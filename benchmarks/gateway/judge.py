"""What the provider's log, the ledger and the answers say together. Pure: it is given all that was written down."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from aiqueue.gateway import Price, UsageRecord
from aiqueue.gateway.standin import LoggedCall

STORED_S = 0.5  # an answer that had come so long before a kill may not have been stored yet


@dataclass
class Verdict:
    """What does not fit. `extra`: calls beyond the first of each request. All lists are of requests' users.

    - `early`: extra calls though no earlier call of the request was under way at a kill.
    - `unstated`: extra calls that the request's answer does not tell of. `overstated`: those it tells of in vain.
    - `unrecorded`: calls that stand in no record. `false`: records "possibly_billed" of no call. `invented`: records
      with a known end of no call.
    - `wrong_tokens`, `wrong_cost`: records with a known end whose figures are not those of a call.
    - `given_up`: how many records say that their call was given up before it was made, and count nothing.
    """

    calls: int = 0
    extra: int = 0
    stated: int = 0
    held: int = 0
    given_up: int = 0
    uncalled: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    unstated: list[str] = field(default_factory=list)
    overstated: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    wrong_tokens: list[str] = field(default_factory=list)
    wrong_cost: list[str] = field(default_factory=list)


def share(part: Sequence[str], whole: int) -> float:
    return len(part) / whole if whole else 0.0


def accounts(
    calls: Iterable[LoggedCall], records: Iterable[UsageRecord], users: Mapping[str, str], stated: Mapping[str, int],
    kills: Sequence[float], price: Price,
) -> Verdict:  # fmt: skip
    """Judge a run. `users`: of each request id, its user at the provider. `stated`: of each request id, how many calls
    besides may be billed, as its answer says. `kills`: when, in seconds since the epoch.
    """
    found = Verdict()
    called: dict[str, list[LoggedCall]] = defaultdict(list)
    for call in calls:
        if call.outcome != "refused":
            called[call.user].append(call)
    told: dict[str, list[UsageRecord]] = defaultdict(list)
    for record in records:
        told[users.get(record.request_id, f"unknown request {record.request_id}")].append(record)
    for request_id, user in users.items():
        extra, known = max(0, len(called[user]) - 1), stated.get(request_id, 0)
        found.stated += known
        found.unstated += [user] * (extra - known)
        found.overstated += [user] * (known - extra)
    for user in {*users.values(), *called, *told}:
        _judge(found, user, sorted(called[user], key=lambda each: each.started_at), told[user], kills, price)
    return found


def _judge(
    found: Verdict, user: str, calls: Sequence[LoggedCall], records: Sequence[UsageRecord], kills: Sequence[float],
    price: Price,
) -> None:  # fmt: skip
    found.calls += len(calls)
    found.extra += max(0, len(calls) - 1)
    if not calls:
        found.uncalled.append(user)
    found.early += [user for each in calls[:-1] if not any(_was_under_way(each, kill) for kill in kills)]
    given_up = [each for each in records if _was_given_up(each)]
    records = [each for each in records if not _was_given_up(each)]
    found.given_up += len(given_up)
    known = [each for each in records if each.outcome != "possibly_billed"]
    found.held += len(records) - len(known)
    found.unrecorded += [user] * (len(calls) - len(records))
    found.invented += [user] * (len(known) - len(calls))
    found.false += [user] * (len(records) - max(len(calls), len(known)))
    tokens = Counter((each.prompt_tokens, each.completion_tokens) for each in calls)
    for each in known:
        of_it = each.prompt_tokens, each.completion_tokens
        if not tokens[of_it]:
            found.wrong_tokens.append(user)
        tokens[of_it] -= 1
        if each.cost_micros != price.cost_micros(*of_it):
            found.wrong_cost.append(user)


def _was_given_up(record: UsageRecord) -> bool:
    """Whether a worker has recorded that it will not make this call: its own, or one that a dead worker has noted."""
    tokens = record.prompt_tokens, record.completion_tokens, record.cached_tokens, record.cache_write_tokens
    is_free = record.cost_micros == 0 and not any(tokens) and record.latency_s is None
    return record.is_of_no_call and record.outcome == "failed" and is_free


def _was_under_way(call: LoggedCall, at: float) -> bool:
    ended_at = math.inf if call.ended_at is None else call.ended_at
    return call.started_at <= at <= ended_at + STORED_S
