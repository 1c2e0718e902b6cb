"""The integration guide's own calls: `NATSClient.publish` and `subscribe`, beside raw nats-py and the typed calls.

The raw side publishes the same payloads with the same headers by `js.publish`, and takes them by one consumer with a
standing pull; it decodes and acknowledges each. Publishers are in a process of their own. Each callback notes when it
began, and then decodes. The typed side stores and drains the same bodies in the same lane, with the defaults of
`client.enqueue` and of a handler; both keep their results.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.bus import Msg, NATSClient, create_envelope, decode, encode

from .agents import Came, mail_config, rate_of, standing_pull, waits_ms
from .common import Noop, add_percentiles, beside, empty, message, paced, percentile_rows, raw_client, run_loop, until
from .drain import WITHIN_S, fill
from .latency import lasting
from .many import CALLERS, callers
from .raw import TEXT
from .report import OURS, RAW, Row
from .targets import document, request

TYPED = "typed calls"
RATE = 200
COST_MAX = 15.0  # what NATSClient may cost above the typed calls, in %
RATE_MIN = 500.0
ACK_MS, MAIL_MS, GATEWAY_MS = 1.0, 2.0, 2.5  # of the p95
MODEL = "some-large-model"


# -- beside raw nats-py: from a publish in one process to a callback in another


class Topic(NamedTuple):
    """A topic of the guide: its family, the queue of its subscribers, what is published with which headers."""

    family: str
    queue: str
    message_type: str
    data: Callable[[int, float], dict[str, Any]]
    headers: Callable[[str], dict[str, str]]


TOPICS = {
    "mail": Topic("agent.message", "agent.a0", "agent_message", lambda i, t: {"i": i, "t": t, "text": TEXT},
                  lambda _: {"target_agent_id": "a0", "source_agent_id": "sender"}),
    "gateway": Topic("gateway.requests", "gateway.workers", "llm_request", lambda i, t: request(i, t).model_dump(),
                     lambda job_id: {"request_id": job_id, "model": MODEL, "priority": "normal"}),
    "ingest": Topic("rag.ingest", "rag.workers", "rag_document",
                    lambda i, t: document(i, t).model_dump() | {"document_id": f"{t:.6f}-{i}"},
                    lambda _: {}),
}  # fmt: skip
HOW = {
    OURS: "NATSClient.publish and subscribe, the guide's headers, JSON envelopes",
    RAW: "js.publish, same payload and headers, Msg-Id; a standing pull, decoded, ack",
}


def payload(topic: Topic, i: int, t: float) -> bytes:
    return encode(create_envelope(topic.message_type, topic.data(i, t)))


def raw_subject(topic: Topic) -> str:
    """Where the raw side stores: the lane or inbox that aiqueue would use, of a tenant that aiqueue does not serve."""
    if topic is TOPICS["mail"]:
        return subjects.inbox(topic.family, "raw", "a0")
    return subjects.work(topic.family, "raw")


async def _publish(client: aiqueue.Client, side: str, key: str, pace: str, count: int) -> None:
    """The publisher's process. It prints how long each publish took to its PubAck, in ms."""
    topic = TOPICS[key]
    raw = await raw_client(client)
    js, subject = raw.jetstream(), raw_subject(topic)
    waits: dict[int, float] = {}

    async with NATSClient(client=client) as bus:

        async def ours(i: int, at: float, body: bytes) -> None:
            told = topic.headers(f"r-{at:.6f}-{i}".replace(".", "-"))
            await bus.publish(subject=f"ai.{topic.family}.bench", payload=body, headers=told)

        async def theirs(i: int, at: float, body: bytes) -> None:
            job_id = f"r-{at:.6f}-{i}".replace(".", "-")
            told = topic.headers(job_id) | {headers.MSG_ID: subjects.msg_id(topic.family, "raw", job_id)}
            await js.publish(subject, body, headers=told)

        publish = ours if side == OURS else theirs

        async def say(i: int, at: float) -> None:
            begun = time.monotonic()
            body = payload(topic, i, at)
            encoding_s = time.monotonic() - begun  # before the publish, so no part of the wait for its PubAck
            await publish(i, at, body)
            waits[i] = (time.monotonic() - at - encoding_s) * 1000

        try:
            if pace == "paced":
                await paced(RATE, count, say)
            elif pace == "one":
                for i in range(count):
                    await say(i, time.monotonic())
            else:
                await callers(count, lambda i: say(i, time.monotonic()))
        finally:
            await raw.close()
    print(json.dumps([waits[i] for i in range(count)]))


async def _all(client: aiqueue.Client, side: str, key: str, pace: str, came: Came, count: int) -> list[float]:
    """Run the publisher until all that it publishes has come. Returns its waits for PubAcks."""
    program = ["-m", "benchmarks.guide", side, key, pace, str(count)]
    async with beside(client, program) as (publisher,):
        await publisher.ended(120.0)
        await until(lambda: len(came) == count, lambda: f"{len(came):,} of {count:,} messages had come")
        waits: list[float] = json.loads(publisher.log.read_text().splitlines()[-1])
    return waits


async def ours(client: aiqueue.Client, key: str, pace: str, count: int) -> tuple[Came, list[float]]:
    """When each message was published and its callback began, and how long each publish took in ms."""
    topic, came = TOPICS[key], Came()

    async def callback(msg: Msg) -> None:
        now = time.monotonic()
        data = decode(msg)
        came[data["i"]] = data["t"], now

    async with NATSClient(client=client) as bus:
        await bus.subscribe(subject=f"ai.{topic.family}.bench", callback=callback, queue=topic.queue)
        waits = await _all(client, OURS, key, pace, came, count)
    return came, waits


async def theirs(client: aiqueue.Client, key: str, pace: str, count: int) -> tuple[Came, list[float]]:
    topic, came = TOPICS[key], Came()

    def arrived(msg: Any) -> None:
        now = time.monotonic()
        data = json.loads(msg.data)["data"]
        came[data["i"]] = data["t"], now

    family = client.topology.families[topic.family]
    config = mail_config(raw_subject(topic)) if key == "mail" else family.lane_config("raw", "normal")
    async with standing_pull(client, family.stream, config, arrived):
        waits = await _all(client, RAW, key, pace, came, count)
    return came, waits


async def _measure_topics(client: aiqueue.Client, jobs: int, rows: dict[str, list[Row]]) -> None:
    """One round more in each row of the topics."""
    count = RATE * lasting(RATE, jobs)
    for key in ("mail", "gateway"):
        for side, measure in ((OURS, ours), (RAW, theirs)):
            came, waits = await measure(client, key, "paced", count)
            add_percentiles(rows[key], side, waits_ms(came, RATE))
            if key == "gateway":
                add_percentiles(rows["acks"], side, waits[RATE:])
    for row, pace in zip(rows["ingest"], ("one", "many"), strict=True):
        for side, measure in ((OURS, ours), (RAW, theirs)):
            came, _ = await measure(client, "ingest", pace, max(1, jobs // 5))
            row.add(side, rate_of(came))
    for topic in TOPICS.values():
        await empty(client, client.topology.families[topic.family].stream)
    await empty(client, client.topology.journal_stream.name)


def _topic_rows() -> dict[str, list[Row]]:
    words = {
        "mail": (f"agent messages at {RATE}/s, publish to callback", MAIL_MS),
        "acks": (f"gateway requests of 2 KB at {RATE}/s, publish to PubAck", ACK_MS),
        "gateway": (f"gateway requests of 2 KB at {RATE}/s, publish to callback", GATEWAY_MS),
    }
    rows = {key: percentile_rows("guide", name, HOW) for key, (name, _) in words.items()}
    for key, (_, limit) in words.items():
        rows[key][1].limit = limit
    paces = "one awaited at a time", f"{CALLERS} callers at once"
    rows["ingest"] = [Row("guide", f"RAG documents of 8 KB, end to end, {pace}", "/s", how=dict(HOW), limit=RATE_MIN)
                      for pace in paces]  # fmt: skip
    return rows


# -- beside the typed calls


class Task(aiqueue.Message, kind="agent.task"):
    """What the guide's envelope of an agent task is to a typed worker."""

    i: int
    text: str


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    i: int
    request_id: str
    text: str


class Pair(NamedTuple):
    """Two rows of the same work by NATSClient and by the typed calls: their rates, and what NATSClient costs more."""

    rates: Row
    cost: Row

    @classmethod
    def of(cls, name: str, bus: str, typed: str) -> Pair:
        how = {OURS: f"NATSClient, {bus}", TYPED: typed}
        cost = "what NATSClient costs above the typed calls"
        return cls(Row("guide", name, "/s", how=how), Row("guide", f"{name}: {cost}", "%", limit=COST_MAX))

    async def measure(self, number: int, work: Mapping[str, Callable[[], Awaitable[float]]]) -> None:
        """One round more. The sides take turns in who begins."""
        found = {side: await work[side]() for side in (work if number % 2 else [*work][::-1])}
        for side, rate in found.items():
            self.rates.add(side, rate)
        self.cost.add(OURS, (found[TYPED] / found[OURS] - 1) * 100)


class Seen:
    """When each handler ran, until all have."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._numbers: set[int] = set()
        self._first = self._last = 0.0
        self._finished = asyncio.Event()

    def note(self, number: int) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._numbers.add(number)
        if len(self._numbers) >= self._jobs:
            self._finished.set()

    async def rate(self) -> float:
        async with asyncio.timeout(WITHIN_S):
            await self._finished.wait()
        return (self._jobs - 1) / (self._last - self._first)


async def drain_typed(client: aiqueue.Client, jobs: int, kind: type[Noop | Task]) -> float:
    """Jobs a second from the first handler to the last; results are kept, as by default."""
    worker, seen = aiqueue.Worker(concurrency=100), Seen(jobs)

    @worker.handle(kind)
    async def handler(job: aiqueue.Job[Any]) -> None:
        seen.note(job.message.i)

    async with worker.running(client):
        return await seen.rate()


async def drain_bus(bus: NATSClient, jobs: int) -> float:
    seen = Seen(jobs)

    async def handler(msg: Msg) -> None:
        seen.note(decode(msg)["i"])

    subscription = await bus.subscribe(subject="ai.agent.tasks.bench", callback=handler, queue="agent.workers")
    try:
        return await seen.rate()
    finally:
        await subscription.unsubscribe()


async def fill_envelopes(client: aiqueue.Client, bus: NATSClient, jobs: int) -> None:
    """Store a backlog as the guide's publisher of tasks does, in the place of what was there."""
    await empty(client)

    async def publish(i: int) -> None:
        await bus.publish("ai.agent.tasks.bench", encode(create_envelope("agent_task", {"i": i, "text": TEXT})))

    await callers(jobs, publish)


async def _drains(client: aiqueue.Client, bus: NATSClient, jobs: int, number: int, pairs: list[Pair]) -> None:
    forms = (
        (pairs[0], partial(fill, client, jobs), Noop),
        (pairs[1], partial(fill_envelopes, client, bus, jobs), Task),
    )
    for pair, store, kind in forms:

        async def by_bus(store: Callable[[], Awaitable[None]] = store) -> float:
            await store()
            return await drain_bus(bus, jobs)

        async def by_type(store: Callable[[], Awaitable[None]] = store, kind: type[Noop | Task] = kind) -> float:
            await store()
            return await drain_typed(client, jobs, kind)

        await pair.measure(number, {OURS: by_bus, TYPED: by_type})
        await empty(client, client.topology.journal_stream.name)


async def _enqueues(client: aiqueue.Client, bus: NATSClient, jobs: int, number: int, pairs: list[Pair]) -> None:
    """One round more for tasks without headers, then for requests with them: one at a time, and many callers."""

    async def publish_task(i: int) -> None:
        await bus.publish("ai.agent.tasks.bench", encode({"i": i, "t": 0.0, "text": TEXT}, codec.CBOR))

    async def enqueue_task(i: int) -> None:
        await client.enqueue(message(i), tenant="bench")

    async def publish_request(i: int) -> None:
        request_id = subjects.new_id()  # the stream drops an id that it has had
        told = {"request_id": request_id, "model": MODEL, "priority": "normal"}
        body = encode({"i": i, "request_id": request_id, "text": TEXT}, codec.CBOR)
        await bus.publish("ai.gateway.requests.bench", body, headers=told)

    async def enqueue_request(i: int) -> None:
        ask = Ask(i=i, request_id=subjects.new_id(), text=TEXT)
        await client.enqueue(ask, tenant="bench", headers={"model": MODEL})

    async def rate(stream: str, work: Callable[[int], Awaitable[None]], at_once: bool) -> float:
        await empty(client, stream)
        count = jobs if at_once else max(1, jobs // 3)
        begun = time.perf_counter()
        if at_once:
            await callers(count, work)
        else:
            for i in range(count):
                await work(i)
        found = count / (time.perf_counter() - begun)
        info = await client.connection.api(f"STREAM.INFO.{stream}")
        if info["state"]["messages"] != count:
            raise RuntimeError(f"{info['state']['messages']:,} of {count:,} jobs were stored")
        await empty(client, stream)
        return found

    works = {"AI_AGENT_TASKS": (publish_task, enqueue_task), "AI_GATEWAY_REQUESTS": (publish_request, enqueue_request)}
    todo = iter(pairs)
    for stream, (by_bus, by_type) in works.items():
        for at_once in (False, True):
            sides = {OURS: partial(rate, stream, by_bus, at_once), TYPED: partial(rate, stream, by_type, at_once)}
            await next(todo).measure(number, sides)


def _pairs() -> tuple[list[Pair], list[Pair]]:
    drained, handled = "a callback that decodes", "a typed handler, 100 slots"
    drains = [
        Pair.of("drain of jobs in CBOR, one worker in this process", drained, handled),
        Pair.of("drain of the guide's envelopes in JSON, one worker in this process", drained, handled),
    ]
    paces = "one awaited at a time", f"{CALLERS} callers at once"
    enqueues = [Pair.of(f"publish without headers, {pace}", "publish", "client.enqueue") for pace in paces]
    enqueues += [Pair.of(f"publish with the gateway's headers, {pace}", "publish", "client.enqueue") for pace in paces]
    return drains, enqueues


async def beside_typed(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    drains, enqueues = _pairs()
    async with NATSClient(client=client) as bus:
        for number in range(rounds):
            await _drains(client, bus, jobs, number, drains)
            await _enqueues(client, bus, jobs, number, enqueues)
    await empty(client)
    return [row for pair in (*drains, *enqueues) for row in pair]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    topics = _topic_rows()
    for _ in range(rounds):
        await _measure_topics(client, jobs, topics)
    rows = [row for key in ("mail", "acks", "gateway", "ingest") for row in topics[key]]
    return [*rows, *await beside_typed(client, rounds=rounds, jobs=jobs)]


async def _main() -> None:
    side, key, pace, count = *sys.argv[1:4], int(sys.argv[4])
    async with aiqueue.connect() as client:
        await _publish(client, side, key, pace, count)


if __name__ == "__main__":
    run_loop(_main())
