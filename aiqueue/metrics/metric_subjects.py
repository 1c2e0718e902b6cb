"""Subjects of the stream of metrics: each is one counter. Built from checked tokens, and parsed, only here."""

from __future__ import annotations

import calendar
import time
from functools import lru_cache
from sys import intern
from typing import Literal, NamedTuple, get_args

METRICS = "ai.metrics"
OTHER = "=other"  # instead of a kind or a tenant: all that have no counters of their own
WORKERS = "=workers"  # instead of a kind: of the workers of a family
Level = Literal["minute", "hour", "total", "tenant"]  # by family and kind, but "tenant": by family and tenant, an hour
LEVEL_S: dict[Level, int] = {"minute": 60, "hour": 3600, "total": 0, "tenant": 3600}
_FORMATS: dict[str, str] = {"minute": "%Y%m%d%H%M", "hour": "%Y%m%d%H", "tenant": "%Y%m%d%H"}
_TOKENS = {"minute": 8, "hour": 8, "total": 7, "tenant": 8}


class MetricKey(NamedTuple):
    """Which counter a subject is. `at`: when its minute or hour began, in seconds since the epoch; 0 of a total.
    `name`: the kind or the tenant, OTHER or WORKERS. `what`: what is counted.
    """

    level: Level
    at: int
    family: str
    name: str
    what: str


def metric(key: MetricKey) -> str:
    """Return the subject of a counter. The dots of a kind become ``/``, which no kind contains."""
    level, at, family, name, what = key
    period = f".{_period(level, at)}" if at else ""
    return f"{METRICS}.{level}{period}.{family}.{name.replace('.', '/')}.{what}"


def parse_metric(subject: str) -> MetricKey | None:
    """Return which counter a subject is; None for any other subject."""
    tokens = subject.split(".")
    level = tokens[2] if len(tokens) > 2 else ""
    if len(tokens) != _TOKENS.get(level):
        return None
    at = 0 if level == "total" else _time_of(level, tokens[3])
    if at is None:
        return None
    first, second, name, what = tokens[-4:]
    # a million counters have few names: each name is kept once
    names = map(intern, (level, f"{first}.{second}", name.replace("/", "."), what))
    level, family, name, what = names
    return MetricKey(level, at, family, name, what)  # type: ignore[arg-type]


def metric_filter(level: Level, family: str = "*.*") -> str:
    """Return the filter over the counters of a level, of one family or of all."""
    return f"{METRICS}.{level}.{'' if level == 'total' else '*.'}{family}.*.*"


def flush(run: str) -> str:
    """Return the subject that counts the flushes of one run of a worker. `run`: an id, or ``*``."""
    return f"{METRICS}.flush.{run}"


def metric_filters() -> list[str]:
    """Return the subjects of the stream of metrics."""
    return [*(metric_filter(level) for level in get_args(Level)), flush("*")]


@lru_cache(maxsize=8)
def _period(level: str, at: int) -> str:
    return time.strftime(_FORMATS[level], time.gmtime(at))


@lru_cache(maxsize=4096)
def _time_of(level: str, text: str) -> int | None:
    try:
        at = calendar.timegm(time.strptime(text, _FORMATS[level]))
    except (ValueError, OverflowError):
        return None
    return at if _period(level, at) == text else None
