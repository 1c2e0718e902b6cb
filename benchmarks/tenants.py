"""What lanes cost: a backlog spread over 1 to 1,000 tenants, lanes in files or in memory, beside one shared lane."""

from __future__ import annotations

from pathlib import Path

import aiqueue

from .common import empty
from .drain import fill, ours
from .fairness import declared, forget_lanes

TENANTS = (1, 10, 100, 1_000)


def server_cpu_s(client: aiqueue.Client) -> float:
    """CPU seconds that the embedded server has used, from /proc (Linux)."""
    embedded = client._embedded
    assert embedded is not None
    fields = Path(f"/proc/{embedded.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def drain(client: aiqueue.Client, jobs: int) -> tuple[float, float]:
    """Jobs a second from the first handler to the last, and the server's CPU seconds meanwhile."""
    before = server_cpu_s(client)
    return await ours(client, jobs), server_cpu_s(client) - before


async def run(client: aiqueue.Client, *, jobs: int) -> str:
    """A table: jobs/s and the server's CPU seconds."""
    plain = client.topology
    lines = [f"{'tenants':>8} {'shared lane':>22} {'lane each, file':>22} {'lane each, memory':>22}"]
    for tenants in TENANTS:
        cells = []
        for lanes, storage in (("shared", "file"), ("tenant", "file"), ("tenant", "memory")):
            client.topology = plain
            await forget_lanes(client)
            declared(client, lanes=lanes, lane_storage=storage)
            await fill(client, jobs, tenants=tenants)
            rate, cpu_s = await drain(client, jobs)
            cells.append(f"{rate:,.0f}/s {cpu_s:.1f} s")
            await empty(client)
        lines.append(f"{tenants:>8} " + " ".join(f"{cell:>22}" for cell in cells))
    client.topology = plain
    await forget_lanes(client)
    return "\n".join(lines)
