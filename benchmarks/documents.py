"""A document through the queue with a worker in a process of its own, and its reading beside the stock client's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import aiqueue

from .common import raw_client

MB = 1_000_000
TENANT = "bench"
BUCKET = "AI_DOCUMENTS"
WAIT_S = 600.0
IN_MEMORY = "nats-py get, in memory"


class Scan(aiqueue.Message, kind="scan"):
    file: aiqueue.Document


def memory_kb(what: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    found = re.search(rf"^{what}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, what
    return int(found[1])


worker = aiqueue.Worker(concurrency=4)


@worker.handle(Scan, timeout=None)
async def scan(job: aiqueue.Job[Scan]) -> dict[str, Any]:
    before, begun = memory_kb("VmRSS"), time.perf_counter()
    digest = hashlib.sha256()
    async for chunk in job.open(job.message.file):
        digest.update(chunk)
    took = time.perf_counter() - begun
    return {"sha256": digest.hexdigest(), "grown_kb": memory_kb("VmHWM") - before, "took_s": took}


def write_file(path: Path, size: int) -> str:
    """A file of noise; its hash."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, 4 * MB):
            block = os.urandom(min(4 * MB, size - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


async def through(client: aiqueue.Client, directory: Path, path: Path, sha256: str) -> tuple[aiqueue.Document, str]:
    """Put the file, enqueue, have the worker's process read it. Returns what it came to."""
    before, begun = memory_kb("VmRSS"), time.perf_counter()
    document = await client.documents.put(path, tenant=TENANT)
    put_s, put_kb = time.perf_counter() - begun, memory_kb("VmHWM") - before
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "aiqueue", "--directory", str(directory), "work", "benchmarks.documents:worker"]
    process = subprocess.Popen([*command, "--log-level", "warning"], env=environment, stdout=subprocess.DEVNULL)
    try:
        handle = await client.enqueue(Scan(file=document), tenant=TENANT)
        told = await handle.result(WAIT_S)
    finally:
        process.terminate()
        process.wait()
    equal = told["sha256"] == sha256 == document.sha256
    size, grown = document.size / MB, told["grown_kb"] / 1000
    return document, "\n".join(
        [
            f"{size:,.0f} MB, server's max_payload {client.connection.max_payload / MB:.2f} MB",
            f"put: {put_s:.2f} s, {size / put_s:,.0f} MB/s, memory +{put_kb / 1000:.0f} MB",
            f"read in a handler: {told['took_s']:.2f} s, {size / told['took_s']:,.0f} MB/s, memory +{grown:.0f} MB",
            f"hash {'equal' if equal else 'DIFFERENT'}",
        ]
    )


async def beside(client: aiqueue.Client, document: aiqueue.Document, rounds: int) -> str:
    """The reading of one object, by turns."""
    raw = await raw_client(client)
    store = await raw.jetstream().object_store(BUCKET)
    name = f"{document.tenant}/{document.sha256}"

    async def ours() -> None:
        async for _ in client.documents.open(document):
            pass

    async def into_file() -> None:
        with Path(os.devnull).open("wb") as nothing:
            await store.get(name, writeinto=nothing)

    sides: dict[str, Callable[[], Awaitable[Any]]] = {
        "ours, verified": ours,
        IN_MEMORY: lambda: store.get(name),
        "nats-py get, writeinto": into_file,
    }
    took: dict[str, list[float]] = {each: [] for each in sides}
    for done in range(rounds):
        for each, read in sides.items():
            if done and each == IN_MEMORY:
                continue  # its time grows with the square of the size: once is enough
            begun = time.perf_counter()
            await read()
            took[each].append(time.perf_counter() - begun)
    await raw.close()
    base = median(took["ours, verified"])
    return "\n".join(
        f"{each:24} {median(times):6.2f} s [{min(times):.2f}-{max(times):.2f}] "
        f"{document.size / MB / median(times):6,.0f} MB/s {median(times) / base:6.1f} x"
        for each, times in took.items()
    )


async def run(client: aiqueue.Client, directory: Path, *, rounds: int, megabytes: int) -> str:
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-") as place:
        path = Path(place) / "document"
        sha256 = await asyncio.to_thread(write_file, path, megabytes * MB)
        document, text = await through(client, directory, path, sha256)
    if rounds:
        text += f"\nreading it, {rounds} rounds by turns, median\n" + await beside(client, document, rounds)
    return text
