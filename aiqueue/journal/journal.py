"""A job's journal: what it says while it runs, one subject per job, its last entry the result.

Every write names the sequence of the last entry that its writer knows (0: none), so that two attempts that believe
they own the job cannot both write: the server takes the first. The rule is in docs/decisions/journal-runs.md.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import codec, headers
from ..connection import Connection, Received, Stored, timestamp
from ..errors import Conflict, DecodeError, JobFailed, Stale
from .chunks import Chunks

LIVE = "aiq.live"
RESULT, FAILED, RETRY, PROGRESS, CANCELLED = "result", "failed", "retry", "progress", "cancelled"
STARTED = "started"  # an attempt that another one, or a cancellation, may contend with
CHUNK = "chunk"  # a part of what comes out of a job; the entry's data is a list of them
TRIAL = "trial"  # a suspect is about to be run in the worker itself (see quarantine)
FINAL = frozenset({RESULT, FAILED, CANCELLED})
_ENDS = FINAL | {RETRY}  # of attempts
TELLING = frozenset({STARTED, RETRY})  # their data has the history of failed attempts
WRITE_TRIES_MAX = 8
WHILE_RUNNING = {"reason": CANCELLED, "error": "taken back while it ran"}
CHUNKS_S = 30.0
HEADERS_ROOM = 1_024  # bytes of an entry's frame that are not its body


@dataclass(frozen=True)
class Entry:
    """One entry. `run` is the work stream's sequence of the job that wrote it: a job enqueued again under the same
    id, or replayed, is another run. `epoch` grows with each attempt that wrote. `time`: seconds since the epoch. `word`
    is that of the parking from which the job came, empty for one that was never parked. `lost`: so many chunks before
    it were not kept. `before` is the sequence of the entry that its writer took for the newest. `enqueued_at` is when the
    job was enqueued and `begun` when this attempt's handler was called, where an entry that ends the attempt says it.
    """

    event: str
    seq: int
    run: int
    epoch: int
    attempt: int
    time: float
    msg_id: str
    data: Any
    word: str = ""
    lost: int = 0
    before: int = 0
    enqueued_at: float | None = None
    begun: float | None = None

    @property
    def final(self) -> bool:
        return self.event in FINAL

    def failure(self, job_id: str) -> JobFailed:
        """What a last word that is no result says, as an error."""
        told = self.data if isinstance(self.data, dict) else {}
        reason, error = str(told.get("reason", "")), str(told.get("error", ""))
        return JobFailed(job_id, reason=reason, error=error, attempt=self.attempt)


def _number(told: Any, name: str) -> int:
    return headers.number(told.get(name, ""))


def _entry(told: Any, body: bytes, seq: int, stored_at: float) -> Entry:
    try:
        data = codec.decode(body, told.get(headers.CONTENT_TYPE, "")) if body else None
    except DecodeError as error:
        data = f"(undecodable: {error})"
    return Entry(
        event=told.get(headers.EVENT, ""),
        seq=seq,
        run=_number(told, headers.RUN),
        epoch=_number(told, headers.EPOCH),
        attempt=_number(told, headers.ATTEMPT),
        time=stored_at,
        msg_id=told.get(headers.MSG_ID, ""),
        data=data,
        word=headers.word(told),
        lost=_number(told, headers.LOST),
        before=_number(told, headers.EXPECTED),
        enqueued_at=headers.decimal(told.get(headers.ENQUEUED, "")),
        begun=headers.decimal(told.get(headers.STARTED_AT, "")),
    )


def entry_of(stored: Stored) -> Entry:
    """The entry in a message read from the journal's stream."""
    return _entry(stored.headers, stored.data, stored.seq, stored.time)


def heard(message: Received) -> Entry:
    """The entry in a message of LIVE."""
    told = message.headers
    stored_at = timestamp(told["Nats-Time-Stamp"]) if "Nats-Time-Stamp" in told else time.time()
    return _entry(told, message.data, _number(told, "Nats-Sequence"), stored_at)


class RunRecord(NamedTuple):
    """What a journal says of one run of its job: `newest`, its newest entry, and `told`, the newest of those that say
    what came before (started, retry). `head_seq` and `epoch` are the whole journal's, for the next writer.
    """

    head_seq: int = 0
    epoch: int = 0
    newest: Entry | None = None
    told: Entry | None = None

    @property
    def ended(self) -> bool:
        return self.newest is not None and self.newest.final


NOTHING = RunRecord()


class Journal:
    """Reads and writes journals; one per connection, without state of its own."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self.connection = connection
        self.stream = stream

    async def head(self, subject: str) -> Entry | None:
        """The newest entry, None for a job that has said nothing (yet, or any more)."""
        stored = await self.connection.last(self.stream, subject)
        return entry_of(stored) if stored else None

    def writer(
        self,
        subject: str,
        *,
        run: int,
        enqueued_at: float,
        attempt: int,
        record: RunRecord,
        word: str = "",
        since: float = 0.0,
        kept: Retention | None = None,
    ) -> Writer:
        """The pen of one attempt at the job stored as `run` at time `enqueued_at`, which knows its `record`; `word` is
        that of the parking from which the job came. What other attempts wrote before `since` is no newer attempt's.
        """
        return Writer(self, self.connection, subject, run, enqueued_at, attempt, record, word, since, kept or AS_STREAM)

    async def record(self, subject: str, run: int, enqueued_at: float, word: str = "") -> RunRecord:
        """What one run of a job id has said, where another live run may have written after it. What was written of the
        job while it was parked under `word` counts too, however old.
        """
        head = await self.head(subject)
        if head is None:
            return NOTHING
        ours = _is_of(head, run, enqueued_at, word)
        if ours and (head.final or head.event in TELLING):
            return RunRecord(head.seq, head.epoch, head, None if head.final else head)
        newest = told = head if ours else None
        if ours or word or (head.time >= enqueued_at and head.run != run):
            told = None
            async for stored in self.connection.read(self.stream, subject):
                entry = entry_of(stored)
                if _is_of(entry, run, enqueued_at, word):
                    newest = entry
                    told = entry if entry.event in TELLING else told
        return RunRecord(head.seq, head.epoch, newest, told)

    async def of_run(self, subject: str, run: int, enqueued_at: float, word: str = "") -> Entry | None:
        """The newest entry of one run, as `record`."""
        return (await self.record(subject, run, enqueued_at, word)).newest

    async def append(
        self, subject: str, event: str, data: Any, *, run: int, attempt: int, word: str, record: RunRecord
    ) -> bool:
        """One entry by somebody who is no attempt, if nothing was written since `record`. Raises Unavailable."""
        told = _told(event, run, max(1, record.epoch), attempt, word)
        told |= {
            headers.MSG_ID: f"{subject}/{secrets.token_hex(8)}",
            headers.EXPECTED: str(record.head_seq),
        }
        try:
            await self.connection.store(subject, codec.encode(data), told)
        except Conflict:
            there = await self.head(subject)
            return there is not None and there.msg_id == told[headers.MSG_ID]  # an answer was lost
        return True

    async def final_entry(self, subject: str, run: int, enqueued_at: float) -> Entry | None:
        """The newest final entry of `run` or a later one, not older than the job itself."""
        head = await self.head(subject)
        if head is None or head.time < enqueued_at or (head.run == run and not head.final):
            return None
        if head.final and head.run >= run:
            return head
        newest = None  # another live run of this id wrote after it
        async for stored in self.connection.read(self.stream, subject):
            told = stored.headers
            if told.get(headers.EVENT) in FINAL and _number(told, headers.RUN) >= run and stored.time >= enqueued_at:
                newest = stored
        return entry_of(newest) if newest else None


def _is_of(entry: Entry, run: int, enqueued_at: float, word: str) -> bool:
    return (entry.run == run and entry.time >= enqueued_at) or (word != "" and entry.word == word)


def _told(event: str, run: int, epoch: int, attempt: int, word: str) -> dict[str, str]:
    told = {
        headers.CONTENT_TYPE: codec.CBOR,
        headers.EVENT: event,
        headers.RUN: str(run),
        headers.EPOCH: str(epoch),
        headers.ATTEMPT: str(attempt),
    }
    return told | {headers.PARKED: word} if word else told


class Retention(NamedTuple):
    """How long entries are kept, in seconds: `final_s` the last ones, `chunk_s` chunks and progress. None, and all
    others: as long as the stream keeps them, for they fence.
    """

    final_s: float | None = None
    chunk_s: float | None = None

    def of(self, event: str) -> dict[str, str]:
        """The header that says so."""
        ttl_s = self.final_s if event in FINAL else self.chunk_s if event in (CHUNK, PROGRESS) else None
        return {} if ttl_s is None else {headers.TTL: f"{math.ceil(ttl_s)}s"}


AS_STREAM = Retention()


class Writer:
    """The pen of one attempt; one write at a time.

    On a conflict it reads the journal. Its own entry means that an earlier try was stored; a final entry of this run,
    or one of another attempt that it did not know of, means that the job is no longer its own (Stale). Anything else,
    such as an entry of another run of the same job id, is taken as the new head and the write is tried again.
    """

    def __init__(
        self,
        journal: Journal,
        connection: Connection,
        subject: str,
        run: int,
        enqueued_at: float,
        attempt: int,
        record: RunRecord,
        word: str,
        since: float,
        kept: Retention,
    ) -> None:
        self._journal = journal
        self._connection = connection
        self.subject = subject
        self._run = run
        self._born = enqueued_at
        self.attempt = attempt
        self.begun = 0.0  # when its handler was called, seconds since the epoch
        self._word = word
        self._since = since
        self._kept = kept
        self._nonce = ""  # two attempts must never make the same Msg-Id; made when it is first needed
        self._head_seq, self._epoch = record.head_seq, record.epoch + 1
        self._known_seq = record.newest.seq if record.newest else 0  # of this run: what is newer is another attempt's
        self._count = 0
        self._lock = asyncio.Lock()
        self._chunks: Chunks | None = None  # where the job has given some
        self._lost = 0  # chunks that there was no room for, since the last entry

    async def write(self, event: str, data: Any, *, timeout_s: float = 30.0) -> None:
        """Append an entry, after all chunks. Raises Stale, EncodeError, TooLarge, Unavailable, QueueFull."""
        body = codec.encode(data)
        if self._chunks is not None:
            await self._chunks.flush()
        await self._append(event, body, set(), timeout_s)

    async def append_chunks(self, body: bytes, tried: set[str]) -> None:
        """Append an entry of chunks. `tried` are the ids of earlier tries at it: it is stored once."""
        await self._append(CHUNK, body, tried, CHUNKS_S)

    async def _append(self, event: str, body: bytes, tried: set[str], timeout_s: float) -> None:
        async with self._lock:
            for _ in range(WRITE_TRIES_MAX):
                try:
                    await self._store(event, body, tried, timeout_s)
                except Conflict:
                    if await self._catch_up(event, tried):
                        return
                else:
                    return
            raise Stale(f"{self.subject}: {WRITE_TRIES_MAX} writes were overtaken", ended=False)

    async def chunk(self, data: Any) -> None:
        """Append a part of what comes out of the job; returns when there is room for it among those that wait for the
        write under way. Raises EncodeError and TooLarge for this one, and what writing the earlier ones raised.
        """
        if self._chunks is None:
            self._chunks = Chunks(self, max(self._connection.max_payload - HEADERS_ROOM, 512))
        await self._chunks.add(codec.encode(data))

    async def flush(self) -> None:
        """Return when all chunks are stored. Raises as `write`."""
        if self._chunks is not None:
            await self._chunks.flush()

    def lose(self, chunks: int) -> None:
        """Chunks that are not kept: the next entry tells how many."""
        self._lost += chunks

    def close(self) -> None:
        """Forget the chunks that are not stored: the attempt is over, or somebody else's. Safe twice."""
        if self._chunks is not None:
            self._chunks.close()

    async def begin(self, data: Any, *, timeout_s: float = 30.0) -> bool:
        """Write `started`, if nothing was written since this writer's past; else False. From then on no other attempt
        that began before can write. Raises as `write`, but Stale.
        """
        tried: set[str] = set()
        async with self._lock:
            try:
                await self._store(STARTED, codec.encode(data), tried, timeout_s)
            except Conflict:
                head = await self._journal.head(self.subject)
                if head is None or head.msg_id not in tried:
                    self._count -= 1
                    return False
                self._head_seq = self._known_seq = head.seq  # stored after all: an answer was lost
            self._since = 0.0
            return True

    @property
    def streams(self) -> bool:
        """Whether the job has given chunks, so that there is something to flush."""
        return self._chunks is not None

    async def ended(self) -> bool:
        """Whether this run has its last word."""
        head = await self._journal.head(self.subject)
        if head is None or (not head.final and _is_of(head, self._run, self._born, self._word)):
            return False
        newest = await self.newest()
        return newest is not None and newest.final

    async def newest(self) -> Entry | None:
        """This run's newest entry, whoever wrote it."""
        return await self._journal.of_run(self.subject, self._run, self._born, self._word)

    async def check(self) -> None:
        """Raises Stale if a newer attempt has written, so that what cannot be taken back is not written elsewhere."""
        head = await self._journal.head(self.subject)
        if head is not None and head.seq != self._known_seq and not self._wrote(head):
            self.resume(await self._journal.record(self.subject, self._run, self._born, self._word), self.attempt)

    def resume(self, record: RunRecord, attempt: int) -> None:
        """Go on from another look at the journal. Raises Stale if a newer attempt has written meanwhile."""
        if record.newest is not None:
            self._heed(record.newest)
            self._known_seq = record.newest.seq
        self._head_seq, self._epoch = record.head_seq, max(self._epoch, record.epoch + 1)
        self.attempt = attempt

    def start_over(self, record: RunRecord, attempt: int) -> None:
        """Before `begin`: take what others have written meanwhile as the past."""
        self._head_seq, self._epoch = record.head_seq, max(self._epoch, record.epoch + 1)
        self._known_seq = record.newest.seq if record.newest else 0
        self.attempt = attempt

    async def _store(self, event: str, body: bytes, tried: set[str], timeout_s: float) -> None:
        self._nonce = self._nonce or secrets.token_hex(4)
        if not tried:
            self._count += 1
        again = f"-{len(tried)}" if tried else ""
        msg_id = f"{self.subject}/{self._nonce}/{self._epoch}/{self._count}{again}"
        tried.add(msg_id)
        told = _told(event, self._run, self._epoch, self.attempt, self._word)
        told |= {headers.MSG_ID: msg_id, headers.EXPECTED: str(self._head_seq)}
        told |= self._kept.of(event)
        if event in _ENDS:
            told |= self._times()
        if lost := self._lost:
            told[headers.LOST] = str(lost)
        ack = await self._connection.store(self.subject, body, told, timeout_s=timeout_s)
        self._head_seq = self._known_seq = ack.seq
        self._lost -= lost

    def _times(self) -> dict[str, str]:
        told = {headers.ENQUEUED: f"{self._born:.6f}"}
        return told | {headers.STARTED_AT: f"{self.begun:.6f}"} if self.begun else told

    async def announce(self, event: str, data: Any) -> None:
        """Say to those who listen just now what `write` finds no room for."""
        told = _told(event, self._run, self._epoch, self.attempt, self._word)
        await self._connection.publish(f"{LIVE}.{self.subject}", codec.encode(data), headers=told)

    async def _catch_up(self, event: str, tried: set[str]) -> bool:
        """Learn the head after a conflict: True if it is this very write after all. Raises Stale."""
        head = await self._journal.head(self.subject)
        if head is not None and self._wrote(head):
            # of this write, or of an earlier one that was given up but stored all the same
            self._head_seq = self._known_seq = head.seq
            if head.msg_id in tried or (head.final and head.event == event):
                self._lost = 0
                return True
            if not head.final:
                return False
        record = await self._journal.record(self.subject, self._run, self._born, self._word)
        self.resume(record, self.attempt)
        return False

    def _wrote(self, entry: Entry) -> bool:
        return self._nonce != "" and entry.msg_id.startswith(f"{self.subject}/{self._nonce}/")

    def _heed(self, newest: Entry) -> None:
        """Raises Stale if the newest entry of this run means that the job is another attempt's."""
        if newest.final:
            raise Stale(f"{self.subject}: another attempt has ended this job", ended=True)
        if newest.seq > self._known_seq and newest.time >= self._since and not self._wrote(newest):
            raise Stale(f"{self.subject}: attempt {newest.attempt} has taken this job over", ended=False)
