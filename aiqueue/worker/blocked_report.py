"""Goes on announcing a worker whose event loop is blocked: from a thread, on a connection of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..config import Settings
from ..connection import Connection
from ..errors import AIQueueError
from ..lanes import EVERY_S, WorkerRecords
from ..topology import Topology

log = logging.getLogger(__name__)

AFTER_S = 6.0  # of a blocked loop: its record is written every 5 s, and expires after 20 s
LOOK_S = 0.2
JOIN_S = 2.0


class BlockedReport:
    """Writes the worker's record every EVERY_S while its loop is blocked. Else it costs nothing.

    `note` is called by the watchdog, in its thread. `describe` returns the record as of now, and is called in a thread
    of this class. A handler that holds the interpreter's lock, and a process that is stopped, stop that thread too:
    then the record expires.
    """

    def __init__(
        self, settings: Callable[[], Settings], topology: Topology, name: str, describe: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._settings, self._topology, self._name, self._describe = settings, topology, name, describe
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._blocked_since, self._where = 0.0, ""  # monotonic seconds
        self.written_seq = 0  # of the last record that was written here

    def note(self, blocked_s: float, where: str) -> None:
        """The loop has been blocked for so many seconds, there; 0: it answers."""
        if blocked_s < AFTER_S:
            self._blocked_since = 0.0
            self._over.set()
            return
        since = time.monotonic() - blocked_s  # the watchdog does not count time in which the process was suspended
        self._blocked_since, self._where = min(self._blocked_since or since, since), where
        if self._thread is None or (self._over.is_set() and not self._thread.is_alive()):
            over = threading.Event()
            thread = threading.Thread(target=self._run, args=(over,), name="aiqueue-blocked", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process may have no more threads; the watchdog has to go on
                log.debug("worker %s cannot be announced while its event loop is blocked: %s", self._name, error)
                return
            self._over, self._thread = over, thread

    async def stop(self) -> None:
        """Write nothing more. Safe twice."""
        self._over.set()
        if self._thread is not None and self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_S)

    def _run(self, over: threading.Event) -> None:
        try:
            asyncio.run(self._report(over))
        except Exception:
            log.exception("worker %s cannot be announced while its event loop is blocked", self._name)

    async def _report(self, over: threading.Event) -> None:
        connection = Connection(self._settings())
        records = WorkerRecords(connection, self._topology)
        try:
            while not over.is_set():
                try:
                    await connection.open()
                    await records.write(self._name, self._record())
                    self.written_seq = records.written_seq
                except AIQueueError as error:
                    log.debug("worker %s is not announced: %s", self._name, error)
                again_at = time.monotonic() + EVERY_S
                while time.monotonic() < again_at and not over.is_set():  # noqa: ASYNC110  (an event of threads)
                    await asyncio.sleep(LOOK_S)
        finally:
            await connection.close()

    def _record(self) -> dict[str, Any]:
        now = time.monotonic()
        stalled_s = round(now - (self._blocked_since or now), 1)
        return {**self._describe(), "state": "stalled", "stalled_s": stalled_s, "blocked_at": self._where[:500]}
