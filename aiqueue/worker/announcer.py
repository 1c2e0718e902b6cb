"""Announces a worker: other workers and operators learn that it is there, and which kinds it knows."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .. import headers
from ..connection import Connection
from ..errors import AIQueueError
from ..lanes import EVERY_S, Delivery, WorkerRecords, known_kinds
from ..topology import Topology

log = logging.getLogger(__name__)

JOBS_MAX = 5  # running jobs in a record, the oldest ones
Kinds = Mapping[str, Collection[str]]  # by family


class Announcer:
    """Writes the worker's record every EVERY_S, and removes the record when the worker drains.

    `vitals` returns the changing part of the record. `announced_anew` is called once, with family and kind of the jobs
    that no other worker announces: it brings jobs forward that wait for such a worker.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        name: str,
        kinds: Kinds,
        vitals: Callable[[], Mapping[str, Any]],
        announced_anew: Callable[[set[tuple[str, str]]], Awaitable[object]],
    ) -> None:
        self._records = WorkerRecords(connection, topology)
        self._name = name
        self._kinds = {family: sorted(names) for family, names in kinds.items()}
        self._vitals = vitals
        self._announced_anew = announced_anew
        self._fixed = {"host": socket.gethostname(), "started": time.time(), "kinds": self._kinds}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to announce, in a task."""
        self._task = asyncio.create_task(self._announce())

    async def stop(self) -> None:
        """Remove the record. Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            await self._records.remove(self._name)

    async def _announce(self) -> None:
        """Write the record again and again. A server without the stream, or without the permission, is no failure."""
        wanted: set[tuple[str, str]] | None = None
        while True:
            try:
                if wanted is None:
                    wanted = await self._find_new_kinds()
                await self._records.write(self._name, {**self._vitals(), **self._fixed, "rss_bytes": _rss_bytes()})
                if wanted:
                    await self._announced_anew(wanted)
                    wanted = set()
            except AIQueueError as error:
                log.debug("worker %s is not announced: %s", self._name, error)
            except Exception:
                log.exception("announcing worker %s failed", self._name)
            await asyncio.sleep(EVERY_S)

    async def _find_new_kinds(self) -> set[tuple[str, str]]:
        """Return family and kind of the jobs that this worker knows and that no other worker announces."""
        own = known_kinds({"kinds": self._kinds})
        return own.difference(*map(known_kinds, await self._records.read()))


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
