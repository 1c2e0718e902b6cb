"""Scenarios of time and memory: documents a second beside the bare pipeline, questions under load, a long run."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.rag.messages import RagDocument, RagQuery

from ..chaos.children import Child
from ..common import resident_mib, until
from ..scenarios import Finding, told
from . import texts
from .bench import READY_S, Asked, Ground, asked_pace, ground, made
from .facts import Facts

ROUND_S = 600.0
THINK_S = 0.1  # from an answer to the asker's next question
DOCUMENTS_S, QUESTION_S, GROWTH = 500.0, 0.050, 1.1  # what is demanded
SETTLE_S = 3.0
LOADERS = 2  # processes of the bare pipeline
TENANT = "notes"


async def throughput(asked: Asked) -> list[Finding]:
    """1-2 KB documents by two workers, end to end, and the bare pipeline without the queue in turn"""
    queued, bare = [], []
    async with ground(asked) as here:
        for number in range(asked.rounds):
            bare.append(await _bare(here, f"bare-{number}", asked.documents, asked.seed + number))
            queued.append(await _queued(here, f"queued-{number}", asked.documents, asked.seed + number))
            asked.say(f"  round {number + 1}: {queued[-1]:,.0f}/s, bare {bare[-1]:,.0f}/s")
    return [
        Finding("documents a round", asked.documents),
        Finding("documents/s, two workers, median", statistics.median(queued), at_least=DOCUMENTS_S),
        Finding("slowest round", min(queued)),
        Finding("documents/s, bare pipeline in two processes, median", statistics.median(bare)),
        Finding("share of the bare pipeline", statistics.median(queued) / statistics.median(bare)),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]


async def _queued(here: Ground, tenant: str, count: int, seed: int) -> float:
    """Documents a second, from the first enqueue to the last document in the store."""
    documents = list(made(0, count, seed))
    begun = time.monotonic()
    filling = asyncio.create_task(here.fill(documents, tenant))
    await here.stored_documents(tenant, count, within_s=ROUND_S)
    took = time.monotonic() - begun
    await filling
    await here.settled()
    return count / took


async def _bare(here: Ground, tenant: str, count: int, seed: int) -> float:
    """Documents a second of as many processes that parse, chunk, embed and put. They wait at a gate until all are
    ready; the workers beside them idle.
    """
    directory = here.directory / tenant
    directory.mkdir()
    share = count // LOADERS
    programs = [
        ["-m", "benchmarks.rag.bare", str(directory), tenant, str(n * share), str(share), str(seed)]
        for n in range(LOADERS)
    ]
    log = here.directory / "bare.log"
    children = [Child(each, {}, log) for each in programs]

    def count_ready() -> int:
        _check(children, log)
        return len(list(directory.glob("ready-*")))

    try:
        await until(lambda: count_ready() == LOADERS, lambda: "the loaders were not ready", within_s=READY_S)
        begun = time.monotonic()
        (directory / "go").touch()
        facts = Facts(directory / "store")
        while await asyncio.to_thread(facts.documents, tenant) < share * LOADERS:
            _check(children, log)
            await asyncio.sleep(0.05)
        return share * LOADERS / (time.monotonic() - begun)
    finally:
        for each in children:
            each.kill()


def _check(children: list[Child], log: Path) -> None:
    if any(each.code for each in children):
        raise RuntimeError(f"a process of the bare pipeline ended: {log.read_text(errors='replace')[-1_000:]}")


async def queries(asked: Asked) -> list[Finding]:
    """questions of 10 askers to 20,000 chunks while 100 documents a second come in"""
    chance = random.Random(asked.seed)
    took: list[float] = []
    empty = 0
    async with ground(asked) as here:
        with told(asked.say, f"{asked.chunks:,} chunks"):
            stored = await _load(here, asked)
        end = time.monotonic() + asked.seconds

        async def ask(number: int) -> None:
            nonlocal empty
            while time.monotonic() < end:
                begun = time.monotonic()
                handle: aiqueue.Handle[Any] = await here.client.enqueue(
                    RagQuery(query=texts.question(chance)), tenant=TENANT
                )
                answer = await handle.result(timeout=30)
                took.append(time.monotonic() - begun)
                empty += not answer["passages"]
                await asyncio.sleep(THINK_S)

        first = here.facts.documents(TENANT)

        async def come(number: int) -> None:
            text = texts.document(first + number, asked.seed)
            await here.client.enqueue(
                RagDocument(document_id=f"late-{number}.txt", content=text, content_type="text/plain"), tenant=TENANT
            )

        await asyncio.gather(*map(ask, range(asked.askers)), asked_pace(asked.rate, asked.seconds, come))
        came = here.facts.documents(TENANT) - first
        surprises = len(here.workers.surprises)
    cuts = statistics.quantiles(took, n=100)
    return [
        Finding("chunks before", stored, at_least=asked.chunks),
        Finding("documents/s that came in meanwhile", came / asked.seconds, at_least=asked.rate * 0.95),
        Finding("questions/s", len(took) / asked.seconds),
        Finding("questions without a passage", empty, at_most=0),
        Finding("ms to the passages, p50", cuts[49] * 1e3),
        Finding("ms to the passages, p95", cuts[94] * 1e3, at_most=QUESTION_S * 1e3),
        Finding("ms to the passages, p99", cuts[98] * 1e3),
        Finding("workers that ended by themselves", surprises, at_most=0),
    ]


async def _load(here: Ground, asked: Asked) -> int:
    """Ingest until so many chunks are stored; how many are."""
    stored = number = 0
    while stored < asked.chunks:
        count = max(100, (asked.chunks - stored) // 2)
        await here.fill(made(number, count, asked.seed), TENANT)
        number += count
        await here.stored_documents(TENANT, number, within_s=ROUND_S)
        stored = here.facts.chunks(TENANT).total()
    return stored


async def memory(asked: Asked) -> list[Finding]:
    """a worker's memory after 50,000 documents, and after 5,000"""
    few, many = asked.memory
    async with ground(asked, workers=1) as here:
        [worker] = here.workers.alive
        with told(asked.say, f"{few:,} documents"):
            early = await _resident_after(here, worker, 0, few)
        with told(asked.say, f"{many - few:,} more documents"):
            late = await _resident_after(here, worker, few, many - few)
    return [
        Finding(f"MiB after {few:,} documents", early),
        Finding(f"MiB after {many:,} documents", late, at_most=early * GROWTH),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]


async def _resident_after(here: Ground, worker: Child, first: int, count: int) -> float:
    """The most that is resident in some seconds after the documents are stored."""
    await here.fill(made(first, count, here.asked.seed), TENANT)
    await here.stored_documents(TENANT, first + count, within_s=ROUND_S * 2)
    most, end = 0.0, time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        most = max(most, resident_mib(worker.pid))
        await asyncio.sleep(0.1)
    return most
