"""Leases kept alive by a thread with a connection of its own: a handler that blocks the event loop keeps its job."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from ..connection import Connection
from ..errors import AIQueueError

log = logging.getLogger("aiqueue.leases")

PARTS = 3  # a heartbeat every third of the lease: two may be lost
TICK_MIN_S, TICK_MAX_S = 0.1, 1.0
AGAIN_S = 1.0  # between tries at a first connection
STOP_S = 5.0


class Leases:
    """Tells the server of every held delivery that it is in progress (+WPI), at a third of its lease.

    `hold` and `let_go` are for the worker's event loop; the rest runs in the thread. `shortest_s` is the shortest
    lease in use, in seconds.
    """

    def __init__(self, worker: Connection, *, shortest_s: float) -> None:
        """`worker` is the worker's own connection: this one goes to the same server, wherever that is."""
        self._worker = worker
        self._tick_s = min(TICK_MAX_S, max(TICK_MIN_S, shortest_s / PARTS / 4))
        self._held: dict[str, list[float]] = {}  # ack subject -> [every, next], monotonic seconds
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        return len(self._held)

    def hold(self, reply: str, ack_wait_s: float) -> None:
        every = ack_wait_s / PARTS
        self._held[reply] = [every, time.monotonic() + every]

    def let_go(self, reply: str) -> None:
        """Safe twice."""
        self._held.pop(reply, None)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="aiqueue-leases", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        loop, task = self._loop, self._task
        if loop is not None and task is not None and thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        await asyncio.to_thread(thread.join, STOP_S)

    def _work(self) -> None:
        while self._thread is not None:
            try:
                asyncio.run(self._main())
            except asyncio.CancelledError:
                return
            except Exception:
                log.exception("keeping leases")  # without this thread they run out, and jobs are run twice
                time.sleep(AGAIN_S)

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        settings = self._worker.settings
        connection = Connection(settings.model_copy(update={"name": f"{settings.name} leases"}))
        try:
            while self._thread is not None and settings.url == self._worker.settings.url:
                try:
                    await connection.open()
                    break
                except AIQueueError as error:
                    log.warning("no connection to keep leases by, trying again: %s", error)
                    await asyncio.sleep(AGAIN_S)
            while self._thread is not None and settings.url == self._worker.settings.url:
                await asyncio.sleep(self._tick_s)
                self._keep(connection)
        finally:
            await connection.close()

    def _keep(self, connection: Connection) -> None:
        now = time.monotonic()
        for reply, lease in list(self._held.items()):
            if lease[1] > now:
                continue
            try:
                connection.tell(reply, b"+WPI")
            except AIQueueError as error:
                log.debug("heartbeat: %s", error)  # the link is down; the next tick tries again
                return
            lease[1] = now + lease[0]  # in place: put in again, one that was let go meanwhile would stay for ever
