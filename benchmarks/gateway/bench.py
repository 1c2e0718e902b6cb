"""What the scenarios stand on: a server, the stand-in provider and gateway workers, all processes of their own."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

import aiqueue
from aiqueue.cli.health import read_report
from aiqueue.errors import NotFound
from aiqueue.gateway import GatewayRequest, UsageLedger, UsageRecord, UsageStore
from aiqueue.gateway.standin import Fault, LoggedCall
from aiqueue.server import supervisor

from .. import scenarios
from ..chaos.children import Child
from ..common import until
from ..limiting import judge
from ..scenarios import Fleet, System, running

STREAM, FAMILY = "AI_GATEWAY_REQUESTS", "gateway.requests"
KEY_ENV = "STANDIN_KEY"
READY_S = 90.0
WAITING = 200  # answers that are waited for at once
PROVIDER = """
[[provider]]
name = "standin"
kind = "openai"
base_url = "{url}"
key_env = "{key_env}"
connections = 1_000
"""
MODEL = """
[[model]]
name = "{name}"
provider = "standin"
context = 100_000
max_output_tokens = 1_000
price = {{ input = {price[0]}, output = {price[1]} }}
"""


@dataclass(frozen=True, kw_only=True)
class Asked(scenarios.Asked):
    """What the command line asked for. `window_s`: of the limits; `seconds`: of a run under load; `requests`: of a run
    with kills; `waiting`: of low priority; `rate`: requests a second, where calls are timed; `lines`: of a large batch.
    """

    window_s: float = 60.0
    seconds: float = 180.0
    workers: int = 4
    requests: int = 2_000
    waiting: int = 10_000
    rate: float = 200.0
    lines: int = 50_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a scenario needs. `tables`: of limits.toml, without their family. `budgets`: tables of gateway.toml, without
    their head. `price`: USD a million tokens of prompt and completion. The times are the stand-in's.
    """

    models: Sequence[str] = ("m",)
    tables: Sequence[str] = ()
    budgets: Sequence[str] = ()
    price: tuple[float, float] = (1.0, 2.0)
    slots: int = 10
    first_token_s: float = 0.0
    token_s: float = 0.0
    completion_tokens: int = 1_000


class Ground(System):
    """A system with the stand-in provider and gateway workers. The harness knows the provider by its log only."""

    def __init__(self, asked: Asked, setting: Setting, directory: Path) -> None:
        super().__init__(directory, STREAM, seed=asked.seed)
        self.asked, self.setting = asked, setting
        self.key = f"sk-{secrets.token_hex(16)}"
        self.sent: dict[str, float] = {}  # by the request's user: when it was enqueued, seconds since the epoch
        self.port = supervisor.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._random = random.Random(asked.seed)
        self._count = itertools.count()
        self._session: aiohttp.ClientSession

    # -- start and end

    def write_files(self) -> None:
        if self.setting.tables:
            tables = "".join(f'[[limit]]\nfamily = "{FAMILY}"\n{each}\n' for each in self.setting.tables)
            (self._streams / "limits.toml").write_text(tables)
        text = PROVIDER.format(url=f"{self.url}/v1", key_env=KEY_ENV)
        text += "".join(MODEL.format(name=each, price=self.setting.price) for each in self.setting.models)
        text += "".join(f"[[budget]]\n{each}\n" for each in self.setting.budgets)
        (self._streams / "gateway.toml").write_text(text)

    async def start(self) -> None:
        self._session = aiohttp.ClientSession()
        log, setting = self.directory / "standin.log", self.setting
        times = (f"--first-token-s={setting.first_token_s}", f"--token-s={setting.token_s}")
        arguments = ["-m", "aiqueue.gateway.standin", f"--port={self.port}", *times]
        arguments.append(f"--completion-tokens={setting.completion_tokens}")
        self.provider = Child(arguments, {}, log)
        await until(lambda: "\n" in log.read_text(), lambda: "the provider did not start")
        if not log.read_text().startswith(self.url):
            raise RuntimeError(f"the provider did not start: {log.read_text()[-500:]}")
        env = {**self.env, KEY_ENV: self.key}
        healths = [[f"--health-file={self._health(n)}"] for n in range(self.asked.workers)]
        places: list[tuple[list[str], dict[str, str]]] = [(each, {}) for each in healths]
        program = ["-m", "aiqueue", "work", "aiqueue.gateway:worker", f"--concurrency={setting.slots}"]
        self.workers = Fleet([*program, "--log-level=warning"], env, self.directory / "workers.log", places)
        self.workers.start()
        await until(self._ready, lambda: f"the workers were not ready; they said: {self.tail()}", within_s=READY_S)

    def _health(self, number: int) -> Path:
        return self.directory / f"worker-{number}.json"

    def _ready(self) -> bool:
        if any(each.code is not None for each in self.workers.alive):
            raise RuntimeError(f"a worker ended by itself: {self.tail()}")
        try:
            return all(read_report(self._health(n))["state"] == "ok" for n in range(self.asked.workers))
        except NotFound:
            return False

    async def end(self) -> None:
        await super().end()
        if hasattr(self, "_session"):
            await self._session.close()

    # -- what happens

    def request(
        self, *, model: str = "m", words: int = 8, tokens: int | tuple[int, int] = 20, stream: bool = False,
        tenant: str = "a",
    ) -> GatewayRequest:  # fmt: skip
        """A request with a number of its own, in its `user` and `request_id`. `tokens`: of its completion."""
        number = next(self._count)
        most = tokens if isinstance(tokens, int) else self._random.randint(*tokens)
        content = " ".join(["word", *[f"w{self._random.randint(0, 99)}" for _ in range(words - 1)]])
        return GatewayRequest(
            model=model, messages=[{"role": "user", "content": content}], max_tokens=most, stream=stream,
            request_id=f"r-{number}", user=f"{tenant}/{number}",
        )  # fmt: skip

    async def enqueue(
        self, request: GatewayRequest, *, tenant: str = "a", priority: str = "normal"
    ) -> aiqueue.Handle[Any]:
        assert request.user is not None
        self.sent[request.user] = time.time()
        return await self.client.enqueue(request, tenant=tenant, priority=priority)

    async def fill(
        self, requests: Sequence[GatewayRequest], *, tenant: str = "a", priority: str = "normal"
    ) -> list[aiqueue.Handle[Any]]:
        """Enqueue many."""
        now = time.time()
        self.sent |= {str(each.user): now for each in requests}
        handles = []
        async for outcome in self.client.enqueue_many(requests, tenant=tenant, priority=priority, on_full="wait"):
            if isinstance(outcome, Exception):
                raise outcome
            handles.append(outcome)
        return handles

    async def pace(
        self, rate: float, seconds: float, *, model: str = "m", tokens: int = 1, tenant: str = "a"
    ) -> list[aiqueue.Handle[Any]]:
        """Enqueue requests at a rate."""
        begun, tasks = time.monotonic(), []
        async with asyncio.TaskGroup() as group:
            for place in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, begun + place / rate - time.monotonic()))
                request = self.request(model=model, tokens=tokens, tenant=tenant)
                tasks.append(group.create_task(self.enqueue(request, tenant=tenant)))
        return [each.result() for each in tasks]

    async def order(self, fault: Fault) -> None:
        """Let the provider's next calls fail."""
        await self._post("fault", asdict(fault))

    async def behave(self, **fields: Any) -> None:
        """Change how the provider answers."""
        await self._post("behaviour", fields)

    async def _post(self, path: str, fields: dict[str, Any]) -> None:
        async with self._session.post(f"{self.url}/{path}", json=fields) as response:
            response.raise_for_status()

    # -- what is seen

    async def answers(
        self, handles: Sequence[aiqueue.Handle[Any]], within_s: float = 120.0
    ) -> list[dict[str, Any] | Exception]:
        """Of each, its result, or with what it ended."""
        end, turn = time.monotonic() + within_s, asyncio.Semaphore(WAITING)

        async def wait(handle: aiqueue.Handle[Any]) -> dict[str, Any] | Exception:
            async with turn:
                try:
                    found: dict[str, Any] = await handle.result(timeout=max(1.0, end - time.monotonic()))
                except aiqueue.AIQueueError as error:
                    return error
                return found

        return await asyncio.gather(*map(wait, handles))

    async def calls(self, since: int = 0) -> list[LoggedCall]:
        """The provider's log, from a number on, in the order of the calls' start."""
        async with self._session.get(f"{self.url}/log", params={"since": since}) as response:
            response.raise_for_status()
            found = [LoggedCall(**{**each, "body": {}}) for each in json.loads(await response.read())]
        return sorted(found, key=lambda each: each.started_at)

    async def called(self, users: set[str], within_s: float) -> None:
        """Wait until requests of all these users have been called. Raises RuntimeError."""
        seen, since, end = set[str](), 0, time.monotonic() + within_s
        while missing := users - seen:
            if time.monotonic() > end:
                raise RuntimeError(f"{len(missing):,} of {len(users):,} requests were not called within {within_s:g} s")
            await asyncio.sleep(0.25)
            found = await self.calls(since)
            seen |= {each.user for each in found}
            since += len(found)

    async def judged(self) -> list[judge.Call]:
        """The provider's log as the judges of limits read it. Times are seconds since the epoch."""
        return [
            judge.Call(
                each.started_at, 0, each.status, each.user.partition("/")[0], each.model,
                each.prompt_tokens + each.completion_tokens, int(each.user.partition("/")[2] or -1),
                self.sent.get(each.user, 0.0), 1, each.ended_at,
            )
            for each in await self.calls()
        ]  # fmt: skip

    @property
    def store(self) -> UsageStore:
        return UsageStore(self.client.connection, self.client.topology)

    async def records(self) -> list[UsageRecord]:
        """The ledger, whole."""
        return [record async for _, record in UsageLedger(self.store).records()]


@asynccontextmanager
async def ground(asked: Asked, setting: Setting) -> AsyncIterator[Ground]:
    """A system of its own with workers that are ready, and nothing left of it afterwards."""
    async with running(lambda path: Ground(asked, setting, path), keep=asked.keep) as made:
        yield made
