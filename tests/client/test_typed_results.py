"""Results of the type that a message's class declares, wherever a result is read, and the error of a cancelled job."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pydantic
import pytest
from typing_extensions import TypedDict

import aiqueue
from aiqueue.errors import BadInput, JobCancelled, JobFailed, NotFound, ResultInvalid

from ..support import Account, Eventually


class Summary(pydantic.BaseModel):
    title: str
    at: datetime
    password: pydantic.SecretStr | None = None


AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Summarise(aiqueue.Message[Summary], kind="summarise"):
    text: str


class Lengths(aiqueue.Message[list[int]], kind="lengths"):
    texts: list[str]


class Plain(aiqueue.Message, kind="plain"):
    text: str


@dataclass
class Size:
    width: int
    made: date


class Row(TypedDict):
    day: date
    size: Size


class Measure(aiqueue.Message[Size], kind="measure"):
    text: str


class Look(aiqueue.Message[Row], kind="look"):
    text: str


class Forget(aiqueue.Message[None], kind="forget"):
    text: str


class Chapters(aiqueue.Message[list[Summary]], kind="chapters"):
    """`odd`: a result that does not fit. `fails`: no result."""

    count: int
    odd: bool = False
    fails: bool = False


class Ask(aiqueue.Message[Summary], kind="gateway.request", family="gateway.requests"):
    prompt: str
    request_id: str = ""


def serving() -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Summarise)
    async def summarise(job: aiqueue.Job[Summarise]) -> Summary:
        if job.message.text == "odd":
            return {"titel": job.message.text}  # type: ignore[return-value]
        await job.chunk({"n": 1})
        return Summary(title=job.message.text, at=AT, password=pydantic.SecretStr("hunter2"))

    @worker.handle(Lengths)
    def lengths(job: aiqueue.Job[Lengths]) -> list[int]:
        return [len(each) for each in job.message.texts]

    @worker.handle(Plain)
    async def plain(job: aiqueue.Job[Plain]) -> Summary:
        return Summary(title=job.message.text, at=AT)

    @worker.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> Summary:
        if job.message.prompt == "odd":
            return 5  # type: ignore[return-value]
        return Summary(title=job.message.prompt, at=AT)

    @worker.handle(Measure)
    async def measure(job: aiqueue.Job[Measure]) -> Size:
        return Size(len(job.message.text), AT.date())

    @worker.handle(Look)
    async def look(job: aiqueue.Job[Look]) -> Row:
        return {"day": AT.date(), "size": Size(5, AT.date())}

    @worker.handle(Forget)
    async def forget(job: aiqueue.Job[Forget]) -> None: ...

    @worker.handle(Chapters, retry=aiqueue.Backoff(attempts=1))
    async def chapters(job: aiqueue.Job[Chapters]) -> list[Summary]:
        if job.message.fails:
            raise ValueError("no chapters")
        made = [Summary(title=f"{n} {LONG}", at=AT) for n in range(job.message.count)]
        return [*made, "the end"] if job.message.odd else made  # type: ignore[list-item]

    return worker


LONG = "x" * 1_000  # 1,000 chapters are more than a message may hold


async def test_a_result_is_a_dataclass_a_typed_dict_nothing_or_a_list_of_models(client: aiqueue.Client) -> None:
    async with serving().running(client):
        assert await (await client.enqueue(Measure(text="abc"), tenant="acme")).result(25) == Size(3, AT.date())
        row = await (await client.enqueue(Look(text="x"), tenant="acme")).result(25)
        assert row == {"day": AT.date(), "size": Size(5, AT.date())}
        gone = await client.enqueue(Forget(text="x"), tenant="acme")
        assert await gone.result(25) is None  # type: ignore[func-returns-value]
        chapters = await (await client.enqueue(Chapters(count=2), tenant="acme")).result(25)
        assert chapters == [Summary(title=f"{n} {LONG}", at=AT) for n in range(2)]


async def test_a_typed_result_larger_than_a_message_is_read_wherever_results_are(
    client: aiqueue.Client, account: Account
) -> None:
    expected = [Summary(title=f"{n} {LONG}", at=AT) for n in range(1_100)]

    def use() -> None:
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as sync:
            assert sync.enqueue(Chapters(count=1_100), tenant="acme", unique="c").result(25) == expected
            assert sync.job("c", model=Chapters).result(25) == expected

    async with serving().running(client):
        handle = await client.enqueue(Chapters(count=1_100), tenant="acme", unique="c")
        assert await handle.result(25) == expected
        [entry] = [each async for each in client.connection.read("AI_RESULTS", ">")]
        assert len(entry.data) < 1_000, "the journal has a reference to the document"
        await asyncio.to_thread(use)


async def test_the_handle_of_a_rerun_is_typed_and_each_handle_has_the_result_of_its_run(
    client: aiqueue.Client,
) -> None:
    async with serving().running(client):
        first = await client.enqueue(Chapters(count=1, fails=True), tenant="acme", unique="c")
        with pytest.raises(JobFailed):
            await first.result(25)
        second = await client.enqueue(Chapters(count=1), tenant="acme", unique="c", on_duplicate="rerun_failed")
        assert [each.at for each in await second.result(25)] == [AT]
        third = await client.enqueue(Chapters(count=2), tenant="acme", unique="c", on_duplicate="rerun")
        assert [each.at for each in await third.result(25)] == [AT, AT]
        odd = await client.enqueue(Chapters(count=0, odd=True), tenant="acme", unique="c", on_duplicate="rerun")
        with pytest.raises(ResultInvalid):
            await odd.result(25)
        known = await client.enqueue(Chapters(count=9), tenant="acme", unique="c", on_duplicate="rerun_failed")
        assert known.duplicate, "a job whose result does not fit has succeeded"
        assert len(await second.result(25)) == 1
        assert len(await third.result(25)) == 2


@pytest.mark.parametrize("count", [0, 1_100])
async def test_a_result_that_does_not_fit_can_be_read_as_plain_data_of_any_size(
    client: aiqueue.Client, count: int
) -> None:
    async with serving().running(client):
        handle = await client.enqueue(Chapters(count=count, odd=True), tenant="acme")
        with pytest.raises(ResultInvalid, match=f"{count}: Input should be a valid dictionary") as caught:
            await handle.result(25)
        assert (len(caught.value.data), caught.value.data[-1]) == (count + 1, "the end")
        again = await client.job(handle.id)
        assert await again.result(25) == caught.value.data
        async with aclosing(handle.stream(timeout=25)) as items:
            assert [each.data async for each in items][-1] == caught.value.data


async def test_a_handle_gives_the_declared_type_and_plain_data_without_one(client: aiqueue.Client) -> None:
    async with serving().running(client):
        summarised = await client.enqueue(Summarise(text="x"), tenant="acme", unique="x")
        counted = await client.enqueue(Lengths(texts=["a", "bc"]), tenant="acme")
        plain = await client.enqueue(Plain(text="x"), tenant="acme")
        delayed = await client.enqueue(Summarise(text="later"), tenant="acme", delay=0.1)
        summary = await summarised.result(25)
        assert summary == Summary(title="x", at=AT, password=pydantic.SecretStr("hunter2"))
        assert await counted.result(25) == [1, 2]
        assert await plain.result(25) == {"title": "x", "at": "2026-01-02T03:04:05Z", "password": None}
        assert (await delayed.result(25)).title == "later"
        again = await client.enqueue(Summarise(text="x"), tenant="acme", unique="x")
        assert again.duplicate
        assert await again.result(25) == summary


async def test_the_handle_of_an_id_gives_the_type_of_its_model(client: aiqueue.Client) -> None:
    async with serving().running(client):
        handle = await client.enqueue(Summarise(text="x"), tenant="acme", unique="x")
        summary = await handle.result(25)
        assert await (await client.job("x", model=Summarise)).result(25) == summary
        assert (await (await client.job("x")).result(25))["title"] == "x"
        assert (await (await client.job("x", model=Plain)).result(25))["title"] == "x"  # its class declares no type
        with pytest.raises(NotFound):
            await client.job("x", model=Ask)  # of another family
        with pytest.raises(ResultInvalid):
            await (await client.job("x", model=Lengths)).result(25)
        with pytest.raises(BadInput, match="job needs the class of a message"):
            await client.job("x", model=Summary)  # type: ignore[call-overload]


async def test_a_result_that_does_not_fit_is_an_error_with_the_data_and_the_job_stays_done(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    async with serving().running(client) as session:
        handle = await client.enqueue(Summarise(text="odd"), tenant="acme")
        for _ in range(2):
            with pytest.raises(ResultInvalid, match="title: Field required") as caught:
                await handle.result(25)
            assert caught.value.data == {"titel": "odd"}
        assert (await handle.status()).state == "done"
        assert await (await client.job(handle.id)).result(25) == {"titel": "odd"}
        assert [each async for each in client.dead.find()] == []
        assert session.done == 1


async def test_the_handles_of_many_are_typed_one_by_one(client: aiqueue.Client) -> None:
    items: list[Any] = [
        Summarise(text="a"),
        aiqueue.JobSpec(Summarise(text="b"), delay=0.1),
        aiqueue.JobSpec(Lengths(texts=["abc"]), headers={"x": "y"}),
        Plain(text="d"),
        Summarise(text="e"),
    ]
    async with serving().running(client):
        results = []
        async for outcome in client.enqueue_many(items, tenant="acme"):
            assert not isinstance(outcome, aiqueue.AIQueueError)
            results.append(await outcome.result(25))
    assert [type(each) for each in results] == [Summary, Summary, list, dict, Summary]
    assert [results[0].title, results[1].title, results[2], results[4].title] == ["a", "b", [3], "e"]


async def test_a_stream_stays_plain(client: aiqueue.Client) -> None:
    async with serving().running(client):
        handle = await client.enqueue(Summarise(text="x"), tenant="acme")
        async with aclosing(handle.stream(timeout=25)) as items:
            last = [each async for each in items][-1]
    assert last.event == "result"
    assert last.data["title"] == "x"


async def test_a_request_gives_the_declared_type(client: aiqueue.Client) -> None:
    async with serving().running(client), aiqueue.Responder().running(client):
        assert await client.request(Ask(prompt="x"), tenant="acme") == Summary(title="x", at=AT)
        with pytest.raises(ResultInvalid) as caught:
            await client.request(Ask(prompt="odd"), tenant="acme")
        assert caught.value.data == 5


async def test_without_asyncio_results_are_typed_too(client: aiqueue.Client, account: Account) -> None:
    def use() -> None:
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as sync:
            handle = sync.enqueue(Summarise(text="x"), tenant="acme", unique="x")
            assert handle.result(25).title == "x"
            assert sync.job("x", model=Summarise).result(25).at == AT
            assert sync.job("x").result(25)["title"] == "x"
            assert sync.request(Ask(prompt="x"), tenant="acme", timeout=20).title == "x"
            (many,) = sync.enqueue_many([Lengths(texts=["ab"])], tenant="acme", window=5)
            assert not isinstance(many, aiqueue.AIQueueError)
            assert many.result(25) == [2]
            odd = sync.enqueue(Summarise(text="odd"), tenant="acme")
            with pytest.raises(ResultInvalid):
                odd.result(25)
            with pytest.raises(BadInput, match="window must be a whole number"):
                list(sync.enqueue_many([], tenant="acme", window=0))
            gone = sync.enqueue(Summarise(text="x"), tenant="acme", delay=60)
            assert gone.cancel()
            with pytest.raises(JobCancelled, match="was cancelled before it started"):
                gone.result(25)

    async with serving().running(client), aiqueue.Responder().running(client):
        await asyncio.to_thread(use)


async def test_the_error_of_a_cancelled_job_says_when_it_was_cancelled_and_is_a_failed_job(
    client: aiqueue.Client,
) -> None:
    started = asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Plain)
    async def plain(job: aiqueue.Job[Plain]) -> None:
        started.set()
        await asyncio.Event().wait()

    queued = await client.enqueue(Summarise(text="x"), tenant="acme", unique="q-1")
    assert await queued.cancel()
    with pytest.raises(JobFailed) as caught:
        await queued.result(25)
    assert type(caught.value) is aiqueue.JobCancelled
    assert (caught.value.reason, caught.value.attempt) == ("cancelled", 0)
    assert str(caught.value) == "job q-1 was cancelled before it started"
    async with worker.running(client):
        running = await client.enqueue(Plain(text="x"), tenant="acme", unique="r-1")
        await started.wait()
        assert await running.cancel()
        with pytest.raises(JobCancelled, match=r"^job r-1 was cancelled while running$") as caught:
            await running.result(25)
        assert caught.value.attempt == 1


async def test_a_job_that_failed_is_not_cancelled(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Plain)
    async def plain(job: aiqueue.Job[Plain]) -> None:
        raise aiqueue.Reject("cancelled")

    async with worker.running(client):
        handle = await client.enqueue(Plain(text="x"), tenant="acme")
        with pytest.raises(JobFailed) as caught:
            await handle.result(25)
    assert type(caught.value) is JobFailed
