"""Right uses of aiqueue, each with a mark: type checkers may not complain of any."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, assert_type

import pydantic

import aiqueue
from aiqueue import testing
from aiqueue.agent import Bounce, Mail
from aiqueue.bus import Msg
from aiqueue.errors import ChildCancelled, ChildFailed, ChildLost, ResultInvalid

T = TypeVar("T")
Item = aiqueue.Message | aiqueue.JobSpec


class Summary(pydantic.BaseModel):
    title: str
    words: int = 0


class LongSummary(Summary):
    chapters: list[str] = []


@dataclass
class Size:
    width: int
    height: int


class Summarise(aiqueue.Message[Summary], kind="summarise"):  # right: a model
    text: str


class Measure(aiqueue.Message[Size], kind="measure"):  # right: a dataclass
    path: str


class Embed(aiqueue.Message[list[float]], kind="embed"):  # right: a container
    text: str


class Count(aiqueue.Message[int], kind="count", family="rag.queries"):  # right: a plain type
    text: str


class Forget(aiqueue.Message[None], kind="forget"):  # right: no result
    text: str


class Find(aiqueue.Message[Summary | None], kind="find"):  # right: a union
    text: str


class Outline(aiqueue.Message[list[Summary]], kind="outline"):  # right: a list of models
    texts: list[str]


class Plain(aiqueue.Message, kind="plain"):  # right: plain data
    text: str


class Page(aiqueue.Message, Generic[T], kind="page"):  # right: a generic message without a result's type
    items: list[T]


class Sort(aiqueue.Message[list[T]], Generic[T], kind="sort"):  # right: the parameter is the result's, too
    items: list[T]


class Busy(Exception):
    after: float = 1.0


def delay_of(error: Busy) -> float:
    return error.after


@asynccontextmanager
async def lifespan() -> AsyncIterator[dict[str, str]]:
    yield {"model": "small"}


worker = aiqueue.Worker(
    families=["agent.tasks"], concurrency=10, lifespan=lifespan, drain_timeout="10s"
)  # right: worker
agent = aiqueue.Agent("a", tenant="acme", capabilities=["summaries"])  # right: agent


@worker.handle(Summarise, retry=aiqueue.Backoff(attempts=5, first="9s"), timeout="2m")  # right: async
async def summarise(job: aiqueue.Job[Summarise]) -> Summary:
    await job.progress(0.5, "reading")
    await job.chunk({"words": 1})
    if job.attempt == 1:
        raise aiqueue.Retry("busy", after="30s")
    return Summary(title=job.message.text)


@worker.handle(Measure, process=True)  # right: a plain function in a process
def measure(job: aiqueue.Job[Measure]) -> Size:
    if not job.message.path:
        raise aiqueue.Reject("no path")
    return Size(1, 2)


@worker.handle(Embed, timeout=None)  # right: a plain function in a thread
def embed(job: aiqueue.Job[Embed]) -> list[float]:
    job.progress_sync(0.1)
    return [float(len(job.message.text))]


@worker.handle(Forget, result=True, retry=None)  # right: a function that returns nothing
async def forget(job: aiqueue.Job[Forget]) -> None:
    print(job.message.text)


@worker.handle(Find, on={ValueError: aiqueue.Reject, OSError: aiqueue.Backoff(first="9s"), Busy: delay_of})  # right: on
async def find(job: aiqueue.Job[Find]) -> LongSummary | None:  # a subclass of what is declared
    return LongSummary(title="x") if job.message.text else None


@worker.handle(Plain, on={KeyError: lambda _: None})  # right: without a declared type, any result
async def plain(job: aiqueue.Job[Plain]) -> dict[str, int]:
    return {"length": len(job.message.text)}


@worker.handle(Sort[int])  # right: a parametrised message
async def sort(job: aiqueue.Job[Sort[int]]) -> list[int]:
    return sorted(job.message.items)


@worker.handle(Page[str])  # right: a parametrised message without a result's type
def page(job: aiqueue.Job[Page[str]]) -> str:
    return "".join(job.message.items)


@worker.handle(Outline)  # right: children of one type
async def outline(job: aiqueue.Job[Outline]) -> list[Summary]:
    child = await job.enqueue(Summarise(text="x"), "first", priority="high", delay="5s")
    assert_type(child, aiqueue.Child[Summary])  # right: a typed child
    base: aiqueue.Child[pydantic.BaseModel] = child  # right: covariant
    pages = [(f"page-{n}", Summarise(text=each)) for n, each in enumerate(job.message.texts)]
    assert_type(await job.gather(pages), list[Summary])  # right: pairs
    assert_type(await job.gather([child]), list[Summary])  # right: what enqueue returned
    both: list[Summary] = await job.gather([child, ("second", Summarise(text="y"))])  # right: both
    assert_type(await job.gather((("f", Forget(text="y")),)), list[None])  # right: a tuple of children without results
    assert_type(await job.gather([("plain", Plain(text="y"))]), list[Any])  # right: plain data
    assert_type(await job.gather([("sorted", Sort(items=[1]))]), list[list[int]])  # right: inferred
    mixed: list[tuple[str, aiqueue.Message]] = [("s", Summarise(text="y")), ("m", Measure(path="y"))]
    assert_type(await job.gather(mixed), list[Any])  # right: several types
    await job.gather([child, ("count", Count(text="y")), ("p", Plain(text="y"))])  # right: several types inline
    await job.gather([("a", Summarise(text="y")), ("b", Measure(path="y"))], on_failed="return")  # right: with errors
    results = await job.gather([("c", Summarise(text="y"))], on_failed="return", priority="low")
    assert_type(results, list[Summary | ChildFailed | ChildLost | ResultInvalid])  # right: errors among the results
    print(base, both, [each.title for each in results if not isinstance(each, aiqueue.AIQueueError)])  # right: narrowed
    for each in results:
        match each:
            case Summary():
                print(each.title)
            case ChildCancelled():
                print(each.name, each.error)
            case ChildFailed() | ChildLost():
                print(each.name, each.job_id)
            case _:
                assert_type(each, ResultInvalid)  # right: nothing else is left
    return await job.gather(pages)


class Ask(aiqueue.Message[str], kind="ask"):
    model: str
    max_tokens: int


class Budgeted(Ask, kind="budgeted"):
    factor: float = 1.0


def tokens_of(message: Ask) -> int:
    return message.max_tokens


def size_of(message: aiqueue.Message | aiqueue.RawMessage) -> float:
    return 1.0


@worker.handle(Ask, cost=lambda message: message.max_tokens)  # right: a cost, of the message's own fields
async def ask(job: aiqueue.Job[Ask]) -> str:
    job.settle(cost=12)  # right: not awaited
    job.settle(0.5)  # right: a float
    raise aiqueue.Retry("too many requests", after="20s", pause="key")  # right: a pause


@worker.handle(Budgeted, cost=tokens_of, process=True)  # right: a function of a base class
def budgeted(job: aiqueue.Job[Budgeted]) -> str:
    job.settle(12)  # right: the same in a plain function
    return ""


worker.handle(Page[str], cost=None)  # right: no cost
worker.handle(Plain, cost=size_of)  # right: a function of any message
worker.handle_any("llm.calls", cost=size_of)  # right: of any message too
worker.handle_any("rag.queries", cost=lambda message: len(message.body))  # right: of the raw message


def outline_sync(job: aiqueue.Job[Outline]) -> list[Summary]:
    child = job.enqueue_sync(Summarise(text="x"), "first")
    assert_type(child, aiqueue.Child[Summary])  # right: a typed child without asyncio
    failed = job.gather_sync([child], on_failed="return")
    assert_type(failed, list[Summary | ChildFailed | ChildLost | ResultInvalid])  # right: errors among the results
    return job.gather_sync([child, ("second", Summarise(text="y"))])  # right: typed results without asyncio


def any_job(job: aiqueue.Job[aiqueue.Message]) -> int:
    return job.attempt


worker.handle(Count)(any_job)  # right: a function for the jobs of every model


@worker.handle_any("agent.tasks", retry=aiqueue.Backoff(attempts=5), process=False)  # right: every kind
async def every_kind(job: aiqueue.Job[aiqueue.RawMessage]) -> int:
    return len(job.message.body) + len(job.message.decode())


@agent.handle(Summarise)  # right: a mail's handler returns no result
async def summarise_mail(mail: Mail[Summarise]) -> None:
    said = await agent.request(Plain(text="?"), to="b", reply=Plain, timeout="5s")
    await mail.reply(Plain(text=said.message.text))


@agent.handle(Bounce)  # right: a bounce
async def bounced(mail: Mail[Bounce]) -> None:
    print(mail.message.reason)


@agent.handle_any()  # right: mail of every kind
def every_mail(mail: Mail[aiqueue.RawMessage]) -> None:
    print(mail.kind, mail.message.body)


async def client_uses(client: aiqueue.Client, job: aiqueue.Job[Summarise]) -> None:
    handle = await client.enqueue(Summarise(text="x"), tenant="acme", unique="doc-1", delay="10m", priority="high")
    assert_type(handle, aiqueue.Handle[Summary])  # right: a typed handle
    assert_type(await handle.result(timeout="30s"), Summary)  # right: a typed result
    anything = await client.enqueue(Plain(text="x"), tenant="acme", at=datetime.now(UTC) + timedelta(hours=1))
    assert_type(await anything.result(), Any)  # right: plain data
    assert_type(await (await client.job("doc-1", model=Summarise)).result(5), Summary)  # right: a handle by id
    assert_type(await (await client.job("doc-1", tenant="acme")).result(), Any)  # right: a handle of any job
    rerun = await client.enqueue(Count(text="x"), tenant="acme", unique="x", on_duplicate="rerun_failed")
    assert_type(await rerun.result(), int)  # right: on_duplicate
    aiqueue.JobSpec(Count(text="x"), on_duplicate="replace", delay="5s")  # right: a spec's on_duplicate
    base: aiqueue.Handle[pydantic.BaseModel] = handle  # right: covariant
    assert_type(await client.request(Count(text="x"), tenant="acme", timeout=5), int)  # right: a request
    found = await (await client.enqueue(Find(text="x"), tenant="acme", deadline=60, on_full="wait")).result()
    assert_type(found, Summary | None)  # right: a union
    assert_type(await (await client.enqueue(Sort(items=[1]), tenant="acme")).result(), list[int])  # right: inferred
    many: Sequence[Summarise] = [Summarise(text="x"), Summarise(text="y")]
    async for outcome in client.enqueue_many(many, tenant="acme", window=10, progress=lambda stored, failed: None):
        if not isinstance(outcome, aiqueue.AIQueueError):
            assert_type(await outcome.result(), Summary)  # right: handles of many
    mixed: list[Item] = [Summarise(text="x"), aiqueue.JobSpec(Embed(text="y"), unique="y"), Plain(text="z")]
    async for any_outcome in client.enqueue_many(mixed, tenant="acme"):  # right: results of several types
        print(any_outcome)
    async for any_outcome in client.enqueue_many([Summarise(text="x"), Measure(path="y")], tenant="a"):  # right: inline
        print(any_outcome, base, await summarise(job))
    assert_type(await summarise(job), Summary)  # right: a registered function keeps its type


async def plain_uses(job: aiqueue.Job[Plain]) -> None:
    assert_type(await plain(job), dict[str, int])  # right: also without a declared type
    assert_type(aiqueue.JobSpec(Summarise(text="x"), delay=5), aiqueue.JobSpec[Summary])  # right: a spec knows the type


def specs() -> Iterator[aiqueue.JobSpec[int]]:
    yield aiqueue.JobSpec(Count(text="x"), tenant="acme")


def sync_uses(client: aiqueue.SyncClient) -> None:
    handle = client.enqueue(Measure(path="x"), tenant="acme")
    assert_type(handle.result(30), Size)  # right: a typed result without asyncio
    again = client.enqueue(Count(text="x"), tenant="acme", unique="x", on_duplicate="rerun")
    assert_type(again.result(), int)  # right: on_duplicate without asyncio
    for outcome in client.enqueue_many(specs(), window=5, on_duplicate="raise"):
        assert_type(outcome, aiqueue.SyncHandle[int] | aiqueue.AIQueueError)  # right: handles of many
    assert_type(client.job("x", model=Find).result(), Summary | None)  # right: a handle by id
    assert_type(client.request(Count(text="x"), tenant="acme", unique="1"), int)  # right: a request


async def failures(handle: aiqueue.Handle[Summary], job_id: str) -> str:
    try:
        return (await handle.result()).title
    except aiqueue.JobCancelled as cancelled:  # right: cancelled
        return cancelled.error
    except aiqueue.JobFailed as failed:  # right: failed
        return f"{failed.reason} {failed.attempt}"
    except ResultInvalid as invalid:  # right: a result of another type
        return f"{invalid.reason} {invalid.data}"


async def bus_uses(bus: aiqueue.NATSClient) -> None:
    async def callback(message: Msg) -> None:
        print(message.data)

    await bus.subscribe("ai.agent.tasks.*", queue="q", cb=callback)  # right: a callback


scheduling = aiqueue.Worker(owner="billing")


class Tidy(aiqueue.Message[Size], kind="tidy"):
    path: str = "x"


@scheduling.schedule("0 6 * * mon-fri", tz="Europe/Berlin", tenant="acme", misfire="all", bound=3)
@scheduling.handle(Tidy)
async def tidy_daily(job: aiqueue.Job[Tidy]) -> Size:
    return Size(1, 1)


@scheduling.schedule(aiqueue.Calendar(months=1), tenant="acme", overlap="skip", makes=Measure)
async def measure_monthly(tick: aiqueue.Tick) -> Measure:
    return Measure(path=f"{tick.time:%Y}")


async def scheduled_uses(job: aiqueue.Job[Tidy]) -> None:
    scheduling.schedule(timedelta(minutes=5), Measure(path="x"), tenant="acme", id="x")  # right: a message
    scheduling.schedule(aiqueue.Once(5.0), Measure(path="x"), tenant="acme", id="once")  # right: a recurrence
    assert_type(await tidy_daily(job), Size)  # right: a scheduled function keeps its type


def settings_uses(path: Path) -> None:
    aiqueue.connect("nats://localhost", creds="a.creds", ping_interval="2s")  # right: texts as in the file
    aiqueue.connect(creds=path, ping_interval=timedelta(seconds=2), claim_check=1024, user=None)  # right: values
    aiqueue.connect(settings=aiqueue.Settings(url="nats://localhost", profile="cluster"))  # right: the settings
    aiqueue.connect_sync(password="x", tls_handshake_first=True)  # right: the same without asyncio
    aiqueue.NATSClient("nats://localhost", user="x", drain_timeout="5s")  # right: settings of the bus


async def states(client: aiqueue.Client) -> aiqueue.JobState:
    stats = await (await client.job("x")).status()
    if stats.state == "in_flight":  # right: a state
        return stats.state
    return "queued"  # right: a state


@dataclass
class State:
    client: aiqueue.Client
    model: str = "small"


class LargeState(State):
    pass


@asynccontextmanager
async def open_state(client: aiqueue.Client) -> AsyncIterator[LargeState]:
    yield LargeState(client)


stateful = aiqueue.Worker(lifespan=open_state, concurrency=5)  # right: a lifespan that takes the client
assert_type(stateful, aiqueue.Worker[LargeState])  # right: the state's type is that of the lifespan
assert_type(worker, aiqueue.Worker[dict[str, str]])  # right: also without the client


@stateful.handle(Summarise)  # right: a job that knows its state
async def with_state(job: aiqueue.Job[Summarise, LargeState]) -> Summary:
    assert_type(job.state, LargeState)  # right: the state
    await job.state.client.enqueue(Plain(text=job.state.model), tenant="acme")
    return Summary(title=job.message.text)


@stateful.handle(Measure)  # right: a job that knows a base of its state
def with_base(job: aiqueue.Job[Measure, State]) -> Size:
    return Size(len(job.state.model), 1)


@stateful.handle(Plain)  # right: a job that does not know its state
async def without_state(job: aiqueue.Job[Plain]) -> None:
    print(job.state.anything)


@stateful.handle_any("agent.tasks")  # right: every kind, with the state
async def any_with_state(job: aiqueue.Job[aiqueue.RawMessage, LargeState]) -> str:
    return job.state.model


@stateful.around  # right: around, with the state
@contextmanager
def around_with_state(job: aiqueue.Job[Any, State]) -> Iterator[None]:
    print(job.state.model)
    yield


@worker.around  # right: around, of a job of any kind
@asynccontextmanager
async def around_async(job: aiqueue.Job) -> AsyncIterator[None]:
    print(job.id, job.state)
    yield


@agent.around  # right: around mail
@contextmanager
def around_mail(mail: Mail) -> Iterator[None]:
    print(mail.sender)
    yield


def trace(message: aiqueue.Message) -> dict[str, str]:
    return {"kind": message.aiq_kind}


aiqueue.connect(headers=trace, name="web")  # right: a function of headers
aiqueue.connect_sync("nats://localhost", headers=lambda message: {"kind": message.aiq_kind})  # right: a lambda


async def own_tests(settings: aiqueue.Settings) -> None:
    async with testing.client(settings, families=["agent.tasks"], ack_wait="1s") as client:  # right: a client
        found = await testing.assert_enqueued(client, Measure, count=1, within="1s", tenant="acme", path="x")
        assert_type(found[0].message, Measure)  # right: of the class that was asked for
        drained = await testing.drain(client, worker, delayed=True)  # right: a worker
        assert_type(drained.attempts[0].delay_s, float | None)  # right: what became of an attempt
        assert_type((await testing.advance(client)).ticks, int)  # right: what is due
        async with testing.spawn(client, worker, die_at="after_handler") as spawned:  # right: a point
            await spawned.died()
    done = await testing.perform(worker, Measure(path="x"), attempt=2, state=1, timeout="1s")  # right: options
    assert_type(done.result, Size)  # right: the declared result
    if done.outcome == "retry":  # right: an outcome
        assert_type(done.after_s, float | None)  # right: a delay
