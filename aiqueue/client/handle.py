"""What enqueue returns: the job's name, and the way to its result."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from .. import subjects
from ..enqueue import Enqueued, duration
from ..errors import NotFound, ResultDisabled
from ..inspect import JobStats, job
from ..journal import CANCELLED, FAILED, Journal, StreamItem, follow, wait_for_outcome
from ..topology import Family
from .cancel import Cancels, Verdict


class Handle:
    """An enqueued job. `duplicate` says that a job of this id was there already and nothing new was stored."""

    def __init__(self, enqueued: Enqueued, family: Family, journal: Journal, cancels: Cancels) -> None:
        self._enqueued = enqueued
        self._family = family
        self._journal = journal
        self._cancels = cancels

    def __repr__(self) -> str:
        due = "" if self.due is None else f" due {datetime.fromtimestamp(self.due, UTC):%Y-%m-%dT%H:%M:%SZ}"
        return f"<Handle {self.id} {self.lane}{due}{' duplicate' if self.duplicate else ''}>"

    @property
    def id(self) -> str:
        return self._enqueued.job_id

    @property
    def lane(self) -> subjects.Lane:
        return self._enqueued.lane

    @property
    def tenant(self) -> str:
        return self._enqueued.lane.tenant

    @property
    def family(self) -> str:
        return self._enqueued.lane.family

    @property
    def duplicate(self) -> bool:
        return self._enqueued.duplicate

    @property
    def due(self) -> float | None:
        """When a delayed job is to begin, in seconds since the epoch; None for one that was not delayed."""
        return self._enqueued.due

    async def result(self, timeout: str | float | None = None) -> Any:
        """What the handler returned, as plain data, waiting up to `timeout` (seconds or "30s"; None: without end).

        Woken by the job's last word. Raises JobFailed (reason
        "cancelled" for a cancelled job), ResultTimeout, and ResultDisabled when the job ended well
        under a handler that keeps no results. Results are kept as long as the journal's stream keeps them (a day).
        """
        left_s = None if timeout is None else duration("timeout", timeout)
        end, run = time.monotonic() + (left_s or 0.0), self._run
        while True:
            entry = await wait_for_outcome(
                self._journal,
                self._subject(),
                run=run,
                timeout_s=left_s,
                job=(self._family.stream, run),
                word=self._enqueued.word,
                parked=self._parked,
            )
            claimant = await self._claimant(run) if entry is None else None
            if claimant is None:
                break
            run, left_s = claimant, None if left_s is None else max(0.0, end - time.monotonic())
        if entry is None:
            raise ResultDisabled(f"job {self.id} ended, and its handler keeps no result")
        if entry.event in (FAILED, CANCELLED):
            raise entry.failure(self.id)
        return entry.data

    async def stream(
        self, *, after: str | None = None, timeout: str | float | None = None
    ) -> AsyncGenerator[StreamItem, None]:
        """What the job's journal says, as it is written: each chunk that its handler gives is one item, and so is each
        other entry (started, progress, retry, and at last result, failed or cancelled)::

            async with contextlib.aclosing(handle.stream()) as items:
                async for item in items:
                    if item.event == "chunk":
                        print(item.data, end="")
                    elif item.event == "restart":  # another attempt begins anew: what it gave so far does not count
                        print()

        From the beginning, or `after` the `cursor` of an earlier item: each item comes once and in order, over lost
        links too. An item "gap" says that some are missing: they have expired, or there was no room for them. It ends
        after the final item, or when the job ends without one: its handler keeps no result.

        Raises ResultTimeout when it has not ended within `timeout`, BadInput for a wrong cursor.
        """
        left_s = None if timeout is None else duration("timeout", timeout)
        end = time.monotonic() + (left_s or 0.0)
        run: int | None = self._run
        while run is not None:
            items = follow(
                self._journal,
                self._subject(),
                run=run,
                after=after,
                timeout_s=left_s,
                job=(self._family.stream, run),
                word=self._enqueued.word,
                parked=self._parked,
            )
            item = None
            async with aclosing(items):
                async for item in items:
                    yield item
            run = await self._claimant(run) if item is None or not item.final else None
            left_s = None if left_s is None else max(0.0, end - time.monotonic())

    async def _claimant(self, run: int) -> int | None:
        """The run that was taken in place of `run`, whose message is gone without a last word: in a family that claims
        its ids it was a duplicate.
        """
        head = await self._journal.head(self._subject()) if self._family.claim else None
        return head.run if head is not None and head.run and head.run != run else None

    async def status(self) -> JobStats:
        """Where the job is and what is known of it. Raises NotFound when nothing is, any more; Unavailable."""
        return await job(
            self._journal.connection, self._cancels.topology, self.id, family=self.family, tenant=self.tenant
        )

    @property
    def _run(self) -> int:
        """0 for a delayed job, which has its place in the work stream when it is due."""
        return 0 if self._enqueued.word else self._enqueued.seq

    def _subject(self) -> str:
        if self._family.journal is None:
            raise NotFound(f"family {self.family} keeps no journal, so there are no results")
        return subjects.journal(self._family.journal, self.tenant, self.id)

    async def cancel(self) -> bool:
        """Take the job back, wherever it is. True: `result` says "cancelled", and it will not run (again); where it
        runs, its worker is told to stop it, which this does not wait for. False: it has ended; nothing has changed.
        Raises Unavailable, after which asking again is fine.
        """
        return (await self.verdict()).cancelled

    async def verdict(self) -> Verdict:
        """What `cancel` does, with a sentence about it."""
        return await self._cancels.enqueued(self._enqueued)

    async def _parked(self) -> bool:
        run, word = self._enqueued.seq, self._enqueued.word
        found = await self._cancels.parking.of(self.lane, self.id)
        return any(each.word == word if word else each.run == run for each in found)
