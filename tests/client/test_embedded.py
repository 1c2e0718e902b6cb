"""A client of the embedded server, whose directory somebody removes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

import aiqueue
from aiqueue.config import Settings

from ..support import eventually


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
        pid = embedded.pid
        while (tmp_path / ".aiqueue").exists():  # the server may write while its files go
            shutil.rmtree(tmp_path / ".aiqueue", ignore_errors=True)
        if killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await eventually(lambda: embedded.pid != pid)
        handle = await client.enqueue(Echo(text="after"), tenant="acme", timeout=25)
        assert await handle.result(25) == "after"
