"""Looking a job up by its id."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue


class Tell(aiqueue.Message[int], kind="tell"):
    pass


async def test_a_job_of_a_known_tenant_is_found_without_its_whole_journal(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, read = aiqueue.Worker(), client.connection.read
    entries = 0

    @worker.handle(Tell)
    async def tell(job: aiqueue.Job[Tell]) -> int:
        for number in range(20):
            await job.progress(number / 20, "")
        return 20

    async def counting(stream: str, *words: Any, **options: Any) -> AsyncIterator[Any]:
        nonlocal entries
        async for each in read(stream, *words, **options):
            entries += stream == client.topology.journal_stream.name
            yield each

    async with worker.running(client):
        handle = await client.enqueue(Tell(), tenant="acme")
        assert await handle.result(timeout=10) == 20
    monkeypatch.setattr(client.connection, "read", counting)
    found = await client.job(handle.id, tenant="acme")
    assert entries == 0
    assert (found.id, found.tenant, found.family) == (handle.id, "acme", "agent.tasks")
    assert await found.result(timeout=5) == 20
    assert await client.cancel(handle.id, tenant="acme") is False
    assert (await client.job(handle.id)).tenant == "acme"
    assert entries > 0
