"""Announces a worker: other workers and operators learn that it is there, and which kinds it knows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..connection import Connection
from ..errors import AIQueueError
from ..lanes import EVERY_S, Record, WorkerRecords, serves
from ..topology import Topology
from .blocked_report import BlockedReport
from .unknown_kinds import Wanted

log = logging.getLogger(__name__)

FORWARD_TRIES_MAX = 3  # hops end by themselves after 30 s at most
Kinds = Mapping[str, Collection[str]]  # by family


class Announcer:
    """Writes the worker's record every EVERY_S, and removes the record when the worker has drained.

    `vitals` returns the changing part of the record, and `jobs` its jobs, also in a thread. `bring_forward` is called
    once: it ends the wait of jobs. Of a family, a kind and a tenant, its function says whether this worker runs such
    jobs and no other one does. `blocked`: writes the record while the event loop is blocked.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        name: str,
        kinds: Kinds,
        vitals: Callable[[], Mapping[str, Any]],
        jobs: Callable[[], list[dict[str, Any]]],
        bring_forward: Callable[[Collection[str], Wanted], Awaitable[object]],
    ) -> None:
        self._records = WorkerRecords(connection, topology)
        self._name = name
        self._kinds = {family: sorted(names) for family, names in kinds.items()}
        self._vitals, self._jobs = vitals, jobs
        self._bring_forward = bring_forward
        version = sys.modules[__name__.partition(".")[0]].__version__  # of the package, which imports this module
        self._fixed = {
            "host": socket.gethostname(), "started": time.time(), "version": version,
            "families": sorted(kinds),
        }  # fmt: skip
        self._wake, self._draining = asyncio.Event(), False
        self._last: Record = {}
        self.blocked = BlockedReport(lambda: connection.settings, topology, name, self._describe_now)
        self._task: asyncio.Task[None] | None = None
        self._forwarding: asyncio.Task[None] | None = None  # beside the announcements: there may be many jobs

    def start(self) -> None:
        """Start to announce, in a task."""
        self._task = asyncio.create_task(self._announce())

    def drain(self) -> None:
        """Announce at once, and from now on, that the worker takes no more jobs: it knows no kinds any more."""
        self._kinds, self._draining = {}, True
        if self._forwarding is not None:
            self._forwarding.cancel()
        self._wake.set()

    async def stop(self) -> None:
        """Remove the record. Safe twice and unstarted."""
        tasks = [each for each in (self._task, self._forwarding) if each is not None]
        self._task = self._forwarding = None
        for task in tasks:
            task.cancel()
        await self.blocked.stop()
        if tasks:
            await asyncio.wait(tasks)
            self._records.written_seq = max(self._records.written_seq, self.blocked.written_seq)
            await self._records.remove(self._name)

    def _describe_now(self) -> Record:
        """Return the last record, with the jobs and the memory of now. Also called in a thread."""
        jobs = self._jobs()
        running = max(self._last.get("running", 0), len(jobs))  # jobs that began since the last record, and block it
        return {**self._last, "time": time.time(), "jobs": jobs, "running": running, "rss_bytes": _rss_bytes()}

    async def _announce(self) -> None:
        """Write the record again and again. A server without the stream, or without the permission, is no failure."""
        while True:
            try:
                self._last = {**self._vitals(), **self._fixed, "kinds": self._kinds}
                record = self._describe_now()
                if self._forwarding is None:
                    others = [each for each in await self._records.read() if each.get("worker") != self._name]
                    await self._records.write(self._name, record)
                    if not self._draining:
                        self._forwarding = asyncio.create_task(self._forward(partial(_serves_alone, record, others)))
                else:
                    await self._records.write(self._name, record)
            except AIQueueError as error:
                log.debug("worker %s is not announced: %s", self._name, error)
            except Exception:
                log.exception("announcing worker %s failed", self._name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _forward(self, wanted: Wanted) -> None:
        """Bring the jobs forward that no other worker knows, once. Never raises."""
        for _ in range(FORWARD_TRIES_MAX):
            try:
                await self._bring_forward(self._kinds, wanted)
            except AIQueueError as error:
                log.debug("jobs are not brought forward to worker %s: %s", self._name, error)
            except Exception:
                log.exception("bringing jobs forward to worker %s failed", self._name)
            else:
                return
            await asyncio.sleep(EVERY_S)


def _serves_alone(own: Record, others: Collection[Record], family: str, kind: str, tenant: str) -> bool:
    """Return whether this worker serves such jobs, and no other worker does."""
    return serves(own, family, kind, tenant) and not any(serves(each, family, kind, tenant) for each in others)


def _rss_bytes() -> int | None:
    """Return the memory that this process uses; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
