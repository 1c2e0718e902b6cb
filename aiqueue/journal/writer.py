"""Who may write to a journal: one `Writer` per attempt, and the first of two competing attempts wins.

Writes use optimistic concurrency: each carries the sequence that the writer expects the subject's newest entry to
have (0: none), and the server rejects a stale one. So of two attempts that both believe they own the job only one can
write. The rule is in docs/decisions/journal-runs.md.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .. import codec, headers
from ..connection import block, check_size
from ..errors import Conflict, Stale, TooLarge
from .chunk_pace import SentChunks
from .chunks import ChunkBuffer
from .entries import (
    CHUNK,
    FINAL,
    LIVE,
    PROGRESS,
    RETRY,
    STARTED,
    Entry,
    RunRecord,
    entry_headers,
    is_of_run,
    kind_header,
)
from .journal import Journal

WRITE_TRIES_MAX = 8
CHUNKS_TIMEOUT_S = 30.0
HEADERS_BYTES = 1_024  # of an entry's frame, beside its body
_ENDS_ATTEMPT = FINAL | {RETRY}
_OF_BODY = FINAL | {STARTED}


class Retention(NamedTuple):
    """How long entries are kept, in seconds: `final_s` for final entries, `chunk_s` for chunks and progress.

    None, and all other entries: as long as the stream keeps them, because they fence older attempts.
    """

    final_s: float | None = None
    chunk_s: float | None = None

    def ttl_header(self, event: str) -> dict[str, str]:
        """Return the header that limits how long an entry of this event is kept; empty for no limit."""
        ttl_s = self.final_s if event in FINAL else self.chunk_s if event in (CHUNK, PROGRESS) else None
        return {} if ttl_s is None else {headers.TTL: f"{math.ceil(ttl_s)}s"}


KEEP_AS_STREAM = Retention()
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def msg_id_of(subject: str, nonce: str, epoch: int, number: int) -> str:
    """Return the Msg-Id of a writer's entry number `number`."""
    return f"{subject}/{nonce}/{epoch}/{number}"


class Writer:
    """Writes the entries of one attempt, one at a time.

    The journal's subject may hold entries of other runs of the job id and of other attempts at this run. Invariants:

    - `_head_seq`: the sequence of the journal's newest entry, of any run, as of this writer's last write or read. The
      next write expects it; 0 expects an empty journal.
    - `_known_seq`: the sequence of the newest entry of *this run* that the writer knows of. An entry of this run above
      it, which this writer did not write, means that a newer attempt has taken the job over. `_head_seq` and
      `_known_seq` are equal after each write of its own.
    - `_epoch`: the epoch of its entries, above that of every entry it has read. It never falls.
    - `_write_number`: how many entries it has written or is writing. Tries at one entry share the number. It is part of
      the Msg-Id, and readers take a skipped number for a gap.
    - `_lost_chunks`: chunks dropped since its last entry. The next entry carries the number.

    `_send` changes them after an ack, `_resolve_conflict` and `write_started` after a conflict, `start_after` and
    `continue_after` after a read of the journal.
    """

    def __init__(
        self,
        journal: Journal,
        subject: str,
        *,
        run: int,
        enqueued_at: float,
        attempt: int,
        record: RunRecord,
        parking_id: str = "",
        ignore_before: float = 0.0,
        retention: Retention | None = None,
        job_headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """Write as attempt `attempt` at the job that was stored as `run` at `enqueued_at` (seconds since the epoch).

        `record` is what the journal held when the attempt read it, or EMPTY_RECORD. `parking_id` names the parking from
        which the job came. Entries of other attempts older than `ignore_before` (seconds since the epoch) do not make
        this attempt stale: they are from before the lane's consumer was recreated. Of the `job_headers`, entries that
        end the attempt repeat Aiq-Unique.
        """
        self._journal = journal
        self._connection = journal.connection
        self.subject = subject
        self._run = run
        self._enqueued_at = enqueued_at
        self.attempt = attempt
        self.started_at = 0.0  # when the handler was called, seconds since the epoch
        self._parking_id = parking_id
        self._ignore_before = ignore_before
        self._retention = retention or KEEP_AS_STREAM
        self._job_headers = job_headers
        self.kind = ""  # what the job was read as: final entries say it
        self.fingerprint = ""  # of the body, in a family that has them
        self._nonce = ""  # in all its Msg-Ids, so that two attempts never make the same; made by the first write
        self._head_seq, self._epoch = record.head_seq, record.epoch + 1
        self._known_seq = record.newest.seq if record.newest else 0
        self._write_number = 0
        self._sent: set[str] = set()  # Msg-Ids of earlier tries at the next entry
        self._lock = asyncio.Lock()
        self._paused_until = 0.0  # monotonic seconds
        self._chunks: ChunkBuffer | None = None  # made by the job's first chunk
        self._chunk_block: tuple[tuple[int, int], bytes] = ((-1, -1), b"")  # by epoch and attempt: see `_chunk_headers`
        self._lost_chunks = 0

    # -- writing

    async def write(
        self, event: str, data: Any, *, extra: Mapping[str, str] | None = None, timeout_s: float = 30.0
    ) -> None:
        """Append an entry, after all chunks. Raises Stale, EncodeError, TooLarge, Unavailable, QueueFull.

        Stale: another attempt has ended the job or taken it over. Nothing is stored then. `extra`: further headers.
        """
        encoded = codec.encode_marked(data)
        if self._chunks is not None:
            await self._chunks.flush(ends=event in _ENDS_ATTEMPT)
        tried, self._sent = self._sent, set()
        await self._write_encoded(event, encoded, tried, timeout_s, extra)

    def take_over_sent(self, nonce: str) -> None:
        """Count an entry that was sent with `ResultHeaders` as the first try of this writer's first entry."""
        self._nonce, self._write_number = nonce, 1
        self._sent = {msg_id_of(self.subject, nonce, self._epoch, 1)}

    async def write_started(self, data: Any, *, timeout_s: float = 30.0) -> bool:
        """Write `started` before the handler is called, so that no earlier attempt can write any more.

        1. Nobody has written since this writer's record: `started` is stored, True.
        2. Somebody has: nothing is stored, False. Read the run again, then `start_after`, or leave the job.

        Raises what `write` raises, except Stale.
        """
        tried: set[str] = set()
        async with self._lock:
            try:
                await self._send(STARTED, codec.Encoded(codec.encode(data)), tried, timeout_s)
            except Conflict:
                if not self._is_stored(tried, await self._read_run()):  # else its ack was lost
                    self._write_number -= 1  # nothing was stored under it
                    return False
            self._ignore_before = 0.0  # from here on, any other attempt's entry is newer than this attempt
            return True

    async def announce(self, event: str, data: Any, *, extra: Mapping[str, str] | None = None) -> None:
        """Publish an entry to those who listen now, without storing it: the server has no space for it yet.

        `extra`: further headers.
        """
        encoded = codec.encode_marked(data)
        fields = entry_headers(event, self._run, self._epoch, self.attempt, self._parking_id, encoded.secrets)
        await self._connection.publish(f"{LIVE}.{self.subject}", encoded.body, headers=fields | dict(extra or {}))

    def pause(self, pause_s: float) -> None:
        """Store nothing for `pause_s` seconds, so that somebody else's entry is not refused as out of date."""
        self._paused_until = time.monotonic() + pause_s

    # -- chunks

    @property
    def has_chunks(self) -> bool:
        """Whether the job has given chunks, so that there may be some to flush."""
        return self._chunks is not None

    async def add_chunk(self, data: Any) -> None:
        """Buffer a part of the job's output to be stored. Waits while the buffer is full.

        Raises EncodeError and TooLarge for this chunk, and what writing earlier chunks raised.
        """
        if self._chunks is None:
            bytes_max = max(self._connection.max_payload - HEADERS_BYTES, 512)
            self._chunks = ChunkBuffer(self, bytes_max, self._journal.chunk_pace)
        await self._chunks.add(data)

    async def flush_chunks(self) -> None:
        """Wait until all chunks are stored. Raises what `write` raises."""
        if self._chunks is not None:
            await self._chunks.flush()

    async def write_chunks(self, encoded: codec.Encoded, tried: set[str]) -> None:
        """Append one entry of chunks. `tried` holds the Msg-Ids of earlier tries at it: it is stored once."""
        await self._write_encoded(CHUNK, encoded, tried, CHUNKS_TIMEOUT_S)

    def begin_chunks(self, encoded: codec.Encoded, tried: set[str]) -> SentChunks | None:
        """Lock the writer until `end_chunks`, and return the first try at an entry of chunks, for somebody to send.

        None: `write_chunks` must write this entry: somebody else writes, or it needs headers that most do not.
        """
        paused = self._paused_until and self._paused_until > time.monotonic()
        if paused or encoded.secrets or self._lost_chunks or not self._connection.connected or not self._try_lock():
            return None
        self._nonce = self._nonce or secrets.token_hex(4)
        msg_id = msg_id_of(self.subject, self._nonce, self._epoch, self._write_number + 1)
        own = f"{headers.MSG_ID}: {msg_id}\r\n{headers.EXPECTED}: {self._head_seq}\r\n\r\n"
        sent = SentChunks(self.subject, self._chunk_headers() + own.encode(), encoded.body, fenced=True)
        try:
            check_size(sent.block, sent.body, self._connection.max_payload)
        except TooLarge:
            self._lock.release()
            return None
        self._write_number += 1
        tried.add(msg_id)
        return sent

    def end_chunks(self, seq: int | None = None) -> None:
        """Unlock the writer after `begin_chunks`. `seq`: that of the entry; None: it is not stored, or nobody knows."""
        if seq is not None:
            self._head_seq = self._known_seq = seq
        self._lock.release()

    async def resolve_chunks(self, encoded: codec.Encoded, tried: set[str]) -> None:
        """Go on as `write_chunks` does after a Conflict of what `begin_chunks` has returned, before `end_chunks`."""
        if not await self._resolve_conflict(CHUNK, tried):
            await self._write_locked(CHUNK, encoded, tried, CHUNKS_TIMEOUT_S)

    def _try_lock(self) -> bool:
        """Lock the writer if nobody holds it or waits for it."""
        if self._lock.locked():
            return False
        locking = self._lock.acquire()
        try:
            locking.send(None)
        except StopIteration:
            return True
        locking.close()  # somebody waits who is about to have it
        return False

    def _chunk_headers(self) -> bytes:
        """Return the encoded headers that all entries of chunks of this attempt have, without their end."""
        key = self._epoch, self.attempt
        if self._chunk_block[0] != key:
            fields = entry_headers(CHUNK, self._run, self._epoch, self.attempt, self._parking_id)
            self._chunk_block = key, block(fields | self._retention.ttl_header(CHUNK))[:-2]
        return self._chunk_block[1]

    def count_lost_chunks(self, count: int) -> None:
        """Note that `count` chunks are not kept. The next entry carries the number."""
        self._lost_chunks += count

    def discard_chunks(self) -> None:
        """Drop the chunks that are not stored, because the attempt is over or was taken over. Safe twice."""
        if self._chunks is not None:
            self._chunks.close()

    # -- what other attempts have written

    async def read_newest(self) -> Entry | None:
        """Return this run's newest entry, of any attempt."""
        return await self._journal.newest_of_run(self.subject, self._run, self._enqueued_at, self._parking_id)

    async def is_run_ended(self) -> bool:
        """Read the journal, and return whether this run has its final entry."""
        head = await self._journal.head(self.subject)
        if head is None:
            return False
        if not head.final and is_of_run(head, self._run, self._enqueued_at, self._parking_id):
            return False
        newest = await self.read_newest()
        return newest is not None and newest.final

    async def raise_if_stale(self) -> None:
        """Read the journal. Raises Stale if another attempt has ended the job or taken it over.

        For use before something that cannot be undone is written elsewhere, such as a dead letter.
        """
        head = await self._journal.head(self.subject)
        if head is not None and head.seq != self._known_seq and not self._is_own(head):
            self.continue_after(await self._read_run(), self.attempt)

    def start_after(self, record: RunRecord, attempt: int) -> None:
        """Start as attempt `attempt` after all that `record` holds. Other attempts' entries are the past: never raises.

        For use before `write_started` only. An attempt that has started uses `continue_after`.
        """
        self._known_seq = record.newest.seq if record.newest else 0
        self._expect_head_of(record)
        self.attempt = attempt

    def continue_after(self, record: RunRecord, attempt: int) -> None:
        """Go on writing as attempt `attempt` after `record`, unless another attempt has overtaken this one.

        1. `record` has a final entry, or one of another attempt above `_known_seq`: raises Stale.
        2. Otherwise the next write expects the head of `record`.
        """
        if record.newest is not None:
            self._raise_if_superseded_by(record.newest)
            self._known_seq = record.newest.seq
        self._expect_head_of(record)
        self.attempt = attempt

    # -- within

    async def _write_encoded(
        self,
        event: str,
        encoded: codec.Encoded,
        tried: set[str],
        timeout_s: float,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Store an entry, trying again after conflicts. Adds the Msg-Ids of its tries to `tried`. Raises Stale."""
        async with self._lock:
            if self._paused_until and (left_s := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            await self._write_locked(event, encoded, tried, timeout_s, extra)

    async def _write_locked(
        self,
        event: str,
        encoded: codec.Encoded,
        tried: set[str],
        timeout_s: float,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        for _ in range(WRITE_TRIES_MAX):
            try:
                await self._send(event, encoded, tried, timeout_s, extra)
            except Conflict:
                if await self._resolve_conflict(event, tried):
                    return
            else:
                return
        reason = f"nothing was written, because other writers were faster {WRITE_TRIES_MAX} times"
        raise Stale(f"{self.subject}: {reason}", ended=False)

    async def _send(
        self,
        event: str,
        encoded: codec.Encoded,
        tried: set[str],
        timeout_s: float,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Try once to store an entry after `_head_seq`. Raises Conflict if that is not the newest any more."""
        self._nonce = self._nonce or secrets.token_hex(4)
        if not tried:
            self._write_number += 1
        suffix = f"-{len(tried)}" if tried else ""
        msg_id = msg_id_of(self.subject, self._nonce, self._epoch, self._write_number) + suffix
        tried.add(msg_id)
        fields = entry_headers(event, self._run, self._epoch, self.attempt, self._parking_id, encoded.secrets)
        fields |= {headers.MSG_ID: msg_id, headers.EXPECTED: str(self._head_seq)}
        fields |= self._retention.ttl_header(event)
        if event in _ENDS_ATTEMPT:
            fields |= self._time_headers()
        if event in FINAL:
            fields |= kind_header(self.kind)
        if self.fingerprint and event in _OF_BODY:
            fields[headers.FINGERPRINT] = self.fingerprint
        if extra:
            fields |= extra
        if lost := self._lost_chunks:
            fields[headers.LOST] = str(lost)
        ack = await self._connection.store(self.subject, encoded.body, fields, timeout_s=timeout_s)
        self._head_seq = self._known_seq = ack.seq
        self._lost_chunks -= lost

    def _time_headers(self) -> dict[str, str]:
        fields = {headers.ENQUEUED: f"{self._enqueued_at:.6f}"}
        fields |= headers.carried_unique(self._job_headers) | headers.carried_tick(self._job_headers)
        return fields | {headers.STARTED_AT: f"{self.started_at:.6f}"} if self.started_at else fields

    async def _resolve_conflict(self, event: str, tried: set[str]) -> bool:
        """Read the journal after a rejected write of `event`, and return whether the entry is stored after all.

        1. The head entry is one of the tries, or this writer's final entry of the same event: stored, its ack was lost.
           True.
        2. The head entry is this writer's, from an earlier write whose ack was lost: write again after it. False.
        3. Otherwise read the run. If its newest entry is one of the tries, behind which other runs of the job id have
           written: stored. True.
        4. If it has ended, or another attempt has taken it over: raises Stale. So does a final entry of this writer of
           another event.
        5. Otherwise other runs of the job id have written: write again after the new head. False.
        """
        head = await self._journal.head(self.subject)
        if head is not None and self._is_own(head):
            self._head_seq = self._known_seq = head.seq
            if head.msg_id in tried or (head.final and head.event == event):
                self._lost_chunks = 0
                return True
            if not head.final:
                return False
        record = await self._read_run()
        if self._is_stored(tried, record):
            return True
        self.continue_after(record, self.attempt)
        return False

    def _is_stored(self, tried: set[str], record: RunRecord) -> bool:
        """Whether the newest entry of this run is one of these tries. The next write goes behind it, and behind what
        other runs have written since.
        """
        if record.newest is None or record.newest.msg_id not in tried:
            return False
        self._known_seq, self._lost_chunks = record.newest.seq, 0
        self._expect_head_of(record)
        return True

    async def _read_run(self) -> RunRecord:
        return await self._journal.read_run(self.subject, self._run, self._enqueued_at, self._parking_id)

    def _expect_head_of(self, record: RunRecord) -> None:
        self._head_seq, self._epoch = record.head_seq, max(self._epoch, record.epoch + 1)

    def _is_own(self, entry: Entry) -> bool:
        return self._nonce != "" and entry.msg_id.startswith(f"{self.subject}/{self._nonce}/")

    def _raise_if_superseded_by(self, newest: Entry) -> None:
        """Raises Stale if this run's newest entry is final, or another attempt's that this writer did not know of."""
        if newest.final:
            raise Stale(f"{self.subject}: another attempt has ended this job", ended=True)
        if newest.seq > self._known_seq and newest.time >= self._ignore_before and not self._is_own(newest):
            raise Stale(f"{self.subject}: attempt {newest.attempt} has taken this job over", ended=False)
