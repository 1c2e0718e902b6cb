"""`aiqueue gateway demo`: two tenants call models of a stand-in provider, which refuses, while a worker is killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...client import Client, Handle
from ...config import Settings
from ...errors import AIQueueError, BadInput, Unavailable
from ...gateway import Budgets, GatewayRequest, UsageLedger, UsageStore, UsageView, load, month_of
from ...server import supervisor
from .. import health
from . import gateway_view
from .gateway_view import CallBoard, DemoBill
from .running import drive, open_screen, private_client, private_directory, run_demo
from .view import Screen

try:
    from ...gateway import standin
except ModuleNotFoundError as error:  # its server is aiohttp's
    raise BadInput(f"aiqueue.gateway needs {error.name}: pip install 'aiqueue[gateway]'") from None

KEY_ENV = "AIQUEUE_DEMO_KEY"
PLAN = {("acme", "small"): 60, ("acme", "large"): 30, ("globex", "small"): 40, ("globex", "large"): 10}
PRIORITIES = ("normal", "high", "normal", "low")
PROMPT = "how do {count} tenants share one account of a provider, and who pays for request {number}?"
LIMIT, WINDOW_S = 20, 5.0
RETRY_AFTER_S = 4.0
BEHAVIOUR = standin.Behaviour(first_token_s=0.2, token_s=0.02, completion_tokens=40, rpm=LIMIT, window_s=WINDOW_S)
UNDER_WAY = 10  # calls, when a worker is killed
FIRST = 20  # answers, before the provider refuses
TICK_S = 0.1
STUCK_S = 60.0  # for a step: longer than the lease of a killed worker's jobs
END_S = 10.0

GATEWAY_FILE = f"""
[[provider]]
name = "stand-in"
kind = "openai"
base_url = "{{url}}"
key_env = "{KEY_ENV}"

[[model]]
name = "small"
provider = "stand-in"
context = 16_000
max_output_tokens = 1_000
price = {{{{ input = 2.00, output = 8.00 }}}}     # USD a million tokens

[[model]]
name = "large"
provider = "stand-in"
context = 16_000
max_output_tokens = 1_000
price = {{{{ input = 10.00, output = 40.00 }}}}

[[budget]]
tenant = "*"
month = 5.00                                      # USD
"""
LIMITS_FILE = f"""
[[limit]]
family = "gateway.requests"
key = "*"                                         # each model
requests = {LIMIT}
window = "{WINDOW_S:g}s"
"""


def gateway_demo(*, keep: bool, as_json: bool) -> None:
    """Run the demo, print its story or its report, and exit."""
    screen = open_screen(quiet=as_json)
    run_demo(lambda: drive(lambda: _run(screen, keep=keep)), screen, keep=keep)


async def _run(screen: Screen, *, keep: bool) -> dict[str, Any]:
    with private_directory(keep=keep) as directory:
        files = directory / "gateway"
        files.mkdir()
        async with standin.StandIn(BEHAVIOUR) as provider:
            (files / "gateway.toml").write_text(GATEWAY_FILE.format(url=provider.url))
            (files / "limits.toml").write_text(LIMITS_FILE)
            screen.say(f"a stand-in for a provider answers on {provider.url}: no key is needed, and nothing is paid")
            async with private_client(Settings.load(), directory, screen.say, streams=files) as client:
                with _workers(client, directory, files) as workers:
                    report = await _Story(client, screen, provider, workers, files).run()
    screen.say("The servers and workers have stopped." + ("" if keep else " Their files are deleted."))
    if keep:
        screen.say("The data was kept. This starts the server again, so that `aiqueue gateway usage` finds it:")
        screen.command(f"cd {shlex.quote(str(directory))} && aiqueue server")
    return {**report, "kept": str(directory) if keep else None}


class _Workers:
    """A pool of two gateway workers."""

    def __init__(self, process: subprocess.Popen[bytes], health_file: Path, log: Path) -> None:
        self._process, self._health_file, self._log = process, health_file, log

    def pids(self) -> list[int]:
        """Return the processes that take jobs now."""
        with contextlib.suppress(AIQueueError):
            report = health.read_report(self._health_file)
            return [each["pid"] for each in report["processes"] if each["state"] == "ok"]
        return []

    def check(self) -> None:
        """Raise Unavailable if the pool has ended."""
        if self._process.poll() is not None:
            told = self._log.read_text(errors="replace").strip().splitlines()
            raise Unavailable(f"the workers have ended: {told[-1] if told else 'they said nothing'}")


@contextmanager
def _workers(client: Client, directory: Path, files: Path) -> Iterator[_Workers]:
    """Run ``aiqueue work aiqueue.gateway:worker`` as a user would, with no setting of another server."""
    settings, health_file, log = client.connection.settings, directory / "workers.json", directory / "workers.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
    env |= {
        "AIQUEUE_URL": settings.url or "", "AIQUEUE_USER": settings.user or "",
        "AIQUEUE_PASSWORD": settings.password.get_secret_value() if settings.password else "",
        "AIQUEUE_STREAMS": str(files), KEY_ENV: f"sk-{secrets.token_hex(16)}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), env.get("PYTHONPATH")])),
    }  # fmt: skip
    command = [sys.executable, "-m", "aiqueue", "work", "aiqueue.gateway:worker", "--processes=2"]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - this program itself
            [*command, f"--health-file={health_file}", "--concurrency=20", "--drain-timeout=5s"], env=env,
            cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509 - one system call
        )  # fmt: skip
    try:
        yield _Workers(process, health_file, log)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Story:
    """The steps of the demo, on an open client."""

    def __init__(
        self, client: Client, screen: Screen, provider: standin.StandIn, workers: _Workers, files: Path
    ) -> None:
        self._client, self._screen, self._provider, self._workers = client, screen, provider, workers
        self._board = CallBoard(provider.calls)
        self._models = load(files / "gateway.toml").models
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> dict[str, Any]:
        """Run all steps, and return the report as plain data."""
        begun = time.monotonic()
        try:
            await self._start()
            with self._screen.watching(self._board):
                await self._kill()
                await self._refuse()
                await self._until(lambda: self._board.is_done, "all answers")
        finally:
            for each in self._tasks:
                each.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return await self._report(time.monotonic() - begun)

    async def _until(self, true: Callable[[], bool], what: str) -> None:
        """Wait for a step. Raises Unavailable if it does not come."""
        end = time.monotonic() + STUCK_S
        while not true():
            self._workers.check()
            if self._board.requests:
                self._screen.tick(self._board)
            if time.monotonic() > end:
                raise Unavailable(f"the demo has waited {STUCK_S:g} s for {what}: {self._board.describe()}")
            await asyncio.sleep(TICK_S)

    async def _start(self) -> None:
        screen = self._screen
        screen.say("2 workers start, in a few seconds: aiqueue work aiqueue.gateway:worker --processes 2")
        await self._until(lambda: len(self._workers.pids()) == 2, "the workers")
        screen.say(
            f"{self._board.total(PLAN)} requests of 2 tenants are enqueued. limits.toml allows {LIMIT} calls of each "
            f"model in {WINDOW_S:g} s, and the provider refuses more."
        )
        number, priorities = 0, itertools.cycle(PRIORITIES)
        for (tenant, model), count in PLAN.items():
            for _ in range(count):
                number += 1
                handle = await self._enqueue(tenant, model, number, priority=next(priorities))
                self._tasks.append(asyncio.create_task(self._wait(tenant, model, handle)))
        handle = await self._enqueue("globex", "small", number + 1, priority="high", stream=True)
        self._tasks.append(asyncio.create_task(self._follow("globex", "small", handle)))

    async def _enqueue(
        self, tenant: str, model: str, number: int, *, priority: str, stream: bool = False
    ) -> Handle[Any]:
        id_ = f"{tenant}-{number}"
        content = PROMPT.format(count=len({each for each, _ in PLAN}), number=number)
        request = GatewayRequest(
            model=model, messages=[{"role": "user", "content": content}], request_id=id_, user=id_, stream=stream,
            max_tokens=BEHAVIOUR.completion_tokens,
        )  # fmt: skip
        self._board.expect(tenant, model)
        return await self._client.enqueue(request, tenant=tenant, priority=priority)

    async def _wait(self, tenant: str, model: str, handle: Handle[Any]) -> None:
        try:
            self._board.answer(tenant, model, await handle.result())
        except AIQueueError as error:
            self._board.fail(tenant, model)
            self._screen.event(f"request {handle.id}: {error}")

    async def _follow(self, tenant: str, model: str, handle: Handle[Any]) -> None:
        """Show a streamed answer."""
        begun, parts, first_s = time.monotonic(), list[str](), 0.0
        async with contextlib.aclosing(handle.stream()) as items:
            async for item in items:
                if item.event == "restart":
                    parts.clear()
                elif item.event == "chunk":
                    first_s = first_s or time.monotonic() - begun
                    parts += [each["delta"].get("content") or "" for each in item.data["choices"]]
        text = "".join(parts)
        self._screen.say(f"streamed to {tenant}, the first part after {first_s:.1f} s: “{text[:60]}…”", "green")
        await self._wait(tenant, model, handle)

    async def _refuse(self) -> None:
        """Have the provider refuse a model."""
        screen, calls = self._screen, self._provider.calls
        await self._until(lambda: self._board.answered >= FIRST, "the first answers")
        self._provider.order(standin.Fault(429, retry_after_s=RETRY_AFTER_S, message="try again later", model="large"))
        await self._until(lambda: any(each.status == 429 for each in calls), "a refusal")
        refusal = next(each for each in calls if each.status == 429)
        screen.say(
            f"Fault 2: the provider answers a call of large with 429 and Retry-After {RETRY_AFTER_S:g}. All workers "
            "let large rest, and small goes on.", "magenta",
        )  # fmt: skip

        def later(model: str) -> list[float]:
            return [each.started_at - refusal.started_at for each in calls[refusal.number + 1 :] if each.model == model]

        await self._until(lambda: any(each > RETRY_AFTER_S / 2 for each in later("large")), "the end of the pause")
        resumed_s = next(each for each in later("large") if each > RETRY_AFTER_S / 2)
        small = sum(each < resumed_s for each in later("small"))
        screen.say(
            f"large is called again, {resumed_s:.1f} s later; small was called {small} times in between.", "green"
        )

    async def _kill(self) -> None:
        """Kill a worker in the middle of its calls."""
        await self._until(lambda: self._board.running >= UNDER_WAY, "calls under way")
        pid = self._workers.pids()[0]
        os.kill(pid, signal.SIGKILL)
        self._screen.say(
            f"Fault 1: kill -9 {pid}, a worker, in the middle of its calls. The pool starts another one. Its requests "
            "go to other workers when its leases end, 30 s after it was last heard of.", "magenta",
        )  # fmt: skip

    async def _report(self, took_s: float) -> dict[str, Any]:
        store = UsageStore(self._client.connection, self._client.topology)
        ledger = UsageLedger(store)
        month = month_of(await store.now())
        end = time.monotonic() + END_S
        budgets = await Budgets(store, ledger).stats(month)
        while any(each.reserved_micros for each in budgets) and time.monotonic() < end:
            await asyncio.sleep(TICK_S)
            budgets = await Budgets(store, ledger).stats(month)
        records = [record async for _, record in ledger.records()]
        totals = await UsageView(store, ledger).totals(month)
        bill = DemoBill.of(self._board, self._provider.calls, records, budgets, self._models)
        gateway_view.show(self._screen, totals, budgets)
        for line, style in bill.describe():
            self._screen.say(line, style)
        return {
            "ok": bill.is_right, **asdict(bill), "totals": [{**e._asdict(), "sums": e.sums._asdict()} for e in totals],
            "budgets": [asdict(each) for each in budgets], "seconds": round(took_s, 2),
        }  # fmt: skip
