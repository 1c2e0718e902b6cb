"""The demo's record of its jobs: what was enqueued, their states from the journals, and how long they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...client import Client
from ...enqueue import DeadLetter
from ...job import Job, M
from ...journal import FAILED, RESULT, RETRY, Entry, entry_from_stored

INGEST, ANALYSIS = "rag.ingest", "agent.tasks"
FAMILIES = (INGEST, ANALYSIS)


@dataclass
class Track:
    """One job. `stored` is set after the PubAck, `state` by the final entry of its journal.

    Times are the server's, in seconds since the epoch.
    """

    family: str
    tenant: str
    job_id: str
    path: str
    stored: bool = False
    state: Literal["open", "done", "dead"] = "open"
    running: bool = False
    retries: int = 0
    replays: int = 0
    result: Any = None
    enqueued_at: float | None = None
    ended_at: float | None = None
    waited_s: float | None = None
    run_s: list[float] = field(default_factory=list)


class Count(NamedTuple):
    """The numbers of one row of the live table."""

    enqueued: int
    running: int
    retries: int
    done: int
    dead: int


class Ledger:
    """All jobs of a run, by family and id. Handlers in threads change only the fields of their own job."""

    def __init__(self, tenants: tuple[str, ...]) -> None:
        self.tenants = tenants
        self.tracks: dict[tuple[str, str], Track] = {}
        self.started_at = time.monotonic()

    def expect(self, family: str, tenant: str, job_id: str, path: str) -> Track:
        """Return the track of a job that is about to be enqueued, or was enqueued by an earlier attempt."""
        return self.tracks.setdefault((family, job_id), Track(family, tenant, job_id, path))

    @contextmanager
    def running(self, job: Job[M]) -> Iterator[None]:
        """Measure one attempt while the block runs."""
        track = self.tracks[job.family, job.id]
        started_at = time.monotonic()
        if track.enqueued_at is None:
            track.enqueued_at = job.enqueued_at
            track.waited_s = max(0.0, time.time() - job.enqueued_at)
        track.running = True
        try:
            yield
        finally:
            track.running = False
            track.run_s.append(time.monotonic() - started_at)

    def mark_replayed(self, letter: DeadLetter) -> None:
        """Reopen the track of a job whose dead letter is about to be replayed."""
        track = self.tracks[letter.lane.family, letter.job_id]
        track.replays += 1
        track.state = "open"

    def add_entry(self, family: str, job_id: str, entry: Entry) -> str | None:
        """Update a job's track from an entry of its journal. Return a line to print if the entry is notable."""
        track = self.tracks.get((family, job_id))
        if track is None:
            return None
        data = entry.data if isinstance(entry.data, dict) else {}
        if entry.event == RETRY:
            track.retries += 1
            return f"attempt {entry.attempt} of {track.path} failed: {data['error']}; retry in {data['delay_s']:.1f} s"
        if entry.event == FAILED:
            track.state, track.ended_at = "dead", entry.time
            return f"{track.path} became a dead letter ({data.get('reason')}): {data.get('error')}"
        if entry.event == RESULT:
            track.state, track.ended_at, track.result = "done", entry.time, entry.data
            if track.replays:
                return f"{track.path} was replayed and succeeded"
            if track.retries:
                return f"attempt {entry.attempt} of {track.path} succeeded"
        return None

    @property
    def settled(self) -> bool:
        """Whether every expected job is stored and has succeeded or become a dead letter."""
        return all(track.stored and track.state != "open" for track in self.tracks.values())

    def of(self, tenant: str | None = None, family: str | None = None) -> list[Track]:
        return [
            track for track in self.tracks.values() if tenant in (None, track.tenant) and family in (None, track.family)
        ]

    def count(self, tenant: str | None = None, family: str | None = None) -> Count:
        found = self.of(tenant, family)
        return Count(
            enqueued=sum(track.stored for track in found),
            running=sum(track.running for track in found),
            retries=sum(track.retries for track in found),
            done=sum(track.state == "done" for track in found),
            dead=sum(track.state == "dead" for track in found),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the measurements as plain data, one row per tenant and family. Times are medians in milliseconds."""
        table = []
        for tenant in self.tenants:
            for family in FAMILIES:
                found = self.of(tenant, family)
                if found:
                    table.append({"tenant": tenant, "family": family, **_measure(found)})
        return table

    def total(self) -> dict[str, Any]:
        """Return the measurements over all jobs."""
        return _measure(self.of())

    def missing(self) -> list[str]:
        """Return a line for each job that is not known to have succeeded."""
        lines = []
        for track in self.tracks.values():
            if not track.stored:
                lines.append(f"{track.path}: its {track.family} job was not stored")
            elif track.state != "done":
                lines.append(f"{track.path}: its {track.family} job {track.job_id} is {track.state}")
            elif track.family == INGEST and (ANALYSIS, track.job_id) not in self.tracks:
                lines.append(f"{track.path}: it was ingested, but no analysis was enqueued")
        return lines


def _measure(tracks: list[Track]) -> dict[str, Any]:
    started_at = min((track.enqueued_at for track in tracks if track.enqueued_at), default=0.0)
    ended = max((track.ended_at for track in tracks if track.ended_at), default=started_at)
    done = sum(track.state == "done" for track in tracks)
    runs = [each for track in tracks for each in track.run_s]
    return {
        "enqueued": sum(track.stored for track in tracks),
        "succeeded": done,
        "dead": sum(track.state == "dead" for track in tracks),
        "retries": sum(track.retries for track in tracks),
        "replays": sum(track.replays for track in tracks),
        "wait_ms": _median_ms([track.waited_s for track in tracks if track.waited_s is not None]),
        "run_ms": _median_ms(runs),
        "run_s": round(sum(runs), 3),
        "span_s": round(ended - started_at, 3),
        "per_s": round(done / (ended - started_at), 1) if ended > started_at else None,
    }


def _median_ms(values_s: list[float]) -> float | None:
    return round(statistics.median(values_s) * 1000, 1) if values_s else None


class JournalReader:
    """Reads new journal entries of some tenants.

    It polls the stream instead of subscribing, so that it misses no entry while the connection is lost.
    """

    def __init__(self, client: Client, tenants: tuple[str, ...]) -> None:
        self._client = client
        roots = [(family, client.topology.family(family).journal) for family in FAMILIES]
        self._next = {(family, f"{root}.{tenant}.*"): 1 for family, root in roots for tenant in tenants}

    async def read_new(self) -> list[tuple[str, str, Entry]]:
        """Return family, job id and entry of all entries since the last call. Raises Unavailable."""
        found = []
        stream = self._client.topology.journal_stream.name
        for (family, subject), seq in self._next.items():
            async for stored in self._client.connection.read(stream, subject, seq=seq):
                self._next[family, subject] = stored.seq + 1
                found.append((family, stored.subject.rpartition(".")[2], entry_from_stored(stored)))
        return found
