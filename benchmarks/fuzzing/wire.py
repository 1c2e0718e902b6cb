"""A plain connection that publishes raw frames, header blocks and all, and hears what the stream says to each."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from types import TracebackType
from typing import Self

from ..chaos.servers import Account
from .frames import Frame

UNDERWAY_MAX = 200
ANSWER_S = 30.0
LINE_MAX = 2**20


class Publisher:
    """Sends frames to subjects; `said` counts the answers: stored, refused by the server's error code, or nothing."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._sent = 0
        self._free = asyncio.Semaphore(UNDERWAY_MAX)
        self._done = asyncio.Event()
        self._open: set[int] = set()
        self.said: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        host, port = self._account.address
        self._reader, self._writer = await asyncio.open_connection(host, port, limit=LINE_MAX)
        options = {"user": self._account.user, "pass": self._account.password, "verbose": False, "headers": True,
                   "no_responders": True, "pedantic": False}  # fmt: skip
        self._writer.write(f"CONNECT {json.dumps(options)}\r\nSUB {self._inbox}.* 1\r\n".encode())
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.cancel()
        self._writer.close()

    async def send(self, subject: str, frame: Frame) -> None:
        """Publish to a stream; waits while too many are unanswered."""
        async with asyncio.timeout(ANSWER_S):
            await self._free.acquire()
        self._sent += 1
        self._open.add(self._sent)
        await self._put(subject, f"{self._inbox}.{self._sent}", frame)

    async def shout(self, subject: str, frame: Frame) -> None:
        """Publish where nobody answers."""
        await self._put(subject, "", frame)

    async def answered(self) -> None:
        """Return when every frame has its answer."""
        async with asyncio.timeout(ANSWER_S):
            while self._open:
                self._done.clear()
                await self._done.wait()

    async def _put(self, subject: str, reply: str, frame: Frame) -> None:
        size = len(frame.block) + len(frame.body)
        if frame.block:
            head = f"HPUB {subject} {reply} {len(frame.block)} {size}\r\n"
        else:
            head = f"PUB {subject} {reply} {size}\r\n"
        self._writer.write(head.encode() + frame.block + frame.body + b"\r\n")
        await self._writer.drain()

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            if line.startswith((b"MSG", b"HMSG")):
                words = line.split()
                body = await self._reader.readexactly(int(words[-1]) + 2)
                self._hear(int(words[1].rpartition(b".")[2]), body, bare=line.startswith(b"MSG"))
            elif line.startswith(b"PING"):
                self._writer.write(b"PONG\r\n")
            elif line.startswith(b"-ERR"):
                self.said[line.decode(errors="replace").strip()] += 1

    def _hear(self, number: int, body: bytes, *, bare: bool) -> None:
        if number not in self._open:
            return
        self._open.discard(number)
        self._free.release()
        told = json.loads(body) if bare and body.strip() else {"error": {"description": "no responders"}}
        if "error" in told:
            self.said[f"refused: {told['error'].get('description')}"] += 1
        else:
            self.said["duplicate" if told.get("duplicate") else "stored"] += 1
        self._done.set()
