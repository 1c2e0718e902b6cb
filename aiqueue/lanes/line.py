"""The line of lanes: of many lanes that hold jobs, which are pulled on, and which wait for their turn.

Pure: nothing here waits or sends, and the time is an argument.

- A lane that is pulled on and holds jobs has a *place*. There are LIVE_MAX. Only where more than FEW_LANES lanes want
  one, the others stand in line.
- A *turn* ends when the lane was given its part of the jobs, in proportion to its weight. How long one lasts depends
  on how many want a place: a round of all takes about ROUND_S.
- The line is first come, first served, by priority. A lane that has come lately goes before those that had a turn
  already, but for every second place. A lower priority that has had no job for AGED_AFTER_S gets one of AGED_PLACES.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

from ..subjects import Lane
from .fairness import AGED_AFTER_S

LIVE_MAX = 16  # places
FEW_LANES = 128  # up to so many lanes are all live
AHEAD = 32  # beyond LIVE_MAX, for lanes that follow others: their consumers are created meanwhile
LEAVING_MAX = 32  # consumers that are about to be removed; each one more takes a place, as it still costs every ack
NEW_PLACES = 16  # beyond these, for lanes that have come lately
AGED_PLACES = 16  # and for lanes of each lower priority
ROUND_S = 2.5  # in which each lane is to have its turn
STEP_OF_TURN = 0.5  # the part of its turn that a lane is given at a time: as much for each weight as for any other
TURN_MIN = 1.0  # jobs of a turn of weight 1: with fewer, lanes of all weights would be given one
OWED_MAX, OWED_MIN, OWED_LATE = 768, 32, 24  # acks that the server may owe while lanes stand in line
LATE_S, LATE_WITHIN_S = 1.2, 1.6  # fewer the longer the first in line waits: all up to LATE_S, OWED_LATE so much later
TURNS_A_SECOND = 850  # more are not to be had, so that where very many wait, they have to wait for longer
DEEP_S = 15.0  # a backlog that takes longer than this
FINISH_TURNS = 2.0  # a lane with at most so many turns' jobs left stays until it is empty
UNSERVED_S = 2.0  # a lane of which no job could be asked for in so long gives up its place
LOWER_S = 0.05  # the same for a lane of a lower priority that was given one in its turn
REMOVAL_PAYS = 6_000  # jobs of a turn times lanes: from here on, removing a consumer costs less than it saves


@dataclass(slots=True, eq=False)
class LaneInLine:
    """A lane in line. Times in monotonic seconds.

    `served_at`: when it was last given a job, or came. `jobs`: how many it holds, as last reported, at `reported_at`.
    `hinted`: a producer relies on its being pulled on. `is_new`: it has had no turn since it has jobs. `debt`: jobs
    that it was given beyond its last turn, divided by its weight.
    """

    lane: Lane
    rank: int
    served_at: float
    reported_at: float
    jobs: int = 1
    weight: float = 1.0
    hinted: bool = False
    is_new: bool = False
    debt: float = 0.0


class Placed(Protocol):
    """What a decision needs of a lane with a place; `delivery.LanePull`.

    `turn_at`: when its turn began, `given_at`: when it was last given a job, monotonic seconds. `turn_jobs`: jobs that
    it was given in its turn, `owed`: and beyond its last one, both divided by its weight. `wanted`: how many more
    of its jobs may be asked for.
    """

    rank: int
    weight: float
    pending: int
    turn_at: float
    owed: float

    @property
    def turn_jobs(self) -> float: ...

    @property
    def given_at(self) -> float: ...

    @property
    def wanted(self) -> int: ...


def turn_length(lanes: int, weight: float, rate: float) -> float:
    """Return how many jobs a lane of weight 1 is given in a turn, where `lanes` lanes want a place or have one, of this
    weight on average, and `rate` jobs a second are started in all. Not the weight of those with a place only: a turn
    would be the longer the lighter they happen to be. At least TURN_MIN: if so few are started, a round takes longer.
    """
    return max(TURN_MIN, ROUND_S * rate / max(1, lanes) / weight)


def debt(turn_jobs: float, owed: float, length: float) -> float:
    """Return what a lane owes of its next turn: jobs are given some at a time, and a turn ends when another one begins,
    so that light lanes would be given more than their due. `owed`: what it owed of this one. At most one turn.
    """
    return min(max(0.0, turn_jobs + owed - length), length)


def unconfirmed_max(lanes: int, longest_wait: float, backlog_s: float, *, is_first_round: bool = False) -> int:
    """Return how many acks the server may owe where `lanes` lanes want a place or have one, and those in line hold jobs
    for `backlog_s` seconds, the first of them without a job for `longest_wait` seconds. `is_first_round`: it has had no
    turn yet.

    The more the server owes, the longer it takes to create and remove consumers, so the later the next turns begin. So
    they are fewer where lanes wait for longer than a round should take, and would do so more than once. In the first
    round the server also loads the stream's blocks and creates all consumers, so that it is late from the beginning.
    """
    if backlog_s < DEEP_S:
        return OWED_MAX
    part = 1.0 - (longest_wait - max(LATE_S, lanes / TURNS_A_SECOND)) / LATE_WITHIN_S
    if part <= 0.0:
        return OWED_LATE
    return OWED_MIN if is_first_round else round(OWED_MIN + min(1.0, part) * (OWED_MAX - OWED_MIN))


def removal_pays(jobs: float, lanes: int) -> bool:
    """Return whether removing a consumer after a turn of `jobs` jobs, and creating it for the next, costs the server
    less than asking it at each ack, where `lanes` lanes want a place.
    """
    return jobs * lanes >= REMOVAL_PAYS


P = TypeVar("P", bound=Placed)


def choose_leaving(placed: Collection[P], line: Line, length: float, now: float) -> list[P]:
    """Return the lanes that give up their places.

    A lane does so only for one of its own or a higher priority, or if there are too many with places: and not before
    the lanes that follow have theirs, so that a worker that waits for the server goes on with those that it has.

    1. It has a lower priority than another one with a place, and was given no second job.
    2. More than LIVE_MAX have places, apart from AGED_PLACES for each lower priority. Lower priorities go first if a
       higher one waits, then those whose turn is over, and of these the ones that were given the most beyond it. One
       that is nearly empty stays.

    Of lanes of a lower priority that were given as many jobs, those that were given the last one last come last.
    """
    highest = min((lane.rank for lane in placed), default=0)
    best = line.highest_rank()
    crowded = len(placed) > FEW_LANES
    aged_places = _count_aged_places((lane.rank for lane in placed), highest)
    leaving: list[P] = []
    over: list[P] = []
    lower: list[P] = []
    for lane in placed:
        if not (crowded or (best is not None and best <= lane.rank)):
            continue
        if lane.rank > highest and lane.turn_jobs > 0 and now - lane.given_at >= LOWER_S:
            leaving.append(lane)
        elif lane.rank > highest and (crowded or (best is not None and best < lane.rank)):
            lower.append(lane)
        elif _turn_is_over(lane, length, now):
            over.append(lane)
    excess = len(placed) - len(leaving) - LIVE_MAX - aged_places
    if excess > 0:
        lower.sort(key=lambda lane: (lane.rank, lane.turn_jobs, lane.given_at))
        over.sort(key=lambda lane: lane.turn_jobs + lane.owed)
        beyond = [each for _, rank in groupby(lower, lambda lane: lane.rank) for each in [*rank][AGED_PLACES:]]
        leaving += [*over, *beyond][-excess:]
    return leaving


def _count_aged_places(ranks: Iterable[int], highest: int) -> int:
    """Return how many places of these ranks are those that lower priorities have of their own."""
    return sum(min(AGED_PLACES, lanes) for lanes in Counter(rank for rank in ranks if rank > highest).values())


def may_go_first(lane: Placed, now: float) -> bool:
    """Return whether a lane that gives up its place goes to the front of the line: it had to before it was given a job,
    and not because it has had its place in vain.
    """
    return lane.turn_jobs <= 0 and not _is_in_vain(lane, now)


def _is_in_vain(lane: Placed, now: float) -> bool:
    """Whether none of a lane's jobs can be asked for. One that waits for a slot keeps its place, however long."""
    return lane.wanted <= 0 and now - lane.turn_at >= UNSERVED_S


def _turn_is_over(lane: Placed, length: float, now: float) -> bool:
    """Whether a lane was given the jobs of its turn, and is not nearly empty; or has its place in vain."""
    jobs = lane.turn_jobs
    if jobs <= 0:
        return _is_in_vain(lane, now)
    if jobs + lane.owed < length:
        return False
    is_nearly_empty = lane.pending <= FINISH_TURNS * length * lane.weight
    return not is_nearly_empty or jobs >= (1 + FINISH_TURNS) * length


class Line:
    """The lanes that wait for a place."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, LaneInLine] = {}
        self._queues: dict[tuple[int, bool], OrderedDict[Lane, LaneInLine]] = {}  # by rank, and whether they are new
        self._new_is_next = True
        self.weights, self.jobs = 0.0, 0  # of all lanes in line

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[LaneInLine]:
        return iter(self._lanes.values())

    def get(self, lane: Lane) -> LaneInLine | None:
        """Return what is known of a lane in line, None for one that is not."""
        return self._lanes.get(lane)

    def note_jobs(self, waiting: LaneInLine, jobs: int, now: float) -> None:
        """A lane in line is reported to hold so many jobs."""
        self.jobs += jobs - waiting.jobs
        waiting.jobs, waiting.reported_at = jobs, now

    def add(self, waiting: LaneInLine, *, first: bool = False) -> None:
        """Let a lane wait at the end of the line, or at its front."""
        self._lanes[waiting.lane] = waiting
        self.weights += waiting.weight
        self.jobs += waiting.jobs
        queue = self._queues.setdefault((waiting.rank, waiting.is_new), OrderedDict())
        queue[waiting.lane] = waiting
        if first:
            queue.move_to_end(waiting.lane, last=False)

    def discard(self, lane: Lane) -> None:
        """A lane waits no more."""
        if (waiting := self._lanes.pop(lane, None)) is not None:
            self.weights = self.weights - waiting.weight if self._lanes else 0.0
            self.jobs -= waiting.jobs
            queue = self._queues[waiting.rank, waiting.is_new]
            del queue[lane]
            if not queue:
                del self._queues[waiting.rank, waiting.is_new]

    def highest_rank(self) -> int | None:
        """Return the highest priority that waits, which is the lowest number; None: nobody waits."""
        return min((rank for rank, _ in self._queues), default=None)

    def longest_wait(self, now: float) -> float:
        """Return for how long the first lane in line has had no job, of those with the highest priority, in seconds."""
        best = self.highest_rank()
        queues = [] if best is None else [self._queues.get((best, is_new)) for is_new in (False, True)]
        return max((now - next(iter(queue.values())).served_at for queue in queues if queue), default=0.0)

    def take(
        self, ranks: Collection[int], now: float, *, leaving: int = 0, skip: Container[Lane] = ()
    ) -> list[LaneInLine]:
        """Take out the lanes that get a place, in this order. `ranks`: of the lanes that have one. `leaving`: consumers
        that are about to be removed: those beyond LEAVING_MAX take places, of each priority in proportion. `skip`:
        lanes that cannot be pulled on at the moment.
        """
        taken: list[LaneInLine] = []
        skipped: list[LaneInLine] = []
        excess = max(0, leaving - LEAVING_MAX)
        highest = min([*ranks, *(rank for rank, _ in self._queues)], default=0)
        lanes = len(ranks) - _count_aged_places(ranks, highest)

        def take(rank: int, *, is_new: bool) -> bool:
            queue = self._queues.get((rank, is_new), OrderedDict())
            while queue:
                waiting = next(iter(queue.values()))
                self.discard(waiting.lane)
                if waiting.lane not in skip:
                    taken.append(waiting)
                    return True
                skipped.append(waiting)
            return False

        for rank in sorted({rank for rank, _ in self._queues}):
            while lanes + len(taken) + excess < LIVE_MAX + AHEAD:
                if take(rank, is_new=self._new_is_next):
                    self._new_is_next = not self._new_is_next
                elif not take(rank, is_new=not self._new_is_next):
                    break
            while lanes + len(taken) < LIVE_MAX + AHEAD + NEW_PLACES and take(rank, is_new=True):
                self._new_is_next = False
        aged_places = round(AGED_PLACES * max(0.0, 1 - excess / (LIVE_MAX + AHEAD)))  # else these alone would go on
        self._take_aged([*ranks, *(each.rank for each in taken)], now, taken, skip, aged_places)
        for waiting in reversed(skipped):
            self.add(waiting, first=True)
        return taken

    def _take_aged(
        self, ranks: Iterable[int], now: float, taken: list[LaneInLine], skip: Container[Lane], places: int
    ) -> None:
        """Take lanes of lower priorities than the highest with a place, which have had no job for AGED_AFTER_S.

        Each priority has `places` of its own: lanes in between, whose places are regular ones, take none away.
        """
        placed = Counter(ranks)
        highest = min(placed, default=0)
        lower = [each for each in self._queues if each[0] > highest]
        aged = [waiting for rank, is_new in lower for waiting in self._aged(rank, now, is_new=is_new)]
        for waiting in sorted(aged, key=lambda each: each.served_at):
            if placed[waiting.rank] < places and waiting.lane not in skip:
                self.discard(waiting.lane)
                taken.append(waiting)
                placed[waiting.rank] += 1

    def _aged(self, rank: int, now: float, *, is_new: bool) -> Iterator[LaneInLine]:
        for number, waiting in enumerate(self._queues.get((rank, is_new), OrderedDict()).values()):
            if number >= AGED_PLACES or now - waiting.served_at < AGED_AFTER_S:
                return
            yield waiting
