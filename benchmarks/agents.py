"""Mail from one agent to another, in processes of their own; many inboxes of which few are served; order.

The raw side does the same with nats-py: `js.publish` to a subject of the same stream, and one consumer with a standing
pull. Times are from the send call to the handler, by the same clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.agent import Mail
from aiqueue.agent.session import AGENTS_MAX

from .common import (
    Noop,
    add_percentiles,
    beside,
    cpu_s,
    message,
    paced,
    percentile_rows,
    raw_client,
    resident_mib,
    run_loop,
    server_pid,
    until,
)
from .latency import RATES, lasting
from .many import CALLERS, callers
from .raw import opened
from .report import OURS, RAW, Row

FAMILY, STREAM, SUBJECT = "agent.message", "AI_AGENT_MESSAGE", "ai.agent.message.bench"
INBOXES_MAX = 5_000
CONVERSATIONS, EACH, HANDLERS = 50, 200, 8
IDLE_S_MAX = 20
HOW = {
    OURS: "agent.send; an agent with a typed handler",
    RAW: "js.publish, same headers, Msg-Id and codec; a standing pull, decoded, ack",
}


def raw_mail(i: int, t: float) -> tuple[str, bytes, dict[str, str]]:
    """Subject, body and headers of the mail that the library would have stored."""
    mail_id = subjects.new_id()
    told = {
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: "noop",
        headers.JOB_ID: mail_id,
        headers.CONVERSATION: mail_id,
        headers.SOURCE: "sender",
        headers.TARGET: "raw",
        headers.MSG_ID: subjects.msg_id(FAMILY, "bench", mail_id, "raw"),
    }
    return f"{SUBJECT}.raw", codec.encode(message(i, t)), told


async def _send(client: aiqueue.Client, side: str, rate: int, count: int, targets: int) -> None:
    """The sender's process: `rate` mails a second, or as fast as CALLERS of them at once can where `rate` is 0."""
    raw = await raw_client(client)
    js = raw.jetstream()
    agent = aiqueue.Agent("sender", tenant="bench")

    async def ours(i: int, at: float) -> None:
        await agent.send(message(i, at), to=f"a{random.randrange(targets)}")

    async def theirs(i: int, at: float) -> None:
        subject, body, told = raw_mail(i, at)
        await js.publish(subject, body, headers=told)

    say = ours if side == OURS else theirs
    try:
        async with agent.running(client):
            await asyncio.sleep(0.5)
            if rate:
                await paced(rate, count, say)
            else:
                await callers(count, lambda i: say(i, time.monotonic()))
    finally:
        await raw.close()


def _sender(side: str, rate: int, count: int, targets: int) -> list[str]:
    return ["-m", "benchmarks.agents", side, str(rate), str(count), str(targets)]


Came = dict[int, tuple[float, float]]  # by the mail's number: when it was sent, when its handler began


def receiver(name: str, came: Came) -> aiqueue.Agent:
    agent = aiqueue.Agent(name, tenant="bench")

    @agent.handle(Noop)
    async def noop(mail: Mail[Noop]) -> None:
        came[mail.message.i] = mail.message.t, time.monotonic()

    return agent


async def _all(client: aiqueue.Client, sender: list[str], came: Came, count: int) -> None:
    """Run the sender, until all that it sends has come."""
    async with beside(client, sender) as (process,):
        await process.ended(120.0)
        await until(lambda: len(came) == count, lambda: f"{len(came):,} of {count:,} mails had come")


async def ours(client: aiqueue.Client, rate: int, count: int) -> Came:
    came: Came = {}
    async with receiver("a0", came).running(client):
        await _all(client, _sender(OURS, rate, count, 1), came, count)
    return came


@asynccontextmanager
async def standing_pull(
    client: aiqueue.Client, stream: str, config: dict[str, Any], take: Callable[[Any], None]
) -> AsyncIterator[None]:
    """The raw receiver: a consumer with a standing pull gives each message to `take`, and then acknowledges it."""
    name, wanted = config["durable_name"], {"stream_name": stream, "config": config}
    await client.connection.api(f"CONSUMER.CREATE.{stream}.{name}.{config['filter_subject']}", wanted)
    raw = await raw_client(client)
    inbox = raw.new_inbox()
    left = 0

    async def pull() -> None:
        nonlocal left
        left += 500
        asked = json.dumps({"batch": 500, "expires": 30_000_000_000}).encode()
        await raw.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", asked, reply=inbox)

    async def arrived(message: Any) -> None:
        nonlocal left
        if not message.reply:
            return
        take(message)
        await raw.publish(message.reply, b"+ACK")
        left -= 1
        if left < 250:
            await pull()

    try:
        await raw.subscribe(inbox, cb=arrived)
        await pull()
        yield
    finally:
        await raw.close()
    await client.connection.api(f"CONSUMER.DELETE.{stream}.{name}")


def mail_config(subject: str) -> dict[str, Any]:
    """The raw receiver's consumer of an inbox."""
    return {"durable_name": "raw", "filter_subject": subject, "ack_policy": "explicit", "mem_storage": True}


async def theirs(client: aiqueue.Client, rate: int, count: int) -> Came:
    came: Came = {}

    def take(message: Any) -> None:
        told = opened(message)
        came[told["i"]] = told["t"], time.monotonic()

    async with standing_pull(client, STREAM, mail_config(f"{SUBJECT}.raw"), take):
        await _all(client, _sender(RAW, rate, count, 1), came, count)
    return came


def waits_ms(came: Came, drop: int) -> list[float]:
    """How long each mail took, but for the first `drop`."""
    return [(end - begun) * 1000 for number, (begun, end) in came.items() if number >= drop]


def rate_of(came: Came) -> float:
    """Mails a second, from the first send to the last handler."""
    begun, ended = zip(*came.values(), strict=True)
    return len(came) / float(max(ended) - min(begun))


async def latency(client: aiqueue.Client, rounds: int, jobs: int) -> list[Row]:
    rows = {rate: percentile_rows("agents", f"send to handler at {rate:,}/s", HOW) for rate in RATES}
    flood = Row("agents", f"mails from one agent to another, {CALLERS} sends at once", "/s", how=HOW)
    for _ in range(rounds):
        for rate, each in rows.items():
            for side, measure in ((OURS, ours), (RAW, theirs)):
                add_percentiles(each, side, waits_ms(await measure(client, rate, rate * lasting(rate, jobs)), rate))
        for side, measure in ((OURS, ours), (RAW, theirs)):
            flood.add(side, rate_of(await measure(client, 0, jobs)))
    return [*(row for each in rows.values() for row in each), flood]


async def _cpu_percent(pid: int, seconds: float) -> float:
    """The part of one core that a process uses."""
    before = cpu_s(pid)
    await asyncio.sleep(seconds)
    return (cpu_s(pid) - before) / seconds * 100


async def many(client: aiqueue.Client, jobs: int) -> list[Row]:
    """All inboxes on the roster, one mail in each that is not served, and as many agents as one client may run."""
    pid = server_pid(client)
    inboxes = min(INBOXES_MAX, max(100, jobs // 2))
    connected = min(AGENTS_MAX, inboxes // 10)
    idle_s = min(IDLE_S_MAX, max(2, jobs // 500))
    rows: list[Row] = []

    def told(name: str, unit: str, figure: float, side: str = OURS) -> None:
        rows.append(Row("agents", name, unit, {side: [figure]}))

    begun = time.monotonic()
    for at in range(0, inboxes, 100):
        most = min(at + 100, inboxes)
        await asyncio.gather(*(client.inboxes.create(f"a{n}", tenant="bench") for n in range(at, most)))
    told(f"{inboxes:,} inboxes made", "s", time.monotonic() - begun)
    for at in range(connected, inboxes, 100):
        some = range(at, min(at + 100, inboxes))
        await asyncio.gather(*(client.inboxes.send(message(n), tenant="bench", to=f"a{n}") for n in some))
    told(f"server with {inboxes:,} inboxes, a mail in each", "MiB", resident_mib(pid))
    told("server's part of a core, none of them served", "%", await _cpu_percent(pid, idle_s / 4))
    came: Came = {}
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        agents = [receiver(f"a{n}", came) for n in range(connected)]
        await asyncio.gather(*(stack.enter_async_context(each.running(client)) for each in agents))
        told(f"{connected} agents of one process connect", "s", time.monotonic() - begun)
        own = cpu_s()
        told(f"server's part of a core, {connected} agents idle", "%", await _cpu_percent(pid, idle_s))
        told(f"part of a core of the process of {connected} idle agents", "%", (cpu_s() - own) / idle_s * 100)
        told(f"server with {connected} agents connected", "MiB", resident_mib(pid))
        rate = RATES[0]
        count = rate * lasting(rate, jobs)
        waits = percentile_rows("agents", f"send to handler at {rate}/s, spread over {connected} agents", HOW)
        await _all(client, _sender(OURS, rate, count, connected), came, count)
        add_percentiles(waits, OURS, waits_ms(came, rate))
        add_percentiles(waits, RAW, waits_ms(await theirs(client, rate, count), rate))
        rows += waits
        begun = time.monotonic()
    told(f"{connected} agents leave", "s", time.monotonic() - begun)
    return rows


async def order(client: aiqueue.Client) -> list[Row]:
    """Mails of many conversations, in random turns, over few handlers that take random times."""
    seen: dict[str, list[int]] = defaultdict(list)
    busy: Counter[str] = Counter()
    wrong = 0
    agent = aiqueue.Agent("orderly", tenant="bench", concurrency=HANDLERS)

    @agent.handle(Noop)
    async def noop(mail: Mail[Noop]) -> None:
        nonlocal wrong
        busy[mail.conversation] += 1
        wrong += busy[mail.conversation] > 1
        await asyncio.sleep(random.uniform(0, 0.005))
        seen[mail.conversation].append(mail.message.i)
        busy[mail.conversation] -= 1

    turns = [f"c{each}" for each in range(CONVERSATIONS)] * EACH
    random.shuffle(turns)
    sent: Counter[str] = Counter()
    async with agent.running(client):
        for name in turns:
            await client.inboxes.send(message(sent[name]), tenant="bench", to="orderly", conversation=name)
            sent[name] += 1

        def handled() -> int:
            return sum(map(len, seen.values()))

        await until(lambda: handled() >= len(turns), lambda: f"{handled():,} of {len(turns):,} mails had been handled")
    if not all(sorted(numbers) == list(range(EACH)) for numbers in seen.values()):
        raise RuntimeError("a mail of a conversation was not handled once")
    inversions = sum(a > b for numbers in seen.values() for a, b in itertools.pairwise(numbers))
    what = f"of {CONVERSATIONS} conversations of {EACH} mails, {HANDLERS} handlers"
    return [
        Row("agents", f"mails out of order, {what}", "jobs", {OURS: [float(inversions)]}),
        Row("agents", f"mails at the same time as one of their own, {what}", "jobs", {OURS: [float(wrong)]}),
    ]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    return [*await latency(client, rounds, jobs), *await order(client), *await many(client, jobs)]


async def _main() -> None:
    side, rate, count, targets = sys.argv[1], *map(int, sys.argv[2:5])
    async with aiqueue.connect() as client:
        await _send(client, side, rate, count, targets)


if __name__ == "__main__":
    run_loop(_main())
