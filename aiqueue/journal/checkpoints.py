"""What a run keeps for its later attempts: results of its steps, the external calls it has made, and its children.

They stand on a subject of their own, one for each run, in a stream that keeps them longer than a journal lives, and
where no chunk can evict them. As in a journal, each write names the sequence that its writer expects the newest entry
to have. An attempt that may have a past first writes `taken`, with its place among the job's deliveries. From then on
an earlier attempt can write nothing (docs/decisions/checkpoints.md).

A step's entry above STEP_BYTES_MAX is stored as a document, and what stands on the subject is a reference to it. The
order is that of a large result: the hold, the document, the entry. Until the entry is stored, the step was not kept.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from .. import codec, headers
from ..connection import Connection
from ..errors import (
    AccessDenied,
    AIQueueError,
    BadInput,
    Conflict,
    Corrupt,
    DecodeError,
    EncodeError,
    NotFound,
    QueueFull,
    Stale,
    TooLarge,
    Unavailable,
)  # fmt: skip
from ..payload import Document, HeldDocument
from .children import CHILDREN, CHILDREN_AT_ONCE, ChildRecord, children_of_entry, encode_children
from .entries import Entry, entry_from_stored, entry_headers

STEP, CALLED, TAKEN = "step", "called", "taken"
STEPS_MAX = 2_000
CALLS_MAX = 2_000  # notes of a run: with its steps, children and attempts, less than the stream keeps on a subject
STEP_BYTES_MAX = 64 * 1024
NAME_MAX = 256
WRITE_TRIES_MAX = 8
LAG_S = 0.05  # a replica that is read may lag behind the leader, which refuses the write then

Order = Sequence[float]


class LargeSteps(Protocol):
    """Where a run keeps the bodies of entries that are too large for a message."""

    async def hold(self, body: bytes) -> HeldDocument: ...
    async def release(self, held: HeldDocument) -> None: ...
    async def read(self, document: Document) -> bytes: ...
    async def forget(self, documents: Collection[Document]) -> None: ...


class Checkpoints:
    """What one attempt keeps, and what earlier attempts of its run have kept. One write at a time.

    - `_head_seq`: the sequence of the newest entry, as of this writer's last write or read.
    - `_order`: the place of this attempt's delivery among those of the job; None until it is needed.
    - `_steps`: what is kept of each step: its result, or the document that its entry refers to.
    - `_may_hold`: the run may have documents, which end with it.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        subject: str,
        *,
        run: int,
        attempt: int,
        find_order: Callable[[], Awaitable[Order]],
        has_past: bool,
        large: LargeSteps,
    ) -> None:
        """`has_past`: earlier attempts may have kept something. `find_order`: a later delivery compares greater."""
        self.subject = subject
        self.names = StepNames()  # of a handler in this process
        self._connection = connection
        self._stream = stream
        self._run = run
        self._attempt = attempt
        self._find_order = find_order
        self._order: Order | None = None
        self._has_past = has_past
        self._nonce = secrets.token_hex(4)
        self._write_number = 0
        self._head_seq = 0
        self._steps: dict[str, tuple[Any] | Document] = {}
        self._large = large
        self._may_hold = False
        self._calls: list[Any] = []  # of earlier attempts
        self._own_calls = 0
        self.children: dict[str, ChildRecord] = {}  # by name, the newest generation
        self._lock = asyncio.Lock()

    # -- what an attempt asks for

    async def load_past(self) -> None:
        """Read what earlier attempts have kept, and shut them out. Raises Stale if a later attempt has done so."""
        if self._has_past:
            async with self._lock:
                if self._has_past:
                    await self._take_over()
                    self._has_past = False

    async def find_step(self, name: str) -> tuple[Any] | None:
        """Return the result that the run has kept for a step; None: the step must run.

        Raises Stale, Unavailable; NotFound and Corrupt for a kept result that can never be read again.
        """
        await self.load_past()
        kept = self._steps.get(name)
        return (decode_step(name, await self._read_large(name, kept)),) if isinstance(kept, Document) else kept

    async def find_encoded_step(self, name: str) -> bytes | None:
        """As `find_step`, for another process: `decode_step` reads what this returns."""
        await self.load_past()
        kept = self._steps.get(name)
        if kept is None:
            return None
        return await self._read_large(name, kept) if isinstance(kept, Document) else encode_step(name, kept[0]).body

    async def keep_step(self, name: str, result: Any) -> Any:
        """Keep the result of a step. Return the result as a later attempt will get it: plain data.

        If an earlier attempt has kept another result meanwhile, that one counts. Raises EncodeError, Stale,
        Unavailable, QueueFull, AccessDenied.
        """
        encoded = encode_step(name, result)
        is_own = await self._keep_step(name, encoded)
        if is_own and isinstance(self._steps[name], Document):
            return decode_step(name, encoded.body)
        kept = await self.find_step(name)
        assert kept is not None
        return kept[0]

    async def keep_encoded_step(self, name: str, encoded: codec.Encoded) -> bytes | None:
        """As `keep_step`, for another process. None: this result counts; else the one that counts, encoded."""
        return None if await self._keep_step(name, encoded) else await self.find_encoded_step(name)

    async def keep_call(self, data: Any) -> None:
        """Keep a note of an external call that is about to be made. Raises as `keep_step`, BadInput for too many."""
        encoded = encode_call(data)
        await self.load_past()
        async with self._lock:
            if len(self._calls) + self._own_calls >= CALLS_MAX:
                raise BadInput(f"a run keeps at most {CALLS_MAX:,} notes of calls: note several calls at once")
            await self._write(CALLED, encoded, lambda: False)
            self._own_calls += 1

    async def earlier_calls(self) -> list[Any]:
        """Return the notes of earlier attempts, the oldest first."""
        await self.load_past()
        return list(self._calls)

    async def keep_children(self, records: Sequence[ChildRecord]) -> None:
        """Keep which children are about to be stored. Those that another attempt has kept meanwhile stay as they are.

        Raises as `keep_step`, and Stale if the run was cancelled.
        """
        await self.load_past()
        async with self._lock:
            for at in range(0, len(records), CHILDREN_AT_ONCE):
                some = records[at : at + CHILDREN_AT_ONCE]
                await self._write(CHILDREN, encode_children(some), partial(self._has_children, some))
                self.children.update({each.name: each for each in some if not self._has_child(each)})

    async def forget(self) -> None:
        """Delete all that the run has kept, because it has ended. A failure is harmless: entries and holds expire."""
        if self._head_seq:
            purge = f"STREAM.PURGE.{self._stream}"
            await self._connection.api(purge, {"filter": self.subject})
            if self.children:
                await self._connection.api(purge, {"filter": f"{self.subject}-ended"})
        await self.forget_documents()

    async def forget_documents(self) -> None:
        """Release the documents of the run, because the run has ended. Never raises."""
        if self._may_hold:
            await self._large.forget([each for each in self._steps.values() if isinstance(each, Document)])

    # -- within

    async def _keep_step(self, name: str, encoded: codec.Encoded) -> bool:
        """Keep the result of a step. False: another attempt's counts, which is in `_steps`."""
        if len(encoded.body) <= STEP_BYTES_MAX:
            return await self._write_step(name, encoded, (decode_step(name, encoded.body),), {})
        held = await self._hold(name, encoded.body)
        reference = codec.Encoded(codec.encode({"name": name, "document": held.entry}), encoded.secrets)
        try:
            is_stored = await self._write_step(name, reference, held.document, held.headers)
        except Unavailable:  # the entry may be stored, as after a cancellation
            raise
        except AIQueueError:
            await self._large.release(held)
            raise
        if not is_stored:
            await self._large.release(held)
        return is_stored

    async def _write_step(
        self, name: str, encoded: codec.Encoded, kept: tuple[Any] | Document, extra: Mapping[str, str]
    ) -> bool:
        async with self._lock:
            if name in self._steps:
                return False
            if not await self._write(STEP, encoded, lambda: name in self._steps, extra):
                return False
            self._steps[name] = kept
        return True

    async def _hold(self, name: str, body: bytes) -> HeldDocument:
        """Store the body of an entry as a document. Raises QueueFull, AccessDenied, Unavailable, NotFound."""
        self._may_hold = True
        what = f"step {name!r}: its result of {len(body):,} bytes cannot be stored as a document"
        try:
            return await self._large.hold(body)
        except AccessDenied as error:
            raise AccessDenied(
                f"{what}: {error}: give the worker's user the permissions of docs/operations/permissions.md"
            ) from None
        except QueueFull as error:
            todo = "free space (`aiqueue documents ls`), or raise max_bytes in streams/documents.toml"
            reason = f"{error.reason}, so {what}: {todo}"
            raise type(error)(error.lane, reason, limit=error.limit, retry_after_s=error.retry_after_s) from None

    async def _read_large(self, name: str, document: Document) -> bytes:
        try:
            return await self._large.read(document)
        except (NotFound, Corrupt, AccessDenied) as error:
            text = f"the kept result of step {name!r} cannot be read: {error}"
            raise type(error)(f"{text}: enqueue the job anew, whose run begins without steps") from None

    async def _take_over(self) -> None:
        self._may_hold = True
        if self._order is None:
            self._order = list(await self._find_order())
        marker = codec.Encoded(codec.encode({"delivery": list(self._order)}))
        for _ in range(WRITE_TRIES_MAX):
            await self._read_past(self._order)
            if await self._try_write(TAKEN, marker):
                return
            await asyncio.sleep(LAG_S)
        raise Stale(f"{self.subject}: others wrote first, {WRITE_TRIES_MAX} times", ended=False)

    async def _read_past(self, order: Order) -> None:
        """Read all entries. Raises Stale before `_head_seq` is changed, so that no later write is stored either."""
        head_seq = 0
        self._calls.clear()
        async for stored in self._connection.read(self._stream, self.subject):
            entry = entry_from_stored(stored)
            head_seq = entry.seq
            if not self._is_own(entry):
                self._note_entry(entry, order)
        self._head_seq = head_seq

    def _note_entry(self, entry: Entry, order: Order) -> None:
        data = entry.data if isinstance(entry.data, dict) else {}
        match entry.event:
            case "step" if isinstance(data.get("name"), str):
                self._steps.setdefault(data["name"], entry.document or (data.get("result"),))
            case "called":
                self._calls.append(data.get("data"))
            case "children":
                self.children.update({each.name: each for each in children_of_entry(entry)})
            case "cancelled":
                raise Stale(f"{self.subject}: the job was cancelled", ended=True)
            case "taken":
                later = data.get("delivery")
                if isinstance(later, list) and later > list(order):
                    raise Stale(f"{self.subject}: a later attempt has taken this job over", ended=False)

    async def _write(
        self, event: str, encoded: codec.Encoded, is_settled: Callable[[], bool], extra: Mapping[str, str] | None = None
    ) -> bool:
        """Store an entry. `is_settled`, after others' entries were read: whether they make this one needless; then
        False. `extra`: more headers.
        """
        for _ in range(WRITE_TRIES_MAX):
            if await self._try_write(event, encoded, extra):
                return True
            await self._take_over()
            if is_settled():
                return False
        raise Stale(f"{self.subject}: others wrote first, {WRITE_TRIES_MAX} times", ended=False)

    async def _try_write(self, event: str, encoded: codec.Encoded, extra: Mapping[str, str] | None = None) -> bool:
        """Store an entry after `_head_seq`. False: another entry is the newest, and nothing is stored."""
        self._write_number += 1
        msg_id = f"{self.subject}/{self._nonce}/{self._write_number}"
        fields = entry_headers(event, self._run, 1, self._attempt, "", encoded.secrets)
        fields |= {headers.MSG_ID: msg_id, headers.EXPECTED: str(self._head_seq), **(extra or {})}
        try:
            self._head_seq = (await self._connection.store(self.subject, encoded.body, fields)).seq
        except Conflict:
            newest = await self._connection.last(self._stream, self.subject)
            if newest is None or newest.headers.get(headers.MSG_ID) != msg_id:
                return False
            self._head_seq = newest.seq  # stored, but its ack was lost
        except NotFound:
            raise NotFound(
                f"stream {self._stream} does not exist, and steps are kept there: run `aiqueue apply` on this server"
            ) from None
        return True

    def _has_children(self, records: Sequence[ChildRecord]) -> bool:
        return all(map(self._has_child, records))

    def _has_child(self, record: ChildRecord) -> bool:
        """Return whether the run has kept a child already, of this generation or a later one."""
        known = self.children.get(record.name)
        return known is not None and known.generation >= record.generation

    def _is_own(self, entry: Entry) -> bool:
        return entry.msg_id.startswith(f"{self.subject}/{self._nonce}/")


class StepNames:
    """The names of the steps in one run of a handler."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def use(self, name: Any) -> None:
        """Note that a step begins. Raises BadInput for a bad name, a second step of this name, or STEPS_MAX steps."""
        if not isinstance(name, str) or not 1 <= len(name) <= NAME_MAX or not name.isprintable():
            raise BadInput(f"a step's name must be 1 to {NAME_MAX} printable characters, not {str(name)[:80]!r}")
        if name in self._used:
            raise BadInput(
                f"a second step {name!r} in one execution of the handler: number the steps of a loop, as in 'p-1'"
            )
        if len(self._used) >= STEPS_MAX:
            raise BadInput(f"a run has at most {STEPS_MAX:,} steps: keep the results of several items in one step")
        self._used.add(name)


def encode_step(name: str, result: Any) -> codec.Encoded:
    """Return the body of a step's entry, of any size. Raises EncodeError."""
    try:
        return codec.encode_marked({"name": name, "result": result})
    except EncodeError as error:
        raise EncodeError(f"the result of step {name!r} cannot be kept: {error}") from None


def decode_step(name: str, body: bytes) -> Any:
    """Return the result in the body of a step's entry. Raises Corrupt."""
    try:
        return codec.decode(body, codec.CBOR, max_bytes=len(body))["result"]
    except (DecodeError, KeyError, TypeError) as error:
        raise Corrupt(f"the kept result of step {name!r} cannot be read: {error}") from None


def encode_call(data: Any) -> codec.Encoded:
    """Return the body of a note of a call; what is encoded already as it is. Raises EncodeError, TooLarge."""
    encoded = data if type(data) is codec.Encoded else codec.encode_marked({"data": data})
    if len(encoded.body) > STEP_BYTES_MAX:
        raise TooLarge(len(encoded.body), STEP_BYTES_MAX)
    return encoded
