"""What holds listed jobs that wait: pauses, and limits of their keys that are reached."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import AccessDenied, NotFound, Unavailable

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import ListedJob

NOTES_MAX = 5


class JobHolds:
    """What holds jobs of a list. `notes`: a sentence for each pause and each limit, NOTES_MAX at most."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], str] = {}
        self.notes: list[str] = []

    def state(self, job: ListedJob) -> str:
        """Return the state of a job, and what holds it: "queued (limit)"."""
        state = job.state.replace("_", " ")
        held = self._held.get((job.stream, job.seq))
        return f"{state} ({held})" if held else state

    async def read(self, client: Client, jobs: Sequence[ListedJob]) -> None:
        """Read what holds those that are queued. What this user may not read is left out."""
        queued = [each for each in jobs if each.state == "queued"]
        if queued:
            with suppress(AccessDenied, NotFound, Unavailable):
                await self._read_pauses(client, queued)
        keyed = [each for each in queued if each.key and (each.stream, each.seq) not in self._held]
        for family in sorted({each.family for each in keyed}):
            with suppress(AccessDenied, NotFound, Unavailable):
                await self._read_limits(client, family, [each for each in keyed if each.family == family])

    async def _read_pauses(self, client: Client, queued: Sequence[ListedJob]) -> None:
        from .. import subjects  # noqa: PLC0415  (a list without jobs that wait does without it)
        from ..lanes import ActivePauses  # noqa: PLC0415

        pauses = ActivePauses(await client.pauses())
        for job in queued:
            key = subjects.hashed(job.key) if job.key else ""
            if (pause := pauses.of_job(job.family, job.tenant, job.kind, key)) is not None:
                self._hold(job, "paused", f"{pause}")

    async def _read_limits(self, client: Client, family: str, queued: Sequence[ListedJob]) -> None:
        reached = [(rule, use) for rule in await client.limits(family) for use in rule.uses if rule.is_reached_by(use)]
        for job in queued:
            for rule, use in reached:
                if use.key == job.key and use.tenant in (None, job.tenant):
                    self._hold(
                        job, "limit", f"the limit of {family} for {use.key!r} is reached: {rule.limit}, {rule.whom}"
                    )
                    break

    def _hold(self, job: ListedJob, held: str, note: str) -> None:
        self._held[job.stream, job.seq] = held
        if note not in self.notes and len(self.notes) < NOTES_MAX:
            self.notes.append(note)
