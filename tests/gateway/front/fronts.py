"""A front that runs in this process, with API keys in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiqueue
from aiqueue.gateway import load
from aiqueue.gateway.front import Front, FrontSettings
from aiqueue.gateway.front.serving import listen, serve, url_of

TOKEN = "aiq-of-acme"
OTHER_TOKEN = "aiq-another-of-acme"
FOREIGN_TOKEN = "aiq-of-globex"


@dataclass(frozen=True)
class Key:
    id: str = "k1"
    tenant: str = "acme"
    models: tuple[str, ...] | None = None
    priorities: tuple[str, ...] | None = None

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


class Admission:
    def __init__(self) -> None:
        self.settled: list[float | None] = []

    def settle(self, tokens: float | None = None) -> None:
        self.settled.append(tokens)


class Keys:
    """API keys in memory, and what their limits have admitted."""

    def __init__(self) -> None:
        self.known = {
            TOKEN: Key(), OTHER_TOKEN: Key("k2", models=("small",), priorities=("low",)),
            FOREIGN_TOKEN: Key("k3", "globex"),
        }  # fmt: skip
        self.admitted: list[tuple[str, float, Admission]] = []
        self.refusal: Exception | None = None

    def find(self, token: str) -> Key | None:
        return self.known.get(token)

    async def admit(self, key: Key, *, tokens: float = 0.0) -> Admission:
        if self.refusal is not None:
            raise self.refusal
        admission = Admission()
        self.admitted.append((key.id, tokens, admission))
        return admission


@dataclass
class RunningFront:
    """A front that serves `url`. `stop`: set it to drain; `served` ends then."""

    front: Front
    keys: Keys
    url: str
    stop: asyncio.Event
    served: asyncio.Task[bool]

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


@asynccontextmanager
async def open_front(
    client: aiqueue.Client,
    config: Path,
    keys: Keys | None = None,
    *,
    port: int = 0,
    drain_timeout_s: float = 0.2,
    **settings: Any,
) -> AsyncIterator[RunningFront]:
    keys = keys or Keys()
    front = Front.of(client, load(config), keys, FrontSettings(**settings))
    bound, ready, stop = listen("127.0.0.1", port), asyncio.Event(), asyncio.Event()
    url = url_of(bound)
    serving = asyncio.create_task(serve(front, bound, drain_timeout_s=drain_timeout_s, on_ready=ready.set, stop=stop))
    await asyncio.wait_for(ready.wait(), 5)
    try:
        yield RunningFront(front, keys, url, stop, serving)
    finally:
        stop.set()
        await serving


def chat_body(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **fields}


def bearer(token: str = TOKEN, **headers: str) -> dict[str, str]:
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
