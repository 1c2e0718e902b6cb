"""Scenarios of the front: what it adds to a stream and a call beside the provider itself, and streams that are cut."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ..common import paced
from ..limiting.judge import p95
from ..scenarios import Finding, told
from .bench import Asked, Setting
from .doors import Doors, Times, doors

FEW, MANY = 20, 100  # streams at once
TOKENS, TOKEN_S = 80, 0.025
FIRST_TOKEN_S = 0.1
ROUND_S, STREAMS_S = 5.0, 60.0
FIRST_MS, FEW_MS, MANY_MS = 6.0, 5.0, 25.0
CALLS_S, HELD_S = 20.0, 1.0
CUT_STREAMS, CUTS, CUT_TOKENS, CUT_EVERY = 8, 20, 660, 30
CUT_TOKEN_S = 0.05  # so that the calls last for as long as the front is away, and longer
FRONT_AT, WORKER_AT = 150, 400  # tokens of a client, after which these die
CUT_S = 240.0
ERRORS = frozenset({"stream_restarted", "stream_incomplete"})  # that docs/guides/gateway.md names


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else float("inf")


# -- streams beside the provider


async def streams(asked: Asked) -> list[Finding]:
    """20 and 100 streams of 40 tokens/s by the front, and the same by the provider itself in turn."""
    setting = Setting(slots=2 * MANY, first_token_s=FIRST_TOKEN_S, token_s=TOKEN_S)
    findings = []
    async with doors(asked, setting, workers=1) as here:
        await here.behave(stamped=True)
        for base in (here.api, here.direct):
            await _round(here, base, FEW, ROUND_S, Times())  # code is warm, connections are there
        for count, most_ms in ((FEW, FEW_MS), (MANY, MANY_MS)):
            found = {here.direct: Times(), here.api: Times()}
            used: Counter[str] = Counter()
            end = time.monotonic() + min(asked.seconds, STREAMS_S)
            while time.monotonic() < end:
                for base, times in found.items():
                    before = here.used()
                    await _round(here, base, count, ROUND_S, times)
                    if base == here.api:
                        used.update({name: each - before[name] for name, each in here.used().items()})
            findings += _told(asked, count, most_ms, found[here.direct], found[here.api], used)
    return findings


async def _round(here: Doors, base: str, count: int, seconds: float, times: Times) -> None:
    """Let so many clients read streams for some seconds, which begin apart from each other."""
    end, read = time.monotonic() + seconds, []

    async def client(number: int) -> None:
        await asyncio.sleep(number / count * TOKENS * TOKEN_S)
        while time.monotonic() < end:
            words = [f"{number}-{place}" for place in range(TOKENS)]
            body = {"model": "m", "messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": TOKENS}
            read.append((await here.read_stream(base, {**body, "stream": True}), words))

    gc.collect()
    gc.disable()  # the clients' pauses are not the front's
    try:
        await asyncio.gather(*map(client, range(count)))
    finally:
        gc.enable()
    for stream, words in read:
        times.add(stream, words)


def _told(
    asked: Asked, count: int, most_ms: float, direct: Times, front: Times, used: Mapping[str, float]
) -> list[Finding]:
    for each in [*direct.broken, *front.broken][:5]:
        asked.say(f"  {count} streams: {each}")
    first = _percentile(front.first, 0.5), _percentile(direct.first, 0.5)
    tokens = max(1, len(front.delays))
    return [
        Finding(f"{count} streams: read by the front", front.streams, at_least=count),
        Finding(f"{count} streams: with lost or repeated tokens", len(front.broken), at_most=0),
        Finding(f"{count} streams: of the provider, the same", len(direct.broken), at_most=0),
        Finding(f"{count} streams: first token p50, provider, ms", first[1]),
        Finding(f"{count} streams: first token p50, front, ms", first[0]),
        Finding(
            f"{count} streams: the front adds, ms", first[0] - first[1], at_most=FIRST_MS if count == FEW else None
        ),
        Finding(f"{count} streams: token delay p50, provider, ms", _percentile(direct.delays, 0.5)),
        Finding(f"{count} streams: token delay p95, provider, ms", p95(direct.delays)),
        Finding(f"{count} streams: token delay p50, front, ms", _percentile(front.delays, 0.5)),
        Finding(f"{count} streams: token delay p95, front, ms", p95(front.delays), at_most=most_ms),
        *(Finding(f"{count} streams: CPU a token, {name}, ms", each * 1000 / tokens) for name, each in used.items()),
    ]


# -- whole answers


@dataclass
class Callers:
    """Clients of whole answers: what they got, and after how many ms."""

    here: Doors
    name: str
    answers: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)

    async def call(self, number: int, at: float) -> None:
        message = {"role": "user", "content": f"word {number}"}
        body = {"model": "m", "messages": [message], "max_tokens": 8, "user": f"{self.name}/{number}"}
        try:
            async with self.here.post(self.here.api, "chat/completions", json=body) as response:
                text = await response.read()
                is_right = response.status == 200 and b'"word %d word' % number in text
                self.answers["right" if is_right else f"{response.status} {text[:200]!r}"] += 1
        except (aiohttp.ClientError, OSError) as error:
            self.answers[repr(error)[:200]] += 1
        self.waits.append((time.monotonic() - at) * 1000)


async def calls(asked: Asked) -> list[Finding]:
    """200 requests a second by the front for 20 s, whose answers are not streamed."""
    seconds = min(asked.seconds, CALLS_S)
    async with doors(asked, Setting(slots=100, first_token_s=0.02), workers=1) as here:
        await paced(asked.rate / 2, int(asked.rate), Callers(here, "warm").call)
        clients, count = Callers(here, "timed"), int(asked.rate * seconds)
        before, begun = here.used(), time.monotonic()
        await paced(asked.rate, count, clients.call)
        took_s = time.monotonic() - begun
        used = {name: each - before[name] for name, each in here.used().items()}
        for what, many in clients.answers.most_common(4):
            asked.say(f"  {many} times: {what}")
        called = Counter(each.user for each in await here.calls())
        right = clients.answers["right"]
        return [
            Finding("requests", count),
            Finding("right answers", right, at_least=count),
            Finding("answers a second", right / took_s, at_least=count / (seconds + HELD_S)),
            Finding("most calls of one request", max(called.values(), default=0), at_most=1),
            Finding("p50 of a request, ms", _percentile(clients.waits, 0.5)),
            Finding("p95, ms", p95(clients.waits)),
            *(Finding(f"CPU a request, {name}, ms", each * 1000 / count) for name, each in used.items()),
            Finding("CPU of all, cores", sum(used.values()) / took_s),
        ]


# -- streams that are cut


@dataclass
class Cut:
    """A client that closes its connection again and again, and goes on by Last-Event-ID. `words`: what it has, without
    what was taken back. `error`: the code of the error that has ended the stream.
    """

    number: int
    with_restarts: bool
    words: list[str] = field(default_factory=list)
    position: str = ""
    cuts: int = 0
    lost: int = 0  # connections that the front has cut or refused
    restarts: int = 0
    error: str = ""
    is_over: bool = False

    def take(self, lines: list[bytes]) -> None:
        """Read the lines of an event."""
        name, data = b"", b""
        for line in lines:
            key, _, value = line.partition(b": ")
            match key:
                case b"id":
                    self.position = value.decode()
                case b"event":
                    name = value
                case b"data":
                    data = value
        if data == b"[DONE]":
            self.is_over = True
        elif name == b"restart":
            self.words.clear()
            self.restarts += 1
        elif data:
            self._take(json.loads(data))

    def _take(self, chunk: Mapping[str, Any]) -> None:
        if chunk.get("error"):
            self.error, self.is_over = chunk["error"]["code"] or "none", True
        for choice in chunk.get("choices") or ():
            self.words += choice["delta"].get("content", "").split()


async def cut(asked: Asked) -> list[Finding]:
    """Streams that are cut 20 times and resumed by Last-Event-ID, over the front's restart and a worker's death."""
    words = [f"w{place}" for place in range(CUT_TOKENS)]
    setting = Setting(slots=CUT_STREAMS // 2, first_token_s=FIRST_TOKEN_S, token_s=CUT_TOKEN_S)
    cuts = [Cut(number, with_restarts=number % 4 < 2) for number in range(CUT_STREAMS)]
    async with doors(asked, setting, workers=2) as here:
        with told(asked.say, "all ended"):
            async with asyncio.timeout(CUT_S), asyncio.TaskGroup() as group:
                reading = [group.create_task(_cut(here, each, words)) for each in cuts]
                await _reached(cuts, FRONT_AT)
                here.kill_front()
                await here.start_front()
                await _reached(cuts, WORKER_AT)
                here.workers.kill(here.workers.alive[0])
                here.workers.start()
                await asyncio.wait(reading)
        calls = Counter(each.user for each in await here.calls())
        for each in cuts:
            asked.say(
                f"  stream {each.number}: {len(each.words)} tokens, {each.cuts} cuts, {each.lost} lost connections, "
                f"{each.restarts} restarts, {calls[f'{each.number}']} calls, error: {each.error or 'none'}"
            )
        whole = [each for each in cuts if not each.error]
        odd = [each for each in cuts if each.error and each.error not in ERRORS]
        return [
            Finding("streams", len(cuts)),
            Finding("fewest cuts of a stream that ended whole", min((e.cuts for e in whole), default=0), at_least=CUTS),
            Finding("streams that met the restart of the front", sum(e.lost > 0 for e in cuts), at_least=1),
            Finding("streams that ended whole", len(whole), at_least=CUT_STREAMS // 2),
            Finding("of them, with lost or repeated tokens", sum(e.words != words for e in whole), at_most=0),
            Finding(
                "streams that met the worker's death", sum(e.restarts > 0 or e.error != "" for e in cuts), at_least=1
            ),
            Finding("of them, begun anew, as the client asked", sum(e.restarts > 0 for e in cuts)),
            Finding("of them, ended with the documented error", sum(e.error in ERRORS for e in cuts)),
            Finding(
                "streams with a token that was not their next one",
                sum(e.words != words[: len(e.words)] for e in cuts),
                at_most=0,
            ),
            Finding("streams that ended with another error", len(odd), at_most=0),
            Finding("calls beyond one a stream", calls.total() - len(cuts), at_most=CUT_STREAMS),
            Finding("most calls of a stream", max(calls.values()), at_most=2),
        ]


async def _reached(cuts: list[Cut], tokens: int) -> None:
    while not any(len(each.words) >= tokens for each in cuts):
        await asyncio.sleep(0.01)


async def _cut(here: Doors, cut: Cut, words: list[str]) -> None:
    """Read a stream to its end, over cuts after every so many tokens."""
    body = {"model": "m", "messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": len(words)}
    body |= {"stream": True, "user": f"{cut.number}"}
    asks = {"x-aiqueue-on-restart": "event"} if cut.with_restarts else {}
    await asyncio.sleep(cut.number * 0.1)
    while not cut.is_over:
        headers = {**asks, **({"Last-Event-ID": cut.position} if cut.position else {})}
        try:
            async with here.post(here.api, "chat/completions", headers, json=body) as response:
                if response.status != 200:
                    cut.error = f"status {response.status}: {(await response.read())[:300]!r}"
                    return
                await _read(response, cut)
                if not cut.is_over:
                    cut.cuts += 1
                    response.close()
        except (aiohttp.ClientError, OSError):
            cut.lost += 1
            await asyncio.sleep(0.1)


async def _read(response: aiohttp.ClientResponse, cut: Cut) -> None:
    """Read events until the client has had enough tokens, or the end has come."""
    lines, begun, restarts = list[bytes](), len(cut.words), cut.restarts
    async for raw in response.content:
        line = raw.rstrip(b"\n")
        if line:
            lines.append(line)
            continue
        cut.take(lines)
        lines = []
        if restarts != cut.restarts:
            begun, restarts = 0, cut.restarts
        if cut.is_over or len(cut.words) - begun >= CUT_EVERY:
            return
