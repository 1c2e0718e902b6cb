"""A front that runs in this process, with an API key of the tenant acme, another one that may do less, and globex's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiqueue
from aiqueue.gateway import ApiKeys, load
from aiqueue.gateway.front import Front, FrontSettings, listen, serve, url_of


class Tokens(NamedTuple):
    """Of API keys: `mine` of the tenant acme may do all, `other` of acme little, and `foreign` is globex's."""

    mine: str
    other: str
    foreign: str


async def add_keys(client: aiqueue.Client) -> Tokens:
    keys = ApiKeys(client)
    _, mine = await keys.add("acme")
    _, other = await keys.add("acme", models=["small"], priorities=["low"])
    _, foreign = await keys.add("globex")
    return Tokens(mine, other, foreign)


@dataclass
class RunningFront:
    """A front that serves `url`. `stop`: set it to drain; `served` ends then."""

    front: Front
    url: str
    stop: asyncio.Event
    served: asyncio.Task[bool]

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


@asynccontextmanager
async def open_front(
    client: aiqueue.Client, config: Path, *, drain_timeout_s: float = 0.2, **settings: Any
) -> AsyncIterator[RunningFront]:
    async with ApiKeys(client) as keys:
        front = Front.of(client, load(config), keys, FrontSettings(**settings))
        bound, ready, stop = listen("127.0.0.1", 0), asyncio.Event(), asyncio.Event()
        url = url_of(bound)
        serving = asyncio.create_task(
            serve(front, bound, drain_timeout_s=drain_timeout_s, on_ready=ready.set, stop=stop)
        )
        await asyncio.wait_for(ready.wait(), 5)
        try:
            yield RunningFront(front, url, stop, serving)
        finally:
            stop.set()
            await serving


def chat_body(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **fields}


def bearer(token: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **{name.replace("_", "-"): value for name, value in headers.items()}}


class Event(NamedTuple):
    """A server-sent event, as a browser reads it."""

    id: str
    name: str
    data: str


def parse_events(text: str) -> list[Event]:
    """The events in a part of a stream; what is cut off at its end is no event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        found.append(Event(fields.get("id", ""), fields.get("event", ""), fields.get("data", "")))
    return found


def text_of_events(events: list[Event]) -> str:
    chunks = [json.loads(each.data) for each in events if each.data != "[DONE]"]
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each.get("choices"))
