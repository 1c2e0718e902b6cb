"""The ticker, of which every worker has one: it takes ticks shortly before their time, and fires them when it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from .. import subjects
from ..connection import Connection
from ..enqueue import KeyLanes
from ..errors import AIQueueError, NotFound, QueueFull, Unavailable
from ..job import MakeHeaders
from ..lanes import Delivery, SharedConsumer, SharedConsumerOptions, WarnOnce
from ..subjects import Lane
from ..topology import Topology
from ..units import Backoff
from .attendance import Attendance
from .document import ANY_ROUTE
from .firing import READY_S, Firing
from .jobs import Makers, NoMaker, TickJobs
from .reconciler import Reconciler
from .ticks import DueTick, parse_due

log = logging.getLogger(__name__)

ACK_WAIT_S = 2.0  # after it, the unacknowledged ticks of a dead worker go to another one
PENDING_MAX = 50_000  # unacknowledged ticks of all workers together, also those that wait after a failure
HELD_MAX = 256  # unacknowledged ticks of one worker
MISSING_S = 10.0  # between looks for the stream, where `apply` has not created it yet
EXTEND_S = 0.7  # how often the lease of a tick is extended that takes long
AHEAD_MAX_S = 1.0  # a tick that comes sooner than this before its time is parked again
AGAIN = Backoff(first=0.5, factor=2, cap=1, jitter=0.5)  # when a tick comes again whose server does not answer
OTHERS = Backoff(first=0.5, factor=2, cap=30, jitter=0.5)  # the same for one that other workers may be able to fire
ACK, PROGRESS = b"+ACK", b"+WPI"


class Ticker:
    """Fires ticks from `start` to `stop`, over lost links, and while the stream is missing.

    It fires those of all schedules whose message is stored, also for families that this worker does not serve, and
    those for which `makers` has functions, of one `owner`.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        key_lanes: KeyLanes | None = None,
        *,
        owner: str = "",
        makers: Makers | None = None,
        make_headers: MakeHeaders | None = None,
    ) -> None:
        self._connection = connection
        self._stream = topology.ticks_stream.name
        self._stopping = asyncio.Event()
        jobs = TickJobs(connection, topology, key_lanes, makers, make_headers)
        self._attendance = Attendance(connection, topology)
        self._firing = Firing(connection, topology, jobs, self._attendance, self._stopping)
        self.reconciler = Reconciler(connection, topology)
        routes = [ANY_ROUTE, owner] if owner and makers else [ANY_ROUTE]
        self._consumers = [self._make_consumer(each) for each in routes]
        self._warn_once = WarnOnce(log)

    def _make_consumer(self, route: str) -> SharedConsumer:
        options = SharedConsumerOptions(
            self._stream, f"ticks-{route}", subjects.tick(route, "*", "*"), ACK_WAIT_S, PENDING_MAX, HELD_MAX,
            Lane("ticks", "*", route), MISSING_S,
        )  # fmt: skip

        async def handle(delivery: Delivery) -> None:
            await self._on_due(consumer, delivery)

        consumer = SharedConsumer(self._connection, options, handle, self._on_refused)
        return consumer

    async def start(self) -> None:
        """Raises Unavailable."""
        await self._connection.clock.ensure(self._stream)
        for each in self._consumers:
            await each.start()
        self.reconciler.start()

    async def stop(self) -> None:
        """Return the ticks whose time has not come, and finish the others. Safe twice and unstarted."""
        self._stopping.set()
        await self.reconciler.stop()
        for each in self._consumers:
            await each.stop()
        await self._attendance.stop()

    def _on_refused(self, error: AIQueueError) -> None:
        """The consumer cannot be created. A server without the stream has no schedules."""
        if isinstance(error, NotFound):
            log.debug("schedules: %s", error)
        else:
            self._warn_once(f"this worker fires no schedules: {error}", about="")

    async def _on_due(self, consumer: SharedConsumer, delivery: Delivery) -> None:
        """Wait until it is nearly a tick's time, fire it, and acknowledge it. Or have it come again."""
        due = parse_due(delivery)
        await self._connection.clock.catch_up(self._stream, delivery.arrived_at, delivery.stored_at)
        if not await self._wait_until(due.fire_at - READY_S):
            consumer.reply(delivery, b"-NAK")
            return
        try:
            with self._extended(consumer, delivery, due.route):
                await self._firing.fire(due)
        except Exception as error:  # noqa: BLE001
            delay_s = self._note_failure(due, delivery.delivery_count, error)
            consumer.reply(delivery, b'-NAK {"delay": %d}' % round(delay_s * 1e9))
        else:
            consumer.reply(delivery, ACK)

    async def _wait_until(self, at: float) -> bool:
        """Return True at a time of the server's clock, and False at once when the ticker stops.

        For a time further ahead than a tick can be, the message is wrong, or the server's clock was set back: then this
        does not wait, and the tick is parked until its time.
        """
        while not self._stopping.is_set():
            wait_s = at - self._connection.clock.now()
            if not 0 < wait_s <= AHEAD_MAX_S:
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
        return False

    @contextlib.contextmanager
    def _extended(self, consumer: SharedConsumer, delivery: Delivery, route: str) -> Iterator[None]:
        """Extend the lease of a tick for as long as this lasts, and note that ticks are taken meanwhile."""
        loop = asyncio.get_running_loop()

        timer: asyncio.TimerHandle | None = None

        def extend() -> None:
            nonlocal timer
            if timer is not None:
                consumer.reply(delivery, PROGRESS)
                self._attendance.keep(route)
            timer = loop.call_later(EXTEND_S, extend)

        extend()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _note_failure(self, due: DueTick, tries: int, error: Exception) -> float:
        """Log why a tick was not fired, and return after how long it is to come again."""
        if isinstance(error, NoMaker):
            log.debug("schedule %s: this worker does not have the function that makes its messages", due.name)
        elif isinstance(error, Unavailable | NotFound | QueueFull):
            log.debug("schedule %s: %s", due.name, error)
            return AGAIN.delay_s(tries)
        elif isinstance(error, AIQueueError):
            self._warn_once(f"schedule {due.name}: this worker cannot fire it: {error}", about=due.name)
        else:
            log.error("schedule %s: firing it failed", due.name, exc_info=error)
        return OTHERS.delay_s(tries)
