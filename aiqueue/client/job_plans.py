"""Plans of an act on many jobs: which jobs a filter selects now, counted before anything is changed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .. import headers
from ..connection import Connection, timestamp
from ..errors import BadInput, NotFound
from ..inspect import JobScan, ListCursor, ListedState, ListFilter, Match, Source
from ..subjects import Lane, made_at
from ..topology import Topology

Act = Literal["cancel", "replay", "purge", "run_now", "move"]
ACTS_ON: Mapping[Act, tuple[ListedState, ...]] = {
    "cancel": ("queued", "in_flight", "parked", "retrying", "waiting"),
    "replay": ("failed",),
    "purge": ("failed",),
    "run_now": ("parked", "retrying"),
    "move": ("queued",),
}
OnSearched = Callable[[int], None]
_AT = re.compile(r",?@(\d{1,15})")


class Target(NamedTuple):
    """A job of a plan: where it was stored, and what identifies it wherever it is by now."""

    seq: int
    job_id: str
    lane: Lane
    run: int
    parking_id: str


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What an act would do: nothing is changed yet.

    `targets`: the jobs, by where they are stored. `last`: the last sequence of each stream that was looked at; `at`:
    when, in seconds since the epoch. Later jobs are not touched. `searched`, `unreadable`, `missing`, `behind`: as of
    `JobPage`.
    `to`: the priority of a move.
    """

    act: Act
    filter: ListFilter
    targets: Mapping[Source, tuple[Target, ...]]
    last: Mapping[str, int]
    at: float
    searched: int
    unreadable: int = 0
    missing: tuple[str, ...] = ()
    to: str = ""
    behind: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many jobs match."""
        return sum(map(len, self.targets.values()))

    @property
    def until(self) -> str:
        """The last sequences, and the time, as a text that a later plan takes."""
        return str(Until(self.last, self.at))


class Until(NamedTuple):
    """What a plan has seen: the last sequence of each stream, and the time (seconds since the epoch).

    A job is stored anew whenever it is parked, comes to its lane or is moved. Then the time of its first storing, which
    ids have in them, tells whether the plan has seen it.
    """

    last: Mapping[str, int]
    at: float

    def __str__(self) -> str:
        return ",".join([*(str(ListCursor(*each)) for each in self.last.items()), f"@{int(self.at * 1000)}"])

    @classmethod
    def parse(cls, text: str) -> Until:
        """Read what `str` returns. Raises BadInput."""
        found = _AT.search(text) if isinstance(text, str) else None
        try:
            cursors = map(ListCursor.parse, _AT.sub("", text, count=1).split(",")) if found else ()
            last = {each.stream: each.seq for each in cursors}
        except BadInput:
            last = {}
        if found is None or not last:
            example = "AI_AGENT_TASKS.17,@1796013528302"
            raise BadInput(f"until is what a dry run has printed, such as {example}, not {text!r:.80}")
        return cls(last, int(found[1]) / 1000)

    def has_seen(self, match: Match) -> bool:
        """Whether a job was stored before."""
        if match.stored.seq <= self.last[match.source.stream]:
            return True
        if match.source.what == "dead" or not match.parking_id:
            return False
        ids = [match.parking_id, *([] if headers.REPLAY in match.stored.headers else [match.job_id])]
        return min([match.at, *(at for each in ids if (at := made_at(each)) is not None)]) <= self.at


def check_act(act: Act, topology: Topology, wanted: ListFilter, to: str) -> None:
    """Raise BadInput for states that an act is not for, and for a move that leads nowhere."""
    if act not in ACTS_ON:
        raise BadInput(f"an act is one of {', '.join(ACTS_ON)}, not {act!r:.80}")
    if not wanted.states <= set(ACTS_ON[act]):
        raise BadInput(f"{act} is for jobs that are {' or '.join(ACTS_ON[act])}: leave other states out")
    if (act == "move") != bool(to):
        raise BadInput("name the priority to move to" if act == "move" else f"{act} has no priority to move to")
    families = topology.work_families if wanted.family is None else (topology.family(wanted.family),)
    if to and not any(to in each.priorities for each in families):
        raise BadInput(f"{wanted.family or 'no family'} has {'no' if wanted.family else 'a'} priority {to!r:.80}")


async def make_plan(
    connection: Connection,
    topology: Topology,
    act: Act,
    wanted: ListFilter,
    *,
    to: str = "",
    until: str = "",
    on_searched: OnSearched = lambda _: None,
) -> JobPlan:
    """Find all jobs of a filter. Raises BadInput, AccessDenied, Unavailable.

    Jobs move meanwhile, from their lanes to parking and back. So parked ones are read before the lanes, and those that
    were parked since then after them; a job that is found twice counts once.
    """
    check_act(act, topology, wanted, to)
    scan, seen = JobScan(connection, topology, wanted), Until.parse(until) if until else None
    parked = [each for each in scan.sources if each.what == "parked"]
    lanes = [each for each in scan.sources if each.what != "parked" and _has_priority(each, to)]
    if seen is not None and (others := {each.stream for each in (*parked, *lanes)} - set(seen.last)):
        raise BadInput(
            f"until is of a dry run with another filter, which has not looked at {', '.join(sorted(others))}"
        )
    await connection.clock.ensure(topology.parked_stream.name)
    planner = _Planner(connection, scan, seen, on_searched, to)
    for source in (*parked, *lanes, *(parked if lanes else ())):
        await planner.read(source)
    found = {source: tuple(targets) for source, targets in planner.targets.items() if targets}
    missing, behind = tuple(dict.fromkeys(scan.missing)), tuple(scan.behind)
    return JobPlan(act, wanted, found, planner.last, planner.at, scan.searched, scan.unreadable, missing, to, behind)


def _has_priority(source: Source, to: str) -> bool:
    """Whether jobs of a source can be moved to a priority; "": they are not to be moved."""
    return not to or (source.family is not None and to in source.family.priorities)


class _Planner:
    """Reads the sources of a plan. `seen`: of a plan before, whose jobs alone count."""

    def __init__(
        self, connection: Connection, scan: JobScan, seen: Until | None, on_searched: OnSearched, to: str
    ) -> None:
        self.targets: dict[Source, list[Target]] = {}
        self.last: dict[str, int] = {}
        self.at = 0.0 if seen is None else seen.at
        self._connection = connection
        self._scan = scan
        self._seen = seen
        self._on_searched = on_searched
        self._to = to
        self._read_to: dict[str, int] = {}
        self._known: set[tuple[str, ...]] = set()

    async def read(self, source: Source) -> None:
        """Read a source from where the last read of its stream has ended, up to its last sequence now."""
        stream, seen = source.stream, self._seen
        self.last.setdefault(stream, 0 if seen is None else seen.last[stream])
        try:
            info = await self._connection.api(f"STREAM.INFO.{stream}")
            self.at = self.at or (timestamp(info["ts"]) if "ts" in info else self._connection.clock.now())
            first, last = self._read_to.get(stream, 0) + 1, int(info["state"]["last_seq"])
            if seen is not None and source.what == "dead":  # a later dead letter is never one of before
                last = min(last, seen.last[stream])
            self._read_to[stream] = last
            if seen is None:
                self.last[stream] = last
            await self._read_until(source, first, last)
        except NotFound:
            self._scan.missing.append(stream)

    async def _read_until(self, source: Source, first: int, last: int) -> None:
        found = self.targets.setdefault(source, [])
        read, searched = self._scan.read_source(source, first, until={source.stream: last}), 0
        async with contextlib.aclosing(read) as matches:
            async for match in matches:
                searched += 1
                if searched % 1_000 == 0:
                    self._on_searched(1_000)
                if match is not None and self._is_wanted(match):
                    seq, job_id, lane = match.stored.seq, match.job_id, match.lane
                    found.append(Target(seq, job_id, lane, match.run, match.parking_id))
        self._on_searched(searched % 1_000)

    def _is_wanted(self, match: Match) -> bool:
        is_elsewhere = match.lane.priority != self._to
        return is_elsewhere and (self._seen is None or self._seen.has_seen(match)) and self._is_new(match)

    def _is_new(self, match: Match) -> bool:
        """Whether this job was not found before, at another place. Dead letters are not jobs that move."""
        if match.source.what == "dead":
            return True
        names = [(*match.identity, f"{name}{value}") for name, value in _names(match)]
        if not self._known.isdisjoint(names):
            return False
        self._known.update(names)
        return True


def _names(match: Match) -> list[tuple[str, str | int]]:
    runs: list[tuple[str, str | int]] = [("run ", match.run)] if match.run else []
    return runs + ([("parked ", match.parking_id)] if match.parking_id else [])
