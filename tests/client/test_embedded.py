"""A client of the embedded server, whose directory somebody removes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

import aiqueue
from aiqueue.config import Settings


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


@pytest.mark.parametrize("killed", [False, True], ids=["the server notices", "the server is killed too"])
async def test_clients_and_workers_go_on_with_a_new_server_when_the_directory_was_removed(
    tmp_path: Path, *, killed: bool
) -> None:
    settings = Settings(directory=tmp_path / ".aiqueue").model_copy(update={"url": None, "context": None})
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return job.message.text

    async with aiqueue.Client(settings) as client, aiqueue.Client(settings) as other, worker.running(other):
        assert await (await client.enqueue(Echo(text="before"), tenant="acme")).result(25) == "before"
        embedded = client._embedded
        assert embedded is not None
        password = embedded.password
        shutil.rmtree(tmp_path / ".aiqueue")
        if killed:
            os.kill(embedded.pid, signal.SIGKILL)
        while embedded.password == password:  # the former server answers for a moment
            handle = await client.enqueue(Echo(text="between"), tenant="acme", timeout=25)
        handle = await client.enqueue(Echo(text="after"), tenant="acme", timeout=25)
        assert await handle.result(25) == "after"
