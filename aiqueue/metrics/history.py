"""What became of jobs over time: reads the counters of the server, by family, kind or tenant, by minute or hour."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..connection import Connection
from ..errors import NotFound
from ..topology import Topology
from .metric_subjects import LEVEL_S, OTHER, WORKERS, Level, metric_filter, parse_metric
from .sums import JobSums

PAGE = 1_000  # counters that are read at once


class Point(NamedTuple):
    """A minute or an hour. `at`: when it began, in seconds since the epoch. `length_s`: how much of it is over.
    `workers`: how many workers have reported in it. `sums`: None if no worker has: a gap, of which nothing is known.
    """

    at: int
    length_s: float
    workers: int
    sums: JobSums | None

    @property
    def rate(self) -> float | None:
        """How many attempts ended in a second; None in a gap."""
        return None if self.sums is None or self.length_s <= 0 else self.sums.ended / self.length_s


class Series(NamedTuple):
    """The points of a family, or of one of its kinds or tenants, in order and without holes. `name` ``=other``: of all
    kinds, or tenants, that have no counters of their own; "": of the whole family.
    """

    family: str
    name: str
    points: tuple[Point, ...]

    @property
    def sums(self) -> JobSums:
        """The sums of all points."""
        return JobSums.total(each.sums for each in self.points if each.sums is not None)


class History:
    """The counters of one level, as they were when `update` was last called: it reads what has changed since then.

    `level`: "minute" or "hour", by kind; "tenant": by hour and tenant; "total": all jobs, see `totals`. `family`: only
    this one. `since_s`: how far it goes back from now. Minutes are kept for two days, hours for 90 days, and less if
    their stream is full.
    """

    def __init__(
        self, connection: Connection, topology: Topology, level: Level, *, since_s: float, family: str | None = None
    ) -> None:
        self._connection = connection
        self._stream = topology.metrics_stream.name
        self._level, self._since_s = level, since_s
        self._filter = metric_filter(level, family or "*.*")
        self._values: dict[tuple[str, str], dict[tuple[int, str], int]] = {}  # by family and name, by time and what
        self._times: dict[str, set[int]] = defaultdict(set)  # by family: of which times something is known
        self._created: str | None = None
        self._next_seq = 0
        self.now = 0.0  # the server's time at the last update

    async def update(self) -> None:
        """Read the counters that have changed. Raises NotFound (run `aiqueue apply`), AccessDenied, Unavailable."""
        info = await self._connection.api(f"STREAM.INFO.{self._stream}")
        self.now = self._connection.clock.now()
        if info["created"] != self._created:  # another stream, which counts from 1
            self._created, self._next_seq = info["created"], 0
            self._values.clear()
            self._times.clear()
        since = self._oldest() if self._next_seq == 0 and self._level != "total" else None
        pages = self._connection.read(
            self._stream, self._filter, seq=max(1, self._next_seq), since=since, batch=PAGE, ahead=True
        )
        async for stored in pages:
            self._next_seq = stored.seq + 1
            key = parse_metric(stored.subject)
            if key is not None and (value := _value_of(stored.data)) is not None:
                self._values.setdefault((key.family, key.name), {})[key.at, key.what] = value
                self._times[key.family].add(key.at)
        if self._level != "total":
            self._drop_before(self._oldest())

    @property
    def families(self) -> list[str]:
        """The families of which something is known, sorted."""
        return sorted({family for family, _ in self._values})

    def names(self, family: str) -> list[str]:
        """Return the kinds of a family that have counters, or its tenants; ``=other`` last."""
        found = {name for of, name in self._values if of == family} - {WORKERS}
        return sorted(found, key=lambda name: (name == OTHER, name))

    def series(self, family: str, name: str = "") -> Series:
        """Return what is known of a family, or of one of its kinds or tenants, up to the last update."""
        counters: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        workers = {at: value for (at, _), value in self._values.get((family, WORKERS), {}).items()}
        for each in [name] if name else self.names(family):
            for (at, what), value in self._values.get((family, each), {}).items():
                counters[at][what] += value
        for at in self._times.get(family, ()):
            counters[at]  # something is known of this time, also if no job of the name ended
        return Series(family, name, tuple(self._points(counters, workers)))

    def totals(self) -> Mapping[tuple[str, str], JobSums]:
        """Return the sums of all jobs by family and kind, at the level "total". They only grow, until a kind has had no
        job for 90 days.
        """
        counters: dict[tuple[str, str], dict[str, int]] = {}
        for key, values in self._values.items():
            if key[1] != WORKERS:
                counters[key] = {what: value for (_, what), value in values.items()}
        return {key: JobSums.of(each) for key, each in counters.items()}

    def _points(self, counters: Mapping[int, Mapping[str, int]], workers: Mapping[int, int]) -> Iterable[Point]:
        step = LEVEL_S[self._level]
        for at in range(self._oldest(), int(self.now) + 1, step):
            is_known = at in counters or at in workers
            sums = JobSums.of(counters.get(at, {})) if is_known else None
            yield Point(at, min(float(step), max(0.0, self.now - at)), workers.get(at, 0), sums)

    def _drop_before(self, oldest: int) -> None:
        """Forget what was before the history begins."""
        if not any(at < oldest for times in self._times.values() for at in times):
            return
        self._values = {
            key: kept
            for key, values in self._values.items()
            if (kept := {at: value for at, value in values.items() if at[0] >= oldest})
        }
        for family, times in self._times.items():
            self._times[family] = {at for at in times if at >= oldest}

    def _oldest(self) -> int:
        """Return when the minute or hour began in which the history begins."""
        step = LEVEL_S[self._level]
        return int((self.now - self._since_s) // step * step)


def _value_of(data: bytes) -> int | None:
    """Return the value of a counter; None for what is none."""
    try:
        return int(json.loads(data)["val"])
    except (ValueError, KeyError, TypeError):
        return None


async def read_history_if_there(
    connection: Connection, topology: Topology, level: Level, *, since_s: float, family: str | None = None
) -> History | None:
    """Return the history, up to date; None where there is no stream of it yet. Raises Unavailable, AccessDenied."""
    history = History(connection, topology, level, since_s=since_s, family=family)
    try:
        await history.update()
    except NotFound:
        return None
    return history
