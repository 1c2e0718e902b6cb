"""Children of a run: which ones it has made, and what the run is told of their ends.

A run keeps its children among its checkpoints. Their ends stand on a second subject of the run, so that whoever ends a
child does not compete with the steps of the parent. Each entry there counts the ends so far, and the parent writes at
which count it must be woken. All writes name the sequence that they expect the newest entry to have, so either the
parent knows of an end before it waits, or whoever reports the end knows that the parent waits
(docs/decisions/children.md).
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import codec, headers
from ..connection import Connection, Stored
from ..errors import Conflict, DecodeError, Unavailable
from .entries import CANCELLED, RESULT, Entry

CHILDREN, ENDED, WAITS = "children", "ended", "waits"
LOST = "lost"  # how a child has ended of which nothing is left; never stored
CHILDREN_MAX = 5_000  # of one run: the stream keeps 10,000 entries on a subject
CHILDREN_AT_ONCE = 500  # in one entry
RESULT_BYTES_MAX = 64 * 1024  # of a child's result in an entry; a larger one stands in the child's journal only
TRIES_MAX = 200
PAUSE_S = 0.01  # between tries, a random part of it
_TEXTS = ("name", "id", "family", "kind", "priority")


class ChildRecord(NamedTuple):
    """A child as its parent's run keeps it. `generation`: 0, or the number of the parent's replay that made it anew.

    `delayed`: it was enqueued with a delay. `noted_at`: when the run has kept this, seconds since the epoch.
    """

    name: str
    job_id: str
    family: str
    kind: str
    priority: str
    generation: int = 0
    delayed: bool = False
    noted_at: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """Return the record as it is stored."""
        plain: dict[str, Any] = {
            "name": self.name, "id": self.job_id, "family": self.family, "kind": self.kind, "priority": self.priority,
        }  # fmt: skip
        if self.generation:
            plain["generation"] = self.generation
        if self.delayed:
            plain["delayed"] = True
        return plain


def encode_children(records: Sequence[ChildRecord]) -> codec.Encoded:
    """Return the body of a `children` entry."""
    return codec.Encoded(codec.encode({"children": [each.to_plain() for each in records]}))


def children_of_entry(entry: Entry) -> list[ChildRecord]:
    """Return the children in a `children` entry, without malformed ones: other programs may write to the stream."""
    listed = entry.data.get("children") if isinstance(entry.data, dict) else None
    found = []
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and all(isinstance(each.get(key), str) for key in _TEXTS):
            generation = each.get("generation")
            generation = generation if isinstance(generation, int) else 0
            name, job_id, family, kind, priority = (each[key] for key in _TEXTS)
            delayed = bool(each.get("delayed"))
            found.append(ChildRecord(name, job_id, family, kind, priority, generation, delayed, entry.time))
    return found


class ChildEnd(NamedTuple):
    """How a child has ended: `event` is result, failed, cancelled or lost.

    `result`: CBOR. None: there is none, or it is `large` and stands in the child's journal only, for the run `run` that
    was enqueued at `enqueued_at`, seconds since the epoch.
    """

    job_id: str
    event: str
    result: bytes | None = None
    large: bool = False
    reason: str = ""
    error: str = ""
    attempt: int = 0
    run: int = 0
    enqueued_at: float = 0.0

    @classmethod
    def of_value(cls, job_id: str, value: Any, *, run: int, enqueued_at: float) -> ChildEnd:
        """Return the end of a child with a result. Raises EncodeError."""
        body = codec.encode_marked(value).body
        large = len(body) > RESULT_BYTES_MAX
        return cls(job_id, RESULT, None if large else body, large, run=run, enqueued_at=enqueued_at)

    @classmethod
    def of_entry(cls, job_id: str, entry: Entry, enqueued_at: float) -> ChildEnd:
        """Return what the final entry of a child's journal says."""
        if entry.event == RESULT and entry.document is not None:
            return cls(job_id, RESULT, large=True, run=entry.run, enqueued_at=enqueued_at)
        if entry.event == RESULT:
            return cls.of_value(job_id, entry.data, run=entry.run, enqueued_at=enqueued_at)
        data = entry.data if isinstance(entry.data, dict) else {}
        return cls(
            job_id, entry.event, reason=str(data.get("reason", "")), error=str(data.get("error", "")),
            attempt=entry.attempt, run=entry.run, enqueued_at=enqueued_at,
        )  # fmt: skip

    def to_plain(self) -> dict[str, Any]:
        """Return the end as it is stored: without what has its default."""
        names = {"id": self.job_id, **self._asdict()}
        del names["job_id"]
        defaults = self._field_defaults
        return {name: value for name, value in names.items() if name not in defaults or value != defaults[name]}

    @classmethod
    def from_plain(cls, plain: Any) -> ChildEnd | None:
        """Return the end that `to_plain` wrote; None for anything else."""
        if not isinstance(plain, dict) or not isinstance(plain.get("id"), str):
            return None
        result, enqueued_at = plain.get("result"), plain.get("enqueued_at")
        attempt, run = plain.get("attempt"), plain.get("run")
        return cls(
            plain["id"], str(plain.get("event", "")), result if isinstance(result, bytes) else None,
            plain.get("large") is True, str(plain.get("reason", "")), str(plain.get("error", "")),
            attempt if isinstance(attempt, int) else 0, run if isinstance(run, int) else 0,
            enqueued_at if isinstance(enqueued_at, int | float) else 0.0,
        )  # fmt: skip


class WakeAt(NamedTuple):
    """At which count of ends a run is woken, and where it is parked: the value of the header Aiq-Until."""

    ends: int
    priority: str
    dedup_key: str

    def __str__(self) -> str:
        return f"{self.ends} {self.priority} {self.dedup_key}"

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> WakeAt | None:
        """Return what the headers of the newest entry say; None if nobody is to be woken now."""
        count, _, rest = fields.get(headers.UNTIL, "").partition(" ")
        priority, _, dedup_key = rest.partition(" ")
        wanted = headers.number(count)
        is_reached = headers.number(fields.get(headers.COUNT, "")) >= wanted > 0 and dedup_key != ""
        return cls(wanted, priority, dedup_key) if is_reached else None


@dataclass
class EndsRecord:
    """What a run was told of the ends of its children so far.

    - `ends`: by child id, the newest.
    - `stored`: by child id, the sequences at which children were stored in their work streams, as far as they are
      known; 0 for a child that was enqueued with a delay.
    - `head_seq`, `count`: of the newest entry. `waited_at`: when the run last began to wait, seconds since the epoch;
      0: never.
    """

    ends: dict[str, ChildEnd] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    head_seq: int = 0
    count: int = 0
    waited_at: float = 0.0

    def note(self, stored: Stored) -> None:
        """Take over one entry."""
        self.head_seq, self.count = stored.seq, headers.number(stored.headers.get(headers.COUNT, ""))
        try:
            data = codec.decode(stored.data, codec.CBOR)
        except DecodeError:
            data = None
        data = data if isinstance(data, dict) else {}
        if stored.headers.get(headers.EVENT) == WAITS:
            self.waited_at = stored.time
            seqs = data.get("seqs")
            if isinstance(seqs, dict):
                self.stored.update({key: seq for key, seq in seqs.items() if isinstance(seq, int)})
        ends = data.get("ends")
        for plain in ends if isinstance(ends, list) else ():
            if (end := ChildEnd.from_plain(plain)) is not None:
                self.ends[end.job_id] = end


class ChildEnds:
    """The entries about the ends of one run's children, on `subject` (`subjects.ParentRun.child_ends`)."""

    def __init__(self, connection: Connection, stream: str, subject: str) -> None:
        self.subject = subject
        self._connection = connection
        self._stream = stream
        self._nonce = secrets.token_hex(6)
        self._number = 0

    async def newest(self) -> Stored | None:
        """Return the newest entry, as the stream's leader has it."""
        return await self._connection.last(self._stream, self.subject)

    async def read_on(self, record: EndsRecord) -> None:
        """Read what came after `record` into it. A replica that lags behind the leader may be read."""
        read = self._connection.read(self._stream, self.subject, seq=record.head_seq + 1)
        async for stored in read:
            record.note(stored)

    async def add(self, ends: Sequence[ChildEnd], newest: Stored | None) -> WakeAt | None:
        """Add ends of children. Return where the parent is parked if it must be woken now. `newest`: see `newest`.

        Two reports of one end count twice, and then the parent is woken early, which is harmless. Raises Unavailable,
        QueueFull, NotFound.
        """
        body = codec.encode({"ends": [each.to_plain() for each in ends]})
        tried: set[str] = set()
        for _ in range(TRIES_MAX):
            fields = newest.headers if newest is not None else {}
            count = headers.number(fields.get(headers.COUNT, "")) + len(ends)
            until = fields.get(headers.UNTIL, "")
            if await self._store(ENDED, body, newest.seq if newest else 0, count, until, tried):
                return WakeAt.of({headers.COUNT: str(count), headers.UNTIL: until})
            newest = await self.newest()
            if newest is not None and newest.headers.get(headers.MSG_ID) in tried:
                return WakeAt.of(newest.headers)  # stored, and the answer was lost
            await asyncio.sleep(random.uniform(0, PAUSE_S))  # noqa: S311
        raise Unavailable(f"{self.subject}: others wrote first, {TRIES_MAX} times")

    async def wait(self, record: EndsRecord, seqs: dict[str, int], wake_at: WakeAt) -> int:
        """Write that the run waits, after all that `record` holds. Return the number of this wait.

        0: something has come meanwhile, and nothing is stored. `seqs`: as `EndsRecord.stored`, what is new of it.
        """
        tried: set[str] = set()
        body = codec.encode({"seqs": seqs})
        if seq := await self._store(WAITS, body, record.head_seq, record.count, str(wake_at), tried):
            return seq
        newest = await self.newest()
        return newest.seq if newest is not None and newest.headers.get(headers.MSG_ID) in tried else 0

    async def _store(self, event: str, body: bytes, expected: int, count: int, until: str, tried: set[str]) -> int:
        """Store an entry if `expected` is the sequence of the newest one. Return its sequence; 0: it is not."""
        self._number += 1
        msg_id = f"{self.subject}/{self._nonce}/{self._number}"
        tried.add(msg_id)
        fields = {
            headers.CONTENT_TYPE: codec.CBOR, headers.EVENT: event, headers.COUNT: str(count), headers.MSG_ID: msg_id,
            headers.EXPECTED: str(expected),
        }  # fmt: skip
        if until:
            fields[headers.UNTIL] = until
        try:
            return (await self._connection.store(self.subject, body, fields)).seq
        except Conflict:
            return 0


def is_over(newest: Stored | None) -> bool:
    """Return whether a run needs no ends of children any more. `newest`: of what it keeps; None: all is deleted."""
    return newest is None or newest.headers.get(headers.EVENT) == CANCELLED
