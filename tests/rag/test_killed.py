"""A worker is killed -9 in the midst of a large document: another one embeds what is missing, and no more."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import JobFailed
from aiqueue.rag import RagDocument
from aiqueue.rag.rag_worker import SUSPECT_AFTER
from aiqueue.rag.store import SqliteStore

from .. import forks
from ..support import eventually

HERE = Path(__file__).parent.parent.parent


def environment_of(account: Any, rag_file: Path, log: Path) -> dict[str, str]:
    return os.environ | {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "EMBED_LOG": str(log), "RAG_FILE": str(rag_file), "PYTHONPATH": str(HERE),
    }  # fmt: skip


def started(account: Any, rag_file: Path, log: Path, *, stops_after: int = 0) -> forks.Program:
    environment = environment_of(account, rag_file, log) | {"EMBED_STOPS_AFTER": str(stops_after)}
    return forks.start("aiqueue", "work", "tests.rag.app:worker", env=environment, cwd=HERE, start_new_session=True)


async def started_with_short_leases(account: Any, rag_file: Path, log: Path) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "tests.rag.app", account.url, account.user, account.password]
    environment = environment_of(account, rag_file, log)
    return await asyncio.create_subprocess_exec(*command, env=environment, cwd=HERE, start_new_session=True)


def embedded(log: Path) -> int:
    return sum(map(int, log.read_text().split())) if log.exists() else 0


async def test_a_killed_worker_costs_at_most_the_chunks_that_were_in_flight(
    client: aiqueue.Client, account: Any, rag_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "embedded.log"
    text = "\n\n".join(f"Paragraph {at} tells of w{at}x. " + "Otters swim in cold rivers. " * 28 for at in range(1_200))
    first = started(account, rag_file, log, stops_after=200)
    second = None
    try:
        handle = await client.enqueue(RagDocument(document_id="large", content=text), tenant="acme")
        await eventually(lambda: embedded(log) > 200)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        before = embedded(log)
        second = started(account, rag_file, log)
        result = await handle.result(60)
        assert 200 < before < result["chunks"]
        assert result["chunks"] <= embedded(log) <= result["chunks"] + 256
        store = SqliteStore(tmp_path / "store")
        stats = await store.stats("acme")
        assert (stats.documents, stats.chunks) == (1, result["chunks"])
        numbers = [chunk.number for _, chunk in await store.chunks("acme", "none", limit=256, missing=True)]
        assert numbers == list(range(256))
        await store.close()
    finally:
        for each in (first, second):
            if each is not None and each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
                each.wait()


async def test_a_document_that_ends_its_worker_ends_as_many_as_make_a_suspect_and_convicts_none_in_flight_beside_it(
    client: aiqueue.Client, account: Any, rag_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "embedded.log"
    texts = {"deadly": "This is a text that ends its process."} | {f"d{at}": f"Otter {at} dives." for at in range(5)}
    handles = {
        each: await client.enqueue(RagDocument(document_id=each, content=text), tenant="acme")
        for each, text in texts.items()
    }
    deaths = 0
    process = await started_with_short_leases(account, rag_file, log)
    deadly = asyncio.create_task(handles.pop("deadly").result(60))
    try:
        while not deadly.done():
            ended = asyncio.create_task(process.wait())
            await asyncio.wait({deadly, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                deaths += 1
                process = await started_with_short_leases(account, rag_file, log)
        with pytest.raises(JobFailed, match="it ended the child process that it was tried in: exit code 9") as failed:
            await deadly
        assert [(await each.result(25))["state"] for each in handles.values()] == ["completed"] * 5
        assert process.returncode is None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert (failed.value.reason, deaths) == ("killed_worker", 2)
    assert SUSPECT_AFTER <= 5
    assert [each.job_id async for each in client.dead.find()] == [failed.value.job_id]
