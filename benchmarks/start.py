"""From the start of a worker's process to its first handler, with many jobs waiting, and the imports' part of that.

The imports' part is a process that imports what the worker has imported by then, and no more; a bare interpreter and
``import aiqueue`` alone stand beside it.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time

import aiqueue

from .backlog import cap_raised, pour
from .chaos.children import ROOT
from .common import empty
from .fairness import forget_lanes
from .report import OURS, RAW, Row
from .stamped import OUR_PROGRAM, running, stored

STARTS = 3  # a round
BARE, PACKAGE, IMPORTS = "python -c pass", "import aiqueue", "aiqueue's imports"
IMPORTED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s*(\S+)$", re.MULTILINE)
REPEAT = """
import contextlib, importlib
for name in {names!r}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""
HOW = {
    OURS: "aiqueue work app:worker, to its first handler",
    RAW: "a process that connects and fetches 100, to its first message decoded",
    IMPORTS: "a process that imports the same modules and ends",
    PACKAGE: "python -c 'import aiqueue', whole process",
    BARE: "an empty process of this Python",
}


async def bare(code: str) -> float:
    """Seconds that a Python process takes for so little."""
    begun = time.monotonic()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    try:
        async with asyncio.timeout(60):
            if await process.wait():
                raise RuntimeError(f"python -c {code!r} failed")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return time.monotonic() - begun


async def first(client: aiqueue.Client, side: str, waiting: int) -> float:
    """Seconds until the first handler of a process begins, with so many jobs waiting. It is killed then: on a busy
    machine, when it has run them all.
    """
    await pour(client, waiting - await stored(client))
    async with running(client, side, 100) as worker:
        await worker.wait(1, within_s=60)
        worker.kill()
        took_s = worker.stamps(0, 1)[0][0] - worker.begun
    await forget_lanes(client)
    return took_s


async def imported(client: aiqueue.Client) -> list[str]:
    """The modules that such a process has imported by its first handlers, in their order."""
    async with running(client, OURS, 100, program=("-X", "importtime", *OUR_PROGRAM)) as worker:
        await worker.wait(1, within_s=60)
        worker.kill()
        names = [name for name in IMPORTED.findall(worker.said()) if name != "site"]
    await forget_lanes(client)
    return names


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """With ten times `jobs` waiting; STARTS starts of each kind a round."""
    waiting = 10 * jobs
    row = Row("start", f"start to first handler, {waiting:,} jobs waiting", "s", x=waiting, how=HOW)
    await empty(client)
    async with cap_raised(client, waiting):
        await pour(client, waiting)
        repeat = REPEAT.format(names=await imported(client))
        for _ in range(rounds * STARTS):
            row.add(OURS, await first(client, OURS, waiting))
            row.add(RAW, await first(client, RAW, waiting))
            row.add(IMPORTS, await bare(repeat))
            row.add(PACKAGE, await bare("import aiqueue"))
            row.add(BARE, await bare("pass"))
    return [row]
