"""Plans of an act on many jobs: which jobs a filter selects now, counted before anything is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..connection import Connection
from ..errors import BadInput, NotFound
from ..inspect import JobScan, ListCursor, ListedState, ListFilter, Match, Source
from ..subjects import Lane
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

    `targets`: the jobs, by where they are stored. `last`: the last sequence of each stream that was looked at: later
    jobs are not touched. `searched`, `unreadable`, `missing`: as of `JobPage`. `to`: the priority of a move.
    """

    act: Act
    filter: ListFilter
    targets: Mapping[Source, tuple[Target, ...]]
    last: Mapping[str, int]
    searched: int
    unreadable: int = 0
    missing: tuple[str, ...] = ()
    to: str = ""

    @property
    def count(self) -> int:
        """How many jobs match."""
        return sum(map(len, self.targets.values()))

    @property
    def until(self) -> str:
        """The last sequences as a text, which a later plan takes."""
        return ",".join(str(ListCursor(stream, seq)) for stream, seq in self.last.items())


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


def parse_until(until: str) -> dict[str, int]:
    """Return the last sequences that a plan has stated. Raises BadInput."""
    return {each.stream: each.seq for each in map(ListCursor.parse, until.split(","))} if until else {}


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
    scan = JobScan(connection, topology, wanted)
    await connection.clock.ensure(topology.parked_stream.name)
    planner = _Planner(connection, scan, parse_until(until), on_searched, to)
    parked = [each for each in scan.sources if each.what == "parked"]
    lanes = [each for each in scan.sources if each.what != "parked" and _has_priority(each, to)]
    for source in (*parked, *lanes, *(parked if lanes else ())):
        with contextlib.suppress(NotFound):
            await planner.read(source)
    found = {source: tuple(targets) for source, targets in planner.targets.items() if targets}
    missing = tuple(each for each in dict.fromkeys(scan.missing))
    return JobPlan(act, wanted, found, planner.last, scan.searched, scan.unreadable, missing, to)


def _has_priority(source: Source, to: str) -> bool:
    """Whether jobs of a source can be moved to a priority; "": they are not to be moved."""
    return not to or (source.family is not None and to in source.family.priorities)


class _Planner:
    def __init__(
        self, connection: Connection, scan: JobScan, until: Mapping[str, int], on_searched: OnSearched, to: str
    ) -> None:
        self.targets: dict[Source, list[Target]] = {}
        self.last: dict[str, int] = {}
        self._connection = connection
        self._scan = scan
        self._until = until
        self._on_searched = on_searched
        self._to = to
        self._known: set[tuple[str, ...]] = set()

    async def read(self, source: Source) -> None:
        """Read a source from where the last read of its stream has ended, up to its last sequence now."""
        if self._until and source.stream not in self._until:
            return
        first = self.last.get(source.stream, 0) + 1
        if source.stream in self._until:
            last = self._until[source.stream]
        else:
            try:
                info = await self._connection.api(f"STREAM.INFO.{source.stream}")
            except NotFound:
                self._scan.missing.append(source.stream)
                return
            last = int(info["state"]["last_seq"])
        self.last[source.stream] = last
        found = self.targets.setdefault(source, [])
        read, searched = self._scan.read_source(source, first, until={source.stream: last}), 0
        async with contextlib.aclosing(read) as matches:
            async for match in matches:
                searched += 1
                if searched % 1_000 == 0:
                    self._on_searched(1_000)
                if match is not None and match.lane.priority != self._to and self._is_new(match):
                    seq, job_id, lane = match.stored.seq, match.job_id, match.lane
                    found.append(Target(seq, job_id, lane, match.run, match.parking_id))
        self._on_searched(searched % 1_000)

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
