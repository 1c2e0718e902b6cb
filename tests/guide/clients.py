"""Plain NATS clients as processes of their own, which have never heard of aiqueue."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .. import npm
from ..support import Account, eventually

HERE = Path(__file__).parent
GUIDE = HERE / "guide.md"
START_S, ANSWER_S, END_S = 20.0, 30.0, 5.0


class Refused(Exception):
    """What the plain client's own library has raised."""


class Plain:
    """One such process: it is told what to do, and what it hears is kept."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as err:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True, env=environment, cwd=HERE
            )
        self._answers: dict[int, Future[Any]] = {}
        self._ready: Future[list[str]] = Future()
        self._heard: dict[str, list[dict[str, Any]]] = {}
        self._count = 0
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.modules = self._ready.result(START_S)  # those of aiqueue that it has imported
        except BaseException:
            self.end()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "sub" in told:
                self._heard.setdefault(told.pop("sub"), []).append(told)
            elif "ready" in told:
                self._ready.set_result(told["ready"])
            elif "error" in told:
                self._answers.pop(told["id"]).set_exception(Refused(told["error"]))
            else:
                self._answers.pop(told["id"]).set_result(told["value"])
        ended = RuntimeError(f"the plain client has ended: {self._log.read_text()}")
        for waiting in (self._ready, *self._answers.values()):
            if not waiting.done():
                waiting.set_exception(ended)

    async def do(self, verb: str, **order: Any) -> Any:
        """Have it do something, and return what came of it. Raises Refused."""
        assert self._process.stdin is not None
        self._count += 1
        answer = self._answers[self._count] = Future()
        self._process.stdin.write(json.dumps({"id": self._count, "do": verb, **order}) + "\n")
        self._process.stdin.flush()
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.wrap_future(answer)

    async def run(self, title: str, **names: str) -> Any:
        """A snippet of the guide, by the comment above it."""
        return await self.do("run", title=title, **names)

    async def hears(self, *subs: str, count: int) -> list[dict[str, Any]]:
        """What came in on these subscriptions, once there is so much of it."""

        def heard() -> list[dict[str, Any]]:
            return [each for sub in subs for each in self._heard.get(sub, ())]

        await eventually(lambda: len(heard()) >= count)
        return heard()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_", "PYTHON"))}


def python(account: Account, log: Path) -> Plain:
    """nats-py, in an interpreter that does not look at where it was started."""
    command = [sys.executable, "-P", str(HERE / "plain.py"), str(GUIDE), account.url, account.user, account.password]
    return Plain(command, environment(), log)


def node(account: Account, log: Path) -> Plain:
    """NATS's client for Node.js. Its packages must be there: see `node_problem`."""
    command = ["node", str(HERE / "plain.mjs"), account.url, account.user, account.password]
    return Plain(command, environment(), log)


def node_problem() -> str:
    """Why there is no Node.js client here, after a try to install it; "" where there is one."""
    return npm.problem(HERE)
