"""A worker whose handlers do what their message asks for: on the event loop, in a thread, or in a child process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import pydantic

import aiqueue
from aiqueue import Backoff, Reject, Retry
from aiqueue.errors import ChildFailed

HIDDEN = "a-hidden-value"
TIMEOUT_S = 0.15


class Wrong(Exception):
    """Has a policy: it is rejected."""


class Short(Exception):
    """Has a policy: two attempts."""


class Slow(Exception):
    """Has a policy: a function of the error."""


class Faulty(Exception):
    """Has a policy that raises."""


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Fields(aiqueue.Message):
    act: str
    key: pydantic.SecretStr = pydantic.SecretStr(HIDDEN)
    document: aiqueue.Document | None = None


class OnLoop(Fields, kind="act.loop"):
    pass


class InThread(Fields, kind="act.thread"):
    pass


class InProcess(Fields, kind="act.process"):
    pass


class Timed(Fields, kind="act.timed"):
    pass


class TimedThread(Fields, kind="act.timed.thread"):
    pass


class Unkept(Fields, kind="act.unkept"):
    pass


class Typed(aiqueue.Message[list[int]], kind="act.typed"):
    act: str


class Page(aiqueue.Message[int], kind="act.page"):
    n: int


class Strict(aiqueue.Message, kind="act.strict"):
    n: int


class Loose(aiqueue.Message, kind="act.strict"):
    n: str


class Unknown(aiqueue.Message, kind="act.unknown"):
    pass


class Raw(aiqueue.Message, kind="act.raw", family="small.jobs"):
    n: int


class Elsewhere(aiqueue.Message, kind="elsewhere", family="no.such"):
    pass


@dataclass
class Point:
    x: int


around: ContextVar[str] = ContextVar("around", default="")


class Voice(Protocol):
    """A job, asked by coroutines that never wait where the handler is a plain function."""

    job: aiqueue.Job[Any]

    async def chunk(self, data: Any) -> None: ...
    async def progress(self, fraction: float, note: str = "") -> None: ...
    async def step(self, name: str, function: Any, *args: Any) -> Any: ...
    async def called(self, data: Any) -> None: ...
    async def calls(self) -> list[Any]: ...
    async def enqueue(self, message: Any, name: str, **options: Any) -> Any: ...
    async def gather(self, children: Any, **options: Any) -> list[Any]: ...
    async def sleep(self, seconds: float) -> None: ...
    async def read(self, document: aiqueue.Document) -> bytes: ...


class LoopVoice:
    def __init__(self, job: aiqueue.Job[Any]) -> None:
        self.job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def read(self, document: aiqueue.Document) -> bytes:
        return await self.job.open(document).read()


class ThreadVoice:
    def __init__(self, job: aiqueue.Job[Any]) -> None:
        self.job = job

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.job, f"{name}_sync")

        async def ask(*args: Any, **options: Any) -> Any:
            return function(*args, **options)

        return ask

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def read(self, document: aiqueue.Document) -> bytes:
        return self.job.open_sync(document).read()


ACTS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {}


def act(function: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
    ACTS[function.__name__.rstrip("_")] = function


def returning(name: str, make: Callable[[], Any]) -> None:
    async def give(_: Any) -> Any:
        return make()

    ACTS[name] = give


def raising(name: str, make: Callable[[], BaseException]) -> None:
    async def fail(_: Any) -> None:
        raise make()

    ACTS[name] = fail


class Shown(pydantic.BaseModel):
    n: int = 1
    key: pydantic.SecretStr = pydantic.SecretStr(HIDDEN)


def generated() -> Any:
    yield 1


async def later() -> str:
    return "awaited"


returning("what is set around", around.get)
raising("an error that is suppressed around", ZeroDivisionError)
raising("an error that is replaced around", KeyError)
returning("nothing", lambda: None)
returning("text", lambda: "text")
returning("a map", lambda: {"a": [1, 2.5, b"x", (1, 2)], 3: None})
returning("a time", lambda: datetime(2026, 1, 2, tzinfo=UTC))
returning("a model", Shown)
returning("a dataclass", lambda: Point(1))
returning("much", lambda: "x" * 300_000)
returning("what cannot be kept", lambda: {"a": object()})
returning("a retry", lambda: Retry("not raised"))
returning("a generator", generated)
returning("a coroutine", later)
raising("an error", lambda: ValueError("bad"))
raising("an error of several lines", lambda: ValueError("bad\nworse"))
raising("an error without text", Broken)
raising("retry", lambda: Retry("later"))
raising("retry in a moment", lambda: Retry(after=0.01))
raising("retry in an hour", lambda: Retry("busy", after="1h"))
raising("retry with a pause of no key", lambda: Retry("busy", after=30, pause="key"))
raising("reject", lambda: Reject("never"))
raising("what a policy rejects", lambda: Wrong("wrong"))
raising("what a policy retries twice", lambda: Short("short"))
raising("what a policy delays", lambda: Slow("slow"))
raising("what a faulty policy decides", lambda: Faulty("faulty"))
raising("a group", lambda: ExceptionGroup("several", [ValueError("bad"), Short("short")]))
raising("a group with a rejected one", lambda: ExceptionGroup("several", [ValueError("bad"), Wrong("wrong")]))
raising("exit", lambda: SystemExit(3))
raising("a cancellation from within", asyncio.CancelledError)


@act
async def reject_from_a_cause(_: Voice) -> None:
    try:
        raise ValueError("the cause")  # noqa: TRY301
    except ValueError as error:
        raise Reject("never") from error


@act
async def say_the_secret(voice: Voice) -> None:
    raise ValueError(f"refused {voice.job.message.key.get_secret_value()}")


@act
async def chunks(voice: Voice) -> str:
    for each in ("a", {"x": [1]}, b"raw", None, Shown(), "\ud83d", "\ude00"):
        await voice.chunk(each)
    await voice.progress(0.5, "half")
    await voice.progress(1)
    return "streamed"


@act
async def chunks_then_fail(voice: Voice) -> None:
    await voice.chunk(f"attempt {voice.job.attempt}")
    raise ValueError("bad")


@act
async def half_a_character(voice: Voice) -> None:
    await voice.chunk("x\ud83d")


@act
async def a_chunk_that_cannot_be_sent(voice: Voice) -> None:
    await voice.chunk(object())


@act
async def a_chunk_that_is_too_large(voice: Voice) -> None:
    await voice.chunk("x" * 1_100_000)


@act
async def progress_above_one(voice: Voice) -> None:
    await voice.progress(2)


@act
async def steps_are_kept(voice: Voice) -> Any:
    first = await voice.step("first", lambda: {"n": (1, voice.job.attempt)})
    if voice.job.attempt == 1:
        raise ValueError("after the first")
    return [first, await voice.step("second", lambda: "two")]


@act
async def one_step_twice(voice: Voice) -> None:
    await voice.step("same", lambda: 1)
    await voice.step("same", lambda: 1)


@act
async def a_step_that_cannot_be_kept(voice: Voice) -> None:
    await voice.step("odd", object)


@act
async def a_step_that_fails(voice: Voice) -> None:
    def fail() -> None:
        raise Reject("in a step")

    await voice.step("fails", fail)


@act
async def calls_are_noted(voice: Voice) -> list[Any]:
    found = await voice.calls()
    if voice.job.attempt < 3:
        await voice.called({"n": voice.job.attempt})
        raise ValueError("not yet")
    return found


@act
async def settle_and_return(voice: Voice) -> None:
    voice.job.settle(3)


@act
async def settle_badly(voice: Voice) -> None:
    voice.job.settle(-1)


@act
async def gather_children(voice: Voice) -> list[Any]:
    return await voice.gather([("one", Page(n=1)), ("two", Page(n=2))])


@act
async def gather_a_failed_child(voice: Voice) -> list[Any]:
    found = await voice.gather([("one", Page(n=1)), ("bad", Page(n=-1))], on_failed="return")
    assert isinstance(found[1], ChildFailed)
    return [found[0], found[1].name, found[1].reason, found[1].attempt]


@act
async def gather_and_fail_with_a_child(voice: Voice) -> list[Any]:
    return await voice.gather([("bad", Page(n=-1))])


@act
async def gather_what_was_enqueued(voice: Voice) -> list[Any]:
    child = await voice.enqueue(Page(n=5), "five", priority="low", headers={"trace": "7"})
    return [child.name, child.priority, *await voice.gather([child])]


@act
async def enqueue_one_child_twice(voice: Voice) -> None:
    await voice.enqueue(Page(n=5), "five")
    await voice.enqueue(Page(n=6), "five")


@act
async def enqueue_a_child_of_an_unknown_family(voice: Voice) -> None:
    await voice.enqueue(Elsewhere(), "odd")


@act
async def read_a_document(voice: Voice) -> bytes:
    return await voice.read(voice.job.message.document)


@act
async def what_the_job_says(voice: Voice) -> dict[str, Any]:
    job = voice.job
    shown = {name: job.headers.get(name) for name in ("trace", "Aiq-Kind", "Aiq-Job-Id", "Content-Type", "Aiq-Unique")}
    return {
        "id": job.id, "kind": job.kind, "family": job.family, "tenant": job.tenant, "priority": job.priority,
        "attempt": job.attempt, "deadline": job.deadline is not None, "state": job.state, "headers": shown,
        "message": type(job.message).__name__, "cancelled": job.cancelled, "names": sorted(job.headers),
    }  # fmt: skip


async def sleep_too_long(voice: Voice) -> None:
    await voice.sleep(TIMEOUT_S + 0.15)


async def swallow_the_timeout(voice: Voice) -> str:
    try:
        await voice.sleep(TIMEOUT_S + 0.15)
    except asyncio.CancelledError:
        return "swallowed"
    return "slept"


LATE = {each.__name__: each for each in (sleep_too_long, swallow_the_timeout)}


@asynccontextmanager
async def lifespan() -> AsyncIterator[dict[str, int]]:
    yield {"state": 1}


def faulty_policy(_: Exception) -> float:
    raise RuntimeError("no policy")


ON: Any = {Wrong: Reject, Short: Backoff(attempts=2, first=0.01), Slow: lambda _: "30s", Faulty: faulty_policy}
OPTIONS: Any = {"on": ON, "retry": Backoff(attempts=3, first=0.02, factor=1, jitter=0.5), "timeout": "20s"}

worker = aiqueue.Worker(families=["agent.tasks", "small.jobs"], lifespan=lifespan, processes=2)


@worker.around
@contextmanager
def suppress(job: aiqueue.Job[Any]) -> Iterator[None]:
    around.set("plain")
    with contextlib.suppress(ArithmeticError):
        yield


@worker.around
@asynccontextmanager
async def replace(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    try:
        yield
    except LookupError as error:
        raise Reject("replaced") from error


@worker.handle(OnLoop, **OPTIONS)
async def on_loop(job: aiqueue.Job[OnLoop]) -> Any:
    return await ACTS[job.message.act](LoopVoice(job))


@worker.handle(InThread, **OPTIONS)
def in_thread(job: aiqueue.Job[InThread]) -> Any:
    return drive(ACTS[job.message.act](ThreadVoice(job)))


@worker.handle(InProcess, **OPTIONS, process=True)
def in_process(job: aiqueue.Job[InProcess]) -> Any:
    return drive(ACTS[job.message.act](ThreadVoice(job)))


@worker.handle(Unkept, **OPTIONS, result=False)
async def unkept(job: aiqueue.Job[Unkept]) -> Any:
    return await ACTS[job.message.act](LoopVoice(job))


@worker.handle(Timed, **{**OPTIONS, "timeout": TIMEOUT_S})
async def timed(job: aiqueue.Job[Timed]) -> Any:
    return await LATE[job.message.act](LoopVoice(job))


@worker.handle(TimedThread, **{**OPTIONS, "timeout": TIMEOUT_S})
def timed_thread(job: aiqueue.Job[TimedThread]) -> Any:
    return drive(LATE[job.message.act](ThreadVoice(job)))


@worker.handle(Typed)
async def typed(job: aiqueue.Job[Typed]) -> list[int]:
    return [1, 2] if job.message.act == "right" else ["no"]  # type: ignore[list-item]


@worker.handle(Page)
async def page(job: aiqueue.Job[Page]) -> int:
    if job.message.n < 0:
        raise Reject("no such page")
    return job.message.n * 10


@worker.handle(Strict)
async def strict(job: aiqueue.Job[Strict]) -> None:
    raise AssertionError


@worker.handle_any("small.jobs")
async def raw(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
    return [job.kind, job.message.content_type, job.message.decode(), len(job.message.body)]


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits, and return what it returns."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")
