"""Jobs that the server delivers no more, having done so `max_deliver` times: they become dead letters.

The server says so once, when it is next asked for jobs; the stream of strandeds keeps that word until a worker has
taken it. Words can be lost, so the lanes are looked at too (docs/decisions/strandeds.md).
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
from ..enqueue import DeadLetters, FailedJob, history_of, trimmed
from ..errors import AccessDenied, AIQueueError, NotFound, Stale, Unavailable
from ..journal import FAILED, Journal, Retention
from ..topology import Family, Topology

log = logging.getLogger("aiqueue.strandeds")

CONSUMER = "sweeper"
FIRST_S = 3.0  # after the start: the first pulls have the server say what it had not said without them
EVERY_S = 60.0  # of each worker, a quarter more or less
CONFIRM_S = 2.0  # a lane is looked at twice: an ack may be on its way
ACK_WAIT_S = 60.0
ANSWER_S = 5.0
BATCH = 100  # words of the server that are taken at once
LANE_MAX = 1_000  # jobs of one lane that are looked at in one round
OTHERS_S = 600.0  # a word on a stream that this worker's topology lacks is left to others for so long
REASON = "stranded"

Look = Callable[[RawJob], Awaitable[DecodedJob | Refused]]


class _Lane(NamedTuple):
    """A lane in which something is stored that its consumer does not count: nothing of it is in flight."""

    family: Family
    consumer: str
    filter: str
    created: str
    delivered: int  # the last sequence that was ever delivered


class StrandedSweeper:
    """Looks for stranded jobs of all declared families, now and then. Several at once do no harm.

    `look` tells which job a parcel is without reading its body in this process (see quarantine).
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        journal: Journal,
        dead: DeadLetters,
        *,
        worker: str,
        look: Look,
    ) -> None:
        self._connection = connection
        self._stream = topology.stranded_stream.name
        self._families = {family.stream: family for family in topology.work_families}
        self._journal = journal
        self._dead = dead
        self._worker = worker
        self._look = look
        self._deaf = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        pause_s = FIRST_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))  # noqa: S311
            pause_s = EVERY_S
            try:
                if swept := await self.sweep():
                    log.warning("%d stranded jobs became dead letters", swept)
            except AIQueueError as error:
                log.info("looking for stranded jobs: %s", error)
            except Exception:
                log.exception("looking for stranded jobs")  # and again in a while

    async def sweep(self) -> int:
        """One round: what the server has said, then what the lanes show. Returns how many jobs were stranded.

        Raises Unavailable, NotFound where a stream is missing, QueueFull where the dead letters are full.
        """
        swept = 0
        while heard := await self._take_if_there():
            for word in heard:
                swept += await self._heed(word)
            if len(heard) < BATCH:
                break
        odd = [lane async for lane in self._odd_lanes()]
        if odd:
            before = [await self._settled(lane) for lane in odd]
            await asyncio.sleep(CONFIRM_S)
            again = {(lane.family.name, lane.consumer): lane async for lane in self._odd_lanes()}
            for lane, seqs in zip(odd, before, strict=True):
                now = again.get((lane.family.name, lane.consumer))
                if now is not None and now.created == lane.created:
                    for seq in seqs:
                        swept += await self._bury(lane.family, seq)
        return swept

    # -- what the server has said

    async def _take_if_there(self) -> list[Received]:
        """What `_take` gives, nothing where the stream is not there yet or not this user's to read: the lanes are."""
        try:
            return await self._take()
        except (NotFound, AccessDenied) as error:
            if not self._deaf:
                log.warning("the server's word on stranded jobs is not heard, only the lanes are looked at: %s", error)
            self._deaf = True
            return []

    async def _take(self) -> list[Received]:
        """Words that nobody has taken, at most BATCH."""
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
        heard: list[Received] = []
        try:
            request = json.dumps({"batch": BATCH, "no_wait": True}).encode()
            await self._connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{CONSUMER}", request, reply=inbox)
            async with asyncio.timeout(ANSWER_S):
                while len(heard) < BATCH and (answer := await answers.get()).status is None:
                    heard.append(answer)
        except TimeoutError:
            if not heard:
                raise Unavailable(f"{self._stream}: no answer within {ANSWER_S:g} s") from None
        finally:
            await subscription.close()
        return heard

    async def _heed(self, word: Received) -> int:
        """Bury the job that a word of the server is about, if it is still so, then take the word away."""
        try:
            told = json.loads(word.data)
            stream, consumer, seq = str(told["stream"]), str(told["consumer"]), int(told["stream_seq"])
            said_at, deliveries = timestamp(told["timestamp"]), int(told["deliveries"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s holds what is no word on a stranded job: dropped", self._stream)
            self._say(word, b"+ACK")
            return 0
        family = self._families.get(stream)
        if family is None:
            self._say(word, b'-NAK {"delay": %d}' % round(OTHERS_S * 1e9))
            return 0
        buried = 0
        if await self._still(family, consumer, since=said_at):
            buried = await self._bury(family, seq, before=said_at, deliveries=deliveries)
        self._say(word, b"+ACK")
        return buried

    async def _still(self, family: Family, consumer: str, *, since: float) -> bool:
        """Whether the consumer is the one of which this was said: one made anew delivers all again."""
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{family.stream}.{consumer}")
        except NotFound:
            return False
        return timestamp(info["created"]) <= since

    def _say(self, word: Received, what: bytes) -> None:
        with contextlib.suppress(AIQueueError):  # unsaid, it comes again
            self._connection.tell(word.reply, what)

    # -- what the lanes show

    async def _odd_lanes(self) -> AsyncIterator[_Lane]:
        """Lanes that hold more jobs than wait or are in flight, with none in flight: what is over was given up."""
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
                    if lane := _odd(family, each, stored):
                        yield lane
                offset += len(found)
                if not found or offset >= page["total"]:
                    break

    async def _settled(self, lane: _Lane) -> list[int]:
        """The stored jobs of a lane that were delivered, of which none is in flight."""
        seqs: list[int] = []
        async for stored in self._connection.read(lane.family.stream, lane.filter):
            if stored.seq > lane.delivered or len(seqs) >= LANE_MAX:
                break
            seqs.append(stored.seq)
        return seqs

    # -- the end of one

    async def _bury(
        self, family: Family, seq: int, *, before: float | None = None, deliveries: int | None = None
    ) -> int:
        """A dead letter first, then the journal, then the job is deleted: killed in between, the next round goes on."""
        stored = await self._connection.get(family.stream, seq)
        if stored is None or (before is not None and stored.time > before):
            return 0  # it has ended meanwhile, or the stream was made anew
        lane = subjects.parse_lane(stored.subject)
        if lane is None:
            return 0
        raw = RawJob(family, lane.tenant, lane.priority, seq, stored.time, stored.headers, stored.data)
        found = await self._look(raw)
        known = attempt.nameless(raw) if isinstance(found, Refused) else found
        if await self._ended(family, lane, stored, known, deliveries):
            with contextlib.suppress(NotFound):
                await self._connection.api(f"STREAM.MSG.DELETE.{family.stream}", {"seq": seq, "no_erase": True})
            return 1
        return 0

    async def _ended(
        self, family: Family, lane: subjects.Lane, stored: Stored, known: DecodedJob, deliveries: int | None
    ) -> bool:
        """Write the job's last words, if nobody has. False: an attempt still goes on with it."""
        told = stored.headers
        run, enqueued_at = headers.run(told, stored.seq, stored.time)
        count, history, writer = max(1, headers.number(told.get(headers.ATTEMPT, ""))), history_of(told), None
        if family.journal:
            subject = subjects.journal(family.journal, lane.tenant, known.job_id)
            record = await self._journal.record(subject, run, enqueued_at, headers.word(told))
            said = record.newest
            if said is not None and said.final:
                return True
            if said is not None:
                count = max(count, said.attempt)
            if record.told is not None and isinstance(record.told.data, dict):
                history = [each for each in record.told.data.get("history", []) if isinstance(each, dict)]
            kept = Retention(family.journal_ttl_s, family.chunk_ttl_s)
            writer = self._journal.writer(
                subject, run=run, enqueued_at=enqueued_at, attempt=count, record=record, kept=kept
            )
        times = f"{deliveries:,} times" if deliveries else "again and again"
        error = f"it was delivered {times} without an outcome (max_deliver is {family.max_deliver:,})"
        obituary = FailedJob(
            job_id=known.job_id, kind=known.kind, lane=lane, seq=stored.seq, reason=REASON, error=error,
            attempt=count, worker=self._worker, enqueued_at=enqueued_at, history=history,
        )  # fmt: skip
        await self._dead.add(obituary, told, stored.data)
        log.warning("job %s of %s is a dead letter (%s): %s", known.job_id, lane, REASON, error)
        if writer is not None:
            try:
                await writer.write(FAILED, {"reason": REASON, "error": error, "history": trimmed(history)})
            except Stale as stale:
                return stale.ended
        return True


def _odd(family: Family, info: dict[str, Any], stored: dict[str, int]) -> _Lane | None:
    """The lane of a consumer that has lost sight of stored jobs, None if it has not, or if some are in flight."""
    config = info["config"]
    wanted = str(config.get("filter_subject", ""))
    lane = subjects.parse_lane(wanted)
    if lane is None or lane.family != family.name or info["num_ack_pending"]:
        return None
    if lane.tenant == "*":
        count = sum(jobs for subject, jobs in stored.items() if subject.endswith(f".{lane.priority}"))
    else:
        count = stored.get(wanted, 0)
    if count <= info["num_pending"] or not info["delivered"]["stream_seq"]:
        return None
    return _Lane(family, str(info["name"]), wanted, str(info["created"]), info["delivered"]["stream_seq"])
