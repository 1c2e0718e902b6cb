"""What Prometheus reads: counts of the server, workers, and the totals of the history, as one text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

from ..connection import Connection
from ..errors import AIQueueError, NotFound
from ..metrics import OTHER, OUTCOMES, Exposition, History, MonotonicTotals
from ..topology import Topology
from . import stats
from .stats import FamilyStats, LaneStats
from .worker_stats import WorkerState
from .workers import read_workers

log = logging.getLogger(__name__)

SOURCE_S = 8.0  # of one source; Prometheus waits 10 s for all
TENANTS_MAX = 1_000  # of a family, those with most jobs; all further ones are added up


class Scrape(NamedTuple):
    """The text of a poll. `failed`: why sources could not be read, by name; their series are not in the text."""

    text: str
    failed: Mapping[str, str]


@dataclass(slots=True)
class _TenantCounts:
    """The jobs of a tenant in one family. `oldest_s`: None if some wait, and it is not known since when."""

    waiting: int = 0
    in_flight: int = 0
    parked: int = 0
    oldest_s: float | None = 0.0

    def add(self, waiting: int, in_flight: int, parked: int, oldest_s: float | None) -> None:
        self.waiting += waiting
        self.in_flight += in_flight
        self.parked += parked
        if waiting:
            known = self.oldest_s is not None and oldest_s is not None
            self.oldest_s = max(self.oldest_s or 0.0, oldest_s or 0.0) if known else None

    @property
    def jobs(self) -> int:
        return self.waiting + self.in_flight + self.parked


class MetricsExporter:
    """Reads all that is exported. `tenants`: waiting, in flight, parked and the oldest by tenant, which costs the
    server more.
    """

    def __init__(self, connection: Connection, topology: Topology, *, tenants: bool = False) -> None:
        self._connection, self._topology, self._tenants = connection, topology, tenants
        self._history = History(connection, topology, "total", since_s=0)
        self._totals = MonotonicTotals()
        self._sources: dict[str, Callable[[Exposition], Awaitable[None]]] = {
            "queues": self._read_queues, "workers": self._read_workers, "history": self._read_history,
        }  # fmt: skip
        self._errors = dict.fromkeys(self._sources, 0)
        self._poll: asyncio.Task[Scrape] | None = None

    async def scrape(self) -> Scrape:
        """Read all sources; who asks while this goes on gets the same answer. Never raises for a source."""
        if self._poll is None or self._poll.done():
            self._poll = asyncio.create_task(self._read_all())
        return await asyncio.shield(self._poll)

    async def stop(self) -> None:
        """End a poll that goes on. Safe twice, and before the first one."""
        poll, self._poll = self._poll, None
        if poll is not None:
            poll.cancel()
            await asyncio.wait([poll])

    async def _read_all(self) -> Scrape:
        text = Exposition()
        read = await asyncio.gather(*map(self._read, self._sources.values()))
        failed: dict[str, str] = {}
        for source, found in zip(self._sources, read, strict=True):
            if isinstance(found, str):
                failed[source] = found
                self._errors[source] += 1
            else:
                text.update(found)
            text.add("aiqueue_up", 0 if source in failed else 1, source=source)
        for source, errors in self._errors.items():
            text.add("aiqueue_scrape_errors_total", errors, source=source)
        return Scrape(text.render(), failed)

    async def _read(self, read: Callable[[Exposition], Awaitable[None]]) -> Exposition | str:
        """Return the samples of one source, all or none; or why it could not be read."""
        if not self._connection.connected:  # a request would wait until it is again
            return "not connected to the server"
        found = Exposition()
        try:
            async with asyncio.timeout(SOURCE_S):
                await read(found)
        except TimeoutError:
            return f"no answer within {SOURCE_S:g} s"
        except AIQueueError as error:
            return str(error)
        except Exception as error:
            log.exception("a source of metrics could not be read")
            return repr(error)
        return found

    # -- the server's counts

    async def _read_queues(self, text: Exposition) -> None:
        for family in await stats.overview(self._connection, self._topology, sample_s=0):
            if family.dead is not None and not family.partial:
                text.add("aiqueue_jobs_dead", family.dead, family=family.family)
            if not family.missing:
                await self._add_family(text, family)

    async def _add_family(self, text: Exposition, family: FamilyStats) -> None:
        lanes: list[LaneStats] | None = None
        if self._tenants and self._topology.family(family.family).role == "work":
            try:
                lanes = await stats.lanes(self._connection, self._topology, family.family)
            except NotFound:  # the stream went meanwhile
                return
        partial = family.partial or any(lane.partial for lane in lanes or ())
        text.add("aiqueue_counts_partial", int(partial), family=family.family)
        if not lanes:  # a family without tenants has series, too: what scales by a sum needs a 0
            counts = _TenantCounts()
            counts.add(family.pending, family.in_flight, family.parked or 0, family.oldest_age_s)
            _add_counts(text, counts, partial=partial, parked=family.parked is not None, family=family.family)
            return
        for tenant, counts in _by_tenant(lanes).items():
            _add_counts(text, counts, partial=partial, parked=True, family=family.family, tenant=tenant)

    async def _read_workers(self, text: Exposition) -> None:
        workers = await read_workers(self._connection, self._topology, with_pauses=False)
        states = [each.state for each in workers]
        for state in get_args(WorkerState):
            text.add("aiqueue_workers", states.count(state), state=state)
        for family in self._topology.families.values():
            if family.role == "work":
                serving = sum(each.state == "running" and family.name in each.families for each in workers)
                text.add("aiqueue_family_workers", serving, family=family.name)

    # -- what workers have counted

    async def _read_history(self, text: Exposition) -> None:
        await self._history.update()
        for (family, kind), sums in sorted(self._totals.update(self._history.totals()).items()):
            for outcome in OUTCOMES:
                text.add("aiqueue_jobs_total", getattr(sums, outcome), family=family, kind=kind, outcome=outcome)
            text.add_histogram("aiqueue_job_run_seconds", sums.runs, sums.run_s, family=family, kind=kind)
            text.add_histogram("aiqueue_job_wait_seconds", sums.waits, sums.wait_s, family=family, kind=kind)


def _by_tenant(lanes: Iterable[LaneStats]) -> dict[str, _TenantCounts]:
    """Return the counts of the TENANTS_MAX tenants with most jobs, and those of all others together as ``=other``."""
    found: dict[str, _TenantCounts] = {}
    for lane in lanes:
        counts = found.setdefault(lane.tenant, _TenantCounts())
        counts.add(lane.pending, lane.in_flight, lane.parked, lane.oldest_age_s)
    ranked = sorted(found.items(), key=lambda each: (-each[1].jobs, each[0]))
    shown = dict(ranked[:TENANTS_MAX])
    for _, counts in ranked[TENANTS_MAX:]:
        others = shown.setdefault(OTHER, _TenantCounts())
        others.add(counts.waiting, counts.in_flight, counts.parked, counts.oldest_s)
    return shown


def _add_counts(text: Exposition, counts: _TenantCounts, /, *, partial: bool, parked: bool, **labels: str) -> None:
    if partial:  # too many would seem to wait: rather no number than a wrong one
        return
    if parked:
        text.add("aiqueue_jobs_parked", counts.parked, **labels)
    text.add("aiqueue_jobs_waiting", counts.waiting, **labels)
    text.add("aiqueue_jobs_in_flight", counts.in_flight, **labels)
    if counts.oldest_s is not None:
        text.add("aiqueue_oldest_waiting_seconds", round(max(0.0, counts.oldest_s), 3), **labels)
