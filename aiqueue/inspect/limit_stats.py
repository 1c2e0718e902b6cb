"""Reads the rules of limits that hold now, and what each value of a limited key uses of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import subjects
from ..connection import Connection
from ..errors import AccessDenied, NotFound
from ..lanes import Pause
from ..subjects import Lane
from ..topology import Topology
from .keys import read_keys
from .pauses import pause_of
from .stats import count_pending

if TYPE_CHECKING:  # imported where it is used: clients without limits do without it
    from ..limits import Controls, EffectiveRule, Rule, RuleId, Rules, StoredUse


@dataclass(frozen=True, slots=True)
class LimitUse:
    """What one value of the key uses of a rule.

    - `tenant`: whose use it is; None: all tenants together.
    - `requests`, `cost`: what counts in the present window, including a little that processes have reserved ahead.
      `in_flight`: how many places for calls processes hold. Each is 0 if the rule does not limit it.
    - `requests_free_at`, `cost_free_at`, `cost_all_free_at`: when the window has room again, if nothing else starts.
    - `waiting`: jobs in the lanes of the value that no worker holds. `pause`: the value is paused.
    """

    key: str
    """Value of the limited key."""
    tenant: str | None
    requests: float
    cost: float
    in_flight: int
    """How many places for calls processes hold; 0 without such a limit."""
    waiting: int
    pause: Pause | None = None
    requests_free_at: float | None = None
    """When the window has room for another request, in seconds since the epoch; None: it has room, or no such limit."""
    cost_free_at: float | None = None
    """When the first of the cost stops counting, in seconds since the epoch; None: no cost counts."""
    cost_all_free_at: float | None = None
    """When all of the cost has stopped counting, in seconds since the epoch; None: no cost counts."""


@dataclass(frozen=True, slots=True)
class LimitStats:
    """A rule that holds now, and the values of the key that use it.

    - `key`: the value or pattern that the rule is for. `tenant`: None is all tenants together, ``*`` each by itself.
    - `requests`, `cost`, `in_flight`: the limits, in `window_s` seconds. None: no such limit. All three None: the
      override lifts the declared rule.
    - `limit` and `declared`: the limits as text, as they are now and as limits.toml has them (None: it does not).
    - `is_override`: somebody has set the rule: `by` whom, `set_at`, and until when (`expires_at`; None: it stays).
      Times are seconds since the epoch.
    - `uses`: one for each value and, if the rule is for tenants, each tenant: those that use it, wait or are paused.
    """

    family: str
    key: str
    tenant: str | None
    limit: str
    requests: int | None
    cost: float | None
    in_flight: int | None
    window_s: float
    """Seconds of the window in which requests and cost count."""
    declared: str | None
    is_override: bool = False
    by: str = ""
    """Who has set the override; empty: the rule is a declared one."""
    set_at: float | None = None
    """When the override was set, in seconds since the epoch; None: the rule is a declared one."""
    expires_at: float | None = None
    """When the override ends by itself, in seconds since the epoch; None: it stays."""
    uses: tuple[LimitUse, ...] = ()

    def __str__(self) -> str:
        """Return what the rule is for, such as "llm.calls, key 'gpt-*', all tenants together"."""
        return f"{self.family}, key {self.key!r}, {self.whom}"

    @property
    def whom(self) -> str:
        """Whose use counts together: "all tenants together", "each tenant", or a tenant."""
        return {None: "all tenants together", "*": "each tenant"}.get(self.tenant, f"tenant {self.tenant}")

    def is_reached_by(self, use: LimitUse) -> bool:
        """Whether a value of the key has used all of a limit of this rule, so that its jobs wait."""
        used = (use.requests, self.requests), (use.cost, self.cost), (use.in_flight, self.in_flight)
        return any(limit is not None and spent >= limit for spent, limit in used)


async def read_limits(
    connection: Connection, topology: Topology, rules: Rules, family: str | None = None
) -> list[LimitStats]:
    """Return the rules of one family or of all, sorted by family, key and tenant. `rules`: the declared ones.

    Raises BadInput for a family without a limit_key, NotFound (the stream is missing), AccessDenied, Unavailable.
    """
    from ..limits import Controls, find_limited_family  # noqa: PLC0415

    if family is not None:
        find_limited_family(topology, family)
    controls = Controls(connection, topology, rules, connection.clock.now)
    await connection.clock.ensure(controls.stream)
    await controls.reload()
    found = [each for each in controls.rules.effective(controls.now()) if family in (None, each.rule.id.family)]
    uses: dict[RuleId, list[LimitUse]] = {}
    for name in {each.rule.id.family for each in found}:
        known = await _read_family(connection, topology, controls, name)
        for which, use in _uses(controls, name, known):
            uses.setdefault(which, []).append(use)
    stats = [describe_limit(each, uses.get(each.rule.id, [])) for each in found]
    return sorted(stats, key=_rank)


async def read_overrides_if_allowed(connection: Connection, topology: Topology, rules: Rules) -> list[LimitStats]:
    """Return the rules that operators have set, without their use, as `read_limits` does; none if the stream is
    missing, or this user may not read it. Raises Unavailable.
    """
    from ..limits import Controls  # noqa: PLC0415

    controls = Controls(connection, topology, rules, connection.clock.now)
    try:
        await controls.reload()
    except (NotFound, AccessDenied):
        return []
    found = [describe_limit(each) for each in controls.rules.effective(controls.now()) if each.override is not None]
    return sorted(found, key=_rank)


def _rank(found: LimitStats) -> tuple[str, str, str]:
    return found.family, found.key, found.tenant or ""


class _FamilyUse:
    """What is stored about the limits of one family. Values are known by their hashes in subjects."""

    def __init__(self, controls: Controls, name: str) -> None:
        self.uses: dict[tuple[str, str | None], StoredUse] = {}  # by hashed value, and tenant
        self.waiting: dict[tuple[str, str | None], int] = {}
        self.pauses = {
            (subjects.hashed(each.key), each.tenant): pause_of(each)
            for each in controls.pauses()
            if each.family == name
        }
        self.texts = {hashed: pause.key or "" for (hashed, _), pause in self.pauses.items()}
        for rule in controls.rules.effective(controls.now()):
            if rule.rule.id.family == name and "*" not in rule.rule.id.key:
                self.texts[subjects.hashed(rule.rule.id.key)] = rule.rule.id.key

    def add_use(self, hashed: str, tenant: str | None, use: StoredUse) -> None:
        self.uses[hashed, tenant] = use
        self.texts[hashed] = use.key

    def add_waiting(self, pending: Mapping[Lane, int]) -> None:
        for lane, jobs in pending.items():
            for tenant in (None, lane.tenant):
                if lane.key and lane.key != subjects.REST:
                    self.waiting[lane.key, tenant] = self.waiting.get((lane.key, tenant), 0) + jobs

    def places(self) -> set[tuple[str, str | None]]:
        """Return the values, and the tenants of each (None: all together), of which something is known."""
        waiting = [place for place, jobs in self.waiting.items() if jobs]
        found = {place for place in (*self.uses, *self.pauses, *waiting) if place[0] in self.texts}
        return found | {(hashed, None) for hashed, _ in found}


async def _read_family(connection: Connection, topology: Topology, controls: Controls, name: str) -> _FamilyUse:
    from ..limits import StoredUse  # noqa: PLC0415

    found = _FamilyUse(controls, name)
    async for stored in connection.read(controls.stream, subjects.bucket(controls.stream, "use", name, ">")):
        *_, hashed, scope = stored.subject.split(".")
        try:
            found.add_use(hashed, subjects.tenant_of_scope(scope), StoredUse.parse(stored.data))
        except ValueError:
            continue  # of a later version, or deleted
    family = topology.families.get(name)
    if family is not None and family.limit_key:
        try:
            pending = await count_pending(connection, family)
            nameless = {lane: jobs for lane, jobs in pending.items() if jobs and lane.key not in found.texts}
            found.texts |= await read_keys(connection, topology, family, nameless)
            found.add_waiting(pending)
        except NotFound:
            pass  # the family's stream is not created yet
    return found


def describe_limit(found: EffectiveRule, uses: Collection[LimitUse] = ()) -> LimitStats:
    """Return a rule as `read_limits` does, with these uses."""
    rule, override = found.rule, found.override
    return LimitStats(
        *rule.id, rule.describe(), rule.requests, rule.cost, rule.in_flight, rule.window_s,
        declared=found.declared.describe() if found.declared is not None else None,
        is_override=override is not None,
        by=override.author if override is not None else "",
        set_at=override.set_at if override is not None else None,
        expires_at=override.expires_at if override is not None else None,
        uses=tuple(sorted(uses, key=lambda each: (-each.waiting, each.key, each.tenant or ""))),
    )  # fmt: skip


def _uses(controls: Controls, family: str, known: _FamilyUse) -> Iterator[tuple[RuleId, LimitUse]]:
    """Yield the use of each value, of all tenants together and of each, with the rule that holds for it."""
    from ..limits import StoredUse, Timing  # noqa: PLC0415

    now = controls.now()
    for hashed, tenant in known.places():
        text = known.texts[hashed]
        wide, narrow = controls.rules.choose(family, text, tenant or "", now)
        rule = wide if tenant is None else narrow
        if rule is None:
            continue
        use = known.uses.get((hashed, tenant), StoredUse(text))
        requests, cost = use.used(now, Timing.of(rule.window_s))
        waiting, in_flight = known.waiting.get((hashed, tenant), 0), use.in_flight(now)
        pause = known.pauses.get((hashed, None)) or known.pauses.get((hashed, tenant))
        if requests or cost or in_flight or waiting or pause is not None:
            free = _free_at(use, rule, now, requests, cost)
            yield rule.id, LimitUse(text, tenant, requests, cost, in_flight, waiting, pause, *free)


def _free_at(
    use: StoredUse, rule: Rule, now: float, requests: float, cost: float
) -> tuple[float | None, float | None, float | None]:
    """Return when another request has room, and when the first and the last of the cost stop counting."""
    from ..limits import Timing  # noqa: PLC0415

    timing, request_at, cost_times = Timing.of(rule.window_s), None, list[float]()
    if rule.requests is not None and requests >= rule.requests:
        use.prune(now, timing)
        request_at = use.room_at(requests + 1 - rule.requests, 0, timing)
    if rule.cost is not None and cost > 0:
        ends = ((timing.counts_until(slot), each) for slot, (_, each) in use.slots.items() if each > 0)
        cost_times = [at for at, _ in ends if at > now]
    return request_at, min(cost_times, default=None), max(cost_times, default=None)
