"""Scenarios of batches, by files over HTTP: what is paid when processes are killed, and what a large one takes."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp

from ..common import resident_mib
from ..scenarios import Finding, told
from .bench import Asked, Setting
from .doors import Doors, doors
from .money import settled

KILLED_LINES = 500
KILLS_S, LARGE_S = 300.0, 3_000.0
POLL_S = 0.5
TOKENS = 8
GROWTH_MIB = 24.0  # that is flat: a process of 50,000 lines held in memory would have more
LINE = {"method": "POST", "url": "/v1/chat/completions"}
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


def _line(number: int) -> bytes:
    message = {"role": "user", "content": f"line {number}"}
    body = {"model": "m", "messages": [message], "max_tokens": TOKENS, "user": f"l-{number}"}
    return json.dumps({"custom_id": f"l-{number}", **LINE, "body": body}).encode() + b"\n"


async def _begin(here: Doors, lines: int) -> str:
    """Upload a file of so many lines, and begin its batch. Return its id."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b"".join(map(_line, range(lines))), filename="in.jsonl")
    file = await _ask(here, "files", data=form)
    fields = {"input_file_id": file["id"], "endpoint": LINE["url"], "completion_window": "24h"}
    return str((await _ask(here, "batches", json=fields))["id"])


async def _ask(here: Doors, path: str, **fields: Any) -> dict[str, Any]:
    async with here.post(here.api, path, **fields) as response:
        text = await response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {text[:300]!r}")
        found: dict[str, Any] = json.loads(text)
        return found


async def _followed(
    here: Doors, batch_id: str, within_s: float, until: Callable[[int], bool] = lambda _: False
) -> dict[str, Any]:
    """Return a batch once it has ended, or `until` of its ended lines holds. Raises RuntimeError."""
    end = time.monotonic() + within_s
    while True:
        found: dict[str, Any] = await here.get(f"batches/{batch_id}")
        counts = found["request_counts"]
        if found["status"] in ENDED or until(counts["completed"] + counts["failed"]):
            return found
        if time.monotonic() > end:
            raise RuntimeError(f"the batch is {found['status']} after {within_s:g} s: {counts}")
        await asyncio.sleep(POLL_S)


async def _records(here: Doors, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """All lines of the output and the error file."""
    files = [batch[name] for name in ("output_file_id", "error_file_id") if batch[name]]
    texts = [await here.read(f"files/{each}/content") for each in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


async def kills(asked: Asked) -> list[Finding]:
    """A batch of 500 lines whose worker, and then whose front, die half-way: each line is called once or told."""
    setting = Setting(budgets=['tenant = "a"\nmonth = 1_000'], slots=20, first_token_s=0.1, token_s=0.02)
    async with doors(asked, setting, workers=1) as here:
        batch_id = await _begin(here, KILLED_LINES)
        with told(asked.say, "ended"):
            await _followed(here, batch_id, KILLS_S, lambda ended: ended >= KILLED_LINES * 0.4)
            at = time.time()
            here.workers.kill(here.workers.alive[0])
            here.workers.start()
            half = await _followed(here, batch_id, KILLS_S, lambda ended: ended >= KILLED_LINES * 0.6)
            here.kill_front()
            await here.start_front()
            batch = await _followed(here, batch_id, KILLS_S)
        asked.say(f"  when the front was killed: {half['request_counts']}, at the end: {batch['request_counts']}")
        records = await _records(here, batch)
        calls = [each for each in await here.calls() if each.outcome != "refused"]
        called = Counter(each.user for each in calls)
        wanted = {f"l-{number}" for number in range(KILLED_LINES)}
        answered = {each["custom_id"]: each["response"]["body"] for each in records if _is_right(each)}
        stated = {name: body["aiqueue"].get("possibly_billed", 0) for name, body in answered.items()}
        extra = {name: count - 1 for name, count in called.items() if count > 1}
        under_way = {each.user for each in calls if each.started_at <= at <= (each.ended_at or at) + 0.5}
        budget = await settled(here, "a")
        return [
            Finding("lines", KILLED_LINES),
            Finding("completed batches", batch["status"] == "completed", at_least=1),
            Finding("records in output and error file", len(records), at_least=KILLED_LINES, at_most=KILLED_LINES),
            Finding("right answers, each of a line of its own", len(answered), at_least=KILLED_LINES),
            Finding("counted as completed", batch["request_counts"]["completed"], at_least=KILLED_LINES),
            Finding("lines that were never called", len(wanted - called.keys()), at_most=0),
            Finding("calls beyond one a line", sum(extra.values())),
            Finding("of them, not reported", sum(n > stated.get(each, 0) for each, n in extra.items()), at_most=0),
            Finding("of them, not under way when the worker died", len(extra.keys() - under_way), at_most=0),
            Finding("budget: reserved still, micro-dollars", budget.reserved_micros, at_most=0),
            Finding("jobs left", await here.left(), at_most=0),
        ]


def _is_right(record: dict[str, Any]) -> bool:
    response, number = record["response"] or {}, record["custom_id"].removeprefix("l-")
    if response.get("status_code") != 200:
        return False
    words = response["body"]["choices"][0]["message"]["content"].split()
    return bool(words == ["line", number] * (TOKENS // 2))


async def large(asked: Asked) -> list[Finding]:
    """A batch of 50,000 lines: how many a second, and the memory of front and worker meanwhile."""
    async with doors(asked, Setting(slots=50), workers=1) as here:
        with told(asked.say, "uploaded and begun"):
            batch_id = await _begin(here, asked.lines)
        used, begun = here.used(), time.monotonic()
        following = asyncio.create_task(_followed(here, batch_id, LARGE_S))
        memory: dict[str, list[float]] = {"front": [], "worker": [], "server": []}
        while not following.done():
            await asyncio.wait([following], timeout=1.0)
            memory["front"].append(resident_mib(here.fronts.alive[0].pid))
            memory["worker"].append(resident_mib(here.workers.alive[0].pid))
            memory["server"].append(resident_mib(str(here.servers[0].pid)))
        batch, took_s = following.result(), time.monotonic() - begun
        used = {name: each - used[name] for name, each in here.used().items()}
        called = Counter(each.user for each in await here.calls())
        for name, each in memory.items():
            asked.say(f"  {name}, MiB over time: {', '.join(f'{mib:.0f}' for mib in each[:: max(1, len(each) // 20)])}")
        with told(asked.say, "output read"):
            right = sum(_is_right(each) for each in await _records(here, batch))
        return [
            Finding("lines", asked.lines),
            Finding("right answers in the output", right, at_least=asked.lines),
            Finding("calls", called.total(), at_least=asked.lines, at_most=asked.lines),
            Finding("most calls of a line", max(called.values()), at_most=1),
            Finding("lines a second", asked.lines / took_s),
            *_flat("front", memory["front"], GROWTH_MIB),
            *_flat("worker", memory["worker"], GROWTH_MIB),
            *_flat("server", memory["server"], None),
            Finding("front after its output was read, MiB", resident_mib(here.fronts.alive[0].pid)),
            *(Finding(f"CPU a line, {name}, ms", each * 1000 / asked.lines) for name, each in used.items()),
        ]


def _flat(name: str, mib: list[float], most: float | None) -> list[Finding]:
    """How much memory a process has in the second and in the last tenth of a run."""
    tenth = max(1, len(mib) // 10)
    early, late = statistics.median(mib[tenth : 2 * tenth] or mib), statistics.median(mib[-tenth:])
    return [
        Finding(f"memory of the {name} early, MiB", early),
        Finding(f"memory of the {name} late, MiB", late),
        Finding(f"memory of the {name}, growth, MiB", late - early, at_most=most),
        Finding(f"memory of the {name} at most, MiB", max(mib)),
    ]
