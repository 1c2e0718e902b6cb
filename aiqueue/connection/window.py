"""Publishes that a stream acknowledges: a bounded number under way, the rest in line behind them, tries again."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import AccessDenied, AIQueueError, Conflict, NotFound, Unavailable
from . import frames
from .dial import reconnect_delay_s

if TYPE_CHECKING:
    from .link import Connection

log = logging.getLogger("aiqueue.connection")

UNDER_WAY_MAX = 4_096  # publishes of one connection that the server has not answered
UNDER_WAY_BYTES_MAX = 32 * 1024 * 1024
TRY_S = 5.0  # one try; the caller's own timeout spans the tries
NO_ANSWER = f"no answer within {TRY_S:g} s"
AWAY = "no stream takes it, or its leader is away"
LOST = "the connection was lost before the answer"


class Publish:
    """One message on its way into a stream, until `outcome` is set and `settled` was called, once.

    `block` is of `frames.block` with Nats-Msg-Id, and measured. `fenced`: it has an expected sequence, so that a
    conflict is an answer and not a reason to try again.
    """

    __slots__ = ("block", "body", "due", "end", "fenced", "maybe_stored", "outcome", "problem", "subject", "token",
                 "tries")  # fmt: skip

    def __init__(self, subject: str, block: bytes, body: bytes, *, fenced: bool = False) -> None:
        self.subject = subject
        self.block = block
        self.body = body
        self.fenced = fenced
        self.outcome: frames.PubAck | AIQueueError | None = None
        self.maybe_stored = False
        self.problem = ""  # why the last try failed; none yet
        self.tries = 0
        self.token = b""
        self.due = self.end = 0.0

    def settled(self) -> None:
        """The outcome is there. Called from the reading of the socket or from a timer: it must not wait."""


class Window:
    """The publishes of one connection: first in line, first sent. One timer stands for all their time limits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._under_way: dict[bytes, Publish] = {}  # in the order of sending
        self._bytes = 0
        self._line: deque[Publish] = deque()
        self._again: list[Publish] = []  # to be sent again, together
        self._unwanted: dict[str, list[Publish]] = {}  # answered by nobody, while the server is asked why
        self._asking: set[asyncio.Task[None]] = set()
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # asked for once: it is a system call in Python 3.11
        self._timer: asyncio.TimerHandle | None = None
        self._again_timer: asyncio.TimerHandle | None = None

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def add(self, publish: Publish, timeout_s: float) -> None:
        """Send `publish`, or put it in line. It is settled within `timeout_s` seconds, if not abandoned."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        publish.end = publish.due = loop.time() + timeout_s
        if self._line or self._full() or not self._connection.connected:
            if self._connection.closing:
                self._end(publish, Unavailable("the connection was closed"))
                return
            self._line.append(publish)
            self._watch(publish.end)
        else:
            self._send(publish)

    def abandon(self, publishes: Iterable[Publish]) -> None:
        """Forget these: what was not sent is not sent any more, and none is settled."""
        gone = set()
        for publish in publishes:
            if self._under_way.get(publish.token) is publish:
                del self._under_way[publish.token]
                self._bytes -= len(publish.body)
            else:
                gone.add(id(publish))
        if gone:
            self._drop(gone)
        self._pump()

    def answered(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """An answer of the server; False if it belongs to no publish that is under way."""
        publish = self._under_way.pop(token, None)
        if publish is None:
            return False
        self._bytes -= len(publish.body)
        if block:
            status = frames.read_headers(block)[1]
            if status is not None and status.code == 503:
                self._ask_why(publish)
                self._pump()
                return True
        try:
            publish.outcome = frames.PubAck.read(data, publish.subject)
        except Conflict as error:
            if publish.fenced:
                self._end(publish, error)
            else:  # the server is writing this very id at the moment (10158)
                self._later(publish, error)
        except Unavailable as error:
            self._later(publish, error)
        except AIQueueError as error:
            self._end(publish, error)
        else:
            publish.settled()
        if self._line:
            self._pump()
        return True

    def lost(self) -> None:
        """The link is gone: what was under way goes to the head of the line, in its order."""
        back = list(self._under_way.values())
        self._under_way.clear()
        self._bytes = 0
        for publish in back:
            publish.maybe_stored, publish.problem = True, LOST
            self._watch(publish.end)
        self._line.extendleft(reversed(back))

    def regained(self) -> None:
        self._pump()

    def refuse(self, denied: str) -> None:
        """End those on a subject which this user may not publish to; nats-py tells it in lower case."""
        for token, publish in list(self._under_way.items()):
            if publish.subject.lower() == denied:
                del self._under_way[token]
                self._bytes -= len(publish.body)
                self._end(publish, AccessDenied(f"this user may not publish to {publish.subject}"))
        self._pump()

    def close(self) -> set[asyncio.Task[None]]:
        """End all with Unavailable, and all timers. Returns tasks that are cancelled and not yet done."""
        for timer in (self._timer, self._again_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._again_timer = None
        for task in self._asking:
            task.cancel()
        for publish in self._under_way.values():
            publish.maybe_stored = True
        unwanted = [each for several in self._unwanted.values() for each in several]
        left = [*self._under_way.values(), *self._again, *unwanted, *self._line]
        self._under_way.clear()
        self._bytes = 0
        self._line.clear()
        self._again.clear()
        self._unwanted.clear()
        for publish in left:
            self._end(publish, Unavailable("the connection was closed", maybe_stored=publish.maybe_stored))
        return set(self._asking)

    # -- within

    def _full(self) -> bool:
        return len(self._under_way) >= UNDER_WAY_MAX or self._bytes > UNDER_WAY_BYTES_MAX

    def _send(self, publish: Publish) -> None:
        self._count += 1
        publish.token = token = b"%x" % self._count
        assert self._loop is not None
        publish.due = due = min(self._loop.time() + TRY_S, publish.end)
        self._under_way[token] = publish
        self._bytes += len(publish.body)
        self._connection.put(publish.subject, token, publish.block, publish.body)
        if self._timer is None or due < self._timer.when():
            self._watch(due)

    def _drop(self, gone: set[int]) -> None:
        self._line = deque(each for each in self._line if id(each) not in gone)
        self._again = [each for each in self._again if id(each) not in gone]
        for subject, waiting in self._unwanted.items():
            self._unwanted[subject] = [each for each in waiting if id(each) not in gone]

    def _pump(self) -> None:
        line = self._line
        while line and not self._full() and self._connection.connected:
            self._send(line.popleft())

    def _end(self, publish: Publish, error: AIQueueError) -> None:
        publish.outcome = error
        publish.settled()

    def _give_up(self, publish: Publish) -> None:
        problem = publish.problem or f"no connection to {self._connection.settings.addresses}"
        self._end(publish, Unavailable(f"{publish.subject}: {problem}", maybe_stored=publish.maybe_stored))

    def _watch(self, due: float) -> None:
        """Have `_tick` called at `due` or before."""
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        """End what is out of time, send again what was not answered. The next look is at the next time limit."""
        self._timer = None
        now = asyncio.get_running_loop().time() + 0.001
        for token, publish in [each for each in self._under_way.items() if each[1].due <= now]:
            del self._under_way[token]
            self._bytes -= len(publish.body)
            publish.maybe_stored, publish.problem = True, NO_ANSWER
            if publish.end <= now:
                self._give_up(publish)
            else:
                self._again.append(publish)
        self._line, late = _parted(self._line, now)
        again, late_again = _parted(self._again, now)
        self._again = list(again)
        for subject, waiting in list(self._unwanted.items()):
            left, ended = _parted(waiting, now)
            self._unwanted[subject] = list(left)
            late += ended
        for publish in [*late_again, *late]:
            self._give_up(publish)
        if self._again:
            self._arm_again(0.0)
        dues = [each.due for each in self._under_way.values()]
        dues += [each.end for each in (*self._line, *self._again, *(p for w in self._unwanted.values() for p in w))]
        if dues:
            self._watch(min(dues))
        self._pump()

    def _later(self, publish: Publish, error: AIQueueError) -> None:
        """Try again after a while, together with others that wait for this."""
        publish.problem = str(error)
        publish.maybe_stored = publish.maybe_stored or (isinstance(error, Unavailable) and error.maybe_stored)
        if self._connection.closing:
            self._give_up(publish)
            return
        log.debug("%s", error)
        self._again.append(publish)
        self._watch(publish.end)
        self._arm_again(reconnect_delay_s(publish.tries))
        publish.tries += 1

    def _arm_again(self, delay_s: float) -> None:
        if self._again_timer is None:
            self._again_timer = asyncio.get_running_loop().call_later(delay_s, self._send_again)

    def _send_again(self) -> None:
        self._again_timer = None
        again, self._again = self._again, []
        self._line.extendleft(reversed(again))
        self._pump()

    def _ask_why(self, publish: Publish) -> None:
        """Nobody took it: NotFound where no stream wants the subject, another try where one does."""
        self._watch(publish.end)
        waiting = self._unwanted.get(publish.subject)
        if waiting is not None:
            waiting.append(publish)
            return
        self._unwanted[publish.subject] = [publish]
        task = asyncio.get_running_loop().create_task(self._explain(publish.subject))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _explain(self, subject: str) -> None:
        missing = False
        try:
            told = await self._connection.api("STREAM.NAMES", {"subject": subject})
            missing = not told.get("streams")
        except AccessDenied:
            pass  # a user of one tenant may not ask; the stream may merely lack a leader now
        except AIQueueError as error:
            log.debug("%s", error)
        for publish in self._unwanted.pop(subject, ()):
            if missing:
                said = f"no stream takes {subject}: has `aiqueue apply` been run on this server?"
                self._end(publish, NotFound(said))
            else:
                self._later(publish, Unavailable(AWAY))


def _parted(publishes: Iterable[Publish], now: float) -> tuple[deque[Publish], list[Publish]]:
    """Those that have time left, and those whose time is over."""
    left: deque[Publish] = deque()
    late: list[Publish] = []
    for each in publishes:
        (left if each.end > now else late).append(each)
    return left, late
