"""How one delivery is run, and the single place that decides what becomes of its job."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import codec, headers, subjects
from .backoff import Backoff
from .connection import Connection
from .deadletter import DeadLetters, Obituary, history_of, trimmed
from .errors import AIQueueError, DecodeError, EncodeError, Stale, TooLarge
from .job import Job, Message, Reject, Retry, parse_message
from .journal import FAILED, PROGRESS, RESULT, RETRY, Entry, Journal, Writer
from .producer import relocate
from .puller import Delivery
from .threads import Threads
from .timers import Limits
from .topology import Family

log = logging.getLogger("aiqueue.runner")

UNKNOWN_KIND_DELAY_S = 5.0
UNKNOWN_KIND_PATIENCE_S = 60.0
SETTLE_AGAIN_S, SETTLE_AGAIN_MAX_S = 5.0, 600.0  # a job whose outcome could not be written comes back
UNKNOWN_SEEN_MAX = 10_000
HAND_BACK_S = 0.1
SAY_WAIT_S = 10.0
HISTORY_MAX = 50
TRACEBACK_CHARS_MAX = 4_000


@dataclass(frozen=True)
class Handler:
    """A function for a kind of message, and how it is to be run."""

    model: type[Message]
    call: Callable[[Job[Any]], Any]
    is_async: bool
    retry: Backoff
    timeout_s: float | None
    keeps_result: bool


# What came of running a delivery


@dataclass(frozen=True)
class Returned:
    """The handler's own result."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """It failed, and another attempt may succeed, `after_s` seconds later if the handler said so."""

    error: str
    trace: str
    after_s: float | None = None


@dataclass(frozen=True)
class Refused:
    """It can never succeed: `reason` is one word for machines, `error` a line for people."""

    reason: str
    error: str
    trace: str = ""


@dataclass(frozen=True)
class Unknown:
    """Nobody here knows this kind or version; a newer worker may."""

    error: str


@dataclass(frozen=True)
class Misplaced:
    """A plain publisher asked by header for a lower priority than the bare subject has."""

    priority: str


@dataclass(frozen=True)
class Ended:
    """Another attempt has ended this job already."""


@dataclass(frozen=True)
class TakenOver:
    """A newer attempt holds this job: whatever this delivery said of it would be taken for that one's word."""


@dataclass(frozen=True)
class Cancelled:
    """The worker is leaving; the job is to go to another one."""


Outcome = Returned | Raised | Refused | Unknown | Misplaced | Ended | TakenOver | Cancelled


@dataclass
class Opened:
    """What is known of a delivery once its body and journal have been looked at."""

    job_id: str
    kind: str
    data: dict[str, Any] | None = None
    version: str | None = None
    problem: str = ""
    attempt: int = 1
    history: list[dict[str, Any]] | None = None
    said: Entry | None = None  # the newest journal entry of this run, where it was looked for


class Runner:
    """Runs deliveries with the handlers of one worker."""

    def __init__(
        self,
        connection: Connection,
        journal: Journal,
        dead: DeadLetters,
        *,
        handlers: Mapping[tuple[str, str], Handler],
        families: Mapping[str, Family],
        worker: str,
        state: Any,
    ) -> None:
        self._connection = connection
        self._journal = journal
        self._dead = dead
        self._handlers = handlers
        self._families = families
        self._worker = worker
        self._state = state
        self._threads = Threads("aiqueue-handler")
        self._limits = Limits()
        self._unknown: dict[tuple[str, int], float] = {}  # jobs of unknown kind, and when each was first met

    def close(self) -> None:
        self._threads.close()

    async def run(self, delivery: Delivery) -> None:
        """Carry one delivery to its end. Never raises for anything that the message or its handler does."""
        opened: Opened | None = None
        writer: Writer | None = None
        handler: Handler | None = None
        try:
            opened = await self._open(delivery)
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            writer = self._writer(delivery, opened)
            outcome = await self._attempt(delivery, opened, handler, writer)
            try:
                await self._settle(delivery, opened, handler, writer, outcome)
            except Stale as stale:
                await self._settle(delivery, opened, handler, writer, Ended() if stale.ended else TakenOver())
        except asyncio.CancelledError:
            await self.hand_back(delivery)
            raise
        except Exception as error:
            # what became of the job could not be written: it must come back, less often each time
            delay_s = min(SETTLE_AGAIN_MAX_S, SETTLE_AGAIN_S * 2.0 ** min(delivery.delivered - 1, 16))
            trace = None if isinstance(error, AIQueueError) else error  # else it is a fault of our own
            log.warning("job in %s comes back in %g s: %s", delivery.lane.key, delay_s, error, exc_info=trace)
            await self._nak(delivery, delay_s)

    async def hand_back(self, delivery: Delivery) -> None:
        """Give a job that was not run to the next worker."""
        await self._nak(delivery, HAND_BACK_S)

    # -- before

    async def _open(self, delivery: Delivery) -> Opened:
        """Read the body and, for a job that was delivered before, what its journal says of the earlier attempts."""
        told = delivery.message.headers
        family = self._families[delivery.lane.key.family]
        opened = Opened(job_id="", kind=told.get(headers.KIND, ""))
        try:
            incoming = codec.read(
                delivery.message.data,
                content_type=told.get(headers.CONTENT_TYPE, ""),
                kind=opened.kind,
                default_kind=family.default_kind,
                aliases=family.aliases,
            )
        except DecodeError as error:
            opened.problem = error.reason
            opened.kind = opened.kind or family.default_kind
        else:
            opened.kind, opened.version, opened.data = incoming
        opened.job_id = _job_id(told, opened.data, family, delivery)
        opened.history = history_of(told)
        if delivery.delivered > 1 and family.journal:
            await self._look_back(delivery, opened, _journal_subject(family, delivery, opened))
        return opened

    async def _look_back(self, delivery: Delivery, opened: Opened, subject: str) -> None:
        """Go on from what this run's journal says of earlier attempts."""
        said = await self._journal.of_run(subject, delivery.seq, delivery.enqueued_at)
        opened.said = said
        if said is None:
            return
        if said.event == RETRY and isinstance(said.data, dict):
            opened.attempt = said.attempt + 1
            opened.history = [each for each in said.data.get("history", []) if isinstance(each, dict)]
        else:
            opened.attempt = max(1, said.attempt)

    def _writer(self, delivery: Delivery, opened: Opened) -> Writer | None:
        family = self._families[delivery.lane.key.family]
        if not family.journal:
            return None
        return self._journal.writer(
            _journal_subject(family, delivery, opened),
            run=delivery.seq,
            born=delivery.enqueued_at,
            attempt=opened.attempt,
            head=opened.said,
        )

    # -- during

    async def _attempt(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None
    ) -> Outcome:
        if opened.said is not None and opened.said.final:
            return Ended()
        told = delivery.message.headers
        family = self._families[delivery.lane.key.family]
        wished = told.get(headers.PRIORITY, "")
        if wished and family.demoted(delivery.lane.key.priority, wished):
            return Misplaced(wished)
        deadline = _deadline(told)
        if deadline is not None and time.time() >= deadline:
            return Refused("deadline", "its deadline passed before it was run")
        if opened.data is None:
            return Refused("undecodable", opened.problem)
        if handler is None:
            return Unknown(f"no handler for kind {opened.kind!r} in {family.name}")
        if not codec.known_version(opened.version, family.schema_versions):
            return Unknown(f"schema version {opened.version!r} is none of {', '.join(family.schema_versions)}")
        try:
            message = parse_message(handler.model, opened.data)
        except DecodeError as error:
            return Refused("invalid", error.reason)
        job = Job(
            message,
            job_id=opened.job_id,
            lane=subjects.Lane(family.name, _tenant(delivery), delivery.lane.key.priority),
            attempt=opened.attempt,
            enqueued_at=delivery.enqueued_at,
            deadline=deadline,
            headers=told,
            state=self._state,
            progress=_Progress(writer),
        )
        return await self._call(handler, job)

    async def _call(self, handler: Handler, job: Job[Any]) -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        limit = None if handler.timeout_s is None else self._limits.start(task, handler.timeout_s)
        try:
            if handler.is_async:
                value = await handler.call(job)
            else:
                value = await self._threads.run(lambda: handler.call(job))
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            outcome = _raised(error)
        else:
            outcome = Returned(value)
        finally:
            if limit is not None:
                self._limits.stop(limit)
        if limit is not None and limit.expired:
            # also where the handler made something else of its cancellation: the time is up
            left = task.uncancel()
            return Cancelled() if left else Raised(f"timed out after {handler.timeout_s:g} s", "")
        if task.cancelling() and not isinstance(outcome, Returned):
            return Cancelled()
        return outcome

    # -- after

    async def _settle(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, outcome: Outcome
    ) -> None:
        """The fate of a job. What it says goes to the journal, or the dead letters, before its lease is given up."""
        if isinstance(outcome, Raised | Refused) and delivery.delivered == 1 and writer is not None:
            # a consumer made anew counts deliveries from 1: what was before stands in the journal
            await self._look_back(delivery, opened, writer.subject)
            writer.attempt = opened.attempt
            if opened.said is not None and opened.said.final:
                outcome = Ended()
        match outcome:
            case Returned(value):
                await self._finish(delivery, opened, handler, writer, value)
            case Raised(error, trace, after_s):
                retry = handler.retry if handler else Backoff()
                opened.history = _with_attempt(opened, self._worker, error, trace)
                if opened.attempt >= retry.attempts:
                    await self._bury(delivery, opened, writer, "attempts", error)
                else:
                    delay_s = retry.delay_s(opened.attempt) if after_s is None else after_s
                    await self._try_again(delivery, opened, writer, error, delay_s)
            case Refused(reason, error, trace):
                opened.history = _with_attempt(opened, self._worker, error, trace)
                await self._bury(delivery, opened, writer, reason, error)
            case Unknown(error):
                if self._unknown_for_s(delivery) >= UNKNOWN_KIND_PATIENCE_S:
                    await self._bury(delivery, opened, writer, "unknown_kind", error)
                else:
                    log.warning("job %s in %s handed back: %s", opened.job_id, delivery.lane.key, error)
                    await self._nak(delivery, UNKNOWN_KIND_DELAY_S)
            case Misplaced(priority):
                to = subjects.Lane(delivery.lane.key.family, _tenant(delivery), priority)
                message = delivery.message
                await relocate(self._connection, to, opened.job_id, delivery.seq, message.headers, message.data)
                await self._ack(delivery)
            case Ended():
                await self._ack(delivery)
            case TakenOver():
                log.info("job %s attempt %d was taken over", opened.job_id, opened.attempt)
            case Cancelled():
                await self.hand_back(delivery)

    def _unknown_for_s(self, delivery: Delivery) -> float:
        """Seconds since this worker first met the job, whose kind or version it does not know."""
        now = time.monotonic()
        if len(self._unknown) >= UNKNOWN_SEEN_MAX:
            self._unknown.pop(next(iter(self._unknown)))
        return now - self._unknown.setdefault((delivery.lane.stream, delivery.seq), now)

    async def _finish(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, value: Any
    ) -> None:
        if writer is not None and handler is not None and handler.keeps_result:
            try:
                await writer.write(RESULT, value)
            except (EncodeError, TooLarge) as error:
                opened.history = _with_attempt(opened, self._worker, str(error), "")
                await self._bury(delivery, opened, writer, "result", f"the result cannot be kept: {error}")
                return
        await self._ack(delivery)

    async def _try_again(
        self, delivery: Delivery, opened: Opened, writer: Writer | None, error: str, delay_s: float
    ) -> None:
        log.info("job %s attempt %d failed, again in %.1f s: %s", opened.job_id, opened.attempt, delay_s, error)
        if writer is not None:
            told = {"error": error, "delay_s": delay_s, "history": trimmed(opened.history or [])}
            await writer.write(RETRY, told)
        await self._nak(delivery, delay_s)

    async def _bury(self, delivery: Delivery, opened: Opened, writer: Writer | None, reason: str, error: str) -> None:
        family = self._families[delivery.lane.key.family]
        key = subjects.Lane(family.name, _tenant(delivery), delivery.lane.key.priority)
        obituary = Obituary(
            job_id=opened.job_id, kind=opened.kind, lane=key, seq=delivery.seq, reason=reason, error=error,
            attempt=opened.attempt, worker=self._worker, enqueued_at=delivery.enqueued_at,
            history=opened.history or [],
        )  # fmt: skip
        await self._dead.bury(obituary, delivery.message.headers, delivery.message.data)
        log.warning("job %s of %s is a dead letter (%s): %s", opened.job_id, key, reason, error)
        if writer is not None:
            await writer.write(FAILED, {"reason": reason, "error": error, "history": trimmed(opened.history or [])})
        await self._ack(delivery)

    async def _ack(self, delivery: Delivery) -> None:
        await self._say(delivery, b"+ACK")

    async def _nak(self, delivery: Delivery, delay_s: float) -> None:
        await self._say(delivery, b'-NAK {"delay": %d}' % max(1, round(delay_s * 1e9)))

    async def _say(self, delivery: Delivery, word: bytes) -> None:
        """Tell the server, waiting a while for a lost link. Without one the lease runs out, and the journal knows."""
        try:
            if not self._connection.connected:
                await self._connection.wait_up(SAY_WAIT_S)
            self._connection.tell(delivery.reply, word)
        except AIQueueError as error:
            log.info("%s of a job in %s could not be said: %s", word[:4].decode(), delivery.lane.key, error)


class _Progress:
    def __init__(self, writer: Writer | None) -> None:
        self._writer = writer

    async def progress(self, fraction: float, note: str) -> None:
        if self._writer is not None:
            await self._writer.write(PROGRESS, {"fraction": fraction, "note": note})


def _raised(error: BaseException) -> Outcome:
    match error:
        case Retry():
            return Raised(error.reason, "", error.after_s)
        case Reject():
            return Refused("rejected", error.reason)
        case asyncio.CancelledError():
            return Raised("the handler was cancelled from within", "")
        case Stale():
            return Ended() if error.ended else TakenOver()
        case Exception():
            return Raised(_error_line(error), _trace(error))
        case _:
            return Raised(f"the handler raised {_error_line(error)}", _trace(error))


def _tenant(delivery: Delivery) -> str:
    """The subject says it: a shared lane has all tenants."""
    return delivery.message.subject.split(".")[3]


def _journal_subject(family: Family, delivery: Delivery, opened: Opened) -> str:
    assert family.journal is not None
    return subjects.journal(family.journal, _tenant(delivery), opened.job_id)


def _job_id(told: Mapping[str, str], data: Mapping[str, Any] | None, family: Family, delivery: Delivery) -> str:
    """The library's header, else the caller's own key in header or body, else what the stream knows: the same at
    every delivery.
    """
    found: Any = told.get(headers.JOB_ID)
    if not found and family.key:
        found = told.get(family.key) or (data or {}).get(family.key)
    if isinstance(found, str | int) and str(found):
        return subjects.foreign_id(str(found))
    return f"s{delivery.seq}-{int(delivery.enqueued_at * 1e6):x}"


def _deadline(told: Mapping[str, str]) -> float | None:
    value = headers.number(told.get(headers.DEADLINE, ""))
    return value / 1000 if value else None


def _with_attempt(opened: Opened, worker: str, error: str, trace: str) -> list[dict[str, Any]]:
    entry: dict[str, Any] = {"attempt": opened.attempt, "at": round(time.time(), 3), "worker": worker, "error": error}
    if trace:
        entry["traceback"] = trace
    return [*(opened.history or []), entry][-HISTORY_MAX:]


def _error_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trace(error: BaseException) -> str:
    """The traceback from the handler on, the frames of this module left out."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("aiqueue."):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return text[-TRACEBACK_CHARS_MAX:]
