"""Mail from one agent to another, in processes of their own; many inboxes of which few are served; order.

The raw side does the same with nats-py: `js.publish` to a subject of the same stream, and one consumer with a standing
pull. Times are from the send call to the handler, by the same clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import cbor2

import aiqueue
from aiqueue.agent import Mail
from aiqueue.mailroom import AGENTS_MAX

from .common import Noop, message, raw_client
from .report import Row, table

STREAM, SUBJECT = "AI_AGENT_MESSAGE", "ai.agent.message.bench"
RATES = ((200, 5), (1_000, 5))  # mails a second, for how many seconds
INBOXES, CONNECTED = 5_000, AGENTS_MAX
CONVERSATIONS, EACH, HANDLERS = 50, 200, 8


async def _pace(client: aiqueue.Client, side: str, rate: int, count: int, targets: int) -> None:
    """The sender's process: an open loop of `rate` a second; a late call counts from its schedule. Sends overlap, so
    that a slow one does not hold up the next.
    """
    js = (await raw_client(client)).jetstream()
    agent = aiqueue.Agent("sender", tenant="bench")
    under_way: set[asyncio.Task[Any]] = set()
    async with agent.running(client):
        await asyncio.sleep(0.5)
        begun = time.monotonic()
        for i in range(count):
            due = begun + i / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            at = time.monotonic() if time.monotonic() - due < 0.005 else due
            to = f"a{random.randrange(targets)}"
            if side == "ours":
                call: Any = agent.send(message(i, at), to=to)
            else:
                told = {"Nats-Msg-Id": f"bench/{i}-{at}", "target_agent_id": to, "source_agent_id": "sender"}
                call = js.publish(f"{SUBJECT}.raw", cbor2.dumps(message(i, at).model_dump()), headers=told)
            task = asyncio.ensure_future(call)
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)


async def _sender(client: aiqueue.Client, *arguments: object) -> asyncio.subprocess.Process:
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else ""
    told = {"AIQUEUE_URL": settings.url or "", "AIQUEUE_USER": settings.user or "", "AIQUEUE_PASSWORD": password}
    where = client.connection.server
    told["AIQUEUE_URL"] = where
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.agents", *map(str, arguments), env={**os.environ, **told}
    )


def receiver(name: str, waits: list[float]) -> aiqueue.Agent:
    agent = aiqueue.Agent(name, tenant="bench")

    @agent.handle(Noop)
    async def noop(mail: Mail[Noop]) -> None:
        waits.append((time.monotonic() - mail.message.t) * 1000)

    return agent


async def _all(waits: list[float], count: int) -> None:
    end = time.monotonic() + 60
    while len(waits) < count and time.monotonic() < end:
        await asyncio.sleep(0.05)
    if len(waits) != count:
        raise RuntimeError(f"{len(waits)} of {count} came")


async def ours(client: aiqueue.Client, rate: int, seconds: int) -> list[float]:
    waits: list[float] = []
    async with receiver("a0", waits).running(client):
        sender = await _sender(client, "ours", rate, rate * seconds, 1)
        await sender.wait()
        await _all(waits, rate * seconds)
    return waits[rate:]


async def theirs(client: aiqueue.Client, rate: int, seconds: int) -> list[float]:
    config = {"durable_name": "raw", "filter_subject": f"{SUBJECT}.raw", "ack_policy": "explicit", "mem_storage": True}
    request = {"stream_name": STREAM, "config": config}
    await client.connection.api(f"CONSUMER.CREATE.{STREAM}.raw.{SUBJECT}.raw", request)
    raw = await raw_client(client)
    waits: list[float] = []
    inbox = raw.new_inbox()
    left = 0

    async def pull() -> None:
        nonlocal left
        left += 500
        asked = json.dumps({"batch": 500, "expires": 30_000_000_000}).encode()
        await raw.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.raw", asked, reply=inbox)

    async def came(message: Any) -> None:
        nonlocal left
        if not message.reply:
            return
        waits.append((time.monotonic() - cbor2.loads(message.data)["t"]) * 1000)
        await raw.publish(message.reply, b"+ACK")
        left -= 1
        if left < 250:
            await pull()

    await raw.subscribe(inbox, cb=came)
    await pull()
    sender = await _sender(client, "raw", rate, rate * seconds, 1)
    await sender.wait()
    await _all(waits, rate * seconds)
    await raw.close()
    await client.connection.api(f"CONSUMER.DELETE.{STREAM}.raw")
    return waits[rate:]


async def latency(client: aiqueue.Client, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for rate, seconds in RATES:
        pair = [Row(f"send to handler at {rate:,}/s, p{p}", "ms", "js.publish, standing pull") for p in (50, 95)]
        for _ in range(rounds):
            for side, measure in (("ours", ours), ("raw", theirs)):
                cuts = statistics.quantiles(await measure(client, rate, seconds), n=100)
                for row, cut in zip(pair, (cuts[49], cuts[94]), strict=True):
                    (row.ours if side == "ours" else row.raw).append(cut)
        rows += pair
    return rows


def _server(pid: int) -> tuple[float, float]:
    """Seconds of CPU that the server has used, and its resident MiB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _cpu(pid: int, seconds: float) -> float:
    """The part of one core that the server uses, in percent."""
    before, _ = _server(pid)
    await asyncio.sleep(seconds)
    return (_server(pid)[0] - before) / seconds * 100


async def many(client: aiqueue.Client, pid: int) -> str:
    """All inboxes on the roster, one mail in each that is not served."""
    lines = []
    begun, (_, before) = time.monotonic(), _server(pid)
    for at in range(0, INBOXES, 100):
        await asyncio.gather(*(client.inboxes.create(f"a{n}", tenant="bench") for n in range(at, at + 100)))
    for at in range(CONNECTED, INBOXES, 100):
        await asyncio.gather(
            *(client.inboxes.send(message(n), tenant="bench", to=f"a{n}") for n in range(at, at + 100))
        )
    took, rss = time.monotonic() - begun, _server(pid)[1]
    lines.append(f"{INBOXES:,} inboxes made in {took:.1f} s; server {before:.0f} -> {rss:.0f} MiB")
    lines.append(f"  none served: server {await _cpu(pid, 5):.1f} % of a core")
    waits: list[float] = []
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        agents = [receiver(f"a{n}", waits) for n in range(CONNECTED)]
        await asyncio.gather(*(stack.enter_async_context(each.running(client)) for each in agents))
        lines.append(f"{CONNECTED} agents connected in {time.monotonic() - begun:.1f} s")
        own = time.process_time()
        idle = await _cpu(pid, 20)
        mine = (time.process_time() - own) / 20 * 100
        lines.append(
            f"  idle: server {idle:.1f} % of a core, {_server(pid)[1]:.0f} MiB; the agents' process {mine:.1f} %"
        )
        rate, seconds = RATES[0]
        used = asyncio.create_task(_cpu(pid, seconds))
        sender = await _sender(client, "ours", rate, rate * seconds, CONNECTED)
        await sender.wait()
        await _all(waits, rate * seconds)
        cuts = statistics.quantiles(waits[rate:], n=100)
        lines.append(
            f"  {rate}/s to all of them: p50 {cuts[49]:.2f} ms, p95 {cuts[94]:.2f} ms, p99 {cuts[98]:.2f} ms; server "
            f"{await used:.0f} % of a core, {_server(pid)[1]:.0f} MiB"
        )
        cuts = statistics.quantiles(await theirs(client, rate, seconds), n=100)
        lines.append(f"  raw beside them, one consumer more: p50 {cuts[49]:.2f} ms, p95 {cuts[94]:.2f} ms")
        begun = time.monotonic()
    lines.append(f"{CONNECTED} agents left in {time.monotonic() - begun:.1f} s")
    return "\n".join(lines)


async def order(client: aiqueue.Client) -> str:
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
    begun = time.monotonic()
    async with agent.running(client):
        for name in turns:
            await client.inboxes.send(message(sent[name]), tenant="bench", to="orderly", conversation=name)
            sent[name] += 1
        while sum(map(len, seen.values())) < len(turns):
            await asyncio.sleep(0.05)
    took = time.monotonic() - begun
    inversions = sum(a > b for numbers in seen.values() for a, b in itertools.pairwise(numbers))
    whole = all(sorted(numbers) == list(range(EACH)) for numbers in seen.values())
    return (
        f"{CONVERSATIONS} conversations of {EACH} over {HANDLERS} handlers in {took:.1f} s: {inversions} inversions, "
        f"{wrong} at the same time, {'each once' if whole else 'NOT each once'}"
    )


async def run(client: aiqueue.Client, *, rounds: int) -> str:
    assert client._embedded is not None
    rows = await latency(client, rounds)
    return "\n".join([table(rows), "", await order(client), "", await many(client, client._embedded.pid)])


async def _main() -> None:
    side, rate, count, targets = sys.argv[1], *map(int, sys.argv[2:5])
    async with aiqueue.connect() as client:
        await _pace(client, side, rate, count, targets)


if __name__ == "__main__":
    asyncio.run(_main())
