"""A worker whose handlers do what their message asks for, and record the job that they saw."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pydantic

import aiqueue
from aiqueue.errors import Stale

from .fuzzed_deliveries import KINDS

HIDDEN = "a-hidden-value"


class Shown(pydantic.BaseModel):
    n: int = 1


class Hiding(pydantic.BaseModel):
    key: pydantic.SecretStr = pydantic.SecretStr(HIDDEN)
    n: int = 1


@dataclass
class Point:
    x: int = 1


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Wrong(Exception):
    """Has a policy: it is rejected."""


class Short(Exception):
    """Has a policy: one attempt."""


class Slow(Exception):
    """Has a policy: a function of the error."""


async def later() -> str:
    await asyncio.sleep(0)
    return "awaited"


def generated() -> Any:
    yield 1


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None, "text": lambda: "text", "number": lambda: 2**70, "float": lambda: 1.5, "true": lambda: True,
    "bytes": lambda: b"\xff", "map": lambda: {"a": [1, {"b": None}]}, "list": lambda: [1, "x"], "tuple": lambda: (1, 2),
    "set": lambda: {1}, "time": lambda: datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "decimal": lambda: Decimal("1.50"),
    "model": Shown, "secret": Hiding, "secret inside": lambda: {"a": [Hiding()]}, "point": Point,
    "surrogate": lambda: {"\ud83d": "a\ud83d"}, "deep": lambda: nested(64), "too deep": lambda: nested(65),
    "object": object, "equal keys": lambda: {1: "a", "1": "b"}, "odd key": lambda: {(1, 2): 3},
    "generator": generated, "coroutine": later, "a Retry": lambda: aiqueue.Retry, "a Reject": aiqueue.Reject,
    "too large": lambda: "x" * 1_100_000,
}  # fmt: skip
ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: ValueError("bad"), "no text": Broken, "exit": lambda: SystemExit(3),
    "interrupt": KeyboardInterrupt, "surrogate error": lambda: ValueError("\ud83d"),
    "leak": lambda: ValueError(f"refused {HIDDEN}"),
    "group": lambda: ExceptionGroup("several", [ValueError("one"), Short("two")]),
    "group of end": lambda: BaseExceptionGroup("several", [Wrong("one"), SystemExit(1)]),
    "retry": aiqueue.Retry, "retry soon": lambda: aiqueue.Retry("soon", after=0.03),
    "retry late": lambda: aiqueue.Retry("late", after=60), "reject": lambda: aiqueue.Reject("never"),
    "wrong": lambda: Wrong("w"), "short": lambda: Short("s"), "slow": lambda: Slow(0.02), "slow late": lambda: Slow(90),
    "slow odd": lambda: Slow(object()), "cancelled": asyncio.CancelledError,
    "ended": lambda: Stale("theirs", ended=True), "lost": lambda: Stale("theirs", ended=False),
    "decode": lambda: aiqueue.errors.DecodeError("not mine"), "stop": StopAsyncIteration,
}  # fmt: skip


async def cancel_and_return(job: Any) -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    return "cancelled myself"


async def cancel_and_wait(job: Any) -> Any:
    await cancel_and_return(job)
    await asyncio.sleep(0)


async def cancel_soon(job: Any) -> Any:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    return "left a cancellation behind"


async def too_long(job: Any) -> Any:
    await asyncio.sleep(60 if job.kind == "timed" else 0)
    return "in time"


async def stubborn(job: Any) -> Any:
    try:
        return await too_long(job)
    except asyncio.CancelledError:
        return "late"


async def turned(job: Any) -> Any:
    try:
        return await too_long(job)
    except asyncio.CancelledError:
        raise ValueError("turned") from None


async def chunks(job: Any) -> Any:
    for part in ("a", {"b": 1}, "half \ud83d", "\ude00", "another half \ud83d"):
        await job.chunk(part)
    return "chunked"


async def chunks_and_error(job: Any) -> Any:
    await job.chunk("a")
    raise ValueError("after a chunk")


async def chunk_and_cancel(job: Any) -> Any:
    await job.chunk(Hiding())
    return await cancel_and_return(job)


async def large_chunk(job: Any) -> Any:
    await job.chunk("x" * 1_100_000)


async def progress(job: Any) -> Any:
    await job.progress(0.5, "half")
    return {"progress": 1}


async def progress_and_error(job: Any) -> Any:
    await job.progress(0.5, "half")
    raise ValueError("after progress")


async def wrong_progress(job: Any) -> Any:
    await job.progress(2)


async def edit_headers(job: Any) -> Any:
    job.headers["X-Edited"] = "1"
    raise aiqueue.Reject("with other headers")


async def cancel_job(job: Any) -> Any:
    """Have the job cancelled while it runs, and wait until its handler is."""
    if job.kind == "timed" or not await job.state.cancel(job.id, family=job.family, tenant=job.tenant):
        return "not cancelled"
    return await asyncio.sleep(60, "nobody stopped it")


async def cancel_job_and_return(job: Any) -> Any:
    try:
        return await cancel_job(job)
    except asyncio.CancelledError:
        return "in spite of it"


async def cancel_job_and_raise(job: Any) -> Any:
    try:
        return await cancel_job(job)
    except asyncio.CancelledError:
        raise ValueError("in spite of it") from None


async def foreign_document(job: Any) -> Any:
    job.open(aiqueue.Document(tenant="other", sha256="ab" * 32, size=1))


DEEDS: dict[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (
        cancel_and_return, cancel_and_wait, cancel_soon, too_long, stubborn, turned, chunks, chunks_and_error,
        chunk_and_cancel, large_chunk, progress, progress_and_error, wrong_progress, edit_headers, foreign_document,
        cancel_job, cancel_job_and_return, cancel_job_and_raise,
    )
}  # fmt: skip
SYNC_ACTS = (*VALUES, *ERRORS)
ACTS = (*SYNC_ACTS, *DEEDS)
FAMILIES = ("agent.tasks", "both.shared", "both.keyless")


def act_plainly(job: Any) -> Any:
    """Do what a job's message asks for, without waiting. Later attempts return."""
    act = job.message.act if job.attempt == 1 else "text"
    make_error = ERRORS.get(act)
    if make_error is not None:
        raise make_error()
    return VALUES[act]() if act in VALUES else f"no act: {act}"


class Acting:
    """A worker, and by tenant and job id the jobs that its handlers saw, as `describe` describes them."""

    def __init__(self, describe: Callable[[aiqueue.Job[Any]], Any], client: aiqueue.Client | None = None) -> None:
        self.seen: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
        self.faults: list[Exception] = []
        self._describe = describe

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[Any]:
            yield client

        self.worker = aiqueue.Worker(concurrency=1_000, name="actor", lifespan=lifespan)
        for family in FAMILIES:
            for kind in KINDS:
                self._add_handler(family, kind)

    def _add_handler(self, family: str, kind: str) -> None:
        class Order(aiqueue.Message, kind=kind, family=family):
            act: str = "none"
            n: int = 0

        class Hushed(Order, kind=kind, family=family):
            key: pydantic.SecretStr = pydantic.SecretStr(HIDDEN)

        async def act(job: aiqueue.Job[Any]) -> Any:
            self._note(job)
            deed = DEEDS.get(job.message.act) if job.attempt == 1 else None
            return act_plainly(job) if deed is None else await deed(job)

        def act_in_thread(job: aiqueue.Job[Any]) -> Any:
            self._note(job)
            return act_plainly(job)

        options: dict[str, Any] = {
            "retry": aiqueue.Backoff(attempts=2, first=0.03, jitter=0), "result": kind != "unkept",
            "timeout": {"timed": 1.5, "choosy": None}.get(kind, "10m"),
        }  # fmt: skip
        if kind == "choosy":
            once = aiqueue.Backoff(attempts=1)
            options["on"] = {Wrong: aiqueue.Reject, Short: once, Slow: lambda error: error.args[0]}
        declare: Any = self.worker.handle(Hushed if kind == "secret" else Order, **options)
        declare(act_in_thread if kind == "thread" else act)

    def _note(self, job: aiqueue.Job[Any]) -> None:
        try:
            self.seen[job.tenant, job.id] += [self._describe(job)]
        except Exception as fault:  # noqa: BLE001  (raised, it would be the handler's)
            self.faults.append(fault)
