"""Lease renewal by a thread with its own connection, so that a handler that blocks the event loop keeps its job."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from ..connection import Connection
from ..errors import AIQueueError

log = logging.getLogger(__name__)

LEASE_PARTS = 3  # a heartbeat every third of the lease, so that two in a row may be lost
TICK_MIN_S, TICK_MAX_S = 0.1, 1.0
RETRY_S = 1.0  # between tries to connect
STOP_S = 5.0


class Leases:
    """Renews the lease of every held delivery: sends the server a heartbeat (+WPI) every third of the lease.

    `hold_lease` and `drop_lease` are called on the worker's event loop; the rest runs in the thread. `shortest_s` is
    the shortest lease in use, in seconds.
    """

    def __init__(self, worker: Connection, *, shortest_s: float) -> None:
        """`worker` is the worker's own connection: the thread connects to the same server, also after a move."""
        self._worker = worker
        self._tick_s = min(TICK_MAX_S, max(TICK_MIN_S, shortest_s / LEASE_PARTS / 4))
        self._held: dict[str, list[float]] = {}  # ack subject -> [interval, next heartbeat], monotonic seconds
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """How many leases are being renewed."""
        return len(self._held)

    def hold_lease(self, reply: str, ack_wait_s: float, since: float) -> None:
        """Renew the lease of the delivery with this ack subject, which began at `since`, in monotonic seconds."""
        interval_s = ack_wait_s / LEASE_PARTS
        self._held[reply] = [interval_s, since + interval_s]

    def drop_lease(self, reply: str) -> None:
        """Renew this lease no more. Safe twice."""
        self._held.pop(reply, None)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run_thread, name="aiqueue-leases", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop the thread and wait for its end, at most STOP_S. Safe twice and unstarted."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        loop, task = self._loop, self._task
        if loop is not None and task is not None and thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        await asyncio.to_thread(thread.join, STOP_S)

    def _run_thread(self) -> None:
        """Run `_renew_until_stopped` in an event loop of this thread; restart it after an unexpected error."""
        while self._thread is not None:
            try:
                asyncio.run(self._renew_until_stopped())
            except asyncio.CancelledError:
                return
            except Exception:
                # restarted, because without this thread the leases end, and other workers run the same jobs
                log.exception("renewing leases failed; the next try is in %g s", RETRY_S)
                time.sleep(RETRY_S)

    async def _renew_until_stopped(self) -> None:
        """Connect, and send due heartbeats every tick. Returns if the worker's server is another one now."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        settings = self._worker.settings
        connection = Connection(settings.model_copy(update={"name": f"{settings.name} leases"}))
        try:
            while self._thread is not None and settings is self._worker.settings:
                try:
                    await connection.open()
                    break
                except AIQueueError as error:
                    log.warning("cannot connect to renew leases; the next try is in %g s: %s", RETRY_S, error)
                    await asyncio.sleep(RETRY_S)
            while self._thread is not None and settings is self._worker.settings:
                await asyncio.sleep(self._tick_s)
                self._send_heartbeats(connection)
        finally:
            await connection.close()

    def _send_heartbeats(self, connection: Connection) -> None:
        """Send a heartbeat for every lease whose interval is over."""
        now = time.monotonic()
        for reply, lease in list(self._held.items()):
            if lease[1] > now:
                continue
            try:
                connection.tell(reply, b"+WPI")
            except AIQueueError as error:
                log.debug("heartbeat not sent: %s", error)  # the link is down; the next tick tries again
                return
            lease[1] = now + lease[0]  # in place: storing it in the dict again could bring back a dropped lease
