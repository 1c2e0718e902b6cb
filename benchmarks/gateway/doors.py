"""A front before the workers, its clients over HTTP, and how they read a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from aiqueue.gateway import ApiKeys
from aiqueue.server import supervisor

from ..common import cpu_s
from ..scenarios import Fleet, running
from .bench import READY_S, Asked, Ground, Setting

TENANT = "a"
LOOK_S = 0.05
WAIT_S = 120.0


class Doors(Ground):
    """A system with one front. `api`: the base URL of the front, `direct`: that of the provider."""

    async def start(self) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_read=WAIT_S)
        )
        await super().start()
        _, self._token = await ApiKeys(self.client).add(TENANT)
        port = supervisor.free_port()
        self.api, self.direct = f"http://127.0.0.1:{port}/v1", f"{self.url}/v1"
        program = ["-m", "aiqueue", "gateway", "serve", f"--port={port}", "--log-level=warning"]
        self.fronts = Fleet(program, self.env, self.directory / "front.log", [([], {})])
        await self.start_front()

    async def start_front(self) -> None:
        """Start the front, if it does not run, and wait until it answers."""
        self.fronts.start()
        end = time.monotonic() + READY_S
        while not await self._answers():
            if time.monotonic() > end or self.fronts.alive[0].code is not None:
                said = (self.directory / "front.log").read_text(errors="replace")[-500:]
                raise RuntimeError(f"the front did not start: {said}")
            await asyncio.sleep(LOOK_S)

    async def _answers(self) -> bool:
        try:
            async with self._http.get(f"{self.api.removesuffix('/v1')}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    def kill_front(self) -> None:
        self.fronts.kill(self.fronts.alive[0])

    async def end(self) -> None:
        if hasattr(self, "fronts"):
            self.fronts.kill_all()
        await super().end()
        await self._http.close()

    # -- what happens

    def post(
        self, base: str, path: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Any:  # aiohttp's context manager of a response
        """Send a request to the front or, as the same one, to the provider."""
        given = {"Authorization": f"Bearer {self._token if base == self.api else self.key}", **(headers or {})}
        return self._http.post(f"{base}/{path}", headers=given, **fields)

    async def get(self, path: str) -> Any:
        """Return the JSON of a path of the front."""
        return json.loads(await self.read(path))

    async def read(self, path: str) -> bytes:
        """Return what a path of the front has. Raises RuntimeError."""
        given = {"Authorization": f"Bearer {self._token}"}
        async with self._http.get(f"{self.api}/{path}", headers=given) as response:
            body = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{path}: {response.status} {body[:300]!r}")
            return body

    async def read_stream(self, base: str, body: Mapping[str, Any]) -> Stream:
        """Read a stream to its end. What has come is looked into by `Stream.chunks`, so that reading takes no time."""
        found = Stream(time.time())
        try:
            async with self.post(base, "chat/completions", json=body) as response:
                found.status = response.status
                async for part in response.content.iter_any():
                    found.parts.append((time.time(), part))
        except (aiohttp.ClientError, OSError) as error:
            found.problem = repr(error)
        return found

    # -- what is seen

    def used(self) -> dict[str, float]:
        """Seconds of CPU by kind of process, the clients', which are here, among them."""
        assert self.provider is not None
        found = {"client": cpu_s(), "front": sum(cpu_s(each.pid) for each in self.fronts.alive)}
        for name, each in self.cpu().items():
            kind = name.partition(" ")[0]
            found[kind] = found.get(kind, 0.0) + each
        return {**found, "provider": cpu_s(self.provider.pid)}


@dataclass
class Stream:
    """A stream as it came. Times: seconds since the epoch."""

    begun_at: float
    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    problem: str = ""

    def events(self) -> list[tuple[float, bytes]]:
        """Of each event, when it was there, and its data."""
        found, buffer = list[tuple[float, bytes]](), b""
        for at, part in self.parts:
            *lines, buffer = (buffer + part).split(b"\n")
            found += [(at, each.removeprefix(b"data: ")) for each in lines if each.startswith(b"data: ")]
        return found


@dataclass
class Times:
    """What streams have shown, in ms: from request to first token, and from the provider to the client. `broken`: what
    was lost or wrong.
    """

    first: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    streams: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, stream: Stream, words: Sequence[str]) -> None:
        """Take in a stream that must have these words. The provider has stamped its chunks."""
        self.streams += 1
        events, said, is_first = stream.events(), list[str](), True
        for at, data in events:
            chunk = {} if data == b"[DONE]" else json.loads(data)
            for choice in chunk.get("choices") or ():
                if not (text := choice["delta"].get("content")):
                    continue
                said.append(text.strip())
                self.delays.append((at - float(chunk["system_fingerprint"])) * 1000)
                if is_first:
                    self.first.append((at - stream.begun_at) * 1000)
                    is_first = False
        if said != list(words) or not events or events[-1][1] != b"[DONE]":
            last = events[-1][1][:200] if events else stream.problem
            self.broken.append(f"{len(said)} of {len(words)} tokens, status {stream.status}, last: {last!r}")


@asynccontextmanager
async def doors(asked: Asked, setting: Setting, *, workers: int) -> AsyncIterator[Doors]:
    """A system with a front that is ready, and at most so many workers."""
    asked = replace(asked, workers=min(asked.workers, workers))
    async with running(lambda path: Doors(asked, setting, path), keep=asked.keep) as made:
        yield made
