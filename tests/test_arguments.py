"""Wrong arguments at every public function: BadInput at once, on one line, which names what was passed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput


class Task(aiqueue.Message, kind="task"):
    n: int = 0


class Plain:
    pass


PAST_A_YEAR = timedelta(days=366)
Client = aiqueue.Client
worker, agent = aiqueue.Worker, lambda **options: aiqueue.Agent("planner", **{"tenant": "acme", **options})
WRONG_MESSAGES: list[tuple[Any, str]] = [
    ({"n": 1}, "subclass of aiqueue.Message, not dict"),
    (Task, r"pass an instance, such as Task\(...\), not the class Task"),
    (aiqueue.Message, "not Message itself"),
    (aiqueue.Message(), "not Message itself"),
    (aiqueue.JobSpec(Task()), "a JobSpec is only for enqueue_many"),
    (None, "not NoneType"),
    ("task", "not str"),
    (Plain(), "not Plain"),
]
WRONG_MODELS: list[tuple[Any, str]] = [
    (len, r"not function len: use handle\(YourClass\)"),
    (lambda job: None, r"not function <lambda>"),
    (Task(), "not an instance of Task"),
    (aiqueue.Message, "needs the class of a message"),
    (Plain, "needs the class of a message"),
    ("task", "not 'task'"),
    (None, "not None"),
]
WRONG_DURATIONS = ["soon", "", -1, float("nan"), float("inf"), True, [1], timedelta(seconds=-1), "200y", object()]
WRONG_WHOLE_NUMBERS = [0, -1, 2.5, "4", True, 10**9, float("nan"), None]

DECLARED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    *((worker, {"concurrency": each}, "concurrency must be a whole number from 1") for each in WRONG_WHOLE_NUMBERS),
    *((worker, {"processes": each}, "processes must be a whole number") for each in WRONG_WHOLE_NUMBERS[:-1]),
    *((agent, {"concurrency": each}, "concurrency must be a whole number from 1") for each in WRONG_WHOLE_NUMBERS),
    *((aiqueue.Responder, {"concurrency": each}, "concurrency must be") for each in WRONG_WHOLE_NUMBERS),
    *((aiqueue.Backoff, {"attempts": each}, "attempts must be a whole number") for each in [*WRONG_WHOLE_NUMBERS]),
    *((each, {"drain_timeout": value}, "drain_timeout: .* is not a duration")
      for each in (worker, agent, aiqueue.Responder) for value in [*WRONG_DURATIONS, None]),
    *((aiqueue.Backoff, {name: value}, f"{name}: .* is not a duration")
      for name in ("first", "cap") for value in WRONG_DURATIONS),
    (aiqueue.Backoff, {"cap": PAST_A_YEAR}, "at most 365 days"),
    (aiqueue.Backoff, {"factor": "2"}, "factor must be a number"),
    (aiqueue.Backoff, {"jitter": 2}, "jitter must be from 0 to 1"),
    (aiqueue.Backoff, {"first": 5, "cap": 1}, "must not be below `first`"),
    *((aiqueue.Retry, {"after": each}, "after: .* is not a duration") for each in WRONG_DURATIONS),
    (aiqueue.Retry, {"after": PAST_A_YEAR}, "after must be at most 365 days.*Reject"),
    (aiqueue.Retry, {"after": "99d" * 4}, "after must be at most 365 days"),
    *((each, {name: value}, f"{name}")
      for each in (worker, aiqueue.Responder) for name in ("families", "tenants")
      for value in ("acme", b"acme", 5, [5], [None], {"acme": 1})),
    (worker, {"tenants": ["a.b"]}, "tenant 'a.b' must be"),
    (worker, {"name": 5}, "name must be a text"),
    (worker, {"lifespan": 5}, "lifespan must be a function"),
    (agent, {"capabilities": "plan"}, "capabilities must be a list"),
    (agent, {"capabilities": [1]}, "each of capabilities must be a text"),
    (agent, {"description": 5}, "description must be a text"),
    (agent, {"tenant": None}, "tenant None"),
    *((each.handle, {"model": value}, problem)
      for each in (worker(), agent()) for value, problem in WRONG_MODELS),
    *((each.handle, {"model": Task, "timeout": value}, "timeout: .* is not a duration")
      for each in (worker(), agent()) for value in WRONG_DURATIONS),
    *((each.handle, {"model": Task, **options}, problem)
      for each in (worker(), agent())
      for options, problem in (
          ({"timeout": 0}, "timeout must be above 0"), ({"retry": 3}, "retry must be a Backoff"),
          ({"on": 5}, "`on` must be a mapping"), ({"on": []}, "`on` must be a mapping"),
          ({"on": {5: aiqueue.Reject}}, "on: 5"), ({"on": {ValueError: 3}}, "on: ValueError"),
      )),
    (worker().handle, {"model": Task, "process": "yes"}, "process must be True or False, not 'yes'"),
    (worker().handle, {"model": Task, "result": "no"}, "result must be True or False"),
    (worker().handle, {"model": Task, "result": None}, "result must be True or False"),
]  # fmt: skip

AWARE = datetime(2030, 1, 1, tzinfo=UTC)
NAIVE = AWARE.replace(tzinfo=None)

Call = Callable[[Client], Any]
CALLED: list[tuple[str, Call, str]] = [
    *((f"enqueue {i}", lambda c, m=m: c.enqueue(m, tenant="acme"), problem)
      for i, (m, problem) in enumerate(WRONG_MESSAGES)),
    *((f"enqueue with headers {i}", lambda c, m=m: c.enqueue(m, tenant="acme", headers={"a": "b"}), problem)
      for i, (m, problem) in enumerate(WRONG_MESSAGES)),
    *((f"delayed {i}", lambda c, m=m: c.enqueue(m, tenant="acme", delay=1), problem)
      for i, (m, problem) in enumerate(WRONG_MESSAGES)),
    *((f"request {i}", lambda c, m=m: c.request(m, tenant="acme"), problem)
      for i, (m, problem) in enumerate(WRONG_MESSAGES)),
    *((f"mail {i}", lambda c, m=m: c.inboxes.send(m, tenant="acme", to="planner"), problem)
      for i, (m, problem) in enumerate(WRONG_MESSAGES)),
    *((f"{name}={value!r}", lambda c, o={name: value}: c.enqueue(Task(), tenant="acme", **o), f"{name}: .* duration")
      for name in ("deadline", "delay", "timeout") for value in WRONG_DURATIONS),
    *((f"{options}", lambda c, o=options: c.enqueue(Task(), **{"tenant": "acme", **o}), problem)
      for options, problem in (
          ({"on_full": "drop"}, 'on_full must be "raise" or "wait", not \'drop\''),
          ({"headers": "a=b"}, "headers must be a mapping"), ({"headers": 5}, "headers must be a mapping"),
          ({"headers": {"a": 5}}, "invalid value of header 'a'"), ({"headers": {5: "a"}}, "header"),
          ({"tenant": None}, "tenant None"), ({"tenant": 5}, "tenant 5"), ({"tenant": ["acme"]}, "tenant"),
          ({"priority": None}, "no priority None"), ({"priority": 5}, "no priority 5"),
          ({"priority": ["high"]}, "no priority"), ({"unique": 5}, "unique key 5"), ({"unique": ""}, "unique key ''"),
          ({"at": "tomorrow"}, "at must be a datetime"), ({"at": float("nan")}, "at must be a datetime"),
          ({"at": 1, "delay": 1}, "only one of them"), ({"delay": PAST_A_YEAR}, "at most 365 days"),
          ({"timeout": None}, "timeout: None is not a duration"),
          ({"on_duplicate": "failed", "unique": "k"}, "on_duplicate must be one of 'first'"),
          ({"on_duplicate": "rerun"}, "needs an id: pass unique="),
          *(({name: NAIVE}, f"{name}: .* has no time zone: use datetime.now") for name in ("at", "deadline")),
          *(({name: AWARE}, f"{name}: .* is a time and not a duration") for name in ("delay", "timeout")),
      )),
    *((f"many {options}", lambda c, o=options: c.enqueue_many(**{"items": [], "tenant": "acme", **o}), problem)
      for options, problem in (
          ({"items": Task()}, "items must be a list"), ({"items": 5}, "items must be a list"),
          ({"items": {"n": 1}}, "items must be a list"), ({"items": "task"}, "items must be a list"),
          ({"items": Task}, "items must be a list"), ({"tenant": "a.b"}, "tenant 'a.b'"), ({"tenant": 5}, "tenant 5"),
          ({"window": 2.5}, "window must be a whole number"), ({"window": 0}, "window must be a whole number"),
          ({"on_full": "drop"}, "on_full must be"), ({"progress": 5}, "progress must be a function"),
          ({"deadline": "soon"}, "deadline: "), ({"delay": "soon"}, "delay: "), ({"timeout": "soon"}, "timeout: "),
      )),
    *((f"{name}({value!r})", lambda c, n=name, v=value: getattr(c, n)(v), "job id")
      for name in ("job", "cancel") for value in (5, None, "", ["a"], Task())),
    *((f"{name} {options}", lambda c, n=name, o=options: getattr(c, n)("a", **o), problem)
      for name in ("job", "cancel")
      for options, problem in (
          ({"tenant": 5}, "tenant 5"), ({"family": 5}, "unknown family 5"), ({"family": ["a.b"]}, "unknown family"),
          ({"family": "agent.message"}, "has inboxes and no jobs"),
      )),
    *((f"dead letter {value!r}", lambda c, v=value: c.dead.get(v), "whole number from 1")
      for value in (0, -1, "1", None, 1.0, True)),
    ("keep", lambda c: c.documents.put(b"", tenant="acme", keep="soon"), "keep: "),
    ("expires", lambda c: c.inboxes.send(Task(), tenant="acme", to="planner", expires="soon"), "expires: "),
    ("naive", lambda c: c.inboxes.send(Task(), tenant="acme", to="planner", expires=NAIVE), "expires: .* no time zone"),
]  # fmt: skip


def assert_clear(error: BadInput, problem: str) -> None:
    assert re.search(problem, str(error)), str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("call", "options", "problem"), DECLARED)
def test_a_wrong_argument_of_a_declaration_is_refused_at_once(
    call: Callable[..., Any], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BadInput) as caught:
        call(**options)
    assert_clear(caught.value, problem)


async def test_a_wrong_argument_of_a_call_is_refused_before_anything_is_sent(client: aiqueue.Client) -> None:
    await client.enqueue(Task(), tenant="acme", unique="known")  # a template for jobs of this kind is cached now
    for name, call, problem in CALLED:
        with pytest.raises(BadInput) as caught:  # noqa: PT012  (the call itself, or what it returns, may raise)
            found = call(client)
            if inspect.isawaitable(found):
                await found
            pytest.fail(f"{name} was accepted")
        assert_clear(caught.value, problem)
    info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
    assert info["state"]["messages"] == 1


async def test_only_an_open_client_runs_workers_agents_and_responders(client: aiqueue.Client) -> None:
    runner = worker()
    runner.handle(Task)(lambda job: None)
    for each in (runner, agent(), aiqueue.Responder()):
        for wrong in (None, "nats://127.0.0.1:4222", aiqueue.SyncClient(client), aiqueue.Client(client.settings)):
            with pytest.raises(BadInput, match=r"open"):
                async with each.running(wrong):  # type: ignore[attr-defined, arg-type]
                    pytest.fail("it runs")


async def test_a_timedelta_is_a_duration_everywhere(client: aiqueue.Client) -> None:
    second = timedelta(seconds=1)
    runner = aiqueue.Worker(drain_timeout=second)
    assert runner.drain_timeout_s == aiqueue.Agent("a", tenant="acme", drain_timeout=second).drain_timeout_s == 1
    assert aiqueue.Responder(drain_timeout=second).drain_timeout_s == 1
    assert aiqueue.Backoff(first=second, cap=timedelta(minutes=1)).cap_s == 60
    assert aiqueue.Retry(after=timedelta(days=365)).after_s == 365 * 86_400

    @runner.handle(Task, timeout=timedelta(minutes=1))
    async def task(job: aiqueue.Job[Task]) -> float | None:
        return job.deadline

    assert runner.handlers[0].timeout_s == 60
    async with runner.running(client):
        handle = await client.enqueue(
            Task(), tenant="acme", deadline=timedelta(hours=1), delay=timedelta(milliseconds=1), timeout=second * 30
        )
        assert await handle.result(timedelta(seconds=30)) is not None
        (other,) = [each async for each in client.enqueue_many([Task()], tenant="acme", deadline=second * 60)]
        assert isinstance(other, aiqueue.Handle)
        assert await other.result(timedelta(seconds=30)) is not None
    await client.documents.put(b"x", tenant="acme", keep=timedelta(days=1))
    await client.inboxes.send(Task(), tenant="acme", to="planner", expires=timedelta(hours=1))
