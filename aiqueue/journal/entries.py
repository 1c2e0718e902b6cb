"""Journal entries: their events, how a message becomes one, and the record of what one run of a job has written."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..codec import secret_paths
from ..connection import Received, Stored, timestamp
from ..errors import DecodeError, JobCancelled, JobFailed
from ..payload import Document, document_in

KIND_MAX = 128
LIVE = "aiq.live"  # prefix of the core subject on which the server repeats each stored entry
RESULT, FAILED, RETRY, PROGRESS, CANCELLED = "result", "failed", "retry", "progress", "cancelled"
STARTED = "started"  # an attempt that another attempt, or a cancellation, may contend with
CHUNK = "chunk"  # a part of a job's output; the entry's data is a list of chunks
TRIAL = "trial"  # the worker is about to run a suspect in its own process (see processes/quarantine.py)
FINAL = frozenset({RESULT, FAILED, CANCELLED})
RECAPS = frozenset({STARTED, RETRY})  # their data carries the history of failed attempts
WHILE_RUNNING = {"reason": CANCELLED, "error": "cancelled while running"}  # data of `cancelled` for a running job


@dataclass(frozen=True)
class Entry:
    """One entry of a journal. All times are seconds since the epoch.

    - `run`: the work stream's sequence of the job that wrote the entry. A job that is enqueued again under the same
      id, or replayed, is another run.
    - `epoch`: grows with each attempt that writes.
    - `parking_id`: the parking from which the job came; empty for a job that was never parked.
    - `lost_chunks`: how many chunks before this entry the server had no space for.
    - `expected_seq`: the sequence that its writer expected the journal's newest entry to have.
    - `secrets`: which fields of `data` are secret, in the form of `secret_paths`; empty for none.
    - `enqueued_at`, `started_at`: when the job was enqueued, and when the attempt's handler was called. Only entries
      that end an attempt carry them.
    - `unique`: the caller's key, of which the job id is a hash, on entries that end an attempt; "" if there is none.
    - `schedule`, `scheduled_for`: the schedule that has enqueued the job, and its tick, on entries that end an attempt;
      "" and None if there is none.
    - `fingerprint`: that of the job's body, on entries that begin and end a run of a family with `fingerprint`.
    - `kind`: that of the job, on final entries; "" where it was not known, or a former version has written the entry.
    - `document`: where a large result is stored, or the large body of a step's entry. `data` is a reference to it then,
      and `secrets` are those of what is stored.
    """

    event: str
    """What the entry says, such as started, chunk or result."""
    seq: int
    """Sequence of the entry in the stream of journals."""
    run: int
    epoch: int
    attempt: int
    time: float
    """When the entry was stored."""
    msg_id: str
    """Id by which the server drops the entry if it is sent twice."""
    data: Any
    """What the event carries, such as a chunk or the result."""
    parking_id: str = ""
    lost_chunks: int = 0
    expected_seq: int = 0
    enqueued_at: float | None = None
    started_at: float | None = None
    secrets: str = ""
    unique: str = ""
    document: Document | None = None
    fingerprint: str = ""
    schedule: str = ""
    scheduled_for: float | None = None
    kind: str = ""

    @property
    def final(self) -> bool:
        """Whether the entry ends its run."""
        return self.event in FINAL

    def masked(self) -> Entry:
        """Return the entry without its secrets, to be shown."""
        if self.event == CHUNK and self.secrets and isinstance(self.data, list):
            of_each = secret_paths.of_items(self.secrets)
            return replace(self, data=[secret_paths.mask(each, of_each) for each in self.data])
        if not self.secrets or self.document is not None:
            return self
        return replace(self, data=secret_paths.mask(self.data, self.secrets))

    def as_error(self, job_id: str) -> JobFailed:
        """Return the error that a `failed` or `cancelled` entry describes."""
        data = self.data if isinstance(self.data, dict) else {}
        reason, error = str(data.get("reason", "")), str(data.get("error", ""))
        kind = JobCancelled if self.event == CANCELLED else JobFailed
        return kind(job_id, reason=reason, error=error, attempt=self.attempt)


class RunRecord(NamedTuple):
    """What one run of a job id has written to its journal, as of one look.

    - `head_seq`, `epoch`: those of the journal's newest entry, whichever run wrote it; 0 for an empty journal. The
      next writer needs them.
    - `newest`: the run's newest entry.
    - `recap`: the run's newest entry that carries the history of failed attempts (`started` or `retry`).
    """

    head_seq: int = 0
    epoch: int = 0
    newest: Entry | None = None
    recap: Entry | None = None

    @property
    def ended(self) -> bool:
        """Whether the run has its final entry."""
        return self.newest is not None and self.newest.final


EMPTY_RECORD = RunRecord()

# what the server repeats of an entry of chunks, as `writer.Writer` writes it, and former versions (with the TTL at its
# end), without a parking, secrets or a loss
_LIVE_CHUNKS = re.compile(
    rb"NATS/1\.0\r\nContent-Type: application/cbor\r\nAiq-Event: chunk\r\nAiq-Run: (\d{1,18}+)\r\n"
    rb"Aiq-Epoch: (\d{1,18}+)\r\nAiq-Attempt: (\d{1,18}+)\r\n(?:Nats-TTL: [!-~]++\r\n)?+"
    rb"Nats-Msg-Id: ([!-~]++)\r\nNats-Expected-Last-Subject-Sequence: (\d{1,18}+)\r\n(?:Nats-TTL: [!-~]++\r\n)?+"
    rb"Nats-Stream: [!-~]++\r\nNats-Subject: [!-~]++\r\nNats-Sequence: (\d{1,18}+)\r\nNats-Time-Stamp: ([!-~]++)\r\n"
    rb"Nats-Last-Sequence: \d++\r\n\r\n"
).fullmatch
_CHUNK_LINE = f"\r\n{headers.EVENT}: {CHUNK}\r\n".encode()


def entry_from_stored(stored: Stored) -> Entry:
    """Return the entry in a message that was read from the journal's stream."""
    return _parse_entry(stored.subject, stored.headers, stored.data, stored.seq, stored.time)


def entry_from_live(message: Received) -> Entry:
    """Return the entry in a message that arrived on a LIVE subject. Its `seq` is 0 if the entry is not stored yet."""
    if (chunks := _chunks_from_live(message)) is not None:
        return chunks
    fields = message.headers
    stored_at = timestamp(fields["Nats-Time-Stamp"]) if "Nats-Time-Stamp" in fields else time.time()
    return _parse_entry(message.subject, fields, message.data, number_in(fields, "Nats-Sequence"), stored_at)


def is_live_chunk(message: Received) -> bool:
    """Return whether a message that arrived on a LIVE subject is an entry of chunks, without decoding its headers."""
    return message.block is not None and _CHUNK_LINE in message.block


def _chunks_from_live(message: Received) -> Entry | None:
    """As `entry_from_live`, for an entry of chunks that has no unusual header; None for any other. Each token of an
    answer is such an entry: this takes a fourth of the time.
    """
    found = _LIVE_CHUNKS(message.block) if message.block else None
    if found is None:
        return None
    run, epoch, attempt, msg_id, expected_seq, seq, stored_at = found.groups()
    entry: Entry = object.__new__(Entry)  # its constructor sets each of 20 fields by a call
    entry.__dict__.update(
        event=CHUNK, seq=int(seq), run=int(run), epoch=int(epoch), attempt=int(attempt),
        time=timestamp(stored_at.decode()), msg_id=msg_id.decode(), data=_decode(message.data, codec.CBOR),
        expected_seq=int(expected_seq),
    )  # fmt: skip
    return entry


def _decode(body: bytes, content_type: str) -> Any:
    try:
        return codec.decode(body, content_type) if body else None
    except DecodeError as error:
        return f"(undecodable: {error})"


def entry_headers(event: str, run: int, epoch: int, attempt: int, parking_id: str, secrets: str = "") -> dict[str, str]:
    """Return the headers that every entry carries. `secrets`: as of `Entry`."""
    fields = {
        headers.CONTENT_TYPE: codec.CBOR,
        headers.EVENT: event,
        headers.RUN: str(run),
        headers.EPOCH: str(epoch),
        headers.ATTEMPT: str(attempt),
    }
    if secrets:
        fields[headers.SECRET] = secrets
    return fields | {headers.PARKED: parking_id} if parking_id else fields


def kind_header(kind: str) -> dict[str, str]:
    """Return the header that says on a final entry of which kind the job is; empty if that is not known."""
    return {headers.READ_KIND: headers.ascii_line(kind, KIND_MAX)} if kind else {}


def is_of_run(entry: Entry, run: int, enqueued_at: float, parking_id: str) -> bool:
    """Return whether an entry belongs to a run: it names the run and is not older than the job, or it names the
    parking from which the job came. Sequences restart when a stream is recreated, hence the time.
    """
    return (entry.run == run and entry.time >= enqueued_at) or (parking_id != "" and entry.parking_id == parking_id)


def number_in(fields: Any, name: str) -> int:
    """Return the whole number in a header, 0 if there is none."""
    return headers.number(fields.get(name, ""))


def _parse_entry(subject: str, fields: Any, body: bytes, seq: int, stored_at: float) -> Entry:
    return Entry(
        event=fields.get(headers.EVENT, ""),
        seq=seq,
        run=number_in(fields, headers.RUN),
        epoch=number_in(fields, headers.EPOCH),
        attempt=number_in(fields, headers.ATTEMPT),
        time=stored_at,
        msg_id=fields.get(headers.MSG_ID, ""),
        data=_decode(body, fields.get(headers.CONTENT_TYPE, "")),
        parking_id=headers.parking_id(fields),
        lost_chunks=number_in(fields, headers.LOST),
        expected_seq=number_in(fields, headers.EXPECTED),
        enqueued_at=headers.decimal(fields.get(headers.ENQUEUED, "")),
        started_at=headers.decimal(fields.get(headers.STARTED_AT, "")),
        secrets=fields.get(headers.SECRET, ""),
        unique=headers.unique_key(fields) if headers.UNIQUE in fields else "",
        document=document_in(fields, subjects.tenant_of_entry(subject)) if headers.DOCUMENT in fields else None,
        fingerprint=fields.get(headers.FINGERPRINT, ""),
        schedule=fields.get(headers.SCHEDULED_BY, ""),
        scheduled_for=headers.decimal(fields.get(headers.SCHEDULED_FOR, "")),
        kind=fields.get(headers.READ_KIND, "")[:KIND_MAX],
    )
