"""Enqueueing: from a message to a stored job."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Literal, NamedTuple, TypeVar
from uuid import UUID

from .. import codec, headers, subjects
from ..connection import Connection, PubAck, block
from ..document_ref import found_in
from ..documents import Documents
from ..errors import AIQueueError, BadInput, LaneFull, QueueFull, StreamFull, Unavailable
from ..job import Message
from ..topology import Family, Topology
from ..units import seconds

HINT_EVERY_S = 20.0  # below the time after which a worker lets an idle lane go (lanes.IDLE_S)
HINTED_MAX = 10_000
FORMS_MAX = 10_000
DELAY_MAX_S = 365 * 86_400.0
FULL_FIRST_S, FULL_CAP_S = 0.05, 2.0
TRY_MIN_S = 0.05  # for a try whose caller has less time left

_STREAM_LIMITS = (("bytes", "max_bytes"), ("messages", "max_msgs"))
T = TypeVar("T")
OnFull = Literal["raise", "wait"]


class Enqueued(NamedTuple):
    """A stored job: where its message is, and whether it had been there before. One that waits for its time has `due`,
    seconds since the epoch, and the `word` of its parking.
    """

    job_id: str
    lane: subjects.Lane
    stream: str
    seq: int
    duplicate: bool
    due: float | None = None
    word: str = ""


class Attached(NamedTuple):
    """A job as it travels, its documents held: `held` are the headers that say so. `last_seq`: its stream's, before."""

    block: bytes
    body: bytes
    lane: subjects.Lane
    held: dict[str, str]
    last_seq: int


class Form(NamedTuple):
    """What all jobs of one kind in one lane have in common on the wire."""

    family: Family
    lane: subjects.Lane
    subject: str
    template: bytes  # the header block; %b where the job's id goes, %d for the deadline
    ids: int
    deadline_s: float | None
    limits: Mapping[str, int]  # of its stream, all lanes together: bytes, messages
    batched: str  # its stream, where that takes atomic batches; else empty

    def block(self, job_id: str) -> bytes:
        """The headers of one job, as they travel."""
        own = (job_id.encode(),) * self.ids
        if self.deadline_s is None:
            return self.template % own
        return self.template % (*own, round((time.time() + self.deadline_s) * 1000))


class Producer:
    """Stores jobs and tells workers about lanes that may be new to them."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self.connection = connection
        self._topology = topology
        self._hinted: dict[subjects.Lane, float] = {}
        self._forms: dict[tuple[str, str, str, str], Form] = {}
        self.documents = Documents(connection, topology)
        check_bytes = connection.settings.claim_check
        self.body_max = min(check_bytes, connection.max_payload // 2) if check_bytes else sys.maxsize

    async def enqueue(
        self,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        extra: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
        on_full: OnFull = "raise",
        timeout_s: float = 30.0,
    ) -> Enqueued:
        """Store one job; see `Client.enqueue`, which this is."""
        form = self.form(message, tenant, priority, extra, deadline)
        job_id, by_caller = identity(form.family, message, unique)
        told, body = form.block(job_id), codec.encode(message)
        end = time.monotonic() + timeout_s
        if message.aiq_documents or len(body) > self.body_max:
            attached = await self.attach(message, form, told, body, end=end, by_caller=by_caller)
            try:
                ack = await self._store(form, attached.block, attached.body, on_full, end)
            except AIQueueError as error:
                await self.detach(attached, error)
                raise
            await self.detach(attached, ack)
        else:
            ack = await self._store(form, told, body, on_full, end)
        # a fresh id can only be known to the server from an earlier try of this very call
        return Enqueued(job_id, form.lane, ack.stream, ack.seq, ack.duplicate and by_caller)

    async def _store(self, form: Form, told: bytes, body: bytes, on_full: OnFull, end: float) -> PubAck:
        self.hint(form.lane)
        wait_s = FULL_FIRST_S
        while True:  # not by `patiently`, which costs two calls more: this is the hot path
            left_s = max(TRY_MIN_S, end - time.monotonic())
            try:
                return await self.connection.store_block(
                    form.subject, told, body, stream=form.batched, timeout_s=left_s
                )
            except QueueFull as error:
                wait_s = await _wait_for_room(error, form, on_full, end, wait_s)

    # -- documents

    async def attach(
        self, message: Message, form: Form, told: bytes, body: bytes, *, end: float, by_caller: bool
    ) -> Attached:
        """Store what does not travel with the job, and hold what it needs. `detach` says later what became of it.

        Raises BadInput, NotFound, QueueFull, and Unavailable when it is not done at `end` (monotonic seconds).
        """
        documents = tuple(found_in(message)) if message.aiq_documents else ()
        large = len(body) > self.body_max
        if not documents and not large:
            return Attached(told, body, form.lane, {}, 0)
        try:
            async with asyncio.timeout(max(0.05, end - time.monotonic())) as limit:
                held = await self.documents.attach(form.lane.tenant, documents, body if large else None)
                last = 0
                if by_caller:  # so that a duplicate can be told from an earlier try of this call
                    info = await self.connection.api(f"STREAM.INFO.{form.family.stream}")
                    last = info["state"]["last_seq"]
        except TimeoutError:
            if not limit.expired():
                raise
            raise Unavailable(f"{form.lane}: the job's documents could not be stored in time") from None
        lines = "".join(f"{name}: {value}\r\n" for name, value in held.items())
        return Attached(told[:-2] + lines.encode() + told[-2:], b"" if large else body, form.lane, held, last)

    async def detach(self, attached: Attached, outcome: PubAck | AIQueueError) -> None:
        """Let go of the documents, if it is sure that no stored job names this hold."""
        if not attached.held or (isinstance(outcome, Unavailable) and outcome.maybe_stored):
            return
        if isinstance(outcome, PubAck):
            if not outcome.duplicate:
                return
            if outcome.seq > attached.last_seq:
                with contextlib.suppress(AIQueueError):
                    stored = await self.connection.get(outcome.stream, outcome.seq)
                    ref = attached.held[headers.DOCUMENT_REF]
                    if stored is not None and stored.headers.get(headers.DOCUMENT_REF) != ref:
                        await self.documents.release(attached.lane.tenant, attached.held)
                return
        await self.documents.release(attached.lane.tenant, attached.held)

    def form(
        self,
        message: Message,
        tenant: str,
        priority: str,
        extra: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
    ) -> Form:
        """The form of such jobs, made once for those without `extra` headers and deadline. Raises BadInput."""
        if extra or deadline is not None or type(tenant) is not str or type(priority) is not str:
            return self._new_form(message, tenant, priority, extra, deadline)
        key = message.aiq_kind, message.aiq_family, tenant, priority
        known = self._forms.get(key)
        if known is None:
            if len(self._forms) >= FORMS_MAX:
                self._forms.clear()
            known = self._forms[key] = self._new_form(message, tenant, priority, None, None)
        return known

    def _new_form(
        self,
        message: Message,
        tenant: str,
        priority: str,
        extra: Mapping[str, str] | None,
        deadline: str | float | None,
    ) -> Form:
        family = self._topology.family(message.aiq_family)
        lane = _lane(family, tenant, priority)
        deadline_s = None if deadline is None else duration("deadline", deadline)
        job_id, when = subjects.new_id(), subjects.new_id()  # words that stand nowhere else
        told = _headers(family, message, lane, job_id, None if deadline_s is None else when)
        told.update(_extra(family, extra))
        raw = block(told).replace(b"%", b"%%")
        template = raw.replace(job_id.encode(), b"%b").replace(when.encode(), b"%d")
        where = subjects.work(family.name, lane.tenant, lane.priority)
        config = self._topology.streams[family.stream].config
        limits = {word: config[key] for word, key in _STREAM_LIMITS if config.get(key, 0) > 0}
        batched = family.stream if config.get("allow_atomic") else ""
        return Form(family, lane, where, template, raw.count(job_id.encode()), deadline_s, limits, batched)

    def told(
        self, message: Message, tenant: str, priority: str, unique: str | None, extra: Mapping[str, str] | None
    ) -> tuple[Family, dict[str, str]]:
        """The family of a message, and the headers of its job. Raises BadInput."""
        family = self._topology.family(message.aiq_family)
        lane = _lane(family, tenant, priority)
        job_id, _ = identity(family, message, unique)
        return family, {**_headers(family, message, lane, job_id, None), **_extra(family, extra)}

    def hint(self, lane: subjects.Lane) -> None:
        """Tell workers of a lane that may be new to them, now and then. Never waits and never fails."""
        now = time.monotonic()
        if self._hinted.get(lane, -HINT_EVERY_S) + HINT_EVERY_S > now:
            return
        if len(self._hinted) >= HINTED_MAX:
            self._hinted.clear()
        try:
            self.connection.tell(subjects.hint(lane), b"")
        except Unavailable:
            return  # the poll of the workers finds the lane
        self._hinted[lane] = now


async def relocate(
    connection: Connection, to: subjects.Lane, job_id: str, seq: int, told: Mapping[str, str], body: bytes
) -> None:
    """Store a job of sequence `seq` again in another lane of its family; the caller acks it afterwards.

    Doing it twice stores one: the Msg-Id has a hop for this move. Raises QueueFull, Unavailable.
    """
    kept = headers.carried(told, ours=True)
    kept |= {
        headers.MSG_ID: subjects.msg_id(to.family, to.tenant, job_id, f"lane-{seq}"),
        headers.JOB_ID: job_id,
        headers.PRIORITY: to.priority,
    }
    await connection.publish(subjects.hint(to))
    await connection.store(subjects.work(*to), body, kept)


def identity(family: Family, message: Message, unique: str | None) -> tuple[str, bool]:
    """The job's id, and whether it is the caller's own word. Raises InvalidToken."""
    if unique is not None:
        return subjects.token("unique key", unique), True
    own = _own_key(family, message)
    return (subjects.new_id(), False) if own is None else (own, True)


def _lane(family: Family, tenant: str, priority: str) -> subjects.Lane:
    subjects.token("tenant", tenant)
    if not family.priorities:
        raise BadInput(f"family {family.name} takes no jobs (it has no priorities)")
    if priority not in family.priorities:
        raise BadInput(f"priority {priority!r} is none of {family.name}'s: {', '.join(family.priorities)}")
    return subjects.Lane(family.name, tenant, priority)


def _own_key(family: Family, message: Message) -> str | None:
    if family.key is None:
        return None
    value = message.__dict__.get(family.key) or (message.model_extra or {}).get(family.key)
    if value is None or value == "":
        return None
    if isinstance(value, UUID) or type(value) is int:
        return str(value)
    return subjects.token(family.key, value)


def _headers(
    family: Family, message: Message, lane: subjects.Lane, job_id: str, deadline: str | None
) -> dict[str, str]:
    told = {
        headers.MSG_ID: subjects.msg_id(family.name, lane.tenant, job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: message.aiq_kind,
        headers.JOB_ID: job_id,
        headers.PRIORITY: lane.priority,
    }
    if family.key:
        told[family.key] = job_id
    if deadline is not None:
        told[headers.DEADLINE] = deadline
    return told


async def patiently(store: Callable[[float], Awaitable[T]], form: Form, on_full: OnFull, timeout_s: float) -> T:
    """What `store` returns, given the seconds that are left; asked again with backoff while there is no room, if
    `on_full` says so. Raises QueueFull.
    """
    end = time.monotonic() + timeout_s
    wait_s = FULL_FIRST_S
    while True:
        try:
            return await store(max(TRY_MIN_S, end - time.monotonic()))
        except QueueFull as error:
            wait_s = await _wait_for_room(error, form, on_full, end, wait_s)


async def _wait_for_room(error: QueueFull, form: Form, on_full: OnFull, end: float, wait_s: float) -> float:
    """Wait before the next try, and return how long to wait before the one after it. Raises QueueFull."""
    left_s = end - time.monotonic()
    if on_full == "raise" or left_s <= 0:
        raise full(error, form) from None
    await asyncio.sleep(min(wait_s, left_s))
    return min(wait_s * 2, FULL_CAP_S)


def due_time(delay: str | float | None, at: datetime | float | None) -> float | None:
    """When a job is due by a caller's arguments, in seconds since the epoch; None: at once. Raises BadInput."""
    if delay is None and at is None:
        return None
    now = time.time()
    if delay is not None:
        if at is not None:
            raise BadInput("delay and at say the same thing: give one of them")
        due = now + duration("delay", delay)
    elif isinstance(at, datetime):
        if at.utcoffset() is None:
            raise BadInput(f"at: {at.isoformat()} has no time zone: give one, such as datetime.now(UTC), or seconds")
        due = at.timestamp()
    elif isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise BadInput(f"at: a datetime with a time zone, or seconds since the epoch, not {at!r}")
    else:
        due = float(at)
    if due - now > DELAY_MAX_S:
        raise BadInput(f"a job may wait for at most {DELAY_MAX_S / 86_400:.0f} days, not {(due - now) / 86_400:,.0f}")
    return due if due > now else None


def duration(what: str, value: str | float) -> float:
    """Seconds of a caller's argument. Raises BadInput, naming it."""
    try:
        return seconds(value)
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from None


def _extra(family: Family, extra: Mapping[str, str] | None) -> Mapping[str, str]:
    for name in extra or {}:
        lower = str(name).lower()
        if lower.startswith(("nats-", "aiq-", "content-type")):
            raise BadInput(f"header {name!r} is not the caller's to set")
        if lower in (headers.PRIORITY, family.key):
            argument = "priority" if lower == headers.PRIORITY else "unique"
            raise BadInput(f"header {name!r} is not the caller's to set: use the argument `{argument}`")
    return extra or {}


def full(error: QueueFull, form: Form) -> QueueFull:
    """The server's refusal, with what the caller can act on. `limit` is the declared one."""
    if isinstance(error, LaneFull):
        return LaneFull(str(form.lane), "it holds as many jobs as it may", limit=form.family.max_msgs_per_subject)
    if isinstance(error, StreamFull):
        return StreamFull(
            str(form.lane), error.reason, limit=form.limits.get("bytes" if "bytes" in error.reason else "messages")
        )
    return type(error)(str(form.lane), error.reason)
