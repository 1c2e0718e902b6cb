"""What the demo knows of each of its jobs: what it enqueued, what their journals say, how long they took."""

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
from ...journal import FAILED, RESULT, RETRY, Entry, entry_of

INGEST, ANALYSIS = "rag.ingest", "agent.tasks"
FAMILIES = (INGEST, ANALYSIS)


@dataclass
class Track:
    """One job. `stored` is set by the PubAck, `state` by the last word in its journal; times are the server's, in
    seconds since the epoch.
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
    """How many jobs of one row of the table are where."""

    enqueued: int
    running: int
    retries: int
    done: int
    dead: int


class Ledger:
    """All jobs of a run, by family and id. Handlers in threads only touch the fields of their own job."""

    def __init__(self, tenants: tuple[str, ...]) -> None:
        self.tenants = tenants
        self.tracks: dict[tuple[str, str], Track] = {}
        self.begun = time.monotonic()

    def expect(self, family: str, tenant: str, job_id: str, path: str) -> Track:
        """The track of a job that is about to be enqueued, or has been by an earlier attempt."""
        return self.tracks.setdefault((family, job_id), Track(family, tenant, job_id, path))

    @contextmanager
    def running(self, job: Job[M]) -> Iterator[None]:
        """Measure one attempt of a handler."""
        track = self.tracks[job.family, job.id]
        begun = time.monotonic()
        if track.enqueued_at is None:
            track.enqueued_at = job.enqueued_at
            track.waited_s = max(0.0, time.time() - job.enqueued_at)
        track.running = True
        try:
            yield
        finally:
            track.running = False
            track.run_s.append(time.monotonic() - begun)

    def replayed(self, letter: DeadLetter) -> None:
        track = self.tracks[letter.lane.family, letter.job_id]
        track.replays += 1
        track.state = "open"

    def enter(self, family: str, job_id: str, entry: Entry) -> str | None:
        """Take in one entry of a job's journal; the line to show where it is a notable one."""
        track = self.tracks.get((family, job_id))
        if track is None:
            return None
        told = entry.data if isinstance(entry.data, dict) else {}
        if entry.event == RETRY:
            track.retries += 1
            return f"attempt {entry.attempt} of {track.path} failed: {told['error']}; next in {told['delay_s']:.1f} s"
        if entry.event == FAILED:
            track.state, track.ended_at = "dead", entry.time
            return f"{track.path} is a dead letter ({told.get('reason')}): {told.get('error')}"
        if entry.event == RESULT:
            track.state, track.ended_at, track.result = "done", entry.time, entry.data
            if track.replays:
                return f"{track.path} was replayed and succeeded"
            if track.retries:
                return f"attempt {entry.attempt} of {track.path} succeeded"
        return None

    @property
    def settled(self) -> bool:
        """Whether every job that was begun to be enqueued has ended, well or badly."""
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
        """The measured table: a row a tenant and family, plain data. Times are medians in milliseconds."""
        table = []
        for tenant in self.tenants:
            for family in FAMILIES:
                found = self.of(tenant, family)
                if found:
                    table.append({"tenant": tenant, "family": family, **_measured(found)})
        return table

    def total(self) -> dict[str, Any]:
        """The last line of `rows`, over all jobs."""
        return _measured(self.of())

    def missing(self) -> list[str]:
        """A line for each job that is not known to have succeeded."""
        lines = []
        for track in self.tracks.values():
            if not track.stored:
                lines.append(f"{track.path}: its {track.family} job was not stored")
            elif track.state != "done":
                lines.append(f"{track.path}: its {track.family} job {track.job_id} is {track.state}")
            elif track.family == INGEST and (ANALYSIS, track.job_id) not in self.tracks:
                lines.append(f"{track.path}: it was ingested, but no analysis was enqueued")
        return lines


def _measured(tracks: list[Track]) -> dict[str, Any]:
    begun = min((track.enqueued_at for track in tracks if track.enqueued_at), default=0.0)
    ended = max((track.ended_at for track in tracks if track.ended_at), default=begun)
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
        "span_s": round(ended - begun, 3),
        "per_s": round(done / (ended - begun), 1) if ended > begun else None,
    }


def _median_ms(values_s: list[float]) -> float | None:
    return round(statistics.median(values_s) * 1000, 1) if values_s else None


class Follower:
    """Reads what is new in the journals of some tenants. The stream is read, not listened to: nothing is missed
    while the link is down.
    """

    def __init__(self, client: Client, tenants: tuple[str, ...]) -> None:
        self._client = client
        roots = [(family, client.topology.family(family).journal) for family in FAMILIES]
        self._next = {(family, f"{root}.{tenant}.*"): 1 for family, root in roots for tenant in tenants}

    async def news(self) -> list[tuple[str, str, Entry]]:
        """Family, job id and entry of all that was written since the last call. Raises Unavailable."""
        found = []
        stream = self._client.topology.journal_stream.name
        for (family, subject), seq in self._next.items():
            async for stored in self._client.connection.read(stream, subject, seq=seq):
                self._next[family, subject] = stored.seq + 1
                found.append((family, stored.subject.rpartition(".")[2], entry_of(stored)))
        return found
