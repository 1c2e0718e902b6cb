"""The program of `spawn`: runs one worker, and dies where it is told to. Its arguments come on stdin, as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from ..client import connect
from ..config import Settings
from ..job import MakeHeaders
from ..processes import find_object
from ..worker import Worker, deaths

READY = "ready"


async def run(settings: Settings, headers: MakeHeaders | None, worker: Worker) -> None:
    """Run the worker until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with connect(settings=settings, headers=headers) as client, worker.running(client):
        print(READY, flush=True)  # noqa: T201
        os.dup2(2, 1)  # what handlers print
        await stopped.wait()


def main() -> None:
    """Read what to do, and do it."""
    given = json.load(sys.stdin)
    worker = find_object(given["worker"])
    if given["die_at"]:
        deaths.die_at(given["die_at"])
    headers = find_object(given["headers"]) if given["headers"] else None
    asyncio.run(run(Settings.of_plain(given["settings"]), headers, worker))


if __name__ == "__main__":
    main()
