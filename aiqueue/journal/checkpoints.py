"""What a run keeps for its later attempts: results of its steps, the external calls it has made, and its children.

They stand on a subject of their own, one for each run, in a stream that keeps them longer than a journal lives, and
where no chunk can evict them. As in a journal, each write names the sequence that its writer expects the newest entry
to have. An attempt that may have a past first writes `taken`, with its place among the job's deliveries. From then on
an earlier attempt can write nothing (docs/decisions/checkpoints.md).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from .. import codec, headers
from ..connection import Connection
from ..errors import BadInput, Conflict, NotFound, Stale, TooLarge
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


class Checkpoints:
    """What one attempt keeps, and what earlier attempts of its run have kept. One write at a time.

    - `_head_seq`: the sequence of the newest entry, as of this writer's last write or read.
    - `_order`: the place of this attempt's delivery among those of the job; None until it is needed.
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
        self._steps: dict[str, Any] = {}
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
        """Return the result that the run has kept for a step; None: the step must run. Raises Stale, Unavailable."""
        await self.load_past()
        return (self._steps[name],) if name in self._steps else None

    async def keep_step(self, name: str, result: Any) -> Any:
        """Keep the result of a step. Return the result as a later attempt will get it: plain data.

        If an earlier attempt has kept another result meanwhile, that one counts. Raises EncodeError, TooLarge, Stale,
        Unavailable, QueueFull.
        """
        encoded = encode_step(name, result)
        async with self._lock:
            if name not in self._steps:
                await self._write(STEP, encoded, lambda: name in self._steps)
                self._steps.setdefault(name, codec.decode(encoded.body, codec.CBOR)["result"])
        return self._steps[name]

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
        """Delete all that the run has kept, because the run has ended. A failure is harmless: entries expire."""
        if self._head_seq:
            purge = f"STREAM.PURGE.{self._stream}"
            await self._connection.api(purge, {"filter": self.subject})
            if self.children:
                await self._connection.api(purge, {"filter": f"{self.subject}-ended"})

    # -- within

    async def _take_over(self) -> None:
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
                self._steps.setdefault(data["name"], data.get("result"))
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

    async def _write(self, event: str, encoded: codec.Encoded, is_settled: Callable[[], bool]) -> None:
        """Store an entry. `is_settled`, after others' entries were read: whether they make this one needless."""
        for _ in range(WRITE_TRIES_MAX):
            if await self._try_write(event, encoded):
                return
            await self._take_over()
            if is_settled():
                return
        raise Stale(f"{self.subject}: others wrote first, {WRITE_TRIES_MAX} times", ended=False)

    async def _try_write(self, event: str, encoded: codec.Encoded) -> bool:
        """Store an entry after `_head_seq`. False: another entry is the newest, and nothing is stored."""
        self._write_number += 1
        msg_id = f"{self.subject}/{self._nonce}/{self._write_number}"
        fields = entry_headers(event, self._run, 1, self._attempt, "", encoded.secrets)
        fields |= {headers.MSG_ID: msg_id, headers.EXPECTED: str(self._head_seq)}
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
    """Return the body of a step's entry. Raises EncodeError, TooLarge. What is encoded already is returned as it is."""
    if type(result) is codec.Encoded:
        return result
    return _limited(codec.encode_marked({"name": name, "result": result}))


def encode_call(data: Any) -> codec.Encoded:
    """As `encode_step`, for a note of a call."""
    return data if type(data) is codec.Encoded else _limited(codec.encode_marked({"data": data}))


def _limited(encoded: codec.Encoded) -> codec.Encoded:
    if len(encoded.body) > STEP_BYTES_MAX:
        raise TooLarge(len(encoded.body), STEP_BYTES_MAX)
    return encoded
