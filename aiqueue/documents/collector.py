"""Deletes documents that nobody holds, and the chunks of uploads whose process died (docs/decisions/documents.md)."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection
from dataclasses import dataclass

from .. import headers, subjects
from ..connection import Connection, timestamp
from ..errors import AIQueueError, Conflict, NotFound, Unavailable
from ..topology import Topology
from ..units import short_size
from .holds import JOB, PUT, RESULT, STEP, DocumentHold
from .store import Documents, document_of

log = logging.getLogger(__name__)

INTERVAL_S = 600.0  # between two rounds, of all workers together
GRACE_S = 600.0  # a document that was put or held within this time is kept
ORPHAN_S = 3600.0  # chunks without a document are deleted if the newest of them is older: the upload is dead
AGED_S = 45 * 86_400.0  # a hold that is older is checked against jobs and journals; dead letters are kept for 30 days
SUBJECTS_MAX = 1_000_000
_HELD_BY_ENTRIES = {"journal": RESULT, "checkpoints": STEP}  # by the role of their stream; jobs hold in all others


@dataclass
class Collected:
    """What was deleted: documents and their bytes, dead uploads, and holds of jobs that are not stored any more."""

    documents: int = 0
    """How many documents were deleted."""
    size_bytes: int = 0
    """Bytes that they had together."""
    uploads: int = 0
    """How many uploads that were never completed were deleted."""
    holds: int = 0
    """How many holds of jobs that are stored no more were deleted."""


class Collector:
    """Deletes what nobody holds. Several collectors at once do no harm."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._documents = Documents(connection, topology)
        self._objects = self._documents.objects
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Collect every INTERVAL_S in a task. Safe twice."""
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the task. Safe twice, and without `start`."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def collect(
        self, *, grace_s: float = GRACE_S, orphan_s: float = ORPHAN_S, aged_s: float = AGED_S
    ) -> Collected:
        """Collect once, and return what was deleted. Raises NotFound if the stream is missing, Unavailable."""
        done = Collected()
        now = timestamp((await self._connection.api(f"STREAM.INFO.{self._objects.stream}"))["ts"])
        uploads = await self._list_uploads()  # before the objects: an upload that ends meanwhile is one of those
        if aged := {hold: seq async for hold, seq, at in self._documents.list_holds() if now - at > aged_s}:
            try:
                done.holds = await self._end_orphaned_holds(aged)
            except (NotFound, Unavailable) as error:  # such as a stream without allow_direct
                log.warning("old holds on documents are kept, because not all jobs can be read: %s", error)
        held = {hold[:2] async for hold, _, _ in self._documents.list_holds()}
        async for info in self._objects.list_infos():
            uploads.discard(info.nuid)
            document = document_of(info)
            if document is None or now - info.time < grace_s:
                continue
            key = document.tenant, document.sha256
            if key not in held and await self._documents.delete_if_unheld(*key) and not info.deleted:
                done.documents += 1
                done.size_bytes += info.size
        for nuid in uploads:
            done.uploads += await self._purge_dead_upload(nuid, before=now - orphan_s)
        return done

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                if not await self._try_claim_turn():
                    continue
                done = await self.collect()
            except AIQueueError as error:
                log.debug("cannot collect documents now: %s", error)
            except Exception:
                log.exception("collecting documents failed")  # the next round tries again
            else:
                if done != Collected():
                    log.info("deleted %d documents (%s), %d dead uploads, %d holds of jobs that are gone",
                             done.documents, short_size(done.size_bytes), done.uploads, done.holds)  # fmt: skip

    async def _try_claim_turn(self) -> bool:
        """Claim the next round in the stream. False if another worker has claimed one within INTERVAL_S."""
        subject = self._objects.subject("R", "collected")
        info = await self._connection.api(f"STREAM.INFO.{self._objects.stream}")
        last = await self._connection.last(self._objects.stream, subject)
        if last is not None and timestamp(info["ts"]) - last.time < INTERVAL_S:
            return False
        claim_headers = {
            headers.MSG_ID: subjects.new_id(),
            headers.EXPECTED: str(last.seq if last else 0),
            headers.ROLLUP: "sub",
        }
        try:
            await self._connection.store(subject, b"", claim_headers)
        except Conflict:
            return False
        return True

    async def _list_uploads(self) -> set[str]:
        """Return the nuids that have chunks. The server answers page by page."""
        found: set[str] = set()
        while len(found) < SUBJECTS_MAX:
            request = {"subjects_filter": self._objects.subject("C", "*"), "offset": len(found)}
            info = await self._connection.api(f"STREAM.INFO.{self._objects.stream}", request)
            page = {subject.rpartition(".")[2] for subject in info["state"].get("subjects") or ()}
            if page <= found:
                break
            found |= page
            if len(found) >= info.get("total", 0):
                break
        return found

    async def _purge_dead_upload(self, nuid: str, *, before: float) -> bool:
        """Delete the chunks of an upload if the newest is older than `before` (seconds since the epoch)."""
        subject = self._objects.subject("C", nuid)
        newest = await self._connection.last(self._objects.stream, subject)
        if newest is None or newest.time > before:
            return False
        await self._objects.purge(subject)
        return True

    async def _end_orphaned_holds(self, aged: dict[DocumentHold, int]) -> int:
        """End those of the aged holds whose jobs or journal entries are not stored any more, and return how many.

        A job's worker died between the ack and the end of the hold, or somebody purged the job. Holds of results and
        steps are so old only if these are kept for so long, or without end.
        """
        kinds = {hold.by for hold in aged} - {PUT}
        refs = await self._read_refs(kinds)
        orphaned = {hold: seq for hold, seq in aged.items() if hold.by in kinds and hold.ref not in refs}
        for hold, seq in orphaned.items():
            await self._documents.end_hold(hold, upto=seq)
        return len(orphaned)

    async def _read_refs(self, kinds: Collection[str]) -> set[str]:
        """Return the names of holds of these kinds, as all stored jobs, those of other applications' families too,
        journals and checkpoints give them.

        Jobs move between streams meanwhile, and are stored in the next stream before they leave the last:

        1. From dead letters or parking to a work stream: work streams are read after those.
        2. From a work stream to dead letters or parking: those are read once more at the end.
        """
        declared = self._topology.streams
        names: list[str] = []
        while page := await self._list_job_streams(len(names)):
            names += page
        work = [name for name in names if name not in declared or declared[name].role == "work"]
        others = [name for name in names if name not in work]
        refs: set[str] = set()
        for stream in (*others, *work, *others):
            role = declared[stream].role if stream in declared else "work"
            if _HELD_BY_ENTRIES.get(role, JOB) not in kinds:
                continue
            async for stored in self._connection.read(stream, ">"):
                refs.add(stored.headers.get(headers.DOCUMENT_REF, ""))
        return refs

    async def _list_job_streams(self, offset: int) -> list[str]:
        answer = await self._connection.api("STREAM.NAMES", {"subject": "ai.>", "offset": offset})
        return answer.get("streams") or []
