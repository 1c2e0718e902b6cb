"""A job's journal: what it says while it runs, one subject per job, its last entry the result.

Every write names the sequence of the last entry that its writer knows (0: none), so that two attempts that believe
they own the job cannot both write: the server takes the first. The rule is in docs/decisions/journal-runs.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass
from typing import Any

from . import codec, headers
from .connection import Connection, Received, Stored, Subscription
from .errors import Conflict, DecodeError, ResultTimeout, Stale, Unavailable

LIVE = "aiq.live"
RESULT, FAILED, RETRY, PROGRESS = "result", "failed", "retry", "progress"
TRIAL = "trial"  # a suspect is about to be run in the worker itself (see quarantine)
FINAL = frozenset({RESULT, FAILED})
WRITE_TRIES_MAX = 8
SETTLED_LOOKS_S = (0.02, 0.1, 0.5, 2.0)
LOOK_AGAIN_S, LOOK_AGAIN_MAX_S = 0.25, 4.0  # after a look that nobody answered
QUIET_S, QUIET_MAX_S = 5.0, 60.0  # a word may be lost in a cluster: looked again although nothing was heard


@dataclass(frozen=True)
class Entry:
    """One entry. `run` is the work stream's sequence of the job that wrote it: a job enqueued again under the same
    id, or replayed, is another run. `epoch` grows with each attempt that wrote. `time`: seconds since the epoch.
    """

    event: str
    seq: int
    run: int
    epoch: int
    attempt: int
    time: float
    msg_id: str
    data: Any

    @property
    def final(self) -> bool:
        return self.event in FINAL


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
    )


def entry_of(stored: Stored) -> Entry:
    """The entry in a message read from the journal's stream."""
    return _entry(stored.headers, stored.data, stored.seq, stored.time)


class Journal:
    """Reads and writes journals; one per connection, without state of its own."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self._connection = connection
        self.stream = stream

    async def head(self, subject: str) -> Entry | None:
        """The newest entry, None for a job that has said nothing (yet, or any more)."""
        stored = await self._connection.last(self.stream, subject)
        return entry_of(stored) if stored else None

    def writer(self, subject: str, *, run: int, born: float, attempt: int, head: Entry | None) -> Writer:
        """The pen of one attempt at the job stored as `run` at time `born`; `head` is the newest entry it knows."""
        return Writer(self, self._connection, subject, run=run, born=born, attempt=attempt, head=head)

    async def of_run(self, subject: str, run: int, born: float) -> Entry | None:
        """The newest entry of one run of a job id, where another live run may have written after it."""
        head = await self.head(subject)
        if head is None or head.time < born or head.run == run:
            return head if head is not None and head.run == run and head.time >= born else None
        newest = None
        async for stored in self._connection.read(self.stream, subject):
            if stored.time >= born and _number(stored.headers, headers.RUN) == run:
                newest = stored
        return entry_of(newest) if newest else None

    async def final(
        self, subject: str, *, run: int, timeout_s: float | None, job: tuple[str, int] | None = None
    ) -> Entry | None:
        """The last word of run `run` of a job id, or of a later one, woken by its message.

        `job` is the stream and sequence of the stored job: when it is gone without a last word, None is returned.
        It goes on over lost links and absent servers. Raises ResultTimeout after `timeout_s` seconds (None: waits
        without end), and Unavailable when the connection is closed.
        """
        woken = asyncio.Event()
        live: list[Entry] = []
        looks = _Looks()

        def on_live(message: Received) -> None:
            told = message.headers
            if told.get(headers.EVENT) in FINAL:  # progress need not be looked at
                live.append(_entry(told, message.data, _number(told, "Nats-Sequence"), time.time()))
                woken.set()

        def on_settled(message: Received) -> None:
            if message.data.startswith((b"+ACK", b"+TERM")):
                looks.soon[:] = SETTLED_LOOKS_S  # a cluster deletes the job a little after its ack is heard
                woken.set()

        listening = {f"{LIVE}.{subject}": on_live}
        if job is not None:
            listening[f"$JS.ACK.{job[0]}.*.*.{job[1]}.>"] = on_settled
        subscriptions: list[Subscription] = []
        off = self._connection.on_regained(woken.set)  # what was said meanwhile must be read
        born = 0.0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    woken.clear()
                    try:
                        while listening:
                            subscriptions.append(await self._connection.subscribe(*next(iter(listening.items()))))
                            del listening[next(iter(listening))]
                        # asked first: a job that is gone has said its last word before
                        stored = await self._connection.get(*job) if job is not None else None
                        born = stored.time if stored is not None else born
                        heard = next((entry for entry in live if entry.run >= run), None)
                        last = heard or await self._last_word(subject, run, born)
                    except Unavailable:
                        if self._connection.closing:
                            raise
                        pause_s = looks.failed()
                    else:
                        if last is not None or (job is not None and stored is None):
                            return last
                        pause_s = looks.in_vain()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await woken.wait()
        except TimeoutError:
            raise ResultTimeout(f"no result within {timeout_s:g} s: {subject}") from None
        finally:
            off()
            for subscription in subscriptions:
                await subscription.close()

    async def _last_word(self, subject: str, run: int, born: float) -> Entry | None:
        """The newest final entry of `run` or a later one, not older than the job itself."""
        head = await self.head(subject)
        if head is None or head.time < born or (head.run == run and not head.final):
            return None
        if head.final and head.run >= run:
            return head
        newest = None  # another live run of this id wrote after it
        async for stored in self._connection.read(self.stream, subject):
            told = stored.headers
            if told.get(headers.EVENT) in FINAL and _number(told, headers.RUN) >= run and stored.time >= born:
                newest = stored
        return entry_of(newest) if newest else None


class _Looks:
    """How long to wait for a word before a journal is looked at again, in seconds."""

    def __init__(self) -> None:
        self.soon: list[float] = []  # the next pauses, where they are known
        self._again_s, self._quiet_s = LOOK_AGAIN_S, QUIET_S

    def failed(self) -> float:
        """Nobody answered."""
        pause_s, self._again_s = self._again_s, min(self._again_s * 2, LOOK_AGAIN_MAX_S)
        return pause_s

    def in_vain(self) -> float:
        self._again_s = LOOK_AGAIN_S
        if self.soon:
            return self.soon.pop(0)
        pause_s, self._quiet_s = self._quiet_s, min(self._quiet_s * 2, QUIET_MAX_S)
        return pause_s


class Writer:
    """The pen of one attempt; one write at a time.

    On a conflict it reads the head: its own entry means that an earlier try was stored; a final entry of this run, or
    a higher epoch, means that another attempt owns the job (Stale); anything else, such as an entry of another run of
    the same job id, is taken as the new head and the write is tried again.
    """

    def __init__(
        self,
        journal: Journal,
        connection: Connection,
        subject: str,
        *,
        run: int,
        born: float,
        attempt: int,
        head: Entry | None,
    ) -> None:
        self._journal = journal
        self._connection = connection
        self.subject = subject
        self._run = run
        self._born = born
        self.attempt = attempt
        self._nonce = ""  # two attempts must never make the same Msg-Id; made when it is first needed
        self._head_seq = head.seq if head else 0
        self._epoch = (head.epoch if head else 0) + 1
        self._count = 0
        self._wrote = False
        self._lock = asyncio.Lock()

    async def write(self, event: str, data: Any, *, timeout_s: float = 30.0) -> None:
        """Append an entry. Raises Stale, EncodeError, TooLarge, Unavailable, QueueFull."""
        body = codec.encode(data)
        tried: set[str] = set()
        async with self._lock:
            self._nonce = self._nonce or secrets.token_hex(4)
            for _ in range(WRITE_TRIES_MAX):
                self._count += 1
                msg_id = f"{self.subject}/{self._nonce}/{self._epoch}/{self._count}"
                tried.add(msg_id)
                told = {
                    headers.MSG_ID: msg_id,
                    headers.EXPECTED: str(self._head_seq),
                    headers.CONTENT_TYPE: codec.CBOR,
                    headers.EVENT: event,
                    headers.RUN: str(self._run),
                    headers.EPOCH: str(self._epoch),
                    headers.ATTEMPT: str(self.attempt),
                }
                try:
                    ack = await self._connection.store(self.subject, body, told, timeout_s=timeout_s)
                except Conflict:
                    if await self._catch_up(event, tried):
                        return
                else:
                    self._head_seq = ack.seq
                    self._wrote = True
                    return
            raise Stale(f"{self.subject}: {WRITE_TRIES_MAX} writes were overtaken", ended=False)

    async def _catch_up(self, event: str, tried: set[str]) -> bool:
        """Learn the head after a conflict: True if it is this very write after all. Raises Stale."""
        head = await self._journal.head(self.subject)
        if head is None:
            self._head_seq = 0
            return False
        if head.msg_id.startswith(f"{self.subject}/{self._nonce}/"):
            # ours: of this write, or of an earlier one that was given up but stored all the same
            self._head_seq = head.seq
            self._wrote = True
            if head.msg_id in tried or (head.final and head.event == event):
                return True
            if not head.final:
                return False
        # another run of this id may have written last: what counts is what this one's own attempts have said
        own = head if head.run == self._run else await self._journal.of_run(self.subject, self._run, self._born)
        if own is not None and own.time >= self._born:
            if own.final:
                raise Stale(f"{self.subject}: another attempt has ended this job", ended=True)
            if self._wrote and own.epoch >= self._epoch and not own.msg_id.startswith(f"{self.subject}/{self._nonce}/"):
                raise Stale(f"{self.subject}: attempt {own.attempt} has taken this job over", ended=False)
        self._head_seq = head.seq
        self._epoch = max(self._epoch, head.epoch + 1)
        return False
