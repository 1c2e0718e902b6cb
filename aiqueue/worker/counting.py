"""Counts what becomes of a worker's jobs, for the history. Each that is done is noted; many are added up together."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import frexp
from time import monotonic
from typing import Any, Self

from ..client import Client
from ..connection import ServerClock
from ..lanes import Delivery
from ..metrics import LONGEST, OTHER, SHORTEST, Counts, Flusher
from .opening import OpenedJob
from .rehearsal import Noted, SettledAttempt, current_rehearsal

KEYS_MAX = 10_000  # tenants and kinds that are counted apart between two flushes
COUNTED = {"done": "done", "retry": "retried", "failed": "dead"}  # of the outcomes in `SettledAttempt`
ADDED_UP = 256  # jobs that are noted before they are added up
_SHORTEST = frexp(SHORTEST)[1]


class Tally:
    """The counters of one worker since `take` was last called.

    `kinds`: families and kinds that have handlers. All other kinds are counted together: whoever enqueues decides about
    them, and each would be some counters more on the server.
    """

    def __init__(self, clock: ServerClock, kinds: Iterable[tuple[str, str]]) -> None:
        self._clock = clock
        self._kinds = frozenset(kinds)
        self._counts: dict[tuple[str, str, str], Counts] = {}  # by family, tenant and kind
        self._caches: list[dict[str, Counts]] = []  # of lanes, which keep counters from here
        self._done: list[tuple[Counts, float, float, float]] = []  # began, ended, stored; 0: no first delivery
        self._ahead_s = 0.0  # the server's clock less the monotonic one
        self._measure()

    def take(self) -> dict[tuple[str, str, str], Counts]:
        """Return what was counted by family, tenant and kind, and count anew."""
        self._add_up()
        counts, self._counts = self._counts, {}
        for each in self._caches:
            each.clear()
        self._caches = []
        self._measure()
        return counts

    def _measure(self) -> None:
        now = self._clock.precise()
        self._ahead_s = (self._clock.now() if now is None else now) - monotonic()

    def count_done(self, delivery: Delivery, opened: OpenedJob) -> None:
        """Count a job that is done. Its attempt ends now, unless its end is noted. `count` would do the same."""
        try:
            counts: Counts = delivery.lane.counts[opened.kind]
        except KeyError:
            counts = self._find_of(delivery, opened)
        stored_at = delivery.stored_at if delivery.delivery_count == 1 else 0.0
        self._done.append((counts, delivery.run_started_at, delivery.run_ended_at or monotonic(), stored_at))
        if len(self._done) >= ADDED_UP:
            self._add_up()

    def _add_up(self) -> None:
        """Add the noted jobs to their counters. In a row this costs less than amid other work, with cold caches."""
        ahead_s = self._ahead_s
        done, self._done = self._done, []
        for counts, started_at, ended_at, stored_at in done:
            run_s = ended_at - started_at
            counts.done += 1
            counts.run_s += run_s
            counts.runs[frexp(run_s)[1] if run_s > SHORTEST else _SHORTEST] += 1
            if stored_at:
                wait_s = started_at + ahead_s - stored_at
                if SHORTEST < wait_s < LONGEST:
                    counts.wait_s += wait_s
                    counts.waits[frexp(wait_s)[1]] += 1
                else:
                    counts.add_wait(wait_s)

    def count(self, outcome: str, delivery: Delivery, opened: OpenedJob) -> None:
        """Count the end of an attempt, or of a job that was not run: one of OUTCOMES of the history."""
        counts = self._find_of(delivery, opened)
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        if started_at := delivery.run_started_at:
            counts.add_run((delivery.run_ended_at or monotonic()) - started_at)
            if delivery.delivery_count == 1:  # a later one has waited for other reasons
                counts.add_wait(started_at + self._ahead_s - delivery.stored_at)

    def count_dead(self, family: str, tenant: str, kind: str) -> None:
        """Count a dead letter of a job that did not run here."""
        self._find(family, tenant, kind).dead += 1

    def _find_of(self, delivery: Delivery, opened: OpenedJob) -> Counts:
        """Return the counters of a delivery's tenant and kind. The lane keeps them until `take`, if it may."""
        lane, kind = delivery.lane, opened.kind
        family = lane.key.family
        counts = self._find(family, delivery.tenant, kind)
        if (family, kind) in self._kinds and lane.key.tenant == delivery.tenant and kind not in lane.counts:
            lane.counts[kind] = counts
            self._caches.append(lane.counts)
        return counts

    def _find(self, family: str, tenant: str, kind: str) -> Counts:
        key = family, tenant, kind if (family, kind) in self._kinds else OTHER
        if key not in self._counts:
            if len(self._counts) >= KEYS_MAX:
                key = family, OTHER, key[2]
            self._counts.setdefault(key, Counts())
        return self._counts[key]


class Notes:
    """Who hears what becomes of each job: the tally, a test, and the spans of what is traced.

    `tally`: None where nothing is counted. `traced`: is told of all outcomes but those of the short ways.
    """

    def __init__(self, tally: Tally | None) -> None:
        self.tally = tally
        self.rehearsal = current_rehearsal()
        self.traced: Noted | None = None

    def note(self, delivery: Delivery, opened: OpenedJob, outcome: str, *rest: Any) -> None:
        """Tell all. `outcome` and `rest`: as in `SettledAttempt`."""
        if self.tally is not None and outcome in COUNTED:
            self.tally.count(COUNTED[outcome], delivery, opened)
        self.rehearse(delivery, opened, outcome, *rest)
        if self.traced is not None:
            self.traced(delivery, opened, outcome, *rest)

    def count_dead(self, family: str, tenant: str, kind: str) -> None:
        """Count a job that became a dead letter without an attempt of this worker."""
        if self.tally is not None:
            self.tally.count_dead(family, tenant, kind)

    def rehearse(self, delivery: Delivery, opened: OpenedJob, outcome: str, *rest: Any) -> None:
        """Tell the test alone."""
        if self.rehearsal is not None:
            who = opened.job_id, opened.kind, opened.family.name, delivery.tenant, opened.attempt
            self.rehearsal(SettledAttempt(*who, outcome, *rest))


class Counting:
    """Counts the jobs of a worker while it runs, unless the setting `metrics` is off: `notes` hears of them."""

    def __init__(self, client: Client, families: Collection[str], kinds: Iterable[tuple[str, str]]) -> None:
        connection, is_on = client.connection, client.settings.metrics
        tally = Tally(connection.clock, kinds) if is_on else None
        self.notes = Notes(tally)
        self._flusher = Flusher(connection, client.topology, families, tally.take) if tally is not None else None

    async def __aenter__(self) -> Self:
        if self._flusher is not None:
            self._flusher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Flush what is left."""
        if self._flusher is not None:
            await self._flusher.stop()
