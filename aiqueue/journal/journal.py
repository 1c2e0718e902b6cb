"""Reads journals. A journal is one subject per job with everything the job reports; its final entry is the outcome.

Who may write, and how: `writer`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from .. import codec, headers
from ..connection import Connection
from ..errors import Conflict
from .chunk_pace import ChunkPace
from .entries import (
    EMPTY_RECORD,
    FINAL,
    RECAPS,
    Entry,
    RunRecord,
    entry_from_stored,
    entry_headers,
    is_of_run,
    number_in,
)


class Journal:
    """Reads journals; one per connection. `chunk_pace`: when its writers send their chunks."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self.connection = connection
        self.stream = stream
        self.chunk_pace = ChunkPace(connection)

    async def head(self, subject: str) -> Entry | None:
        """Return the newest entry of any run; None if the journal is empty or has expired."""
        stored = await self.connection.last(self.stream, subject)
        return entry_from_stored(stored) if stored else None

    async def read_run(self, subject: str, run: int, enqueued_at: float, parking_id: str = "") -> RunRecord:
        """Return what run `run` has written to the journal on `subject`. See `is_of_run` for which entries count.

        A recap (`started` or `retry`) carries the history of failed attempts, so nothing before it is needed.

        1. The journal is empty: the record is empty.
        2. The head entry is of this run, and is final or a recap: nothing else is read.
        3. The head entry is older than the job, which was never parked: the run has written nothing.
        4. Otherwise another live run may have written in between: the whole journal is read.
        """
        return await self._read_run(await self.head(subject), subject, run, enqueued_at, parking_id)

    async def _read_run(
        self, head: Entry | None, subject: str, run: int, enqueued_at: float, parking_id: str
    ) -> RunRecord:
        """Return what a run has written, given the head entry: see `read_run`.

        The stream's leader has returned the head. The whole journal may come from a replica that lags behind it.
        """
        if head is None:
            return EMPTY_RECORD
        is_ours = is_of_run(head, run, enqueued_at, parking_id)
        if is_ours and (head.final or head.event in RECAPS):
            return RunRecord(head.seq, head.epoch, head, None if head.final else head)
        if not is_ours and not parking_id and head.time < enqueued_at:
            return RunRecord(head.seq, head.epoch)
        newest, recap = head if is_ours else None, None
        async for stored in self.connection.read(self.stream, subject):
            entry = entry_from_stored(stored)
            if is_of_run(entry, run, enqueued_at, parking_id):
                newest = entry if newest is None or entry.seq > newest.seq else newest
                recap = entry if entry.event in RECAPS else recap
        return RunRecord(head.seq, head.epoch, newest, recap)

    async def newest_of_run(self, subject: str, run: int, enqueued_at: float, parking_id: str = "") -> Entry | None:
        """Return the newest entry of one run, None if it has written nothing. Arguments as in `read_run`."""
        head = await self.head(subject)
        if head is not None and is_of_run(head, run, enqueued_at, parking_id):
            return head
        return (await self._read_run(head, subject, run, enqueued_at, parking_id)).newest

    async def final_entry(self, subject: str, run: int, enqueued_at: float, *, later_runs: bool = True) -> Entry | None:
        """Return the outcome of run `run`: its final entry. None: not ended yet.

        With `later_runs`, for a caller that awaits the id: the newest final entry of the run or a later one, because
        the id may have been enqueued again or replayed. Entries of earlier runs, and those older than the job, never
        count. The head entry mostly answers. Only where another run of the id has written after this one, the whole
        journal is read.
        """
        head = await self.head(subject)
        if head is None or head.time < enqueued_at or (head.run == run and not head.final):
            return None
        if head.final and (head.run == run or (later_runs and head.run > run)):
            return head
        newest = None
        async for stored in self.connection.read(self.stream, subject):
            fields, of_run = stored.headers, number_in(stored.headers, headers.RUN)
            if (
                fields.get(headers.EVENT) in FINAL
                and (of_run == run or (later_runs and of_run > run))
                and stored.time >= enqueued_at
            ):
                newest = stored
        return entry_from_stored(newest) if newest else None

    async def append_if_unchanged(
        self, subject: str, event: str, data: Any, *, run: int, attempt: int, parking_id: str, record: RunRecord,
        extra: Mapping[str, str] | None = None,
    ) -> bool:  # fmt: skip
        """Append one entry on behalf of nobody's attempt, such as a cancellation. Attempts use `Writer`.

        1. Nothing was written since `record` was read: the entry is stored, True.
        2. Something was: nothing is stored, False.

        `extra`: further headers. Raises Unavailable.
        """
        fields = entry_headers(event, run, max(1, record.epoch), attempt, parking_id)
        fields |= dict(extra or {}) | {
            headers.MSG_ID: f"{subject}/{secrets.token_hex(8)}",
            headers.EXPECTED: str(record.head_seq),
        }
        try:
            await self.connection.store(subject, codec.encode_marked(data).body, fields)
        except Conflict:
            head = await self.head(subject)
            return head is not None and head.msg_id == fields[headers.MSG_ID]  # stored, but its ack was lost
        return True
