"""The provider: a server in a process of its own, whose log is the judge. ``python -m benchmarks.limiting.standin``.

``standin LOG PORT_FILE``. Lines of JSON over TCP. A worker says ``{"hello": PID}`` and then one line a call; it is
answered when the call has taken its time, or at once with a 429 while the call's key is refused. A call goes on when
its client is gone, as with a real provider, which works on and bills. ``{"refuse": KEY, "for_s": S}`` has the next call
of a key and all others refused for so long.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

FLUSH_S = 0.1


class StandIn:
    """Writes a line for each thing that happens; times are monotonic seconds, which all processes share."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._refused: dict[str, float] = {}  # for how long from the first refusal on
        self._until: dict[str, float] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def _write(self, what: str, *fields: Any) -> None:
        self._log.write(json.dumps([what, round(time.monotonic(), 6), *fields]) + "\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the lines of one connection."""
        pid = 0
        try:
            while line := await reader.readline():
                told = json.loads(line)
                if "hello" in told:
                    pid = told["hello"]
                    self._write("hello", pid)
                elif "refuse" in told:
                    self._refused[told["refuse"]] = told["for_s"]
                else:
                    self._call(pid, told, writer)
        except ConnectionError:
            pass
        finally:
            if pid:
                self._write("bye", pid)
            writer.close()

    def _call(self, pid: int, told: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self._count += 1
        number, now, key = self._count, time.monotonic(), told["key"]
        if key in self._refused:
            self._until[key] = now + self._refused.pop(key)
        left = self._until.get(key, 0.0) - now
        status = 429 if left > 0 else 200
        fields = [told[each] for each in ("tenant", "key", "used", "number", "sent", "attempt")]
        self._write("call", pid, number, status, *fields)
        if status == 200:
            task = asyncio.create_task(self._work(number, told, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answer(writer, {"id": told["id"], "status": status, "after": left})

    async def _work(self, number: int, told: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if told["takes_s"]:
            await asyncio.sleep(told["takes_s"])
        self._write("end", number)
        self._answer(writer, {"id": told["id"], "status": 200, "used": told["used"]})

    @staticmethod
    def _answer(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(answer).encode() + b"\n")


async def main(log: str, port_file: str) -> None:
    with Path(log).open("a") as lines:
        stand_in = StandIn(lines)
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0)
        port = Path(port_file + ".new")
        port.write_text(str(server.sockets[0].getsockname()[1]))
        port.rename(port_file)
        while True:
            await asyncio.sleep(FLUSH_S)
            lines.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
