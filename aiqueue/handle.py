"""What enqueue returns: the job's name, and the way to its result."""

from __future__ import annotations

from typing import Any

from . import subjects
from .errors import JobFailed, NotFound, ResultDisabled
from .journal import FAILED, Journal
from .producer import Enqueued, duration


class Handle:
    """An enqueued job. `duplicate` says that a job of this id was there already and nothing new was stored."""

    def __init__(self, enqueued: Enqueued, journal: Journal, root: str | None) -> None:
        self._enqueued = enqueued
        self._journal = journal
        self._root = root

    def __repr__(self) -> str:
        return f"<Handle {self.id} {self.lane}{' duplicate' if self.duplicate else ''}>"

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

    async def result(self, timeout: str | float | None = None) -> Any:
        """What the handler returned, as plain data, waiting up to `timeout` (seconds or "30s"; None: without end).

        Woken by the job's last word. Raises JobFailed, ResultTimeout, and ResultDisabled when the job ended well
        under a handler that keeps no results. Results are kept as long as the journal's stream keeps them (a day).
        """
        if self._root is None:
            raise NotFound(f"family {self.family} keeps no journal, so there are no results")
        stream, seq = self._enqueued.stream, self._enqueued.seq
        entry = await self._journal.final(
            subjects.journal(self._root, self.tenant, self.id),
            run=seq,
            timeout_s=None if timeout is None else duration("timeout", timeout),
            job=(stream, seq),
        )
        if entry is None:
            raise ResultDisabled(f"job {self.id} ended, and its handler keeps no result")
        if entry.event == FAILED:
            told = entry.data if isinstance(entry.data, dict) else {}
            raise JobFailed(
                self.id,
                reason=str(told.get("reason", "")),
                error=str(told.get("error", "")),
                attempt=entry.attempt,
            )
        return entry.data
