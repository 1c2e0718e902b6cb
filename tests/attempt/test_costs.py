"""What a call uses at most: the functions that handlers are declared with, and what wrong ones make of a job."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import aiqueue
from aiqueue import attempt
from aiqueue.attempt import DecodedJob, Handler, Raised, RawJob, Refused, cost_of, outcome_from_plain, outcome_to_plain
from aiqueue.errors import BadInput, DecodeError
from aiqueue.topology import Topology

from ..support import Account, create_streams

pytestmark = pytest.mark.families("agent.tasks")
LIMITED = """
[family]
name = "llm.calls"
default_kind = "llm.call"
limit_key = "model"
[stream]
name = "LLM_CALLS"
storage = "memory"
"""


class Call(aiqueue.Message, kind="llm.call", family="llm.calls"):
    model: str = "large"
    max_tokens: int = 0
    hidden: SecretStr = SecretStr("sesame-9127")


class Unlimited(aiqueue.Message, kind="unlimited"):
    max_tokens: int = 0


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Costs:
    """A function that is an object."""

    def __call__(self, message: Call) -> float:
        return message.max_tokens / 2


def fails(error: BaseException) -> Any:
    def cost(message: Any) -> float:
        raise error

    return cost


async def handle(job: aiqueue.Job[Any]) -> None: ...


def handler_with(cost: Any) -> Handler:
    worker = aiqueue.Worker()
    worker.handle(Call, cost=cost)(handle)
    return worker.handlers[0]


def unchecked(cost: Any) -> Handler:
    return dataclasses.replace(handler_with(None), cost=cost)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (None, 0.0), (lambda m: m.max_tokens, 70.0), (lambda m: 0, 0.0), (lambda m: 0.5, 0.5), (lambda m: 10**15, 1e15),
        (Costs(), 35.0), (functools.partial(lambda factor, m: factor * m.max_tokens, 2), 140.0),
    ],
)  # fmt: skip
def test_the_cost_of_a_call_is_what_its_function_says_of_the_message_and_0_without_one(
    cost: Any, expected: float
) -> None:
    found = cost_of(handler_with(cost), Call(max_tokens=70))
    assert found == expected
    assert type(found) is float


@pytest.mark.parametrize(
    ("cost", "error"),
    [
        (lambda m: float("nan"), "returned nan, which is not a number from 0 to 1e+15"),
        (lambda m: -1, "returned -1, which is not a number"),
        (lambda m: float("inf"), "returned inf, which is not a number"),
        (lambda m: 10**16, "returned 10000000000000000, which is not a number"),
        (lambda m: 10**9_999, "raised ValueError"),  # has too many digits to be shown
        (lambda m: True, "returned bool, which is not a number"),
        (lambda m: None, "returned NoneType, which is not a number"),
        (lambda m: m.model, "returned str, which is not a number"),
        (lambda m: asyncio.sleep(0), "returned coroutine, which is not a number"),
        (lambda m: m.no_such_field, "raised AttributeError: 'Call' object has no attribute 'no_such_field'"),
        (fails(KeyError("price")), "raised KeyError: 'price'"),
        (fails(SystemExit(3)), "raised SystemExit: 3"),
        (fails(asyncio.CancelledError()), "raised CancelledError"),
        (fails(Broken()), "raised Broken: (its text cannot be read: RuntimeError)"),
        (fails(ValueError("two\nlines")), "raised ValueError: two lines"),
    ],
)
def test_a_cost_function_that_fails_or_returns_no_cost_refuses_the_job_in_one_line(cost: Any, error: str) -> None:
    refused = cost_of(unchecked(cost), Call())
    assert isinstance(refused, Refused)
    assert refused.reason == "cost"
    assert refused.error.startswith(f"the cost function of kind 'llm.call' {error}")
    assert refused.error.endswith(": correct the function, and replay the dead letter")
    assert "\n" not in refused.error


def test_the_trace_of_a_cost_function_that_fails_begins_in_the_function() -> None:
    refused = cost_of(unchecked(fails(KeyError("price"))), Call())
    assert isinstance(refused, Refused)
    assert "in cost\n" in refused.trace
    assert "attempt/costs.py" not in refused.trace


def test_a_refusal_of_a_cost_function_shows_no_secret_of_the_message() -> None:
    def cost(message: Call) -> float:
        raise ValueError(f"no price for {message.hidden.get_secret_value()}")

    handler = unchecked(cost)
    data = {"model": "large", "hidden": "sesame-9127"}
    refused = cost_of(handler, attempt.read_message(handler, *raw_and_decoded(data)))
    assert isinstance(refused, Refused)
    shown = attempt.without_secrets(refused, attempt.secrets_of({}, handler), data, b"")
    assert isinstance(shown, Refused)
    assert "no price for" in shown.error
    assert "sesame-9127" in refused.error
    assert "sesame-9127" not in shown.error + shown.trace


def raw_and_decoded(data: dict[str, Any] | None, *, problem: str = "") -> tuple[RawJob, DecodedJob]:
    family = Topology.build([("llm.toml", LIMITED), *bundled()]).family("llm.calls")
    raw = RawJob(family, "acme", "normal", 1, 0.0, {}, b"body")
    return raw, DecodedJob("j1", "llm.call", None, data, problem)


def bundled() -> list[tuple[str, str]]:
    return [(each.file, Path(each.file).read_text(encoding="utf-8")) for each in Topology.load().streams.values()]


def test_the_cost_function_of_a_handler_of_every_kind_gets_the_raw_message() -> None:
    worker = aiqueue.Worker()
    worker.handle_any("llm.calls", cost=lambda message: len(message.body))(handle)
    (handler,) = worker.handlers
    assert cost_of(handler, attempt.read_message(handler, *raw_and_decoded(None))) == 4.0


@pytest.mark.parametrize("data", [None, {"max_tokens": "many"}])
def test_a_message_that_cannot_be_read_has_no_cost(data: dict[str, Any] | None) -> None:
    with pytest.raises(DecodeError):
        attempt.read_message(handler_with(lambda m: 1), *raw_and_decoded(data, problem="neither CBOR nor JSON"))


async def an_async_cost(message: Any) -> float:
    return 1.0


def a_generator_cost(message: Any) -> Any:
    yield 1.0


@pytest.mark.parametrize(
    ("cost", "error"),
    [
        (100, "cost must be a function of the message, such as lambda message: message.max_tokens, not 100"),
        ("max_tokens", "cost must be a function of the message"),
        (float, "cost must be a function of the message"),
        (lambda: 1, "must take one argument, the message"),
        (lambda m, factor: 1, "must take one argument, the message"),
        (an_async_cost, "cost must be a plain function, which the worker calls before the handler"),
        (functools.partial(an_async_cost), "cost must be a plain function"),
        (a_generator_cost, "is a generator function: return the number"),
    ],
)
@pytest.mark.parametrize("declare", ["handle", "handle_any"])
def test_what_cannot_tell_a_cost_is_refused_where_the_handler_is_declared(cost: Any, error: str, declare: str) -> None:
    worker = aiqueue.Worker()
    with pytest.raises(BadInput) as refused:
        getattr(worker, declare)(Call if declare == "handle" else "llm.calls", cost=cost)
    assert error in str(refused.value)
    assert "\n" not in str(refused.value)


async def test_a_worker_with_a_cost_in_a_family_without_limit_key_does_not_start(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    worker.handle(Unlimited, cost=lambda message: message.max_tokens)(handle)
    with pytest.raises(BadInput) as refused:
        async with worker.running(client):
            pytest.fail("it runs")
    problem = "the handler of kind 'unlimited' has a cost, and agent.tasks has no limit_key, by which jobs are limited"
    assert str(refused.value).startswith(problem)
    assert str(refused.value).endswith(
        'set limit_key in aiqueue.toml, below [overlay."agent.tasks".family], or leave cost= out'
    )


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [({}, True), ({"extra": "allow"}, False), ({"alias_generator": lambda name: "model"}, False)],
)
async def test_a_worker_whose_messages_all_lack_the_limit_key_logs_that_nothing_is_limited(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, options: dict[str, Any], *, is_warned: bool
) -> None:
    class Ask(aiqueue.Message, kind="ask", **options):
        llm: str

    settings = client.settings.with_arguments(overlay={"agent.tasks": {"family": {"limit_key": "model"}}})
    worker = aiqueue.Worker()
    worker.handle(Ask)(handle)
    async with aiqueue.connect(settings=settings) as limited, worker.running(limited):
        pass
    said = "no job of agent.tasks is limited: no Ask has its limit_key, model"
    assert (said in caplog.messages) == is_warned


async def test_a_worker_with_a_cost_in_a_family_with_limit_key_starts_also_where_no_child_could_find_the_function(
    account: Account, streams: Path
) -> None:
    (streams / "llm.toml").write_text(LIMITED)
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        worker = aiqueue.Worker(processes=1)
        worker.handle(Call, process=True, cost=lambda message: message.max_tokens)(handle)
        async with worker.running(client):
            assert await (await client.enqueue(Call(), tenant="acme")).result(25) is None


# A retry that pauses the key of its job


@pytest.mark.parametrize(
    ("error", "after_s", "pauses"),
    [
        (aiqueue.Retry("429", after="20s", pause="key"), 20.0, True),
        (aiqueue.Retry("429", after="20s"), 20.0, False),
        (aiqueue.Retry("429", after=0, pause="key"), 0.0, False),  # there is nothing to wait for
        (aiqueue.Retry(), None, False),
    ],
)
def test_a_retry_that_pauses_the_key_says_so_in_its_outcome(
    error: aiqueue.Retry, after_s: float | None, pauses: bool
) -> None:
    outcome = attempt.outcome_of_error(error)
    assert isinstance(outcome, Raised)
    assert (outcome.after_s, outcome.pauses_key) == (after_s, pauses)
    assert outcome_from_plain(outcome_to_plain(outcome)) == outcome


@pytest.mark.parametrize("pause", [5, None, object()])
def test_a_subclass_of_retry_may_use_the_name_pause_for_something_else(pause: Any) -> None:
    class Later(aiqueue.Retry):
        def __init__(self) -> None:
            super().__init__("later", after=3)
            self.pause = pause

    assert attempt.outcome_of_error(Later()) == Raised("later", "", 3.0)


def test_a_subclass_of_retry_without_its_init_may_pause_the_key() -> None:
    class TooMany(aiqueue.Retry):
        pause = "key"
        after_s = 20.0

        def __init__(self) -> None: ...

    assert attempt.outcome_of_error(TooMany()) == Raised("the handler asked for a retry", "", 20.0, pauses_key=True)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([aiqueue.Retry(after=5, pause="key"), aiqueue.Retry(after=20, pause="key")], (20.0, True)),
        ([aiqueue.Retry(after=3_600), aiqueue.Retry(after=20, pause="key")], (20.0, True)),
        ([aiqueue.Retry(after=3_600), aiqueue.Retry(after=20)], (3_600.0, False)),
        ([ValueError("x"), ExceptionGroup("inner", [aiqueue.Retry(after=20, pause="key")])], (20.0, True)),
    ],
)
def test_a_group_pauses_the_key_for_as_long_as_one_of_its_errors_asks_and_no_longer(
    errors: list[Exception], expected: tuple[float, bool]
) -> None:
    outcome = attempt.outcome_of_error(ExceptionGroup("group", errors))
    assert isinstance(outcome, Raised)
    assert (outcome.after_s, outcome.pauses_key) == expected


async def test_a_retry_that_pauses_the_key_of_a_job_without_one_is_retried_and_logged(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Unlimited)
    async def once_more(job: aiqueue.Job[Unlimited]) -> int:
        if job.attempt == 1:
            raise aiqueue.Retry("429", after="10ms", pause="key")
        return job.attempt

    async with worker.running(client):
        handle = await client.enqueue(Unlimited(), tenant="acme")
        assert await handle.result(25) == 2
    text = f'job {handle.id}: the handler raised Retry(pause="key"), which pauses nothing: family agent.tasks has no '
    assert [each for each in warnings(caplog) if "pauses nothing" in each] == [f"{text}limit_key"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
