"""`aiqueue tail`, as its users meet it: processes on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import codec, headers, provision
from aiqueue.cli.app import app

from .support import ROOT, Account

COMMAND = [sys.executable, "-m", "aiqueue", "tail"]


class Say(aiqueue.Message, kind="say"):
    text: str = ""


@pytest.fixture
def environment(account: Account, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
async def client(account: Account, environment: dict[str, str]) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """`aiqueue tail …` as a process, its stdout a pipe; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, cwd=tmp_path,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it says; the time limit of the test bounds the wait."""
    assert process.stdout is not None
    return process.stdout.readline()


def following(process: subprocess.Popen[str]) -> None:
    """Return when it listens, which it says."""
    assert process.stderr is not None
    assert process.stderr.readline().startswith("following ")


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How it takes Ctrl-C: its exit code, and what it has to say to it."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


async def entry(
    client: aiqueue.Client, job_id: str, event: str, data: Any, *, tenant: str = "acme", attempt: int = 1
) -> None:
    """As a worker would write it."""
    told = {
        headers.EVENT: event, headers.RUN: "1", headers.EPOCH: str(attempt), headers.ATTEMPT: str(attempt),
        headers.CONTENT_TYPE: codec.CBOR,
    }  # fmt: skip
    await client.connection.store(f"ai.agent.results.{tenant}.{job_id}", codec.encode(data), told)


class TestFamily:
    async def test_shows_what_its_jobs_say_from_now_on_until_ctrl_c(self, client: aiqueue.Client, start: Start) -> None:
        await entry(client, "old", "result", 1)
        process = start("--family", "agent.tasks")
        following(process)
        await entry(client, "doc-1", "progress", {"fraction": 0.5, "note": "half"})
        await entry(client, "doc-2", "chunk", ["Hel", "lo\x1b[31m", {"n": 1}])
        await entry(client, "doc-1", "failed", {"reason": "rejected", "error": "not wanted"})
        told = [line(process).split(" ", 1)[1] for _ in range(3)]
        assert told == [
            "acme/doc-1 progress: 50% half\n",
            'acme/doc-2 chunk: Hel lo\\x1b[31m {"n":1}\n',
            "acme/doc-1 failed: rejected: not wanted\n",
        ]
        assert interrupted(process) == (0, "")

    async def test_json_has_an_entry_a_line_and_tenants_are_told_apart(
        self, client: aiqueue.Client, start: Start
    ) -> None:
        process = start("--family", "agent.tasks", "--tenant", "acme", "--json")
        following(process)
        await entry(client, "doc-1", "result", 1, tenant="globex")
        await entry(client, "doc-1", "result", {"text": "x"})
        told = json.loads(line(process))
        assert told.pop("time") > 1e9
        assert told == {
            "family": "agent.tasks", "tenant": "acme", "job_id": "doc-1", "event": "result", "attempt": 1, "run": 1,
            "data": {"text": "x"}, "final": True,
        }  # fmt: skip
        assert interrupted(process) == (0, "")

    async def test_a_reader_that_leaves_ends_it_without_a_word(self, client: aiqueue.Client, start: Start) -> None:
        process = start("--family", "agent.tasks")
        following(process)
        assert process.stdout is not None
        process.stdout.close()
        for _ in range(200):
            await entry(client, "doc-1", "progress", {"fraction": 1})
            if process.poll() is not None:
                break
            await asyncio.sleep(0.05)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(10) == 1

    async def test_without_the_stream_it_says_what_to_do(self, account: Account, environment: dict[str, str]) -> None:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["tail", "--family", "agent.tasks"])
        assert (done.exit_code, done.stdout) == (1, "")
        assert "stream AI_RESULTS is missing: `aiqueue apply` makes it" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "agent.tasks", "--tenant", "a.b"], "tenant"),
        (["--family", "agent.tasks", "--tenant", "*"], "tenant"),
        (["--family", "no.such"], "unknown family 'no.such'; declared families: agent"),
        (["--family", "agent.message"], "keeps no journals"),
    ],
)
async def test_what_cannot_be_followed_is_refused_on_one_line(
    environment: dict[str, str], words: list[str], said: str
) -> None:
    done = await asyncio.to_thread(CliRunner().invoke, app, ["tail", *words])
    assert (done.exit_code, done.stdout) == (2, "")
    (only,) = done.stderr.splitlines()
    assert said in only
