"""Rules: how often, how much and how many at once. Declared in limits.toml, overridden in the bucket of limits.

A rule's key is a pattern, in which ``*`` stands for any text. The rule holds for each value of the key by itself: each
value has its own use. Of several rules that match a value, the most specific one holds.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from .. import subjects, units
from ..errors import BadInput, TopologyError
from ..topology import LIMITS_FILE, Family, FileKey, Topology
from ..units import COST_MAX

WINDOW_MIN_S, WINDOW_MAX_S = 1.0, 31 * 86_400.0
WINDOW_S = 60.0  # unless a rule says another one
_RATES = ("requests", "cost")  # the limits that have a window
COUNT_MAX = 10**9
KEY_CHARS_MAX = subjects.KEY_CHARS_MAX
_LINE_MAX, _LINES_MAX = 300, 50  # of rules in the record of a worker
_NO_TENANT = ""  # of whom only rules for each tenant hold
_CHOICES_MAX = 10_000  # how many values of keys the choice of a rule is kept for


def check_key(key: object) -> None:
    """Raises BadInput for what cannot be a value of a limited key."""
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_CHARS_MAX:
        raise BadInput(f"a key is a text of 1 to {KEY_CHARS_MAX:,} characters, not {key!r:.80}")


class RuleId(NamedTuple):
    """What a rule is for. `tenant`: None is all tenants together, ``*`` each tenant by itself."""

    family: str
    key: str
    tenant: str | None

    def __str__(self) -> str:
        whom = {None: "all tenants together", "*": "each tenant"}.get(self.tenant, f"tenant {self.tenant}")
        return f"{self.family}, key {self.key!r}, {whom}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key may use within any `window_s` seconds: `requests`, and the sum of their `cost` (such as tokens).

    `in_flight`: how many may run at once. None: no such limit. A rule without any limits none; only an override can be
    one.
    """

    id: RuleId
    requests: int | None = None
    cost: float | None = None
    in_flight: int | None = None
    window_s: float = WINDOW_S

    @property
    def is_unlimited(self) -> bool:
        return self.requests is None and self.cost is None and self.in_flight is None

    def fields(self) -> dict[str, Any]:
        """Return the limits as fields of a table: those that the rule has."""
        window = {"window": self.window_s} if (self.requests, self.cost) != (None, None) else {}
        limits = {"requests": self.requests, "cost": self.cost, "in_flight": self.in_flight}
        return {field: value for field, value in limits.items() if value is not None} | window

    def plain(self) -> dict[str, Any]:
        """Return the rule as it is stored, in JSON."""
        limits = {"requests": self.requests, "cost": self.cost, "in_flight": self.in_flight}
        return {**self.id._asdict(), **limits, "window_s": self.window_s}

    def describe(self) -> str:
        """Return the limits as text: "100 requests and cost 10,000 in 1m, 5 in flight"."""
        window = units.short_duration(self.window_s)
        rates = [f"{self.requests:,} request{'' if self.requests == 1 else 's'}"] if self.requests is not None else []
        rates += [f"cost {self.cost:,.10g}"] if self.cost is not None else []
        parts = [f"{' and '.join(rates)} in {window}"] if rates else []
        parts += [f"{self.in_flight:,} in flight"] if self.in_flight is not None else []
        return ", ".join(parts) or "no limit"


class Override(NamedTuple):
    """A rule that replaces the declared one of the same id. Times: seconds since the epoch, None: never expires."""

    rule: Rule
    author: str
    set_at: float
    expires_at: float | None

    def holds(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at


class EffectiveRule(NamedTuple):
    """A rule that holds now. `override`: None if it is the declared one. `declared`: what the override replaces."""

    rule: Rule
    declared: Rule | None
    override: Override | None


class Rules:
    """All declared rules and overrides, and which of them holds for a value of a key."""

    def __init__(self, declared: Iterable[Rule] = ()) -> None:
        self.declared = {each.id: each for each in declared}
        self._overrides: dict[RuleId, Override] = {}
        self._choices: dict[tuple[str, str, str], tuple[Rule | None, Rule | None]] = {}
        self._expires_at = math.inf
        self.version = 0  # counts the changes

    @property
    def overrides(self) -> Mapping[RuleId, Override]:
        return self._overrides

    def describe_declared(self, families: Iterable[str]) -> dict[str, list[str]]:
        """Return the declared rules of these families as sorted lines (the first 50) for the records of workers."""
        found: dict[str, list[str]] = {name: [] for name in families}
        for each in self.declared.values():
            if each.id.family in found:
                found[each.id.family].append(f"{each.id}: {each.describe()}"[:_LINE_MAX])
        return {name: sorted(lines)[:_LINES_MAX] for name, lines in found.items()}

    def override(self, which: RuleId, override: Override | None) -> None:
        """Set the override of an id, or remove it."""
        if override is None:
            self._overrides.pop(which, None)
        else:
            self._overrides[which] = override
        self._changed()

    def replace_overrides(self, overrides: Iterable[Override]) -> None:
        self._overrides = {each.rule.id: each for each in overrides}
        self._changed()

    def expire(self, now: float) -> bool:
        """Drop overrides that have expired. Return whether there were any."""
        if now < self._expires_at:
            return False
        self.replace_overrides([each for each in self._overrides.values() if each.holds(now)])
        return True

    def effective(self, now: float) -> list[EffectiveRule]:
        """Return the rules that hold, declared ones first."""
        self.expire(now)
        found = []
        for each in [*self.declared, *(each for each in self._overrides if each not in self.declared)]:
            override, declared = self._overrides.get(each), self.declared.get(each)
            rule = override.rule if override else declared
            assert rule is not None
            found.append(EffectiveRule(rule, declared, override))
        return found

    def choose(self, family: str, key: str, tenant: str, now: float) -> tuple[Rule | None, Rule | None]:
        """Return the rule over all tenants of a value of the family's key, and the rule of one tenant. None: no limit.

        The most specific rule holds: one for this very value before a pattern, a pattern with more letters before one
        with fewer, and then one for this tenant before one for each tenant.
        """
        self.expire(now)
        asked = (family, key, tenant)
        if asked not in self._choices:
            if len(self._choices) >= _CHOICES_MAX:
                self._choices.clear()
            rules = [each.rule for each in self.effective(now) if each.rule.id.family == family]
            rules = [each for each in rules if matches(each.id.key, key)]
            wide = _most_specific(each for each in rules if each.id.tenant is None)
            self._choices[asked] = wide, _most_specific(each for each in rules if each.id.tenant in ("*", tenant))
        return self._choices[asked]

    def more_general(self, which: RuleId, now: float) -> Rule | None:
        """Return the rule that holds for what a rule that is not there would be for. None: no limit."""
        tenant = which.tenant if which.tenant not in (None, "*") else _NO_TENANT
        wide, narrow = self.choose(which.family, which.key, tenant, now)
        return wide if which.tenant is None else narrow

    def _changed(self) -> None:
        self._choices.clear()
        expiries = [each.expires_at for each in self._overrides.values() if each.expires_at is not None]
        self._expires_at = min(expiries, default=math.inf)
        self.version += 1


def matches(pattern: str, value: str) -> bool:
    """Return whether a value of a key matches a rule's pattern."""
    if "*" not in pattern:
        return pattern == value
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), value, re.DOTALL) is not None


def collapse(pattern: str) -> str:
    """Return the pattern with one ``*`` for several in a row, so that two rules never are for the same values."""
    return re.sub(r"\*+", "*", pattern)


def _most_specific(rules: Iterable[Rule]) -> Rule | None:
    def rank(rule: Rule) -> tuple[bool, int, bool]:
        key = rule.id.key
        return "*" not in key, len(key) - key.count("*"), rule.id.tenant not in (None, "*")

    found = max(rules, key=rank, default=None)
    return None if found is None or found.is_unlimited else found


def load_rules(topology: Topology, *directories: Path) -> Rules:
    """Load limits.toml of each directory that has one. Raises TopologyError, in one line with file and key."""
    texts = []
    for file in (each / LIMITS_FILE for each in directories):
        try:
            if file.is_file():
                texts.append((str(file), file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise TopologyError(str(file), "", f"cannot be read: {error}") from None
    return parse_rules(topology, *texts)


def parse_rules(topology: Topology, *files: tuple[str, str]) -> Rules:
    """Parse (file name, TOML text) pairs: tables ``[[limit]]``. Raises TopologyError, in one line with file and key."""
    rules: dict[RuleId, Rule] = {}
    for file, text in files:
        try:
            raw = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise TopologyError(file, "", f"is not TOML: {error}") from None
        for key in raw:
            if key != "limit":
                raise TopologyError(file, key, "unknown key; rules are tables [[limit]]")
        given = raw.get("limit", [])
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise TopologyError(file, "limit", "must be tables: write [[limit]]")
        for number, fields in enumerate(given, 1):
            if fields.get("family") in topology.left_out:
                continue  # the rule is for programs that declare this family
            try:
                rule = make_rule(topology, fields)
            except _WrongField as error:
                key = ".".join(filter(None, (f"limit {number}", error.key)))
                raise TopologyError(file, key, error.problem) from None
            if rule.id in rules:
                problem = (
                    f"there is a rule for {rule.id} already: write one table with all limits of both, which have one "
                )
                problem += "window"
                raise TopologyError(file, f"limit {number}", problem)
            rules[rule.id] = rule
    return Rules(rules.values())


class _WrongField(BadInput):
    """A field of a rule is wrong. `key`: its name, empty for the rule as a whole."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


def make_rule(topology: Topology, fields: Mapping[str, Any], *, may_be_unlimited: bool = False) -> Rule:
    """Return the rule of a table's fields: family, key, tenant, requests, cost, window, in_flight.

    Raises BadInput, in one line. `may_be_unlimited`: a rule without any limit is one that lifts a declared rule.
    """
    for field in fields:
        if field not in FIELDS:
            close = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(FIELDS)}"
            raise _WrongField(field, f"unknown field; {hint}")
    which = rule_id(topology, fields)
    rule = Rule(which, **check_limits(fields), window_s=parse_window(fields))
    if rule.is_unlimited and not may_be_unlimited:
        raise _WrongField("", f"limits nothing: give at least one of requests, cost and in_flight for {which}")
    if "window" in fields and rule.requests is None and rule.cost is None:
        raise _WrongField("window", "is of requests or cost: give one of them, or leave the window out")
    return rule


def merge_limits(which: RuleId, now: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given fields of a rule, and those that it has now for the others.

    Raises BadInput if requests or cost that are not given would count in another window than now, or those that are new
    in one that nobody has named.
    """
    named = [each for each in _RATES if each in given]
    kept = [each for each in _RATES if each in now and each not in given]
    window_s = now.get("window", WINDOW_S)
    default_s = window_s if now.keys() >= set(named) else WINDOW_S
    wanted_s = parse_window(given) if "window" in given else default_s
    if kept and wanted_s != window_s:
        figures = " and ".join(f"{each} {now[each]:,.10g}" for each in kept)
        wanted, holds = units.short_duration(wanted_s), units.short_duration(window_s)
        problem = (
            f"requests and cost of a rule share one window, and {figures} of {which} would change from {holds} to "
        )
        problem += f"{wanted}: give {' and '.join(kept)} for {wanted}, too"
        also = f", or {named[0]} for {holds}, with the window {holds}" if named else ""
        raise _WrongField("window", problem + also)
    return {**now, **given}


FIELDS: Final[Mapping[str, FileKey]] = {
    "family": FileKey("Family that the rule is for, which has a `limit_key`."),
    "key": FileKey(
        "Value of the key, or a pattern in which `*` stands for any text. Each value that matches has its own use.",
        '"*"',
    ),
    "tenant": FileKey(
        'Whose use is counted: without it, that of all tenants together; `"*"`: of each tenant by itself; a name: of '
        "that "
        "tenant only.",
        "none",
    ),
    "requests": FileKey("How many jobs start in any window, at most. Each attempt counts.", "none"),
    "cost": FileKey("What the jobs that start in any window cost together, at most.", "none"),
    "window": FileKey("Length of the window, for `requests` and `cost` only.", '"1m"'),
    "in_flight": FileKey("How many jobs run at once, at most.", "none"),
}


def rule_id(topology: Topology, fields: Mapping[str, Any]) -> RuleId:
    """Return what the rule of a table is for. Raises BadInput."""
    name, key, tenant = fields.get("family"), fields.get("key", "*"), fields.get("tenant")
    if name is None:
        raise _WrongField("family", "is missing: which family is the rule for?")
    name = find_limited_family(topology, name).name
    if not isinstance(key, str) or not 1 <= len(key) <= KEY_CHARS_MAX:
        shown = f'a text of 1 to {KEY_CHARS_MAX:,} characters, such as "gpt-*"'
        raise _WrongField("key", f"must be {shown}, not {_shown(key)}")
    if tenant is not None and tenant != "*" and not (isinstance(tenant, str) and subjects.TOKEN.fullmatch(tenant)):
        raise _WrongField("tenant", f'must be a tenant, or "*" for each tenant by itself, not {_shown(tenant)}')
    return RuleId(name, collapse(key), tenant)


def find_limited_family(topology: Topology, name: object) -> Family:
    """Return the family of this name. Raises BadInput if there is none, or it has no limit_key."""
    family = topology.families.get(name) if isinstance(name, str) else None
    if family is None:
        limited = sorted(each.name for each in topology.families.values() if each.limit_key)
        advice = topology.advice(name) if isinstance(name, str) else ""
        known = (
            advice
            or f"families with a limit_key: {', '.join(limited) or 'none'}; `streams` sets the directory of your own"
        )
        raise _WrongField("family", f"unknown family {name!r:.80}; {known}")
    if family.limit_key is None:
        problem = f"{name} has no limit_key, so its jobs cannot be limited: {family.advise_to_set('limit_key')}"
        raise _WrongField("family", problem)
    return family


def check_limits(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits of a rule: requests, cost and in_flight, each a number or None. Raises BadInput."""
    return {
        "requests": _number(fields, "requests", COUNT_MAX, whole=True),
        "cost": _number(fields, "cost", COST_MAX),
        "in_flight": _number(fields, "in_flight", COUNT_MAX, whole=True),
    }


def _number(fields: Mapping[str, Any], field: str, most: float, *, whole: bool = False) -> float | None:
    value = fields.get(field)
    if value is None:
        return None
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:  # NaN fails the comparison
        expected = f"a whole number from 1 to {most:,}" if whole else f"a number above 0, up to {most:g}"
        raise _WrongField(field, f"must be {expected}, not {_shown(value)}")
    return value


def parse_window(fields: Mapping[str, Any], field: str = "window") -> float:
    """Return the seconds of a rule's window. Raises BadInput."""
    value = fields.get(field, WINDOW_S)
    expected = f"must be a duration from {units.short_duration(WINDOW_MIN_S)} to {units.short_duration(WINDOW_MAX_S)}, "
    expected += 'such as "1m", not '
    try:
        window_s = units.seconds(value)
    except ValueError:
        raise _WrongField(field, expected + _shown(value)) from None
    if not WINDOW_MIN_S <= window_s <= WINDOW_MAX_S:
        raise _WrongField(field, expected + units.short_duration(window_s))
    return window_s


def _shown(value: object) -> str:
    shown = json.dumps(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"
