"""Collects documents that no job needs, and what uploads that died have left (docs/decisions/documents.md)."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass

from .. import headers, subjects
from ..connection import Connection, timestamp
from ..errors import AIQueueError, Conflict, NotFound, Unavailable
from ..topology import Topology
from ..units import short_size
from .store import JOB, Documents, Hold, document_of

log = logging.getLogger("aiqueue.collector")

EVERY_S = 600.0  # of all workers together
GRACE_S = 600.0  # a document that was touched within this time is left alone
ORPHAN_S = 3600.0  # chunks without a document are those of an upload under way until the last one is so old
AGED_S = 45 * 86_400.0  # a job's hold that is older is looked into; dead letters are kept for 30 days
SUBJECTS_MAX = 1_000_000


@dataclass
class Collected:
    """What was deleted: documents and their bytes, uploads that had died, holds of jobs that are no more."""

    documents: int = 0
    size_bytes: int = 0
    uploads: int = 0
    holds: int = 0


class Collector:
    """Deletes what nobody needs. Several at once do no harm."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._documents = Documents(connection, topology)
        self._objects = self._documents.objects
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Collect now and then, beside other work. Safe twice."""
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def collect(
        self, *, grace_s: float = GRACE_S, orphan_s: float = ORPHAN_S, aged_s: float = AGED_S
    ) -> Collected:
        """One round. Raises NotFound where the stream is missing, Unavailable."""
        done = Collected()
        now = timestamp((await self._connection.api(f"STREAM.INFO.{self._objects.stream}"))["ts"])
        uploads = await self._uploads()  # before the objects: one that ends meanwhile is among those
        if aged := {hold: seq async for hold, seq, at in self._documents.holds() if now - at > aged_s}:
            try:
                done.holds = await self._end_needless(aged)
            except (NotFound, Unavailable) as error:  # a stream without allow_direct, say: what it holds stays
                log.warning("old holds of documents are kept: %s", error)
        held = {hold[:2] async for hold, _, _ in self._documents.holds()}
        async for info in self._objects.all():
            uploads.discard(info.nuid)
            document = document_of(info)
            if document is None or now - info.time < grace_s:
                continue
            whose = document.tenant, document.sha256
            if whose not in held and await self._documents.drop(*whose) and not info.deleted:
                done.documents += 1
                done.size_bytes += info.size
        for nuid in uploads:
            done.uploads += await self._end_upload(nuid, before=now - orphan_s)
        return done

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                if not await self._our_turn():
                    continue
                done = await self.collect()
            except AIQueueError as error:
                log.debug("collecting documents: %s", error)
            except Exception:
                log.exception("collecting documents")  # the next round tries again
            else:
                if done != Collected():
                    log.info("collected %d documents (%s), %d dead uploads, %d holds of jobs that are no more",
                             done.documents, short_size(done.size_bytes), done.uploads, done.holds)  # fmt: skip

    async def _our_turn(self) -> bool:
        """Whether no other worker has collected within EVERY_S; then this one says that it does."""
        where = self._objects.subject("R", "collected")
        info = await self._connection.api(f"STREAM.INFO.{self._objects.stream}")
        last = await self._connection.last(self._objects.stream, where)
        if last is not None and timestamp(info["ts"]) - last.time < EVERY_S:
            return False
        told = {
            headers.MSG_ID: subjects.new_id(),
            headers.EXPECTED: str(last.seq if last else 0),
            headers.ROLLUP: "sub",
        }
        try:
            await self._connection.store(where, b"", told)
        except Conflict:
            return False
        return True

    async def _uploads(self) -> set[str]:
        """The nuids that have chunks."""
        found: set[str] = set()
        while len(found) < SUBJECTS_MAX:
            wanted = {"subjects_filter": self._objects.subject("C", "*"), "offset": len(found)}
            info = await self._connection.api(f"STREAM.INFO.{self._objects.stream}", wanted)
            page = {subject.rpartition(".")[2] for subject in info["state"].get("subjects") or ()}
            if page <= found:
                break
            found |= page
            if len(found) >= info.get("total", 0):
                break
        return found

    async def _end_upload(self, nuid: str, *, before: float) -> bool:
        where = self._objects.subject("C", nuid)
        newest = await self._connection.last(self._objects.stream, where)
        if newest is None or newest.time > before:
            return False
        await self._objects.purge(where)
        return True

    async def _end_needless(self, aged: dict[Hold, int]) -> int:
        """End the aged holds of jobs that are nowhere any more: their workers died between the last ack and the end
        of the hold, or somebody purged them.
        """
        needed = await self._needed()
        needless = {hold: seq for hold, seq in aged.items() if hold.by == JOB and hold.ref not in needed}
        for hold, seq in needless.items():
            await self._documents.let_go(hold, upto=seq)
        return len(needless)

    async def _needed(self) -> set[str]:
        """The holds that stored jobs name, those of other applications' families too. Jobs move meanwhile, and are
        stored where they go before they leave: out of the dead letters and the parked ones into work streams, which
        are read after these, and back, which is why these are read once more.
        """
        declared = self._topology.streams
        names: list[str] = []
        while page := await self._jobs_streams(len(names)):
            names += page
        work = [name for name in names if name not in declared or declared[name].role == "work"]
        others = [name for name in names if name not in work]
        needed: set[str] = set()
        for stream in (*others, *work, *others):
            if stream in declared and declared[stream].role == "journal":
                continue
            async for stored in self._connection.read(stream, ">"):
                needed.add(stored.headers.get(headers.DOCUMENT_REF, ""))
        return needed

    async def _jobs_streams(self, offset: int) -> list[str]:
        answer = await self._connection.api("STREAM.NAMES", {"subject": "ai.>", "offset": offset})
        return answer.get("streams") or []
