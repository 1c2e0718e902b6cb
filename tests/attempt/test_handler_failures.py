"""Handlers that fail in unusual ways: every attempt counts, and nothing is repeated for ever or lost."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import pytest

import aiqueue
from aiqueue.attempt import Raised, Refused, outcome_of_error
from aiqueue.enqueue import Filter
from aiqueue.errors import BadInput, JobFailed

from ..support import create_streams, eventually
from . import handler_shapes
from .handler_shapes import FAILS

pytestmark = pytest.mark.families("agent.tasks", "agent.message", "rag.ingest")
SOON = aiqueue.Backoff(attempts=3, first=0.05, jitter=0)


class Try(aiqueue.Message, kind="try"):
    how: str = ""
    n: int = 0


class Letter(aiqueue.Message, kind="letter", family="agent.message"):
    how: str = ""


async def dead_letters(client: aiqueue.Client) -> list[Any]:
    return [letter async for letter in client.dead.find(Filter())]


@pytest.mark.parametrize("how", sorted(FAILS))
async def test_an_unusual_failure_is_tried_as_often_as_any_and_then_a_dead_letter(
    client: aiqueue.Client, how: str
) -> None:
    tries: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Try, retry=SOON)
    async def handler(job: aiqueue.Job[Try]) -> Any:
        tries.append(job.attempt)
        return await FAILS[job.message.how]()

    async with worker.running(client):
        handle = await client.enqueue(Try(how=how), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await handle.result(30)
    assert tries == [1, 2, 3]
    assert failed.value.reason == "attempts"
    (letter,) = await dead_letters(client)
    assert (letter.reason, letter.attempt) == ("attempts", 3)


@pytest.mark.parametrize("how", sorted(FAILS))
async def test_an_unusual_failure_of_mail_is_tried_and_dead_lettered_and_its_conversation_goes_on(
    client: aiqueue.Client, how: str
) -> None:
    tries: list[int] = []
    handled = asyncio.Event()
    agent, other = aiqueue.Agent("bob", tenant="acme"), aiqueue.Agent("alice", tenant="acme")

    @agent.handle(Letter, retry=SOON)
    async def letter(mail: Any) -> Any:
        if not mail.message.how:
            handled.set()
            return None
        tries.append(mail.attempt)
        return await FAILS[mail.message.how]()

    async with agent.running(client), other.running(client):
        await other.send(Letter(how=how), to="bob", conversation="c")
        await other.send(Letter(), to="bob", conversation="c")
        async with asyncio.timeout(30):
            await handled.wait()
    assert tries == [1, 2, 3]
    (dead,) = await dead_letters(client)
    assert (dead.reason, dead.attempt) == ("attempts", 3)


async def test_a_cancellation_left_behind_by_a_handler_does_not_reach_the_writing_of_its_result(
    client: aiqueue.Client,
) -> None:
    """The timer fires a little after the handler's end, at one time or another of the settlement."""
    runs: list[int] = []
    worker = aiqueue.Worker(concurrency=50)

    @worker.handle(Try)
    async def handler(job: aiqueue.Job[Try]) -> int:
        runs.append(job.message.n)
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(job.message.n * 0.0002, task.cancel)
        return job.message.n

    async with worker.running(client):
        handles = [await client.enqueue(Try(n=n), tenant="acme") for n in range(100)]
        assert [await handle.result(30) for handle in handles] == list(range(100))
    assert sorted(runs) == list(range(100))


async def test_a_job_interrupted_by_the_drain_is_no_failed_attempt(client: aiqueue.Client) -> None:
    attempts: list[int] = []
    begun = asyncio.Event()

    def build(*, waits: bool) -> aiqueue.Worker:
        worker = aiqueue.Worker(drain_timeout="0.1s")

        @worker.handle(Try)
        async def handler(job: aiqueue.Job[Try]) -> str:
            attempts.append(job.attempt)
            begun.set()
            if waits:
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(60))
            return "done"

        return worker

    async with build(waits=True).running(client):
        handle = await client.enqueue(Try(), tenant="acme")
        await begun.wait()
    async with build(waits=False).running(client):
        assert await handle.result(30) == "done"
    assert attempts == [1, 1]


def test_a_loop_that_ends_with_its_worker_in_a_task_leaves_the_job_uncounted(account: Any) -> None:
    """`asyncio.run` cancels all tasks at once, the handlers' too: they did not cancel themselves."""
    attempts: list[int] = []

    async def serve(begun: asyncio.Event, *, waits: bool) -> None:
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
            worker = aiqueue.Worker(drain_timeout="0.1s")

            @worker.handle(Try)
            async def handler(job: aiqueue.Job[Try]) -> None:
                attempts.append(job.attempt)
                begun.set()
                if waits:
                    await asyncio.sleep(60)

            if waits:
                await client.enqueue(Try(), tenant="acme")
            await worker.run(client, until=asyncio.Event().wait())

    async def main(*, waits: bool) -> None:
        begun = asyncio.Event()
        serving = asyncio.create_task(serve(begun, waits=waits))
        async with asyncio.timeout(30):
            await begun.wait()
        assert not serving.done()

    asyncio.run(main(waits=True))
    asyncio.run(main(waits=False))
    assert attempts == [1, 1]


async def test_no_job_sees_a_context_variable_of_another_one(client: aiqueue.Client) -> None:
    """Of 50 tenants, on the loop and in threads: a job starts inside the task of the job whose slot it takes."""
    tenant_var: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="")
    leaks: list[tuple[str, str]] = []
    ran = 0
    worker = aiqueue.Worker(concurrency=10)

    def note(tenant: str) -> None:
        nonlocal ran
        if tenant_var.get():
            leaks.append((tenant, tenant_var.get()))
        tenant_var.set(tenant)
        ran += 1

    @worker.handle(Try, result=False)
    async def on_the_loop(job: aiqueue.Job[Try]) -> None:
        note(job.tenant)
        await asyncio.sleep(0)
        if tenant_var.get() != job.tenant:
            leaks.append((job.tenant, tenant_var.get()))

    class InThread(aiqueue.Message, kind="in-thread"):
        pass

    @worker.handle(InThread, result=False)
    def in_a_thread(job: aiqueue.Job[InThread]) -> None:
        note(job.tenant)

    total = 2_000
    async with worker.running(client):
        for n in range(total // 2):
            await client.enqueue(Try(), tenant=f"t{n % 50}")
            await client.enqueue(InThread(), tenant=f"t{n % 50}")
        await eventually(lambda: ran == total, within=60)
    assert leaks == []


async def test_no_mail_sees_a_context_variable_of_another_one(client: aiqueue.Client) -> None:
    seen: list[str] = []
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("conversation", default="")
    agent, other = aiqueue.Agent("bob", tenant="acme", concurrency=3), aiqueue.Agent("alice", tenant="acme")

    @agent.handle(Letter)
    async def letter(mail: Any) -> None:
        seen.append(variable.get())
        variable.set(mail.conversation)

    async with agent.running(client), other.running(client):
        for n in range(60):
            await other.send(Letter(), to="bob", conversation=f"c{n % 7}")
        await eventually(lambda: len(seen) == 60)
    assert set(seen) == {""}


@pytest.mark.parametrize("keeps", [True, False], ids=["result", "no result"])
async def test_a_plain_decorator_around_an_async_function_runs_its_body_within_the_timeout(
    client: aiqueue.Client, *, keeps: bool
) -> None:
    """In a thread the call only makes a coroutine; the worker awaits the coroutine."""

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*arguments)

        return call

    ran: list[int] = []
    worker = aiqueue.Worker()

    async def body(job: aiqueue.Job[Try]) -> str:
        await asyncio.sleep(job.message.n)
        ran.append(job.message.n)
        return "from the body"

    worker.handle(Try, timeout=0.5, retry=aiqueue.Backoff(attempts=1), result=keeps)(plain(body))
    async with worker.running(client):
        handle = await client.enqueue(Try(n=0), tenant="acme")
        if keeps:
            assert await handle.result(30) == "from the body"
        await eventually(lambda: ran == [0])
        with pytest.raises(JobFailed, match=r"timed out after 0\.5 s"):
            await (await client.enqueue(Try(n=60), tenant="acme")).result(30)
    assert ran == [0]


def _generator(job: Any) -> Iterator[int]:
    yield 1


async def _async_generator(job: Any) -> AsyncIterator[int]:
    yield 1


class _AsCall:
    async def __call__(self, job: Any) -> AsyncIterator[int]:
        yield 1


def _nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (_generator, "is a generator function"),
        (_async_generator, "is a generator function"),
        (_AsCall(), "is a generator function"),
        (functools.partial(_generator), "is a generator function"),
        (_nothing, "must take one argument"),
        (lambda a, b: None, "must take one argument"),
        (5, "must be a function of one argument"),
        (Try, "must be a function of one argument"),
    ],
)
def test_what_cannot_be_a_handler_is_refused_where_it_is_registered(function: Any, problem: str) -> None:
    for register in (aiqueue.Worker().handle(Try), aiqueue.Agent("a", tenant="t").handle(Letter)):
        with pytest.raises(BadInput, match=problem):
            register(function)


@pytest.mark.parametrize("retry", [3, "3", aiqueue.Backoff, 2.5])
def test_a_retry_that_is_no_backoff_is_refused_where_it_is_registered(retry: Any) -> None:
    for declare in (aiqueue.Worker().handle, aiqueue.Agent("a", tenant="t").handle):
        with pytest.raises(BadInput, match="retry must be a Backoff"):
            declare(Letter, retry=retry)


async def _returns_a_generator(job: Any) -> Any:
    return (n for n in range(3))


def _returns_a_generator_from_a_thread(job: Any) -> Any:
    return (n for n in range(3))


@pytest.mark.parametrize("function", [_returns_a_generator, _returns_a_generator_from_a_thread])
@pytest.mark.parametrize("keeps", [True, False], ids=["result", "no result"])
async def test_a_returned_generator_is_a_dead_letter_and_not_a_success(
    client: aiqueue.Client, function: Any, *, keeps: bool
) -> None:
    worker = aiqueue.Worker()
    worker.handle(Try, result=keeps)(function)
    async with worker.running(client):
        with pytest.raises(JobFailed, match="returned a generator") as failed:
            await (await client.enqueue(Try(), tenant="acme")).result(30)
    assert failed.value.reason == "result"


class _Evil:
    """A result whose own code raises while the result is encoded."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> NoReturn:
        raise self.error


class _EvilModel(aiqueue.Message, kind="evil"):
    def model_dump(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        raise ZeroDivisionError("while it is dumped")


class _EvilDict(dict[str, Any]):
    def items(self) -> NoReturn:  # type: ignore[override]
        raise ZeroDivisionError("while it is read")

    keys = __iter__ = items  # type: ignore[assignment]


@pytest.mark.parametrize("value", [_EvilModel(), _Evil(ZeroDivisionError()), _EvilDict(a=1), [_EvilModel()]])
async def test_a_result_whose_own_code_fails_is_a_dead_letter_at_once(client: aiqueue.Client, value: Any) -> None:
    runs: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Try)
    async def handler(job: aiqueue.Job[Try]) -> Any:
        runs.append(job.attempt)
        return value

    async with worker.running(client):
        with pytest.raises(JobFailed, match="the result cannot be kept") as failed:
            await (await client.enqueue(Try(), tenant="acme")).result(30)
    assert failed.value.reason == "result"
    assert runs == [1]


# -- what errors mean


class Busy(Exception): ...


def test_errors_that_cannot_be_read_are_failed_attempts_with_a_placeholder() -> None:
    unprintable = outcome_of_error(handler_shapes.Unprintable())
    assert isinstance(unprintable, Raised)
    assert unprintable.error == "Unprintable: (its text cannot be read: RuntimeError)"
    assert outcome_of_error(handler_shapes.BareRetry()) == Raised("the handler asked for a retry", "", None)
    assert outcome_of_error(handler_shapes.UnreadableReject()) == Raised(
        "UnreadableReject: (the error cannot be read: KeyError)", ""
    )


def test_a_reject_raised_from_an_error_keeps_its_cause() -> None:
    try:
        try:
            raise ValueError("bad input")  # noqa: TRY301
        except ValueError as error:
            raise aiqueue.Reject("never") from error
    except aiqueue.Reject as reject:
        outcome = outcome_of_error(reject)
    assert isinstance(outcome, Refused)
    assert outcome.error == "never (ValueError: bad input)"
    assert "ValueError: bad input" in outcome.trace


SLOW, SLOWER = aiqueue.Backoff(attempts=9, first="30s"), aiqueue.Backoff(attempts=2, first="30s")
POLICIES: dict[type[Exception], Any] = {
    Busy: SLOW,
    KeyError: SLOWER,
    OSError: aiqueue.Reject,
    ArithmeticError: lambda _: 7,
}


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([ValueError("x")], (Raised, None, None)),
        ([Busy("a"), Busy("b")], (Raised, None, 0)),
        ([Busy("a"), KeyError("b")], (Raised, None, 1)),
        ([KeyError("b"), ValueError("a")], (Raised, None, 1)),
        ([Busy("a"), OSError("b")], (Refused, "rejected")),
        ([Busy("a"), aiqueue.Reject("never")], (Refused, "rejected")),
        ([aiqueue.Retry("later", after=60), aiqueue.Retry("soon", after=5)], (Raised, 60.0, None)),
        ([ZeroDivisionError(), Busy("a")], (Raised, 7.0, None)),
        ([ExceptionGroup("inner", [OSError("deep")])], (Refused, "rejected")),
    ],
)
def test_a_group_of_errors_means_the_strictest_of_what_its_errors_mean(
    errors: list[Exception], expected: tuple[Any, ...]
) -> None:
    outcome = outcome_of_error(ExceptionGroup("unhandled errors in a TaskGroup", errors), POLICIES)
    if isinstance(outcome, Raised):
        assert (Raised, outcome.after_s, outcome.rule) == expected
    else:
        assert isinstance(outcome, Refused)
        assert (Refused, outcome.reason) == expected
    named = [type(each).__name__ for each in errors if not isinstance(each, ExceptionGroup)]
    assert all(name in outcome.error for name in named)


def test_a_policy_for_groups_decides_about_a_group_alone() -> None:
    policies: dict[type[Exception], Any] = {ExceptionGroup: SLOW, OSError: aiqueue.Reject}
    outcome = outcome_of_error(ExceptionGroup("both", [OSError("x")]), policies)
    assert isinstance(outcome, Raised)
    assert outcome.rule == 0


def test_a_delay_beyond_a_year_is_a_year() -> None:
    error = aiqueue.Retry("much later")
    error.after_s = 99 * 365 * 86_400.0  # as a subclass may; Retry itself refuses it
    outcome = outcome_of_error(error)
    assert isinstance(outcome, Raised)
    assert outcome.after_s == 365 * 86_400


async def test_the_time_limit_also_ends_a_handler_that_cancelled_itself_before(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Try, timeout=0.3, retry=aiqueue.Backoff(attempts=1))
    async def handler(job: aiqueue.Job[Try]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    async with worker.running(client):
        began = time.monotonic()
        with pytest.raises(JobFailed, match=r"timed out after 0\.3 s"):
            await (await client.enqueue(Try(), tenant="acme")).result(30)
        assert time.monotonic() - began < 20
