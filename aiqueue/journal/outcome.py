"""Waiting for a job's last word, over lost links and through parking."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable

from .. import headers
from ..connection import Received, Subscription
from ..errors import ResultTimeout, Unavailable
from .journal import CHUNK, FINAL, LIVE, PROGRESS, RETRY, STARTED, Entry, Journal, entry_of, heard

SETTLED_LOOKS_S = (0.02, 0.1, 0.5, 2.0)
LOOK_AGAIN_S, LOOK_AGAIN_MAX_S = 0.25, 4.0  # after a look that nobody answered
QUIET_S, QUIET_MAX_S = 5.0, 60.0  # a word may be lost in a cluster: looked again although nothing was heard


async def wait_for_outcome(
    journal: Journal,
    subject: str,
    *,
    run: int,
    timeout_s: float | None,
    job: tuple[str, int] | None = None,
    word: str = "",
    parked: Callable[[], Awaitable[bool]] | None = None,
) -> Entry | None:
    """The last word of run `run` of a job id, or of a later one, woken by its message.

    `job` is the stream and sequence of the stored job: when it is gone without a last word, None is returned, unless it
    is `parked`, or on its way back from there. A job that was enqueued with a delay has no run yet (0, and sequence 0):
    its first attempt tells it, under the `word` of its parking. It goes on over lost links and absent servers.

    Raises ResultTimeout after `timeout_s` seconds (None: waits without end), and Unavailable when the connection is
    closed.
    """
    waiting = Watch(journal, subject, run, job, word, parked)
    try:
        async with asyncio.timeout(timeout_s):
            return await waiting.wait()
    except TimeoutError:
        raise ResultTimeout(f"no result within {timeout_s:g} s: {subject}") from None
    finally:
        await waiting.close()


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


class Watch:
    """One wait for a job's last word. One that does not listen itself is told by `hear` what is heard."""

    def __init__(
        self,
        journal: Journal,
        subject: str,
        run: int,
        job: tuple[str, int] | None,
        word: str,
        parked: Callable[[], Awaitable[bool]] | None,
        *,
        listens: bool = True,
    ) -> None:
        self._journal = journal
        self._connection = journal.connection
        self._subject = subject
        self.run = run
        self._job = job
        self._word = word
        self._parked = parked
        self._born = 0.0
        self._woken = asyncio.Event()
        self._live: list[Entry] = []
        self._looks = _Looks()
        self._to_hear: dict[str, Callable[[Received], None]] = {f"{LIVE}.{subject}": self.hear} if listens else {}
        self._subscriptions: list[Subscription] = []
        self._off: Callable[[], None] | None = None

    async def wait(self) -> Entry | None:
        self._off = self._connection.on_regained(self._woken.set)  # what was said meanwhile must be read
        if self._job is not None and self.run:
            self._follow(self._job)
        while True:
            self._woken.clear()
            try:
                over, last = await self._look()
            except Unavailable:
                if self._connection.closing:
                    raise
                pause_s = self._looks.failed()
            else:
                if over:
                    return last
                pause_s = self._looks.in_vain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()

    async def close(self) -> None:
        if self._off is not None:
            self._off()
        for subscription in self._subscriptions:
            await subscription.close()

    def hear(self, message: Received) -> None:
        told = message.headers
        event = told.get(headers.EVENT)
        if event in FINAL:
            self._live.append(heard(message))
        if event not in (PROGRESS, CHUNK):  # which need not be looked at
            self._woken.set()

    def _on_settled(self, message: Received) -> None:
        if message.data.startswith((b"+ACK", b"+TERM")):
            self._looks.soon[:] = SETTLED_LOOKS_S  # a cluster deletes the job a little after its ack is heard
            self._woken.set()

    def _follow(self, job: tuple[str, int]) -> None:
        self._job = job
        self._to_hear[f"$JS.ACK.{job[0]}.*.*.{job[1]}.>"] = self._on_settled

    async def _look(self) -> tuple[bool, Entry | None]:
        """Whether the wait is over, and the last word, if there is one."""
        while self._to_hear:
            subject, callback = next(iter(self._to_hear.items()))
            self._subscriptions.append(await self._connection.subscribe(subject, callback))
            del self._to_hear[subject]
        if not self.run and self._word:
            return await self._look_for_word()
        # asked first: a job that is gone has said its last word before
        stored = await self._connection.get(*self._job) if self._job is not None else None
        self._born = stored.time if stored is not None else self._born
        heard = next((entry for entry in self._live if entry.run >= self.run), None)
        last = heard or await self._journal.final_entry(self._subject, self.run, self._born)
        if last is not None:
            return True, last
        return (False, None) if self._job is None or stored is not None else await self._look_for_place(self._job)

    async def _look_for_word(self) -> tuple[bool, Entry | None]:
        """A job that was enqueued with a delay, and of which no attempt was known when it was last looked for."""
        entry = await self._journal.of_run(self._subject, 0, math.inf, self._word)
        if entry is None or entry.final:
            return entry is not None, entry
        self.run = entry.run
        if self._job is not None:
            self._follow((self._job[0], _place(entry) or entry.run))
        return await self._look()

    async def _look_for_place(self, job: tuple[str, int]) -> tuple[bool, Entry | None]:
        """The job is gone from where it was, without a last word: over, or parked, or come back to another place."""
        place, parked = 0, False
        async for stored in self._connection.read(self._journal.stream, self._subject):
            entry = entry_of(stored)
            if entry.run == self.run:
                if entry.event == RETRY:
                    parked = isinstance(entry.data, dict) and bool(entry.data.get("parked"))
                elif entry.event == STARTED and _place(entry):
                    place, parked = _place(entry), False
        if not parked and place not in (0, job[1]):
            self._follow((job[0], place))
            return await self._look()
        return not (parked or (self._parked is not None and await self._parked())), None


def _place(entry: Entry) -> int:
    """Where in the work stream the attempt that wrote `started` had its job from, 0 where it does not say."""
    seq = entry.data.get("seq") if isinstance(entry.data, dict) else 0
    return seq if isinstance(seq, int) else 0
