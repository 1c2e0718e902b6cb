"""Announces a worker: other workers and operators learn that it is there, and which kinds it knows."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .. import headers
from ..connection import Connection
from ..errors import AIQueueError
from ..lanes import EVERY_S, Delivery, Record, WorkerRecords, serves
from ..topology import Topology
from .unknown_kinds import Wanted

log = logging.getLogger(__name__)

FORWARD_TRIES_MAX = 3  # hops end by themselves after 30 s at most
JOBS_MAX = 5  # running jobs in a record, the oldest ones
Kinds = Mapping[str, Collection[str]]  # by family


class Announcer:
    """Writes the worker's record every EVERY_S, and removes the record when the worker drains.

    `vitals` returns the changing part of the record. `bring_forward` is called once: it ends the wait of jobs. Of a
    family, a kind and a tenant, its function says whether this worker runs such jobs and no other one does.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        name: str,
        kinds: Kinds,
        vitals: Callable[[], Mapping[str, Any]],
        bring_forward: Callable[[Collection[str], Wanted], Awaitable[object]],
    ) -> None:
        self._records = WorkerRecords(connection, topology)
        self._name = name
        self._kinds = {family: sorted(names) for family, names in kinds.items()}
        self._vitals = vitals
        self._bring_forward = bring_forward
        self._fixed = {"host": socket.gethostname(), "started": time.time(), "kinds": self._kinds}
        self._task: asyncio.Task[None] | None = None
        self._forwarding: asyncio.Task[None] | None = None  # beside the announcements: there may be many jobs

    def start(self) -> None:
        """Start to announce, in a task."""
        self._task = asyncio.create_task(self._announce())

    async def stop(self) -> None:
        """Remove the record. Safe twice and unstarted."""
        tasks = [each for each in (self._task, self._forwarding) if each is not None]
        self._task = self._forwarding = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            await self._records.remove(self._name)

    async def _announce(self) -> None:
        """Write the record again and again. A server without the stream, or without the permission, is no failure."""
        while True:
            try:
                record = {**self._vitals(), **self._fixed, "rss_bytes": _rss_bytes()}
                if self._forwarding is None:
                    others = [each for each in await self._records.read() if each.get("worker") != self._name]
                    await self._records.write(self._name, record)
                    self._forwarding = asyncio.create_task(self._forward(partial(_serves_alone, record, others)))
                else:
                    await self._records.write(self._name, record)
            except AIQueueError as error:
                log.debug("worker %s is not announced: %s", self._name, error)
            except Exception:
                log.exception("announcing worker %s failed", self._name)
            await asyncio.sleep(EVERY_S)

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


def describe_jobs(running: Iterable[Delivery], now: float) -> list[dict[str, Any]]:
    """Return the first JOBS_MAX of the running jobs as plain data. `now` is in monotonic seconds."""
    return [
        {
            "family": each.lane.key.family, "tenant": each.tenant, "priority": each.lane.key.priority, "seq": each.seq,
            "job_id": each.message.headers.get(headers.JOB_ID, ""), "kind": each.message.headers.get(headers.KIND, ""),
            "delivered_s": round(now - each.arrived_at, 3),
        }
        for each in islice(running, JOBS_MAX)
    ]  # fmt: skip


def _rss_bytes() -> int | None:
    """Return the memory that this process uses; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
