"""A client that knows nats-py, cbor2 and the guide, and nothing of aiqueue: told what to do in lines of JSON on stdin.

The guide's snippets are not written again here: they are read from the guide and run as they stand, but for nats-py's
own name of one argument.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import cbor2
import nats

GUIDE, URL, USER, PASSWORD = sys.argv[1:]
_SNIPPET = re.compile(r"^# (.+)\n((?:(?!# ).*\n)+)", re.MULTILINE)


def snippets(guide: str) -> dict[str, Any]:
    """The guide's code by the comment above it."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        for title, code in _SNIPPET.findall(block):
            ours = code.replace("callback=", "cb=")  # as nats-py calls it
            found[title] = compile(ours, title, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return found


def say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told, default=repr) + "\n")
    sys.stdout.flush()


def shown(msg: Any) -> dict[str, Any]:
    told = dict(msg.headers or {})
    return {"subject": msg.subject, "headers": told, "data": decoded(msg.data, told)}


def decoded(body: bytes, told: dict[str, str]) -> Any:
    if not body:
        return None
    if told.get("Content-Type") == "application/cbor":
        return cbor2.loads(body)
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


class Plain:
    """One connection, and what can be asked of it."""

    def __init__(self, nc: Any, guide: str) -> None:
        self.nc = nc
        self.js = nc.jetstream()
        self.snippets = snippets(guide)

    async def titles(self) -> list[str]:
        return list(self.snippets)

    async def run(self, title: str, sub: str = "", **names: str) -> Any:
        """One snippet of the guide. `encoded_…` are bodies; what is subscribed reports messages as those of `sub`."""

        async def handler(msg: Any) -> None:
            say(sub=sub, **shown(msg))

        place = {name: text.encode() if name.startswith("encoded_") else text for name, text in names.items()}
        place |= {"nats_client": self.nc, "message_handler": handler, "task_handler": handler}
        code = eval(self.snippets[title], place)
        if inspect.isawaitable(code):
            await code
        await self.nc.flush()
        answer = place.get("response") or place.get("results")
        return None if answer is None else shown(answer)

    async def listen(self, subject: str, queue: str, sub: str) -> None:
        async def handler(msg: Any) -> None:
            say(sub=sub, **shown(msg))

        await self.nc.subscribe(subject, queue=queue, cb=handler)
        await self.nc.flush()

    async def respond(self, subject: str, queue: str, answer: str, sub: str) -> None:
        async def handler(msg: Any) -> None:
            say(sub=sub, **shown(msg))
            await msg.respond(answer.encode())

        await self.nc.subscribe(subject, queue=queue, cb=handler)
        await self.nc.flush()

    async def store(self, subject: str, body: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """A publish that the server confirms."""
        ack = await self.js.publish(subject, body.encode(), headers=headers)
        return {"stream": ack.stream, "seq": ack.seq, "duplicate": bool(ack.duplicate)}

    async def request(self, subject: str, body: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
        return shown(await self.nc.request(subject, body.encode(), timeout=20, headers=headers))

    async def outcome(self, subject: str, run: int) -> dict[str, Any]:
        """Wait for a job's last word: live first, then what is there already."""
        final = ("result", "failed", "cancelled")
        live = await self.nc.subscribe(f"aiq.live.{subject}")
        try:
            msg = await self.js.get_msg("AI_RESULTS", subject=subject, direct=True)
        except nats.js.errors.NotFoundError:
            msg = await live.next_msg(timeout=20)
        while msg.headers["Aiq-Event"] not in final or int(msg.headers["Aiq-Run"]) < run:
            msg = await live.next_msg(timeout=20)
        await live.unsubscribe()
        return shown(msg)

    async def journal(self, subject: str) -> list[dict[str, Any]]:
        """All entries that are stored, by direct get: no consumer is made."""
        found: list[dict[str, Any]] = []
        seq = 1
        while True:
            try:
                msg = await self.js.get_msg("AI_RESULTS", seq=seq, next=True, subject=subject, direct=True)
            except nats.js.errors.NotFoundError:
                return found
            found.append({"headers": dict(msg.headers), "data": decoded(msg.data, msg.headers)})
            seq = msg.seq + 1


async def obey(plain: Plain, order: dict[str, Any]) -> None:
    number, do = order.pop("id"), order.pop("do")
    try:
        say(id=number, value=await getattr(plain, do)(**order))
    except Exception as error:  # noqa: BLE001 - it is told
        say(id=number, error=f"{type(error).__name__}: {error}")


async def main() -> None:
    nc = await nats.connect(URL, user=USER, password=PASSWORD, max_reconnect_attempts=3)
    plain = Plain(nc, Path(GUIDE).read_text())
    say(ready=sorted(name for name in sys.modules if name.split(".")[0] == "aiqueue"))
    loop, running = asyncio.get_running_loop(), set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = asyncio.create_task(obey(plain, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    await nc.close()


asyncio.run(main())
