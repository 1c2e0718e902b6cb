"""Reads what a place shows from the server: once for each interval, and for the lanes one list of consumers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from ...client import Client
from ...errors import AccessDenied, BadInput, NotFound
from ...inspect import (
    FamilyStats,
    LaneStats,
    ListedJob,
    WorkerStats,
    explain_job,
    find_and_describe,
    read_pauses_if_allowed,
    read_workers,
    stats,
)
from ...metrics import EVERY_S, History, Series
from .figures import FamilyRow, Figures, KindRow, KnownAges, OutcomeRates, RecentRates
from .place import Place

if TYPE_CHECKING:
    from ...inspect import Explanation, JobStats

PAST_S = 3600.0
JOBS_MAX = 1_000
PAGES_MAX = 5  # that are looked through for a page of jobs
UNFINISHED = ("queued", "parked", "in_flight", "retrying", "waiting")


class TopReader:
    """Reads figures. `shown_lanes`: of which lanes the oldest job is read, given all of them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._link, self._topology = client.connection, client.topology
        self._samples: stats.Samples = {}
        self._history = History(self._link, self._topology, "minute", since_s=PAST_S)
        self._past: dict[tuple[str, str], Series] = {}
        self._rates: dict[tuple[str, str], RecentRates] = {}
        self._past_until = 0.0
        self._past_error = ""
        self.shown_lanes: stats.ChooseAged = lambda found: found
        self.ages = KnownAges()
        self.jobs_limit = 100

    async def read(self, place: Place) -> Figures:
        """Return the figures of a place. Raises AIQueueError."""
        notes: dict[str, str] = {}
        self._link.optional += 1  # a denial is said on the screen
        try:
            workers, past_error, families = await asyncio.gather(
                self._try(notes, "workers", read_workers(self._link, self._topology, with_pauses=False)),
                self._update_past(),
                self._read_families(place),
            )
            if past_error:
                notes["history"] = past_error
            found = await self._read_pane(place, workers)
        finally:
            self._link.optional -= 1
        families = found.pop("stats", families)
        return Figures(
            place, self._link.server, tuple(self._family_row(each, workers) for each in families),
            None if workers is None else tuple(workers), notes=notes, **found,
        )  # fmt: skip

    async def _read_families(self, place: Place) -> Sequence[FamilyStats]:
        """Return all families, or that of the place. Lanes are counted with their family."""
        if place.pane == "lanes":
            return []
        names = [place.family] if place.family else None
        return await stats.overview(self._link, self._topology, samples=self._samples, names=names)

    async def _read_pane(self, place: Place, workers: Sequence[WorkerStats] | None) -> dict[str, Any]:
        match place.pane:
            case "lanes":
                return await self._read_lanes(place)
            case "jobs" | "dead":
                return await self._read_jobs(place)
            case "kinds":
                names = [place.family] if place.family else self._history.families
                kinds = [(family, kind) for family in names for kind in self._history.names(family)]
                return {"kinds": tuple(self._kind_row(family, kind) for family, kind in kinds)}
            case "pauses":
                pauses = await read_pauses_if_allowed(self._link, self._topology)
                return {"pauses": tuple(each for each in pauses if place.family in ("", each.family))}
            case "job":
                return await self._read_job(place)
            case "worker":
                named = [each for each in workers or () if each.name == place.item]
                missing = "" if named else f"no worker {place.item} is running any more"
                return {"details": named[0] if named else None, "missing": missing}
            case _:
                return {}

    async def _read_lanes(self, place: Place) -> dict[str, Any]:
        def choose(found: Sequence[LaneStats]) -> Sequence[LaneStats]:
            known = self.ages.fill(found, time.monotonic())
            return list(self.shown_lanes([each for each in known if place.tenant in ("", each.tenant)]))

        try:
            family, lanes = await stats.family_with_lanes(
                self._link, self._topology, place.family, samples=self._samples, choose_aged=choose
            )
        except NotFound:
            stream = self._topology.family(place.family).stream
            return {"missing": f"stream {stream} does not exist: run `aiqueue apply`"}
        lanes = self.ages.fill(lanes, time.monotonic())
        lanes = [each for each in lanes if place.tenant in ("", each.tenant)]
        return {"stats": [family], "lanes": tuple(lanes)}

    async def _read_jobs(self, place: Place) -> dict[str, Any]:
        which: dict[str, Any] = {
            name: value for name in ("family", "tenant", "priority") if (value := getattr(place, name))
        }
        if place.tenant == "*":
            del which["tenant"]
        if place.pane == "dead":
            which["state"] = "failed"
        else:
            which["state"] = UNFINISHED
        jobs: list[ListedJob] = []
        cursor = ""
        for _ in range(PAGES_MAX):
            page = await self._client.jobs.page(limit=self.jobs_limit - len(jobs), cursor=cursor, **which)
            jobs, cursor = jobs + list(page.jobs), page.cursor
            if len(jobs) >= self.jobs_limit or not cursor:
                break
        return {"jobs": tuple(jobs), "more_jobs": bool(cursor)}

    async def _read_job(self, place: Place) -> dict[str, Any]:
        narrowed = {"family": place.family or None, "tenant": None if place.tenant in ("", "*") else place.tenant}
        try:
            found, stored = await find_and_describe(self._link, self._topology, place.item, **narrowed)
        except (NotFound, BadInput) as error:
            return {"missing": str(error)}
        why: Explanation | None = None
        if found.state in UNFINISHED:
            with contextlib.suppress(NotFound, AccessDenied):  # it has ended meanwhile, or its state shows that
                why = await explain_job(self._link, self._topology, found, stored, self._client.limit_rules)
        details: tuple[JobStats, Explanation | None] = found, why
        return {"details": details}

    async def _try(self, notes: dict[str, str], name: str, work: Awaitable[Any]) -> Any:
        """Return what was read; None if this user may not, or its stream is missing."""
        try:
            return await work
        except (NotFound, AccessDenied) as error:
            notes[name] = str(error)
            return None

    # -- the last hour

    async def _update_past(self) -> str:
        """Read what workers have counted since, which they report every 5 s. Return why it cannot be read, or ""."""
        now = time.monotonic()
        if now < self._past_until:
            return self._past_error
        try:
            await self._history.update()
        except (NotFound, AccessDenied) as error:
            self._past_error = str(error)
        else:
            self._past_error = ""
        self._past.clear()
        self._past_until = now + EVERY_S
        return self._past_error

    def _series(self, family: str, kind: str = "") -> tuple[Series, OutcomeRates]:
        """Return the last hour of a family or a kind, and its rates; made once for each reading of the history."""
        key = family, kind
        if key not in self._past:
            series = self._past[key] = self._history.series(family, kind)
            self._rates.setdefault(key, RecentRates()).update(series, self._history.now)
        return self._past[key], self._rates[key].now

    def _kind_row(self, family: str, kind: str) -> KindRow:
        series, rates = self._series(family, kind)
        return KindRow(series, series.sums, rates)

    def _family_row(self, family: FamilyStats, workers: Sequence[WorkerStats] | None) -> FamilyRow:
        past, rates = None, OutcomeRates(family.rate_done)  # gone from the stream: all that is known without a history
        if not self._past_error and family.family in self._history.families:
            past, rates = self._series(family.family)
        serving = None if workers is None else sum(_serves(each, family.family) for each in workers)
        is_inbox = self._topology.family(family.family).role != "work"
        return FamilyRow(family, past, rates, serving, is_inbox)


def _serves(worker: WorkerStats, family: str) -> bool:
    return worker.state == "running" and family in worker.families
