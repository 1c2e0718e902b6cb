"""Dead letters: jobs that ended badly, kept with payload, reason and history, to be replayed or purged.

The body is the job's own, untouched; what happened stands in headers (docs/wire-contract.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import codec, headers, subjects
from ..connection import Connection, Stored
from ..documents import Documents
from ..errors import EncodeError, NotFound, TooLarge
from ..subjects import Lane
from ..topology import Topology

HISTORY_BYTES_MAX = 16_384
_REPLAY_KEEPS = (headers.CONTENT_TYPE, headers.KIND, headers.JOB_ID, headers.HISTORY, *headers.DOCUMENTS)


@dataclass(frozen=True)
class DeadLetter:
    """A job that ended badly. `seq` identifies it in the dead letters' stream; times are seconds since the epoch.

    `history` has one entry an attempt, the oldest first: attempt, at, worker, error, traceback where there was one.
    """

    seq: int
    job_id: str
    kind: str
    lane: Lane
    reason: str
    error: str
    attempt: int
    worker: str
    enqueued_at: float | None
    failed_at: float
    replays: int
    history: list[dict[str, Any]]
    headers: Mapping[str, str]
    body: bytes

    def summary(self) -> dict[str, Any]:
        """The dead letter as plain data, without its body."""
        return {
            "seq": self.seq, "job_id": self.job_id, "kind": self.kind, "family": self.lane.family,
            "tenant": self.lane.tenant, "priority": self.lane.priority, "reason": self.reason, "error": self.error,
            "attempt": self.attempt, "worker": self.worker, "enqueued_at": self.enqueued_at,
            "died_at": self.failed_at, "replays": self.replays, "history": self.history,
            "size_bytes": headers.number(self.headers.get(headers.DOCUMENT_SIZE, "")) or len(self.body),
        }  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """Which dead letters are meant; None matches all. `older_s`: died at least this many seconds ago."""

    family: str | None = None
    tenant: str | None = None
    kind: str | None = None
    job_id: str | None = None
    older_s: float | None = None

    def subject(self) -> str:
        family = self.family or "*.*"
        tenant = subjects.token("tenant", self.tenant) if self.tenant else "*"
        return subjects.dead(family, tenant, subjects.token("job id", self.job_id) if self.job_id else "*")

    def matches(self, letter: DeadLetter, now: float) -> bool:
        if self.kind is not None and letter.kind != self.kind:
            return False
        return self.older_s is None or now - letter.failed_at >= self.older_s


@dataclass(frozen=True)
class FailedJob:
    """What the worker knows of a job that has just ended badly."""

    job_id: str
    kind: str
    lane: Lane
    seq: int
    reason: str
    error: str
    attempt: int
    worker: str
    enqueued_at: float
    history: list[dict[str, Any]]


class DeadLetters:
    """The dead letters' stream."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._stream = topology.dead_stream.name
        self.documents = Documents(connection, topology)

    async def add(self, job: FailedJob, told: Mapping[str, str], body: bytes) -> int:
        """Keep a job as a dead letter; doing it twice keeps one. Returns its number. Raises Unavailable, QueueFull.

        What is too large beside its body loses the history first, then the publisher's own headers; a body that
        still leaves no room for the reason is kept in two messages.
        """
        subject = subjects.dead(job.lane.family, job.lane.tenant, job.job_id)
        own = _own_headers(job, told)
        foreign = headers.carried(told)
        history = {headers.HISTORY: history_text(job.history)}
        for letter in ({**foreign, **own, **history}, {**foreign, **own}, own):
            try:
                return (await self._connection.store(subject, body, letter)).seq
            except TooLarge:
                continue
        half = len(body) // 2
        rest = {headers.MSG_ID: f"{own[headers.MSG_ID]}/rest", headers.REST: "0"}
        stored = await self._connection.store(subject, body[half:], rest)
        letter = {**own, headers.REST: str(stored.seq)}
        return (await self._connection.store(subject, body[:half], letter)).seq

    async def find(self, wanted: Filter | None = None) -> AsyncIterator[DeadLetter]:
        """The dead letters that match, the oldest first. Raises NotFound where the stream is missing."""
        wanted = wanted or Filter()
        if wanted.family is not None:
            self._topology.family(wanted.family)
        now = time.time()
        async for stored in self._connection.read(self._stream, wanted.subject()):
            letter = await self._whole(stored)
            if letter is not None and wanted.matches(letter, now):
                yield letter

    async def get(self, seq: int) -> DeadLetter:
        """The dead letter with this number. Raises NotFound."""
        stored = await self._connection.get(self._stream, seq)
        letter = await self._whole(stored) if stored else None
        if letter is None:
            raise NotFound(f"there is no dead letter {seq}: `aiqueue dead ls` shows those there are")
        return letter

    async def _whole(self, stored: Stored) -> DeadLetter | None:
        """The letter in a message, its second part put to it; None for that second part itself."""
        at = stored.headers.get(headers.REST)
        if at == "0":
            return None
        if at is not None and (seq := headers.number(at)):  # else a stranger's, who put anything there
            rest = await self._connection.get(self._stream, seq)
            stored = stored._replace(data=stored.data + (rest.data if rest else b""))
        return _letter(stored)

    async def replay(self, letter: DeadLetter) -> None:
        """Enqueue the job again in its own lane, its history with it, then drop the dead letter.

        It gets a fresh set of attempts. Killed in between, the next replay stores nothing twice. Raises QueueFull.
        """
        kept = {
            name: value
            for name, value in letter.headers.items()
            if name in _REPLAY_KEEPS or not name.startswith((headers.OURS, headers.SERVERS))
        }
        told = {
            **kept,
            headers.MSG_ID: subjects.msg_id(
                letter.lane.family, letter.lane.tenant, letter.job_id, f"replay-{letter.seq}-{int(letter.failed_at)}"
            ),
            headers.REPLAY: str(letter.replays + 1),
        }
        await self._connection.publish(subjects.hint(letter.lane))
        subject = subjects.work(*letter.lane)
        try:
            await self._connection.store(subject, letter.body, told)
        except TooLarge:  # a body that hardly fitted: its history stays behind, the job itself does not
            told.pop(headers.HISTORY, None)
            await self._connection.store(subject, letter.body, told)
        await self._delete(letter)

    async def purge(self, letter: DeadLetter) -> None:
        """Delete the dead letter, and what only it has held. One that is gone already is fine."""
        await self._delete(letter)
        if headers.DOCUMENT_REF in letter.headers:
            await self.documents.release(letter.lane.tenant, letter.headers)

    async def body(self, letter: DeadLetter) -> bytes:
        """The job's body, also where it is kept as a document. Raises NotFound, Corrupt, BadInput, Unavailable."""
        if headers.DOCUMENT not in letter.headers:
            return letter.body
        return await self.documents.body(letter.lane.tenant, letter.headers)

    async def _delete(self, letter: DeadLetter) -> None:
        for seq in (letter.seq, headers.number(letter.headers.get(headers.REST, ""))):
            if seq:
                await self._connection.delete(self._stream, seq)


def _own_headers(job: FailedJob, told: Mapping[str, str]) -> dict[str, str]:
    letter = {
        headers.MSG_ID: subjects.msg_id(
            job.lane.family, job.lane.tenant, job.job_id, f"dead-{job.seq}-{int(job.enqueued_at)}"
        ),
        headers.JOB_ID: job.job_id,
        headers.READ_KIND: headers.ascii_line(job.kind, 128),
        headers.SUBJECT: subjects.lane(*job.lane),
        headers.REASON: job.reason,
        headers.ERROR: headers.ascii_line(job.error),
        headers.ATTEMPT: str(job.attempt),
        headers.WORKER: headers.ascii_line(job.worker, 128),
        headers.ENQUEUED: f"{job.enqueued_at:.6f}",
        headers.REPLAY: str(headers.number(told.get(headers.REPLAY, ""))),
    }
    if headers.KIND in told:  # only where the publisher set it: without it the body is an envelope or a default
        letter[headers.KIND] = headers.ascii_line(told[headers.KIND], 128)
    letter |= {name: headers.ascii_line(told[name], 128) for name in headers.DOCUMENTS if name in told}
    if headers.CONTENT_TYPE in told:
        letter[headers.CONTENT_TYPE] = headers.ascii_line(told[headers.CONTENT_TYPE], 128)
    return letter


def trimmed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history in at most HISTORY_BYTES_MAX: it loses its tracebacks first, the oldest first, then attempts."""
    entries: list[dict[str, Any]] = json.loads(history_text(history))
    return entries


def history_of(told: Mapping[str, str]) -> list[dict[str, Any]]:
    """The attempts that a replayed job brings along. A plain publisher may have set the header: what could not be
    written to a journal again is left out.
    """
    if headers.HISTORY not in told:
        return []
    try:
        history = json.loads(told[headers.HISTORY], parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return []
    return [each for each in history if isinstance(each, dict) and _writable(each)] if isinstance(history, list) else []


def _writable(entry: dict[str, Any]) -> bool:
    try:
        codec.encode({"history": [entry]})
    except EncodeError:
        return False
    return True


def history_text(history: list[dict[str, Any]]) -> str:
    """The history as a header value. Too long, it loses tracebacks first, then its oldest attempts."""
    entries = [dict(each) for each in history]
    text = json.dumps(entries)
    for each in entries:
        if len(text) <= HISTORY_BYTES_MAX:
            break
        each.pop("traceback", None)
        text = json.dumps(entries)
    while len(text) > HISTORY_BYTES_MAX and entries:
        entries.pop(0)
        text = json.dumps(entries)
    return text


def _letter(stored: Stored) -> DeadLetter | None:
    told = stored.headers
    parts = stored.subject.split(".")
    if len(parts) != 6:
        return None
    lane = subjects.parse_lane(told.get(headers.SUBJECT, "")) or Lane(
        f"{parts[2]}.{parts[3]}", parts[4], subjects.NORMAL
    )
    return DeadLetter(
        seq=stored.seq,
        job_id=parts[5],
        kind=told.get(headers.READ_KIND, ""),
        lane=lane,
        reason=told.get(headers.REASON, ""),
        error=told.get(headers.ERROR, ""),
        attempt=headers.number(told.get(headers.ATTEMPT, "")),
        worker=told.get(headers.WORKER, ""),
        enqueued_at=headers.decimal(told.get(headers.ENQUEUED, "")),
        failed_at=stored.time,
        replays=headers.number(told.get(headers.REPLAY, "")),
        history=history_of(told),
        headers=told,
        body=stored.data,
    )
