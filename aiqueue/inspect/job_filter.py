"""Which jobs a list or an act on many jobs is about, by what is stored of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .. import subjects
from ..errors import BadInput
from ..topology import Topology
from ..units import Duration, parse_duration, short_duration

ListedState = Literal["queued", "in_flight", "parked", "retrying", "waiting", "failed"]
STATES: tuple[ListedState, ...] = get_args(ListedState)
IN_LANES: frozenset[ListedState] = frozenset(("queued", "in_flight"))
IN_PARKING: frozenset[ListedState] = frozenset(("parked", "retrying", "waiting"))
WHERE_MAX = 10  # conditions of one filter
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ListFilter:
    """Selects jobs; None and empty match all. Create one with `make_filter`, which checks the values.

    `states`: see `ListedJob`. `older_s`, `newer_s`: enqueued at least, or at most, so many seconds ago; of failed jobs,
    failed. `where`: fields of the message and the values that they must have. `error`: text in the reason or error of
    failed jobs.
    """

    family: str | None = None
    tenant: str | None = None
    kind: str | None = None
    priority: str | None = None
    states: frozenset[ListedState] = frozenset(STATES)
    older_s: float | None = None
    newer_s: float | None = None
    where: Mapping[str, Scalar] = field(default_factory=dict)
    error: str | None = None

    @property
    def reads_bodies(self) -> bool:
        """Whether the body decides."""
        return bool(self.where)

    @property
    def reads_messages(self) -> bool:
        """Whether messages are read that do not match: the subject alone does not decide."""
        ages = (self.older_s, self.newer_s)
        return self.kind is not None or bool(self.where) or ages != (None, None) or self.error is not None

    def describe(self) -> dict[str, Any]:
        """Return what the filter says as plain data, without what it leaves open: for the audit, and for people."""
        found: dict[str, Any] = {"family": self.family, "tenant": self.tenant, "kind": self.kind}
        found |= {"priority": self.priority}
        if self.states != frozenset(STATES):
            found["state"] = ",".join(each for each in STATES if each in self.states)
        for name, value in (("older", self.older_s), ("newer", self.newer_s)):
            found[name] = None if value is None else short_duration(value)
        found["error"] = self.error
        found |= {f"where {path}": value for path, value in self.where.items()}
        return {name: value for name, value in found.items() if value is not None or name.startswith("where ")}

    def matches_age(self, at: float | None, now: float) -> bool:
        """Whether a job of this time (seconds since the epoch) is as old as the filter says. None: not known."""
        if self.older_s is None and self.newer_s is None:
            return True
        if at is None:
            return False
        age = now - at
        return (self.older_s is None or age >= self.older_s) and (self.newer_s is None or age <= self.newer_s)

    def matches_data(self, data: Mapping[str, Any]) -> bool:
        """Whether the fields of a message have the values. A path of a secret field leads to asterisks."""
        return all(_has(data, path, value) for path, value in self.where.items())


def make_filter(
    topology: Topology,
    *,
    family: str | None = None,
    tenant: str | None = None,
    kind: str | None = None,
    priority: str | None = None,
    state: ListedState | Collection[ListedState] | None = None,
    older: Duration | None = None,
    newer: Duration | None = None,
    where: Mapping[str, Scalar] | None = None,
    error: str | None = None,
) -> ListFilter:
    """Return a filter. Raises BadInput (InvalidToken, UnknownFamily).

    `where`: a field may lie deeper, as "user.id"; in a list, one item must match. A text matches a number or a flag
    that is written like it. `error`: a text in the reason or error of failed jobs, in any case; others do not match.
    """
    if family is not None:
        declared = topology.family(family)
        if declared.role != "work":
            raise BadInput(f"family {family} has inboxes and no jobs: see `aiqueue inbox`")
        if priority is not None and priority not in declared.priorities:
            raise BadInput(f"{family} has no priority {priority!r}: it has {', '.join(declared.priorities)}")
    if tenant is not None:
        subjects.token("tenant", tenant)
    if priority is not None and not subjects.PRIORITY.fullmatch(priority):
        raise BadInput(f"a priority has 1 to 16 characters of a-z 0-9, unlike {priority!r:.80}")
    if kind is not None and (not isinstance(kind, str) or not kind):
        raise BadInput(f"a kind is the name of a message's type, such as summarise, not {kind!r:.80}")
    where = dict(where or {})
    if len(where) > WHERE_MAX:
        raise BadInput(f"at most {WHERE_MAX} conditions on fields at once, not {len(where)}")
    for path, value in where.items():
        if not isinstance(path, str) or not path or not isinstance(value, Scalar):
            raise BadInput(f"where: a field and a text, number, flag or None, such as {{'doc': 42}}, not {path!r:.80}")
    older_s = None if older is None else parse_duration("older", older)
    newer_s = None if newer is None else parse_duration("newer", newer)
    if older_s is not None and newer_s is not None and older_s > newer_s:
        raise BadInput(f"no job is older than {short_duration(older_s)} and newer than {short_duration(newer_s)}")
    states = _states_of(state)
    if error is not None:
        if not isinstance(error, str) or not error.strip():
            raise BadInput(f"error is a text, a part of the error such as ValueError, not {error!r:.80}")
        if not (states := states & {"failed"}):
            raise BadInput("error is of failed jobs (dead letters): leave it out, or the states")
    return ListFilter(family, tenant, kind, priority, states, older_s, newer_s, where, error)


def _states_of(state: ListedState | Collection[ListedState] | None) -> frozenset[ListedState]:
    wanted = frozenset(STATES if state is None else [state] if isinstance(state, str) else state)
    if not wanted or (unknown := sorted(str(each) for each in wanted - set(STATES))):
        named = ", ".join(unknown) if wanted else "none"
        raise BadInput(f"a state is one of {', '.join(STATES)}, not {named:.80}")
    return wanted


def _has(data: Any, path: str, wanted: Scalar) -> bool:
    """Whether a value at this path is the wanted one. A key may contain dots itself."""
    if isinstance(data, list):
        return any(_has(each, path, wanted) for each in data)
    if not path:
        return _is(data, wanted)
    if not isinstance(data, dict):
        return False
    if path in data and _has(data[path], "", wanted):
        return True
    step, _, rest = path.partition(".")
    return bool(rest) and step in data and _has(data[step], rest, wanted)


def _is(value: Any, wanted: Scalar) -> bool:
    if not isinstance(wanted, str):
        return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)
    if isinstance(value, str):
        return value == wanted
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value] == wanted
    if isinstance(value, int):
        return str(value) == wanted if value.bit_length() < 10_000 else False
    if isinstance(value, float):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return not isinstance(value, dict | bytes) and str(value) == wanted
