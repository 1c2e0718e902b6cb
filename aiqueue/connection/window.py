"""Publishes that a stream acknowledges: a bounded number under way, the rest in line behind them, tries again."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import AccessDenied, AIQueueError, Conflict, NotFound, Unavailable
from . import frames
from .batches import Batch, Group
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
    conflict is an answer and not a reason to try again. `stream`: the one that it goes to, where that takes atomic
    batches and this may go in one; else empty.
    """

    __slots__ = ("alone", "batch", "block", "body", "due", "end", "fenced", "group", "maybe_stored", "outcome",
                 "problem", "stream", "subject", "token", "tries")  # fmt: skip

    def __init__(self, subject: str, block: bytes, body: bytes, *, fenced: bool = False, stream: str = "") -> None:
        self.subject = subject
        self.block = block
        self.body = body
        self.fenced = fenced
        self.stream = stream
        self.group: Group | None = None
        self.batch = b""  # the token of the batch that it is under way in
        self.alone = False  # it was in a batch that failed
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
        self._groups: dict[str, Group] = {}  # by stream
        self._batch_name = secrets.token_hex(6)
        self._bytes = 0
        self._line: deque[Publish] = deque()
        self._again: list[Publish] = []  # to be sent again, together
        self._unwanted: dict[str, list[Publish]] = {}  # answered by nobody, while the server is asked why
        self._asking: set[asyncio.Task[None]] = set()
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # asked for once: it is a system call in Python 3.11
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = math.inf  # when the timer ends
        self._again_timer: asyncio.TimerHandle | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def add(self, publish: Publish, timeout_s: float) -> None:
        """Send `publish`, or put it in line. It is settled within `timeout_s` seconds, if not abandoned."""
        publish.end = publish.due = self.loop.time() + timeout_s
        if publish.stream and publish.group is None:
            publish.group = self._group(publish.stream)
        if self._line or not self.ready:
            if self._connection.closing:
                self._end(publish, Unavailable("the connection was closed"))
                return
            self._line.append(publish)
            self.watch(publish.end)
        else:
            self._go(publish)

    def abandon(self, publishes: Iterable[Publish]) -> None:
        """Forget these: what was not sent is not sent any more, and none is settled."""
        gone = set()
        for publish in publishes:
            if self._under_way.get(publish.token) is publish:
                self.take((publish,))
            else:
                gone.add(id(publish))
        if gone:
            self._drop(gone)
        self.pump()

    def answered(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """An answer of the server; False if it belongs to no publish that is under way."""
        publish = self._under_way.pop(token, None)
        if publish is None:
            return any(group.told(token, data, block) for group in self._groups.values())
        self._bytes -= len(publish.body)
        if publish.group is not None:
            publish.group.answered()
        if block:
            status = frames.read_headers(block)[1]
            if status is not None and status.code == 503:
                self._ask_why(publish)
                self.pump()
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
            self.pump()
        return True

    def lost(self) -> None:
        """The link is gone: what was under way goes to the head of the line, in its order."""
        back = list(self._under_way.values())
        self._under_way.clear()
        self._bytes = 0
        for publish in back:
            publish.maybe_stored, publish.problem = True, LOST
            publish.alone, publish.batch = bool(publish.batch), b""
            self.watch(publish.end)
        for group in self._groups.values():
            back += group.lost()
        self.first(back)

    def regained(self) -> None:
        self.pump()

    def refuse(self, denied: str) -> None:
        """End those on a subject which this user may not publish to; nats-py tells it in lower case."""
        for publish in list(self._under_way.values()):
            if publish.subject.lower() == denied:
                self.take((publish,))
                self._end(publish, AccessDenied(f"this user may not publish to {publish.subject}"))
        for group in self._groups.values():
            group.refused(denied)
        self.pump()

    def close(self) -> set[asyncio.Task[None]]:
        """End all with Unavailable, and all timers. Returns tasks that are cancelled and not yet done."""
        for timer in (self._timer, self._again_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._again_timer = None
        self._look_at = math.inf
        for task in self._asking:
            task.cancel()
        for publish in self._under_way.values():
            publish.maybe_stored = True
        unwanted = [each for several in self._unwanted.values() for each in several]
        gathered = [each for group in self._groups.values() for each in group.lost()]
        left = [*self._under_way.values(), *self._again, *unwanted, *gathered, *self._line]
        self._under_way.clear()
        self._bytes = 0
        self._line.clear()
        self._again.clear()
        self._unwanted.clear()
        for publish in left:
            self._end(publish, Unavailable("the connection was closed", maybe_stored=publish.maybe_stored))
        return set(self._asking)

    # -- what groups ask for

    @property
    def ready(self) -> bool:
        """Whether one more may be sent."""
        return (
            len(self._under_way) < UNDER_WAY_MAX and self._bytes <= UNDER_WAY_BYTES_MAX and self._connection.connected
        )

    @property
    def room(self) -> int:
        """How many more may be under way."""
        return UNDER_WAY_MAX - len(self._under_way)

    def now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def max_payload(self) -> int:
        return self._connection.max_payload

    def send(self, publish: Publish) -> None:
        self._start((publish,), self.now())
        self._connection.put(publish.subject, publish.token, publish.block, publish.body)

    def new_batch(self) -> Batch:
        self._count += 1
        # no other token begins so
        return Batch(f"{self._batch_name}-{self._count:x}", b"g%x" % self._count, self.now() + TRY_S)

    def put_batch(self, batch: Batch, members: list[Publish], *, last: bool) -> None:
        """Send these, the next ones of `batch`. With the `last` of them the server stores it."""
        self._start(members, self.now(), batch.token)
        first = len(batch.members) + 1
        batch.members += members
        batch.open = not last
        self._connection.put_batch(batch.name, batch.token, members, first, last=last)
        self.watch(batch.due)

    def take(self, publishes: Iterable[Publish]) -> None:
        """These are not under way any more."""
        for publish in publishes:
            del self._under_way[publish.token]
            self._bytes -= len(publish.body)
            if publish.group is not None:
                publish.group.gone(publish)

    def first(self, publishes: Sequence[Publish]) -> None:
        """Put these at the head of the line."""
        self._line.extendleft(reversed(publishes))

    def pump(self) -> None:
        """Send from the line what may be sent."""
        line = self._line
        while line and self.ready:
            self._go(line.popleft())
        for group in self._groups.values():
            if group.gathered:
                group.flush_soon()

    # -- within

    def _group(self, stream: str) -> Group:
        group = self._groups.get(stream)
        if group is None:
            group = self._groups[stream] = Group(self, stream)
        return group

    def _go(self, publish: Publish) -> None:
        if publish.group is None or not publish.group.gather(publish):
            self.send(publish)

    def _start(self, publishes: Sequence[Publish], now: float, batch: bytes = b"") -> None:
        """These, of one group or none, are under way from now on."""
        count, soonest, size = self._count, now + TRY_S, 0
        for count, publish in enumerate(publishes, count + 1):  # noqa: B020
            publish.token = token = b"%x" % count
            publish.batch = batch
            publish.due = due = min(now + TRY_S, publish.end)
            soonest = min(soonest, due)
            self._under_way[token] = publish
            size += len(publish.body)
        self._count = count
        self._bytes += size
        group = publishes[0].group
        if group is not None:
            group.sent(now, len(publishes))
        if soonest < self._look_at:
            self.watch(soonest)

    def _drop(self, gone: set[int]) -> None:
        self._line = deque(each for each in self._line if id(each) not in gone)
        self._again = [each for each in self._again if id(each) not in gone]
        for subject, waiting in self._unwanted.items():
            self._unwanted[subject] = [each for each in waiting if id(each) not in gone]
        for group in self._groups.values():
            group.gathered = deque(each for each in group.gathered if id(each) not in gone)

    def _end(self, publish: Publish, error: AIQueueError) -> None:
        publish.outcome = error
        publish.settled()

    def _give_up(self, publish: Publish) -> None:
        problem = publish.problem or f"no connection to {self._connection.settings.addresses}"
        self._end(publish, Unavailable(f"{publish.subject}: {problem}", maybe_stored=publish.maybe_stored))

    def watch(self, due: float) -> None:
        """Have `_tick` called at `due` or before."""
        if self._look_at <= due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._tick)
        self._look_at = due

    def _tick(self) -> None:
        """End what is out of time, send again what was not answered. The next look is at the next time limit."""
        self._timer, self._look_at = None, math.inf
        now = asyncio.get_running_loop().time() + 0.001
        for group in self._groups.values():
            group.expire(now)
        for publish in [each for each in self._under_way.values() if each.due <= now]:
            self.take((publish,))
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
        for group in self._groups.values():
            group.gathered, ended = _parted(group.gathered, now)
            late += ended
        for publish in [*late_again, *late]:
            self._give_up(publish)
        if self._again:
            self._arm_again(0.0)
        dues = [each.due for each in self._under_way.values()]
        dues += [each.end for each in (*self._line, *self._again, *(p for w in self._unwanted.values() for p in w))]
        for group in self._groups.values():
            dues += [each.end for each in group.gathered]
            dues += [each.due for each in group.batches.values()]
        if dues:
            self.watch(min(dues))
        self.pump()

    def _later(self, publish: Publish, error: AIQueueError) -> None:
        """Try again after a while, together with others that wait for this."""
        publish.problem = str(error)
        publish.maybe_stored = publish.maybe_stored or (isinstance(error, Unavailable) and error.maybe_stored)
        if self._connection.closing:
            self._give_up(publish)
            return
        log.debug("%s", error)
        self._again.append(publish)
        self.watch(publish.end)
        self._arm_again(reconnect_delay_s(publish.tries))
        publish.tries += 1

    def _arm_again(self, delay_s: float) -> None:
        if self._again_timer is None:
            self._again_timer = asyncio.get_running_loop().call_later(delay_s, self._send_again)

    def _send_again(self) -> None:
        self._again_timer = None
        again, self._again = self._again, []
        self._line.extendleft(reversed(again))
        self.pump()

    def _ask_why(self, publish: Publish) -> None:
        """Nobody took it: NotFound where no stream wants the subject, another try where one does."""
        self.watch(publish.end)
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
