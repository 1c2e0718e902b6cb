"""APScheduler alone, beside which the lateness of ticks is judged: intervals of a second at the phases in the
arguments, until a time. Prints how late each function was called, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import UTC, datetime

from apscheduler.schedulers.asyncio import AsyncIOScheduler


async def main(end: float, phases: list[float]) -> None:
    late: list[float] = []

    async def called(phase: float) -> None:
        now = time.time()
        late.append((now - phase) % 1.0)

    scheduler = AsyncIOScheduler()
    for phase in phases:
        start = datetime.fromtimestamp(int(time.time()) + 2 + phase, UTC)
        scheduler.add_job(called, "interval", seconds=1, start_date=start, args=[phase])
    scheduler.start()
    await asyncio.sleep(end - time.time())
    scheduler.shutdown()
    print(json.dumps(late))


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), [float(each) for each in sys.argv[2:]]))
