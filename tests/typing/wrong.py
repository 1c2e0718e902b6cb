"""Wrong uses of aiqueue: type checkers must complain of each line that is marked, and of no other one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pydantic

import aiqueue
from aiqueue import testing
from aiqueue.agent import Mail

T = TypeVar("T")


class Summary(pydantic.BaseModel):
    title: str


@dataclass
class Size:
    width: int


class Summarise(aiqueue.Message[Summary], kind="summarise"):
    text: str


class Measure(aiqueue.Message[Size], kind="measure"):
    path: str


class Count(aiqueue.Message[int], kind="count", family="rag.queries"):
    text: str


class Forget(aiqueue.Message[None], kind="forget"):
    text: str


class Plain(aiqueue.Message, kind="plain"):
    text: str


class Sort(aiqueue.Message[list[T]], Generic[T], kind="sort"):
    items: list[T]


class TwoResults(aiqueue.Message[Summary, Size]):  # wrong: one type of results
    text: str


class OfAnother(Summarise[Size]):  # wrong: it has its result's type
    text: str


worker = aiqueue.Worker()
agent = aiqueue.Agent("a", tenant="acme")

aiqueue.Worker(concurrency="10")  # wrong: a number
aiqueue.Worker(lifespan="app:lifespan")  # wrong: a function
aiqueue.Agent("a")  # wrong: no tenant
aiqueue.Backoff(attempts="5")  # wrong: a number
aiqueue.Retry("busy", after=["30s"])  # wrong: no duration
aiqueue.Retry("busy", delay="30s")  # wrong: no such option
aiqueue.Retry("busy", after="30s", pause="family")  # wrong: no such pause
aiqueue.Retry("busy", after="30s", pause=True)  # wrong: no flag
aiqueue.Reject(after="30s")  # wrong: no such option
aiqueue.JobSpec("text", tenant="acme")  # wrong: no message
aiqueue.JobSpec(Plain(text="x"), "acme")  # wrong: options have names


@worker.handle(Summarise)  # wrong: another result than declared
async def another_result(job: aiqueue.Job[Summarise]) -> int:
    return 5


@worker.handle(Summarise)  # wrong: a function that returns nothing
async def no_result(job: aiqueue.Job[Summarise]) -> None: ...


@worker.handle(Measure)  # wrong: another result, of a plain function
def another_plain_result(job: aiqueue.Job[Measure]) -> Summary:
    return Summary(title="x")


@worker.handle(Count, process=True)  # wrong: another result, in a process
def another_process_result(job: aiqueue.Job[Count]) -> str:
    return job.message.text


@worker.handle(Forget)  # wrong: a result where none is declared
async def a_result(job: aiqueue.Job[Forget]) -> Summary:
    return Summary(title="x")


@worker.handle(Sort[int])  # wrong: another parameter's result
async def another_parameter(job: aiqueue.Job[Sort[int]]) -> list[str]:
    return []


@worker.handle(Summarise)  # wrong: another message
async def another_message(job: aiqueue.Job[Plain]) -> Summary:
    return Summary(title=job.message.text)


@worker.handle(Plain)  # wrong: another message, without a declared type
async def another_plain_message(job: aiqueue.Job[Summarise]) -> str:
    return job.message.text


@worker.handle(Plain)  # wrong: no job
async def no_job(message: Plain) -> str:
    return message.text


@worker.handle(Plain)  # wrong: two arguments
async def two_arguments(job: aiqueue.Job[Plain], more: str) -> str:
    return more


@worker.handle(Plain, retry=5)  # wrong: no Backoff
async def no_backoff(job: aiqueue.Job[Plain]) -> str:
    return job.message.language  # wrong: no such field


@worker.handle(Plain, on={ValueError: "reject"})  # wrong: no policy
async def no_policy(job: aiqueue.Job[Plain]) -> None:
    await job.progress("half")  # wrong: a fraction


async def async_cost(message: Plain) -> float:
    return 1.0


def cost_of_summarise(message: Summarise) -> float:
    return 1.0


worker.handle(Plain, cost=100)  # wrong: no function
worker.handle(Plain, cost=async_cost)  # wrong: not awaited
worker.handle(Plain, cost=cost_of_summarise)  # wrong: a function of another message
worker.handle(Plain, cost=lambda: 1.0)  # wrong: no argument
worker.handle(Plain, cost=lambda message: message.text)  # wrong: no number
worker.handle(Plain, cost=lambda message: message.max_tokens)  # wrong: no field of the message
worker.handle_any("agent.tasks", cost=lambda message: message.text)  # wrong: no field of the raw message
agent.handle(Plain, cost=lambda message: 1.0)  # wrong: mail is not limited


async def settles(job: aiqueue.Job[Plain]) -> None:
    await job.settle(12)  # wrong: not awaited
    job.settle("12")  # wrong: no number
    job.settle()  # wrong: no cost


@worker.handle("plain")  # wrong: no class
async def no_class(job: aiqueue.Job[Plain]) -> None: ...


@worker.handle_any("agent.tasks")  # wrong: a typed job
async def typed_job(job: aiqueue.Job[Plain]) -> None: ...


@worker.handle(Forget)
async def parent(job: aiqueue.Job[Forget]) -> None:
    child: aiqueue.Child[Size] = await job.enqueue(Summarise(text="x"), "a")  # wrong: a child of another result
    sizes: list[Size] = await job.gather([("b", Summarise(text="x"))])  # wrong: other results
    (summary,) = await job.gather([("c", Summarise(text="x"))])
    print(summary.words)  # wrong: no such field
    (either,) = await job.gather([("d", Summarise(text="x"))], on_failed="return")
    print(either.title)  # wrong: an error has no such field
    await job.enqueue(Summarise(text="x"))  # wrong: no name
    await job.enqueue("x", "e")  # wrong: no message
    await job.gather(Summarise(text="x"))  # wrong: no list
    await job.gather([Summarise(text="x")])  # wrong: no name
    await job.gather([(1, Summarise(text="x"))])  # wrong: a name is a text
    await job.gather([("f", "text")])  # wrong: no message
    await job.gather([("g", Summarise(text="x"))], on_failed="ignore")  # wrong: no such way
    await child.result()  # wrong: gather waits for it
    print(sizes)


def sync_parent(job: aiqueue.Job[Forget]) -> None:
    counts: list[str] = job.gather_sync([("a", Count(text="x"))])  # wrong: other results
    child: aiqueue.Child[str] = job.enqueue_sync(Count(text="x"), "b")  # wrong: a child of another result
    print(counts, child)


@agent.handle(Plain)  # wrong: another mail
async def another_mail(mail: Mail[Summarise]) -> None:
    await mail.reply("yes")  # wrong: no message


@agent.handle_any()  # wrong: a typed mail
async def typed_mail(mail: Mail[Plain]) -> None: ...


async def client_uses(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Summarise(text="x"), tenant="acme")
    number: int = await handle.result()  # wrong: another result
    print((await handle.result()).words)  # wrong: no such field
    sizes: aiqueue.Handle[Size] = handle  # wrong: a handle of another result
    of_size: aiqueue.Handle[Size] = await client.enqueue(Summarise(text="x"), tenant="acme")  # wrong: the other way
    by_id: aiqueue.Handle[Size] = await client.job("x", model=Summarise)  # wrong: a model of another result
    await client.job("x", model=Summary)  # wrong: no message
    await client.enqueue(Summarise, tenant="acme")  # wrong: a class
    await client.enqueue(Summary(title="x"), tenant="acme")  # wrong: no message
    await client.enqueue(Plain(text="x"))  # wrong: no tenant
    await client.enqueue(Plain(text="x"), tenant="acme", unique=5)  # wrong: a text
    await client.enqueue(Plain(text="x"), tenant="acme", delay=[1])  # wrong: no duration
    await client.enqueue(Plain(text="x"), tenant="acme", at="tomorrow")  # wrong: no time
    await client.enqueue(Plain(text="x"), tenant="acme", on_full="drop")  # wrong: no such way
    await client.enqueue(Plain(text="x"), tenant="acme", on_duplicate="again")  # wrong: no such way
    client.enqueue_many([Plain(text="x")], tenant="acme", on_duplicate=True)  # wrong: no such way
    aiqueue.JobSpec(Plain(text="x"), on_duplicate="again")  # wrong: no such way
    words: str = await client.request(Count(text="x"), tenant="acme")  # wrong: another result
    client.enqueue_many(["text"], tenant="acme")  # wrong: no messages
    client.enqueue_many([Plain(text="x")], unique="x")  # wrong: an option of each job
    async for outcome in client.enqueue_many([Measure(path="x")], tenant="acme"):
        await outcome.result()  # wrong: an error has no result
        if not isinstance(outcome, aiqueue.AIQueueError):
            summary: Summary = await outcome.result()  # wrong: another result
            print(number, sizes, of_size, by_id, words, summary)


def sync_uses(client: aiqueue.SyncClient) -> None:
    size: Summary = client.enqueue(Measure(path="x"), tenant="acme").result()  # wrong: another result
    count: str = client.job("x", model=Count).result()  # wrong: another result
    text: str = client.request(Count(text="x"), tenant="acme")  # wrong: another result
    client.enqueue(Plain(text="x"), tenant="acme", on_duplicate="again")  # wrong: no such way
    client.enqueue_many([Plain(text="x")], tenant="acme", window="10")  # wrong: a number
    print(size, count, text)


def scheduled_uses(worker: aiqueue.Worker) -> None:
    worker.schedule("@daily", Plain(text="x"), id="x")  # wrong: no tenant
    worker.schedule("@daily", Plain(text="x"), tenant="acme", id="x", misfire="never")  # wrong: no such way
    worker.schedule("@daily", "text", tenant="acme", id="x")  # wrong: no message
    worker.schedule([1], Plain(text="x"), tenant="acme", id="x")  # wrong: no time
    worker.schedule("@daily", Plain(text="x"), tenant="acme", id="x", every=5)  # wrong: no such option


def settings_uses() -> None:
    aiqueue.connect("nats://localhost", creds=5)  # wrong: a path
    aiqueue.connect(ping_intervall="2s")  # wrong: no such setting
    aiqueue.connect(profile="clustered")  # wrong: no such profile
    aiqueue.connect(tls_handshake_first="yes")  # wrong: no text
    aiqueue.connect_sync(adress="nats://localhost")  # wrong: no such setting
    aiqueue.Settings(generation="one")  # wrong: a number
    aiqueue.Settings(servers="nats://localhost")  # wrong: no such setting
    aiqueue.NATSClient("nats://localhost", usr="x")  # wrong: no such setting


async def states(client: aiqueue.Client) -> aiqueue.JobState:
    status = await (await client.job("x")).status()
    for child in status.children:
        if child.state == "finished":  # wrong: no such state
            print(child)
    if status.state == "in_fligth":  # wrong: a misspelled state
        print(status)
    return "running"  # wrong: no such state


@dataclass
class State:
    model: str = "small"


@asynccontextmanager
async def open_state(client: aiqueue.Client) -> AsyncIterator[State]:
    yield State()


@asynccontextmanager
async def open_two(client: aiqueue.Client, more: str) -> AsyncIterator[State]:
    yield State()


stateful = aiqueue.Worker(lifespan=open_state)
aiqueue.Worker(lifespan=open_two)  # wrong: a lifespan with two arguments


@stateful.handle(Summarise)  # wrong: another state
async def another_state(job: aiqueue.Job[Summarise, Size]) -> Summary:
    return Summary(title=job.message.text)


@stateful.handle(Plain)
async def with_state(job: aiqueue.Job[Plain, State]) -> None:
    print(job.state.size)  # wrong: no such field of the state


@stateful.around  # wrong: around, of another state
@contextmanager
def around_another_state(job: aiqueue.Job[Any, Size]) -> Iterator[None]:
    yield


@stateful.around  # wrong: around, no context manager
def no_context_manager(job: aiqueue.Job[Any, State]) -> Iterator[None]:
    yield


@agent.around  # wrong: around, a job in place of mail
@contextmanager
def around_jobs(job: aiqueue.Job[Any]) -> Iterator[None]:
    yield


async def async_headers(message: aiqueue.Message) -> dict[str, str]:
    return {}


aiqueue.connect(headers={"x": "y"})  # wrong: a function makes headers
aiqueue.connect(headers=async_headers)  # wrong: not awaited
aiqueue.connect(headers=lambda message: {"x": 5})  # wrong: a header is a text
aiqueue.connect_sync(headers=lambda: None)  # wrong: no argument


async def own_tests(client: aiqueue.Client, settings: aiqueue.Settings) -> None:
    await testing.perform(worker, Measure(path="x"), attemp=2)  # wrong: no such argument
    done = await testing.perform(worker, Measure(path="x"))
    if done.outcome == "ok":  # wrong: no such outcome
        print(done)
    text: str = done.result  # wrong: a Size
    print(text)
    await testing.perform(worker, "text")  # wrong: no message
    await testing.drain(client, Measure)  # wrong: no worker
    await testing.assert_enqueued(client, Measure, count="1")  # wrong: a number
    testing.spawn(client, worker, die_at="soon")  # wrong: no such point
    async with testing.client("nats://localhost"):  # wrong: settings
        pass
