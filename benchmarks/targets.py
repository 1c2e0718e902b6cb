"""What the integration guide demands, and the numbers of its family, measured as the guide's user meets them.

Each figure is of the client and the worker as they are by default; where it matters, once with results kept and once
without. Queuing is from the enqueue call in one process to the handler in another.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import cbor2

import aiqueue
from aiqueue import codec, subjects
from aiqueue.enqueue.producer import Producer
from aiqueue.payload import parse_message

from . import agents
from .common import beside, empty, paced, run_loop, until
from .latency import lasting
from .report import OURS, Row

RATE = 200
TEXT = "A sentence of a prompt, as people write them. "
SIZES = {"2 KB": 2_000, "20 KB": 20_000}
REPEATS = 500


class Request(aiqueue.Message, kind="bench.request", family="gateway.requests"):
    i: int
    t: float
    model: str
    messages: list[dict[str, str]]
    temperature: float = 0.7
    max_tokens: int = 1_024


class Document(aiqueue.Message, kind="bench.document", family="rag.ingest"):
    i: int
    t: float
    source: str
    text: str


class Query(aiqueue.Message, kind="bench.query", family="rag.queries"):
    i: int
    t: float
    question: str
    top_k: int = 10


Sent = Request | Document | Query


def text(size: int) -> str:
    return (TEXT * (size // len(TEXT) + 1))[:size]


def request(i: int, t: float, size: int = 2_000) -> Request:
    told = [{"role": "system", "content": text(200)}, {"role": "user", "content": text(max(0, size - 400))}]
    return Request(i=i, t=t, model="some-large-model", messages=told)


def document(i: int, t: float) -> Document:
    return Document(i=i, t=t, source=f"library/part-{i}.md", text=text(8_000))


def query(i: int, t: float) -> Query:
    return Query(i=i, t=t, question=text(200))


class Family(NamedTuple):
    """A family of the guide: what its jobs are here, and what is demanded of it (None: nothing)."""

    name: str
    stream: str
    kind: type[Sent]
    make: Callable[[int, float], Sent]
    queuing_ms: float
    rate: float | None


FAMILIES = {
    "gateway": Family("gateway requests of 2 KB", "AI_GATEWAY_REQUESTS", Request, request, 5.0, 50.0),
    "queries": Family("RAG queries", "AI_RAG_QUERIES", Query, query, 5.0, None),
    "ingest": Family("RAG documents of 8 KB", "AI_RAG_INGEST", Document, document, 10.0, 100.0),
}


class Handled:
    """A worker of one family, and how long each of its jobs took to its handler."""

    def __init__(self, family: Family, *, result: bool) -> None:
        self.came: dict[int, tuple[float, float]] = {}
        self.worker = aiqueue.Worker(concurrency=100)

        async def handler(job: aiqueue.Job[Sent]) -> dict[str, int] | None:
            self.came[job.message.i] = job.message.t, time.monotonic()
            return {"i": job.message.i} if result else None

        self.worker.handle(family.kind, result=result)(handler)

    async def all(self, count: int) -> None:
        await until(lambda: len(self.came) == count, lambda: f"{len(self.came):,} of {count:,} jobs had come")


async def queuing(client: aiqueue.Client, key: str, count: int, *, result: bool) -> float:
    """The p95 in ms of the wait from the enqueue call to the handler, RATE a second, the first second left out."""
    handled = Handled(FAMILIES[key], result=result)
    program = ["-m", "benchmarks.targets", key, str(count)]
    async with handled.worker.running(client), beside(client, program) as (producer,):
        await producer.ended()
        await handled.all(count)
    waits = sorted(agents.waits_ms(handled.came, RATE))
    return waits[int(len(waits) * 0.95)]


async def throughput(client: aiqueue.Client, key: str, count: int, *, result: bool) -> float:
    """Jobs a second from the first call of enqueue_many to the last handler, on a worker that knows the lane."""
    family = FAMILIES[key]
    handled = Handled(family, result=result)
    async with handled.worker.running(client):
        await client.enqueue(family.make(-1, time.monotonic()), tenant="bench")
        await handled.all(1)
        handled.came.clear()
        begun = time.monotonic()
        async for outcome in client.enqueue_many((family.make(i, begun) for i in range(count)), tenant="bench"):
            if isinstance(outcome, aiqueue.AIQueueError):
                raise outcome
        await handled.all(count)
    return agents.rate_of(handled.came)


def each_ms(work: Callable[[], object]) -> float:
    """What one call takes, of REPEATS."""
    begun = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return (time.perf_counter() - begun) / REPEATS * 1000


class Codec:
    """What a request costs to write and to read; nothing is sent."""

    def __init__(self, client: aiqueue.Client, word: str) -> None:
        self.message = request(1, 0.0, SIZES[word])
        self.body = codec.encode(self.message)
        data = self.message.model_dump()
        self.guides = cbor2.dumps({"schema_version": "1.0", "message_type": "llm_request", "data": data})
        self.data, self.bare = data, cbor2.dumps(data)
        self.producer = Producer(client.connection, client.topology)
        self.aliases = {"llm_request": Request.aiq_kind}
        writes, reads = "codec.encode", "codec.read and parse_message"
        self.rows = {
            "encode": Row("targets", f"codec, encode a request of {word}", "ms", how={OURS: writes}, limit=1.0),
            "decode": Row("targets", f"codec, decode a request of {word}", "ms", how={OURS: reads}, limit=2.0),
            "guide": Row("targets", f"codec, decode the guide's envelope of {word}", "ms",
                         how={OURS: reads}, limit=2.0),
            "more": Row("targets", f"envelope of a request of {word}", "ms", limit=0.5,
                        how={OURS: "headers, encode, read and parse, less a bare cbor2 dumps and loads"}),
        }  # fmt: skip

    def headers(self) -> bytes:
        template = self.producer.template(self.message, "bench", subjects.NORMAL)
        return template.header_block(subjects.new_id(), self.producer.clock)

    def encode(self) -> bytes:
        return codec.encode(self.message)

    def decode(self) -> Request:
        body = codec.decode_message(
            self.body, content_type=codec.CBOR, kind=Request.aiq_kind, default_kind="", aliases={}
        )
        return parse_message(Request, body.data)

    def opened(self) -> Request:
        body = codec.decode_message(self.guides, default_kind=Request.aiq_kind, aliases=self.aliases)
        return parse_message(Request, body.data)

    def measure(self) -> None:
        """A figure more in each row. Raises RuntimeError where a message does not come back as it was."""
        if self.decode() != self.message or self.opened() != self.message:
            raise RuntimeError("a request does not come back as it was")
        encode, decode, told = each_ms(self.encode), each_ms(self.decode), each_ms(self.headers)
        bare = each_ms(lambda: cbor2.dumps(self.data)) + each_ms(lambda: cbor2.loads(self.bare))
        self.rows["encode"].add(OURS, encode)
        self.rows["decode"].add(OURS, decode)
        self.rows["guide"].add(OURS, each_ms(self.opened))
        self.rows["more"].add(OURS, told + encode + decode - bare)


def tracing() -> Row:
    """Demanded, and not there to be measured."""
    return Row("targets", "tracing, of a job's time", "%", how={OURS: "not built"}, limit=5.0)


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    count = RATE * lasting(RATE, jobs)
    mail = Row("targets", f"agent messages at {RATE}/s, p95", "ms", how={OURS: agents.HOW[OURS]}, limit=10.0)
    mails = Row("targets", "messages between two agents, end to end", "/s", how={OURS: agents.HOW[OURS]}, limit=200.0)
    kept = {True: "results kept", False: "results off"}
    waits = {
        (key, result): Row("targets", f"queuing of {family.name} at {RATE}/s, p95, {kept[result]}", "ms",
                           how={OURS: "client.enqueue to the handler"}, limit=family.queuing_ms)
        for key, family in FAMILIES.items() for result in kept
    }  # fmt: skip
    rates = {
        (key, result): Row("targets", f"{family.name}, end to end, {kept[result]}", "/s",
                           how={OURS: "client.enqueue_many and one worker"}, limit=family.rate)
        for key, family in FAMILIES.items() if family.rate for result in kept
    }  # fmt: skip
    codecs = [Codec(client, word) for word in SIZES]
    for _ in range(rounds):
        waited = sorted(agents.waits_ms(await agents.ours(client, RATE, count), RATE))
        mail.add(OURS, waited[int(len(waited) * 0.95)])
        mails.add(OURS, agents.rate_of(await agents.ours(client, 0, jobs // 2)))
        for (key, result), row in waits.items():
            row.add(OURS, await queuing(client, key, count, result=result))
            await empty(client, FAMILIES[key].stream)
        for (key, result), row in rates.items():
            row.add(OURS, await throughput(client, key, jobs // 2, result=result))
            await empty(client, FAMILIES[key].stream)
        for each in codecs:
            await asyncio.to_thread(each.measure)
    return [mail, mails, *waits.values(), *rates.values(), *(row for each in codecs for row in each.rows.values()),
            tracing()]  # fmt: skip


async def _main() -> None:
    family, count = FAMILIES[sys.argv[1]], int(sys.argv[2])
    async with aiqueue.connect() as client:

        async def say(i: int, at: float) -> None:
            await client.enqueue(family.make(i, at), tenant="bench")

        await paced(RATE, count, say)


if __name__ == "__main__":
    run_loop(_main())
