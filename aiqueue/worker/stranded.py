"""Dead-letter jobs that exceeded max deliveries: the server delivered them `max_deliver` times, and stops there.

The server publishes one advisory for each such job, when it is next asked for jobs of the lane. A stream keeps the
advisories until a worker has handled them. Advisories can be lost, so the lanes are checked too: a lane that stores
more jobs than its consumer counts has some (docs/decisions/max-deliveries.md). The reason of their dead letters is
`stranded`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from .. import attempt, headers, subjects
from ..attempt import DecodedJob, RawJob, Refused
from ..connection import Connection, Received, Stored, timestamp
from ..enqueue import DeadLetters, FailedJob, Parents, history_of, trimmed
from ..errors import AccessDenied, AIQueueError, NotFound, Stale, Unavailable
from ..journal import FAILED, ChildEnd, Journal, Retention, Writer
from ..lanes import PullLimits
from ..topology import Family, Topology
from .counting import Notes

log = logging.getLogger(__name__)

CONSUMER = "sweeper"
FIRST_S = 3.0  # until the first round: the worker's first pulls make the server publish advisories
EVERY_S = 60.0  # between the rounds of one worker, a quarter more or less
CONFIRM_S = 2.0  # a lane is checked twice, this far apart, because an ack may be on its way
ACK_WAIT_S = 60.0
ANSWER_S = 5.0
BATCH = 100  # advisories that are fetched at once
LANE_MAX = 1_000  # jobs of one lane that are checked in one round
OTHERS_S = 600.0  # an advisory for a stream that this worker's topology lacks is left to other workers for so long
REASON = "stranded"

Identify = Callable[[RawJob], Awaitable[DecodedJob | Refused]]


class _UncountedLane(NamedTuple):
    """A lane that stores more jobs than its consumer counts as waiting, with none in flight."""

    family: Family
    consumer: str
    filter: str
    created: str
    delivered_seq: int  # the last sequence that was ever delivered

    @property
    def identity(self) -> tuple[str, str, str]:
        """What a consumer that was made anew has not in common with the former one."""
        return self.family.name, self.consumer, self.created


class StrandedSweeper:
    """Looks for jobs that exceeded max deliveries, in all declared families. Several sweepers at once do no harm.

    `identify` returns id and kind of a job without reading its body in this process (see `Quarantine`).
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        journal: Journal,
        dead: DeadLetters,
        parents: Parents,
        *,
        worker: str,
        identify: Identify,
        notes: Notes,
    ) -> None:
        self._connection = connection
        self._stream = topology.stranded_stream.name
        self._families = {family.stream: family for family in topology.work_families}
        self._journal = journal
        self._dead = dead
        self._parents = parents
        self._worker = worker
        self._identify = identify
        self._notes = notes
        self._limits = PullLimits(batch_max=BATCH)
        self._warned = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to sweep, in a task."""
        if self._task is None:
            self._task = asyncio.create_task(self._run_rounds())

    async def stop(self) -> None:
        """Stop sweeping. Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run_rounds(self) -> None:
        """Sweep once every EVERY_S, for ever."""
        pause_s = FIRST_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))  # noqa: S311
            pause_s = EVERY_S
            try:
                if swept := await self.sweep():
                    log.warning("%d jobs exceeded max deliveries and became dead letters", swept)
            except AIQueueError as error:
                log.info("could not look for jobs that exceeded max deliveries, the next round tries again: %s", error)
            except Exception:
                log.exception("could not look for jobs that exceeded max deliveries, the next round tries again")

    async def sweep(self) -> int:
        """Run one round: handle the advisories, then check the lanes. Returns how many jobs were dead-lettered.

        Raises Unavailable, NotFound where a stream is missing, QueueFull where the dead letters are full.
        """
        swept = 0
        while advisories := await self._fetch_if_readable():
            for advisory in advisories:
                swept += await self._handle_advisory(advisory)
            if len(advisories) < self._limits.batch_max:
                break
        lanes = [lane async for lane in self._find_uncounted_lanes()]
        if lanes:
            await asyncio.sleep(CONFIRM_S)
            confirmed = {lane.identity async for lane in self._find_uncounted_lanes()}
            for lane in lanes:  # of many busy lanes most look so once, as their jobs end between the two requests
                if lane.identity in confirmed:
                    for seq in await self._list_delivered(lane):
                        swept += await self._remove_job(lane.family, seq)
        return swept

    # -- advisories

    async def _fetch_if_readable(self) -> list[Received]:
        """Return what `_fetch_advisories` does, [] if their stream is missing or this user may not read it."""
        try:
            return await self._fetch_advisories()
        except (NotFound, AccessDenied) as error:
            if not self._warned:
                log.warning(
                    "jobs that exceeded max deliveries are found by a slower search: %s",
                    error,
                )
            self._warned = True
            return []

    async def _fetch_advisories(self) -> list[Received]:
        """Return advisories that no worker has handled, at most BATCH, or as many as the server allows at once."""
        config = {
            "durable_name": CONSUMER,
            "ack_policy": "explicit",
            "ack_wait": round(ACK_WAIT_S * 1e9),
            "max_deliver": -1,
        }
        await self._connection.api(
            f"CONSUMER.CREATE.{self._stream}.{CONSUMER}", {"stream_name": self._stream, "config": config}
        )
        inbox = self._connection.new_inbox()
        answers: asyncio.Queue[Received] = asyncio.Queue()
        subscription = await self._connection.subscribe(inbox, answers.put_nowait)
        advisories: list[Received] = []
        try:
            async with asyncio.timeout(ANSWER_S):
                while not advisories:
                    batch = self._limits.batch_max
                    request = json.dumps({"batch": batch, "no_wait": True}).encode()
                    subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{CONSUMER}"
                    await self._connection.publish(subject, request, reply=inbox)
                    while len(advisories) < batch and (answer := await answers.get()).status is None:
                        advisories.append(answer)
                    if answer.status is None or not self._limits.learn_limit(answer.status.description):
                        break
        except TimeoutError:
            if not advisories:
                raise Unavailable(f"{self._stream}: no answer within {ANSWER_S:g} s") from None
        finally:
            await subscription.close()
        return advisories

    async def _handle_advisory(self, advisory: Received) -> int:
        """Dead-letter the job of an advisory, unless the advisory is outdated, then acknowledge the advisory.

        Returns how many jobs were dead-lettered.
        """
        try:
            fields = json.loads(advisory.data)
            stream, consumer, seq = str(fields["stream"]), str(fields["consumer"]), int(fields["stream_seq"])
            sent_at, deliveries = timestamp(fields["timestamp"]), int(fields["deliveries"])
        except (ValueError, KeyError, TypeError):
            log.warning("ignored a message in %s: its form is not that of the server's messages there", self._stream)
            self._reply_to(advisory, b"+ACK")
            return 0
        family = self._families.get(stream)
        if family is None:
            self._reply_to(advisory, b'-NAK {"delay": %d}' % round(OTHERS_S * 1e9))
            return 0
        removed = 0
        if await self._is_same_consumer(family, consumer, since=sent_at):
            removed = await self._remove_job(family, seq, before=sent_at, deliveries=deliveries)
        self._reply_to(advisory, b"+ACK")
        return removed

    async def _is_same_consumer(self, family: Family, consumer: str, *, since: float) -> bool:
        """Return whether the consumer has existed since then. A recreated consumer delivers all jobs again."""
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{family.stream}.{consumer}")
        except NotFound:
            return False
        return timestamp(info["created"]) <= since

    def _reply_to(self, advisory: Received, reply: bytes) -> None:
        """Send an ack or nak for an advisory. If that fails, the advisory is redelivered."""
        with contextlib.suppress(AIQueueError):
            self._connection.tell(advisory.reply, reply)

    # -- lanes

    async def _find_uncounted_lanes(self) -> AsyncIterator[_UncountedLane]:
        """Yield the lanes that store more jobs than their consumers count, with none in flight."""
        for family in self._families.values():
            info = await self._connection.api(
                f"STREAM.INFO.{family.stream}", {"subjects_filter": f"ai.{family.name}.>"}
            )
            stored: dict[str, int] = info["state"].get("subjects") or {}
            offset = 0
            while stored:
                page = await self._connection.api(f"CONSUMER.LIST.{family.stream}", {"offset": offset})
                found: list[dict[str, Any]] = page.get("consumers") or []
                for each in found:
                    if lane := _uncounted_lane(family, each, stored):
                        yield lane
                offset += len(found)
                if not found or offset >= page["total"]:
                    break

    async def _list_delivered(self, lane: _UncountedLane) -> list[int]:
        """Return the sequences of the lane's stored jobs that had been delivered at the first look, at most LANE_MAX.

        The first one is asked for alone: most lanes that are busy have none, and each job costs the server a search.
        """
        seqs: list[int] = []
        for batch in (1, LANE_MAX):
            read = self._connection.read(lane.family.stream, lane.filter, seq=seqs[-1] + 1 if seqs else 1, batch=batch)
            async with contextlib.aclosing(read) as found:
                async for stored in found:
                    if stored.seq > lane.delivered_seq or len(seqs) >= LANE_MAX:
                        return seqs
                    seqs.append(stored.seq)
                    if batch == 1:
                        break
            if not seqs:
                break
        return seqs

    # -- one job

    async def _remove_job(
        self, family: Family, seq: int, *, before: float | None = None, deliveries: int | None = None
    ) -> int:
        """Dead-letter a job, then delete its message. Killed in between, the next round goes on. Returns 1 or 0.

        0: the job has ended meanwhile, or was stored after `before` (the stream was recreated), or still runs.
        """
        stored = await self._connection.get(family.stream, seq)
        if stored is None or (before is not None and stored.time > before):
            return 0
        lane = subjects.parse_lane(stored.subject)
        if lane is None:
            return 0
        job_headers = dict(stored.headers)
        headers.restore_case(job_headers)
        stored = stored._replace(headers=job_headers)
        lane = lane.without_key
        raw = RawJob(family, lane.tenant, lane.priority, seq, stored.time, job_headers, stored.data)
        found = await self._identify(raw)
        decoded = attempt.decode_headers_or_defaults(raw) if isinstance(found, Refused) else found
        if await self._end_run(family, lane, stored, decoded, deliveries):
            with contextlib.suppress(NotFound):
                await self._connection.api(f"STREAM.MSG.DELETE.{family.stream}", {"seq": seq, "no_erase": True})
            return 1
        return 0

    async def _end_run(
        self, family: Family, lane: subjects.Lane, stored: Stored, decoded: DecodedJob, deliveries: int | None
    ) -> bool:
        """Dead-letter the job and write `failed`, unless its run has ended. False: an attempt has taken it over."""
        run, enqueued_at = headers.run(stored.headers, stored.seq, stored.time)
        number, writer = max(1, headers.number(stored.headers.get(headers.ATTEMPT, ""))), None
        history = history_of(stored.headers)
        if family.journal:
            subject = subjects.journal(family.journal, lane.tenant, decoded.job_id)
            parking_id = headers.parking_id(stored.headers)
            record = await self._journal.read_run(subject, run, enqueued_at, parking_id)
            newest, recap = record.newest, record.recap
            if newest is not None and newest.final:
                end = ChildEnd.of_entry(decoded.job_id, newest, enqueued_at)
                await self._parents.report(stored.headers, lane.tenant, end, journaled=True)
                return True
            if newest is not None:
                number = max(number, newest.attempt)
            if recap is not None and isinstance(recap.data, dict):
                history = [each for each in recap.data.get("history", []) if isinstance(each, dict)]
            retention = Retention(family.journal_ttl_s, family.chunk_ttl_s)
            writer = Writer(
                self._journal, subject, run=run, enqueued_at=enqueued_at, attempt=number, record=record,
                retention=retention, job_headers=stored.headers,
            )  # fmt: skip
            writer.kind = decoded.kind
        times = f"{deliveries:,} times" if deliveries else "again and again"
        error = f"it was delivered {times} without an outcome (max_deliver is {family.max_deliver:,})"
        failed = FailedJob(
            job_id=decoded.job_id, kind=decoded.kind, lane=lane, seq=stored.seq, reason=REASON, error=error,
            attempt=number, worker=self._worker, enqueued_at=enqueued_at, history=history, run=run,
        )  # fmt: skip
        await self._dead.add(failed, stored.headers, stored.data)
        log.warning("job %s of %s is a dead letter (%s): %s", decoded.job_id, lane, REASON, error)
        self._notes.count_dead(lane.family, lane.tenant, decoded.kind)
        if writer is not None:
            try:
                await writer.write(FAILED, {"reason": REASON, "error": error, "history": trimmed(history)})
            except Stale as stale:
                return stale.ended
        end = ChildEnd(
            decoded.job_id, FAILED, reason=REASON, error=error, attempt=number, run=run, enqueued_at=enqueued_at
        )
        await self._parents.report(stored.headers, lane.tenant, end, journaled=True)
        return True


def _uncounted_lane(family: Family, info: dict[str, Any], stored: dict[str, int]) -> _UncountedLane | None:
    """Return the lane of a consumer, if jobs are stored that the consumer does not count. None: all are counted, or
    some are in flight. `stored`: by subject, how many jobs the stream has.
    """
    config = info["config"]
    filter_subject = str(config.get("filter_subject", ""))
    lane = subjects.parse_lane(filter_subject)
    if lane is None or lane.family != family.name or info["num_ack_pending"]:
        return None
    if lane.tenant == "*":
        count = sum(jobs for subject, jobs in stored.items() if subject.endswith(f".{lane.priority}"))
    else:
        count = stored.get(filter_subject, 0)
    if count <= info["num_pending"] or not info["delivered"]["stream_seq"]:
        return None
    return _UncountedLane(
        family, str(info["name"]), filter_subject, str(info["created"]), info["delivered"]["stream_seq"]
    )
