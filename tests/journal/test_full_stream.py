"""The journals' stream while more is streamed than it holds: it drops its oldest entries, also answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.topology import Topology

from ..support import Account, create_streams, eventually

FILE = """
[family]
name = "test.streamed"
default_kind = "ask"
claim = true
{ttl}
[stream]
name = "TEST_STREAMED"
max_bytes = "16MiB"
"""
MAX_BYTES, PART_BYTES, PARTS = 384 * 1024, 16 * 1024, 16


class Ask(aiqueue.Message, kind="ask", family="test.streamed"):
    parts: int


@pytest.mark.parametrize("ttl", ["chunk_ttl = '1s'", ""])
async def test_with_a_chunk_ttl_answers_outlive_more_chunks_than_the_stream_holds(
    account: Account, tmp_path: Path, ttl: str
) -> None:
    (tmp_path / "streamed.toml").write_text(FILE.format(ttl=ttl))
    worker, ran = aiqueue.Worker(), []

    @worker.handle(Ask)
    async def run(job: aiqueue.Job[Ask]) -> str:
        ran.append(job.id)
        for _ in range(job.message.parts):
            await job.chunk("x" * PART_BYTES)
        return f"answer {job.id}"

    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": tmp_path}
    async with aiqueue.connect(account.url, **options) as client:
        await create_streams(client)
        config = (await client.connection.api("STREAM.INFO.AI_RESULTS"))["config"]
        await client.connection.api("STREAM.UPDATE.AI_RESULTS", {**config, "max_bytes": MAX_BYTES})

        async def stored() -> int:
            return int((await client.connection.api("STREAM.INFO.AI_RESULTS"))["state"]["bytes"])

        async def has_room() -> bool:
            return await stored() < PART_BYTES

        async with worker.running(client):
            assert await ask(client, "first", 0) == "answer first"
            for n in range(2):
                assert await ask(client, f"n{n}", PARTS) == f"answer n{n}"
                if ttl:
                    await eventually(has_room)
            assert await has_room() == bool(ttl)  # else it is full
            first = await client.connection.last("AI_RESULTS", "ai.test.streamed-results.acme.first")
            assert (first is not None) == bool(ttl)
            if ttl:
                for each in ("first", "n0", "n1"):
                    assert await (await client.job(each)).result(5) == f"answer {each}"
                assert await ask(client, "first", 0) == "answer first"
    assert ran == ["first", "n0", "n1"]


async def ask(client: aiqueue.Client, job_id: str, parts: int) -> Any:
    return await (await client.enqueue(Ask(parts=parts), tenant="acme", unique=job_id)).result(20)


def test_the_gateways_chunks_outlive_a_call_and_its_lease_and_expire_long_before_its_answers() -> None:
    topology = Topology.load()
    family = topology.family("gateway.requests")
    assert family.chunk_ttl_s is not None
    assert family.chunk_ttl_s >= 600 + 2 * family.ack_wait_s
    assert family.journal_ttl_s is None
    assert family.chunk_ttl_s * 10 < topology.journal_stream.config["max_age"] / 1e9
