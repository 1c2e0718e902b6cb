"""``connect(headers=...)``: a function makes headers for each job; where it fails, nothing is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput
from aiqueue.job import JobSpec, add_made_headers

from ..support import Account, create_streams, eventually
from .heading import TRACE, Parent, Seen, parent, parent_in_thread, resume_trace, trace


class Ask(aiqueue.Message, kind="ask", family="gateway.requests"):
    prompt: str = ""


def connect(account: Account, headers: Any = trace) -> aiqueue.Client:
    return aiqueue.connect(account.url, user=account.user, password=account.password, headers=headers)


class Headers(dict[str, list[dict[str, str]]]):
    """The headers of ours that jobs arrived with, by kind, and a worker that records them."""

    def __init__(self, **options: Any) -> None:
        self.worker = aiqueue.Worker(**options)
        self.worker.handle(Seen)(self.see)
        self.worker.handle(Ask)(self.see)
        self.worker.around(resume_trace)

    async def see(self, job: aiqueue.Job[Any]) -> int:
        ours = {name.lower(): value for name, value in job.headers.items() if name.lower().startswith("x-")}
        self.setdefault(job.kind, []).append(ours)
        return len(self)

    def traces(self, kind: str) -> list[str]:
        return sorted(each["x-trace"] for each in self.get(kind, []))


async def test_each_way_of_enqueueing_has_the_headers_that_the_function_makes_of_the_message(account: Account) -> None:
    seen = Headers()
    async with connect(account) as client:
        await create_streams(client)
        TRACE.set("plain")
        await client.enqueue(Seen(), tenant="acme")
        TRACE.set("delayed")
        await client.enqueue(Seen(), tenant="acme", delay="1ms")
        TRACE.set("rerun")
        await client.enqueue(Seen(), tenant="acme", unique="x", on_duplicate="rerun")
        TRACE.set("many")
        async for outcome in client.enqueue_many([Seen(), JobSpec(Seen(), headers={"X-Kind": "its own"})], tenant="a"):
            assert isinstance(outcome, aiqueue.Handle), outcome
        TRACE.set("schedule")
        await client.schedules.add("daily", aiqueue.Cron("0 6 * * *"), Seen(), tenant="acme")
        await client.schedules.run_now("daily", tenant="acme")
        async with seen.worker.running(client), aiqueue.Responder(families=["gateway.requests"]).running(client):
            TRACE.set("request")
            await client.request(Ask(), tenant="acme", timeout=25)
            await eventually(lambda: len(seen.get("seen", [])) == 6)
    assert seen.traces("seen") == ["delayed", "many", "many", "plain", "rerun", "schedule"]
    assert seen["ask"] == [{"x-trace": "request", "x-kind": "ask"}]
    assert sorted(each["x-kind"] for each in seen["seen"]) == ["its own", *["seen"] * 5]


def test_a_header_of_the_call_replaces_the_made_one_in_whatever_case_its_name_is() -> None:
    made = add_made_headers(lambda message: {"X-Kind": "made", "X-Trace": "made"}, Seen(), {"x-kind": "given"})
    assert made == {"X-Trace": "made", "x-kind": "given"}


async def test_the_sync_client_makes_headers_in_the_context_of_its_caller(account: Account) -> None:
    seen = Headers()

    def enqueue() -> None:
        TRACE.set("sync")
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password, headers=trace) as client:
            client.enqueue(Seen(), tenant="acme")
            assert len(list(client.enqueue_many([Seen(), Seen()], tenant="acme"))) == 2

    async with connect(account) as client:
        await create_streams(client)
        await asyncio.to_thread(enqueue)
        async with seen.worker.running(client):
            await eventually(lambda: seen.traces("seen") == ["sync"] * 3)


@pytest.mark.parametrize(
    ("handler", "process"),
    [(parent, False), (parent_in_thread, False), (parent, True), (parent_in_thread, True)],
    ids=["async", "thread", "async in a process", "plain in a process"],
)
async def test_children_have_headers_made_within_what_is_around_their_parents_handler(
    account: Account, handler: Callable[..., Any], process: bool
) -> None:
    seen = Headers(processes=1)
    seen.worker.handle(Parent, process=process)(handler)
    async with connect(account) as client:
        await create_streams(client)
        TRACE.set("web")
        async with seen.worker.running(client):
            await (await client.enqueue(Parent(), tenant="acme")).result(25)
            await eventually(lambda: seen.traces("seen") == ["web/parent", "web/parent"])
    assert sorted(each["x-kind"] for each in seen["seen"]) == ["seen", "the parent's own"]


async def test_the_message_that_a_function_makes_of_a_tick_has_headers_and_one_that_is_declared_only_its_own(
    account: Account,
) -> None:
    seen = Headers(owner="billing")

    @seen.worker.schedule(aiqueue.Once(datetime.now(UTC) + timedelta(seconds=1)), tenant="acme")
    def of_a_tick(tick: aiqueue.Tick) -> Seen:
        TRACE.set("tick")
        return Seen()

    own = {"X-Trace": "declared"}
    seen.worker.schedule(
        aiqueue.Once(datetime.now(UTC) + timedelta(seconds=1)), Seen(), tenant="acme", id="declared", headers=own
    )
    async with connect(account) as client:
        await create_streams(client)
        async with seen.worker.running(client):
            await eventually(lambda: len(seen.get("seen", [])) == 2)
    assert sorted(map(tuple, (each.items() for each in seen["seen"]))) == [
        (("x-trace", "declared"),), (("x-trace", "none"), ("x-kind", "seen"))
    ]  # fmt: skip


def broken(message: aiqueue.Message) -> dict[str, str]:
    raise LookupError("no\ntrace")


def reserved(message: aiqueue.Message) -> dict[str, str]:
    return {"Aiq-Attempt": "7"}


def servers(message: aiqueue.Message) -> dict[str, str]:
    return {"Nats-Msg-Id": "7"}


def nothing(message: aiqueue.Message) -> Any:
    return None


def numbers(message: aiqueue.Message) -> Any:
    return {"X-Number": 5}


def two_lines(message: aiqueue.Message) -> dict[str, str]:
    return {"X-Text": "two\nlines"}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (broken, "headers= of connect raised LookupError: no trace; nothing was enqueued"),
        (reserved, "header 'Aiq-Attempt' is reserved for aiqueue"),
        (servers, "header 'Nats-Msg-Id' is reserved for aiqueue"),
        (nothing, "headers= of connect returned None, which is no mapping; nothing was enqueued"),
        (numbers, "invalid value of header 'X-Number'"),
        (two_lines, "invalid value of header 'X-Text'"),
    ],
)
async def test_where_the_function_fails_nothing_is_enqueued_and_one_line_says_why(
    account: Account, make: Any, problem: str
) -> None:
    async with connect(account, make) as client:
        await create_streams(client)
        calls = [
            client.enqueue(Seen(), tenant="acme"),
            client.enqueue(Seen(), tenant="acme", delay="1h"),
            client.enqueue(Seen(), tenant="acme", unique="x", on_duplicate="rerun"),
            client.request(Ask(), tenant="acme", timeout=5),
            client.schedules.add("daily", aiqueue.Cron("0 6 * * *"), Seen(), tenant="acme"),
        ]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        errors += [each async for each in client.enqueue_many([Seen()], tenant="acme")]
        for error in errors:
            assert isinstance(error, BadInput)
            assert str(error).startswith(problem)
            assert "\n" not in str(error)
        for stream in client.topology.streams:
            info = await client.connection.api(f"STREAM.INFO.{stream}")
            assert info["state"]["messages"] == 0, stream


async def test_a_child_whose_headers_cannot_be_made_is_an_error_of_its_parents_handler(account: Account) -> None:
    def only_for_parents(message: aiqueue.Message) -> dict[str, str]:
        return {} if message.aiq_kind == "parent" else broken(message)

    worker = aiqueue.Worker()
    worker.handle(Parent, on={BadInput: aiqueue.Reject})(parent)
    async with connect(account, only_for_parents) as client:
        await create_streams(client)
        async with worker.running(client):
            with pytest.raises(aiqueue.JobFailed, match="headers= of connect raised LookupError: no trace"):
                await (await client.enqueue(Parent(), tenant="acme")).result(25)


async def coroutine_function(message: aiqueue.Message) -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [({"X-Own": "7"}, "not {'X-Own': '7'}"), (coroutine_function, "coroutine_function is async"), (lambda: None, "")],
    ids=["a mapping", "async", "other arguments"],
)
def test_what_cannot_make_headers_is_refused_where_the_client_is_made(wrong: Any, problem: str) -> None:
    with pytest.raises(BadInput, match=r"^headers= of connect must be a plain function of the message") as refused:
        aiqueue.connect("nats://127.0.0.1:1", headers=wrong)
    assert problem in str(refused.value)
    with pytest.raises(BadInput, match=r"^headers= of connect must be"):
        aiqueue.connect_sync("nats://127.0.0.1:1", headers=wrong)


async def test_a_function_that_a_child_process_cannot_find_is_refused_when_a_worker_with_process_handlers_starts(
    account: Account,
) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Parent, process=True)(parent)
    async with connect(account, lambda message: {}) as client:
        await create_streams(client)
        with pytest.raises(BadInput, match=r"headers= of connect, is not found under its name"):
            async with worker.running(client):
                pass
