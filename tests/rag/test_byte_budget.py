"""Large documents wait for a share of the bytes that a worker may have open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from aiqueue.rag import RagConfig, RagDocument, TenantConfig, sources
from aiqueue.rag.byte_budget import SMALL_BYTES, ByteBudget
from aiqueue.rag.fetch_share import FetchShare
from aiqueue.rag.fetched import FetchLimits

MIB = 1024**2


async def test_large_documents_are_open_one_after_another_within_the_budget_and_small_ones_do_not_wait(
    tmp_path: Path,
) -> None:
    job, config = (
        cast("Any", SimpleNamespace(tenant="acme")),
        RagConfig(tenants={"acme": TenantConfig(roots=(tmp_path,))}),
    )
    (tmp_path / "large").write_bytes(b"x" * 2 * MIB)
    (tmp_path / "small").write_bytes(b"x")
    budget, go, is_open = ByteBudget(5 * MIB), asyncio.Semaphore(0), asyncio.Semaphore(0)
    now = most = 0

    async def read(name: str) -> None:
        nonlocal now, most
        message = RagDocument(path=str(tmp_path / name))
        async with sources.opened(job, message, config, FetchLimits(), FetchShare(1), budget):
            now, most = now + 1, max(most, now + 1)
            is_open.release()
            await go.acquire()
            now -= 1

    async with asyncio.timeout(10):
        readers = [asyncio.create_task(read("large")) for _ in range(6)]
        for _ in range(2):
            await is_open.acquire()
        small = asyncio.create_task(read("small"))
        await is_open.acquire()
        assert now == 3
        for _ in range(7):
            go.release()
        await asyncio.gather(*readers, small)
    assert most == 3
    assert budget._free == 5 * MIB


async def test_shares_are_given_in_turn_also_after_one_that_waited_is_cancelled() -> None:
    budget, order = ByteBudget(10 * MIB), list[str]()

    async def hold(name: str, size: int) -> None:
        async with budget.share(size):
            order.append(name)

    async with asyncio.timeout(5):
        async with budget.share(6 * MIB):
            waiting = [asyncio.create_task(hold(name, size * MIB)) for name, size in (("big", 99), ("second", 2))]
            await asyncio.sleep(0)
            await hold("small", SMALL_BYTES)
            assert order == ["small"]
            waiting[0].cancel()
            await waiting[1]
            waiting.append(asyncio.create_task(hold("big again", 99 * MIB)))
            await asyncio.sleep(0)
            assert order == ["small", "second"]
        await waiting[2]
    assert order == ["small", "second", "big again"]
    assert budget._free == 10 * MIB
