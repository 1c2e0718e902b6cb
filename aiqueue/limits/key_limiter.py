"""The reservations of one process for one value of a key, on a server: reads, writes one at a time, and listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable

from .. import headers, subjects
from ..connection import Connection, Received, Subscription, timestamp
from ..errors import AccessDenied, AIQueueError, ConfigMismatch, Conflict, NotFound, Unavailable
from .bucket import Bucket, Draft
from .controls import Controls
from .credit import BatchCall, Credit
from .sharing import Sharing, Waiter
from .stored_use import StoredUse

log = logging.getLogger(__name__)

WRITE_S = 5.0
RETRY_S = 0.2
CATCH_UP_S = 0.002  # how long the document that was first takes to be heard
RANK_S = 0.002  # how much later a process writes for each one whose turn is sooner
IDLE_S = 30.0  # how long a key stays open that nobody uses
LEAD_MAX_S = 2.0  # how far ahead a reservation is charged, at most
LEAD_SMOOTHING = 0.1
REPORT_S = 60.0  # how often use above reservations is logged


class KeyLimiter:
    """The limiter of one value of a family's key. `written` and `rejected` count writes."""

    def __init__(
        self, connection: Connection, controls: Controls, family: str, key: str, process: str,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._connection, self._controls, self.family, self.key = connection, controls, family, key
        self._clock = clock
        self.sharing = Sharing(process, key, clock, changed=self.wake, report=self._report)
        self.sharing.paused_until = lambda tenant: controls.paused_until(family, key, tenant)
        self.sharing.rules_version = -1
        self.sharing.wide.subject = self._subject(None)
        self._buckets = {self.sharing.wide.subject: self.sharing.wide}
        self._tenants: set[str] = set()
        self._subscription: Subscription | None = None
        self._sent: dict[str, float] = {}  # by Nats-Msg-Id of the writes under way, when they were sent
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_stale = True  # what is known may be out of date: read before the next write
        self.used_at = time.monotonic()
        self.written = self.rejected = 0
        self.above = 0.0  # how much was used above reservations
        self._reported_at = -REPORT_S

    def _subject(self, tenant: str | None) -> str:
        return subjects.limit(self._controls.stream, "use", self.family, self.key, subjects.limit_scope(tenant))

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    @property
    def is_idle(self) -> bool:
        return self.sharing.is_idle and time.monotonic() - self.used_at > IDLE_S

    async def close(self) -> None:
        """Give back what is reserved and not spent, if the server answers. Waiting reservations fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
            self._fail(Unavailable("the limiter was closed"))
            with contextlib.suppress(AIQueueError):
                if self._connection.connected and not self.is_stale:
                    for bucket in self.sharing.buckets:
                        bucket.close()
                    await self._write_all(self.sharing.plan(self._clock()))
        if self._subscription is not None:
            await self._subscription.close()

    # -- reservations

    def try_acquire(self, waiter: Waiter) -> Credit | None:
        """Return a credit if nobody waits and what is reserved ahead suffices. Raises AboveLimit."""
        self.used_at = time.monotonic()
        self._follow(waiter.tenant)
        if self.is_stale:
            self.sharing.check(waiter.tenant, waiter.requests, waiter.cost)
            return None
        return self.sharing.try_acquire(self._clock(), waiter)

    def ask(self, waiter: Waiter, *, first: bool = False) -> None:
        """Have `waiter.done` called with the credit, or an error. `first`: before all others of its tenant.

        Raises AboveLimit.
        """
        self.used_at = time.monotonic()
        self._follow(waiter.tenant)
        self.sharing.note(self._clock(), waiter)
        self.sharing.add(waiter, first=first)
        self.wake()

    def cancel(self, waiter: Waiter) -> None:
        """Stop waiting: `waiter.done` is not called any more."""
        self.sharing.cancel(waiter)

    async def acquire(self, waiter: Waiter, *, first: bool = False) -> Credit:
        """Wait for a credit. Cancel to stop waiting. Raises AboveLimit, NotFound, AccessDenied, ConfigMismatch."""
        credit = self.try_acquire(waiter)
        if credit is not None:
            return credit
        future: asyncio.Future[Credit] = asyncio.get_running_loop().create_future()

        def done(outcome: Credit | Exception) -> None:
            if future.done():
                if isinstance(outcome, Credit):
                    outcome.release()
            elif isinstance(outcome, Credit):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        waiter.done = done
        self.sharing.add(waiter, first=first)
        self.wake()
        try:
            return await future
        except asyncio.CancelledError:
            self.sharing.cancel(waiter)
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise

    def wake(self) -> None:
        self._wake.set()

    def _follow(self, tenant: str | None = None) -> None:
        """Follow the rules as they are now, and those of a tenant that is new."""
        rules, now = self._controls.rules, self._clock()
        rules.expire(now)
        is_new = tenant is not None and tenant not in self._tenants
        if rules.version == self.sharing.rules_version and not is_new:
            return
        if tenant is not None and is_new:
            self._tenants.add(tenant)
        self.sharing.rules_version = rules.version
        for each in self._tenants:
            wide, narrow = rules.choose(self.family, self.key, each, now)
            self.sharing.wide.use_rule(wide)
            if narrow is not None or each in self.sharing.narrow:
                bucket = self.sharing.narrow_bucket(each)
                bucket.subject = self._subject(each)
                self._buckets[bucket.subject] = bucket
                bucket.use_rule(narrow)
        self.sharing.check_all()

    def _report(self, credit: Credit | BatchCall, above: float) -> None:
        self.above += above
        if time.monotonic() - self._reported_at >= REPORT_S:
            self._reported_at = time.monotonic()
            log.warning(
                "%s, key %r: a call of tenant %s used cost %g above its reservation of %g, %g in all: later calls wait "
                "for it. Reserve an upper bound",
                self.family, self.key, credit.tenant, above, credit.cost, self.above,
            )  # fmt: skip

    # -- the loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause_s = 0.0
            try:
                if not await self._step():
                    pause_s = max(0.0, min(self.sharing.wake_at - self._clock(), IDLE_S))
            except Unavailable as error:
                log.debug("%s, key %r: %s", self.family, self.key, error)
                await asyncio.sleep(RETRY_S)
            except (NotFound, AccessDenied, ConfigMismatch) as error:
                self._fail(error)
                pause_s = IDLE_S
            except AIQueueError as error:
                log.warning("%s, key %r: %s", self.family, self.key, error)
                await asyncio.sleep(RETRY_S)
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()
                if rank := self.sharing.rank(self._clock()):
                    await asyncio.sleep(RANK_S * rank)

    async def _step(self) -> bool:
        """Write what there is to write. Return False if there was nothing."""
        if self.is_stale:
            await self._refresh()
        for bucket in [each for each in self.sharing.buckets if each.rule is not None and not each.is_loaded]:
            await self._read(bucket)
        self._follow()
        drafts = self.sharing.plan(self._clock())
        if drafts:
            await self._write_all(drafts)
        return bool(drafts)

    async def _refresh(self) -> None:
        """Listen, and know the rules, the server's time and the documents as they are now."""
        if self._subscription is None:
            live = subjects.limit_live(self._controls.stream, self._subject(None)).removesuffix("all") + "*"
            self._subscription = await self._connection.subscribe(live, self._heard)
            await self._connection.flush()
        await self._controls.current.wait()
        for bucket in self.sharing.buckets:
            bucket.is_loaded = False
        self.is_stale = False

    async def _read(self, bucket: Bucket) -> None:
        """Take what is stored, also if its sequence is lower, as in a stream that was created again."""
        seq = bucket.seq
        stored = await self._connection.last(self._controls.stream, bucket.subject)
        if bucket.seq != seq:
            return  # a newer one was heard meanwhile
        if stored is None:
            bucket.see(0, StoredUse(self.key))
        else:
            self._see(bucket, stored.seq, b"" if headers.KV_OPERATION in stored.headers else stored.data)

    def _see(self, bucket: Bucket, seq: int, data: bytes) -> None:
        try:
            bucket.see(seq, StoredUse.parse(data) if data else StoredUse(self.key))
        except ValueError as error:
            problem = f"the use of key {self.key!r} is stored on {bucket.subject}, but {error}"
            raise ConfigMismatch(f"{problem}: update aiqueue, or delete it with `nats kv del`") from None

    async def _write_all(self, drafts: list[Draft]) -> None:
        for each in drafts:
            each.bucket.begin(each)
        try:
            failures = await asyncio.gather(*(self._write(each) for each in drafts))
        except asyncio.CancelledError:
            for each in drafts:
                if each.bucket.is_writing:
                    each.bucket.lost(each)
            raise
        for each in drafts:
            if self.is_stale or each.rule is not each.bucket.rule:  # reserved by a rule that may not hold any more
                each.bucket.give_back_purse()
        self.sharing.serve(self._clock())
        for failure in failures:
            if failure is not None:
                raise failure

    async def _write(self, draft: Draft) -> AIQueueError | None:
        """Write a document, if nobody has since. Return an error that the loop must heed."""
        bucket, msg_id = draft.bucket, subjects.new_id()
        told = {
            headers.MSG_ID: msg_id,
            headers.EXPECTED: str(draft.seq),
            headers.TTL: f"{draft.document.ttl_s(draft.now, draft.timing)}s",
        }
        self._sent[msg_id] = begun = time.monotonic()
        self.written += 1
        try:
            ack = await self._connection.store(bucket.subject, draft.document.encode(), told, timeout_s=WRITE_S)
        except Conflict:
            self.rejected += 1
            bucket.rejected(draft)
            return await self._catch_up(bucket)
        except Unavailable as error:
            bucket.is_loaded = False
            (bucket.lost if error.maybe_stored else bucket.rejected)(draft)
            return error
        except AIQueueError as error:
            bucket.rejected(draft)
            return error
        finally:
            asyncio.get_running_loop().call_later(1.0, self._sent.pop, msg_id, None)
        self._note_write(time.monotonic() - begun)
        bucket.stored(draft, ack.seq)
        return None

    def _note_write(self, took_s: float) -> None:
        """Remember how long writes take: at once if it is longer than before, and slowly if it is shorter."""
        longest_s = self.sharing.lead_s
        self.sharing.lead_s = min(LEAD_MAX_S, max(took_s, longest_s + LEAD_SMOOTHING * (took_s - longest_s)))

    async def _catch_up(self, bucket: Bucket) -> AIQueueError | None:
        """Another process was first: take what it has stored, once that is heard, or else by reading it."""
        seq = bucket.seq
        await asyncio.sleep(CATCH_UP_S * random.random())  # noqa: S311
        if bucket.seq == seq:
            try:
                await self._read(bucket)
            except AIQueueError as error:
                bucket.is_loaded = False
                return error
        return None

    def _fail(self, error: Exception) -> None:
        for waiter in [each for queue in self.sharing.queues.values() for each in queue]:
            self.sharing.cancel(waiter)
            waiter.done(error)

    def _heard(self, message: Received) -> None:
        """Take a document as it is stored. A copy of this process's own write tells the server's time."""
        told, now = message.headers, time.monotonic()
        sent_at = self._sent.pop(told.get(headers.MSG_ID, ""), None)
        if sent_at is not None:
            if stamp := told.get("Nats-Time-Stamp"):
                self._connection.clock.note(sent_at, now, timestamp(stamp))
            return  # the PubAck tells the rest
        bucket, seq = self._buckets.get(told.get("Nats-Subject", "")), headers.number(told.get("Nats-Sequence", ""))
        if bucket is None or seq <= bucket.seq:
            return
        try:
            self._see(bucket, seq, b"" if headers.KV_OPERATION in told else message.data)
        except ConfigMismatch as error:
            self._fail(error)
            return
        if self.sharing.queues or self.sharing.process in bucket.document.flights:
            self.wake()
