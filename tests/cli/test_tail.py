"""`aiqueue tail`, as its users meet it: processes on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import codec, headers
from aiqueue.cli.app import app
from aiqueue.journal import Journal

from .. import forks
from ..support import ROOT, Account, create_streams

TAIL = ("aiqueue", "tail")


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
        await create_streams(client)
        yield client


Cli = Callable[..., Awaitable[Result]]


@pytest.fixture
def cli(environment: dict[str, str]) -> Cli:
    """The same in this process, for what ends by itself."""

    async def run(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, ["tail", *words])

    return run


Start = Callable[..., forks.Program]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """`aiqueue tail …` as a process, its stdout a pipe; what still runs at the end is killed."""
    started: list[forks.Program] = []

    def start(*words: str) -> forks.Program:
        process = forks.start(
            *TAIL, *words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: forks.Program) -> str:
    """The next line that it says; the time limit of the test bounds the wait."""
    assert process.stdout is not None
    return process.stdout.readline()


def following(process: forks.Program) -> None:
    """Return when it listens, which it says."""
    assert process.stderr is not None
    assert process.stderr.readline().startswith("following ")


def interrupted(process: forks.Program) -> tuple[int, str]:
    """How it takes Ctrl-C: its exit code, and what it has to say to it."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=40)
    return process.returncode, err


async def entry(
    client: aiqueue.Client, job_id: str, event: str, data: Any, *, tenant: str = "acme", attempt: int = 1
) -> None:
    """As the worker of run 1 would write it."""
    subject = f"ai.agent.results.{tenant}.{job_id}"
    head = await Journal(client.connection, "AI_RESULTS").head(subject)
    known, count = (head.seq, int(head.msg_id.rsplit("/", 1)[1])) if head else (0, 0)
    message_headers = {
        headers.EVENT: event, headers.RUN: "1", headers.EPOCH: str(attempt), headers.ATTEMPT: str(attempt),
        headers.CONTENT_TYPE: codec.CBOR, headers.EXPECTED: str(known),
        headers.MSG_ID: f"{subject}/{attempt:08x}/{attempt}/{count + 1 if head and head.attempt == attempt else 1}",
    }  # fmt: skip
    await client.connection.store(subject, codec.encode(data), message_headers)


async def job(client: aiqueue.Client) -> None:
    """One that is stored, and that nobody runs."""
    handle = await client.enqueue(Say(), tenant="acme", unique="doc-1")
    assert not handle.duplicate


class TestFamily:
    async def test_shows_what_its_jobs_say_from_now_on_until_ctrl_c(self, client: aiqueue.Client, start: Start) -> None:
        await entry(client, "old", "result", 1)
        process = start("--family", "agent.tasks")
        following(process)
        await entry(client, "doc-1", "progress", {"fraction": 0.5, "note": "half"})
        await entry(client, "doc-2", "chunk", ["Hel", "lo\x1b[31m", {"n": 1}])
        await entry(client, "doc-1", "failed", {"reason": "rejected", "error": "not wanted"})
        lines = [line(process).split(" ", 1)[1] for _ in range(3)]
        assert lines == [
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
        printed = json.loads(line(process))
        assert printed.pop("time") > 1e9
        assert printed == {
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
        assert process.wait(40) == 1

    async def test_without_the_stream_it_says_what_to_do(self, cli: Cli) -> None:
        done = await cli("--family", "agent.tasks")
        assert (done.exit_code, done.stdout) == (1, "")
        assert "stream AI_RESULTS does not exist: run `aiqueue apply`" in done.stderr


class TestJob:
    async def test_text_comes_as_it_is_written_and_ends_with_the_job(
        self, client: aiqueue.Client, start: Start
    ) -> None:
        await job(client)
        await entry(client, "doc-1", "chunk", ["Hel"])
        process = start("doc-1")
        assert process.stdout is not None
        assert process.stdout.read(3) == "Hel", "through a pipe, while the job goes on"
        await entry(client, "doc-1", "chunk", ["lo", ", wor"])
        assert process.stdout.read(7) == "lo, wor"
        await entry(client, "doc-1", "chunk", ["ld\x1b[31m", {"tokens": 3}])
        await entry(client, "doc-1", "result", {"text": "x"})
        out, err = await asyncio.to_thread(process.communicate, timeout=40)
        first, tokens, result = out.splitlines()
        assert (first, tokens) == ("ld\\x1b[31m", '{"tokens":3}')
        assert result.startswith("-- ")
        assert result.endswith('result: {"text":"x"}')
        assert (process.returncode, err) == (0, "")

    async def test_a_restart_is_marked_and_a_failure_is_exit_code_1(self, client: aiqueue.Client, start: Start) -> None:
        await job(client)
        await entry(client, "doc-1", "chunk", ["half of"])
        process = start("doc-1")
        assert process.stdout is not None
        assert process.stdout.read(7) == "half of"
        await entry(client, "doc-1", "started", {"worker": "w-2"}, attempt=2)
        await entry(client, "doc-1", "chunk", ["again\n"], attempt=2)
        await entry(client, "doc-1", "failed", {"reason": "rejected", "error": "not wanted"}, attempt=2)
        out, _ = await asyncio.to_thread(process.communicate, timeout=40)
        lines = out.splitlines()
        assert lines[0] == "", "the line of text is ended first"
        assert "-- restarted (attempt 2): the previous attempt was lost; discard the output above" in lines[1]
        assert lines[-2] == "again"
        assert lines[-1].endswith("failed (attempt 2): rejected: not wanted")
        assert process.returncode == 1

    async def test_json_has_cursors_and_one_of_them_is_gone_on_from(self, client: aiqueue.Client, cli: Cli) -> None:
        await job(client)
        await entry(client, "doc-1", "chunk", ["a", "b", "c"])
        await entry(client, "doc-1", "chunk", ["d"])
        await entry(client, "doc-1", "result", 7)
        whole = [json.loads(each) for each in (await cli("doc-1", "--json")).stdout.splitlines()]
        assert [(each["event"], each["data"]) for each in whole] == [
            ("chunk", "a"), ("chunk", "b"), ("chunk", "c"), ("chunk", "d"), ("result", 7),
        ]  # fmt: skip
        assert whole[-1]["final"]
        for at, each in enumerate(whole[:-1]):
            rest = (await cli("doc-1", "--json", "--after", each["cursor"])).stdout.splitlines()
            assert [json.loads(one) for one in rest] == whole[at + 1 :]

    async def test_ctrl_c_says_how_to_go_on(self, client: aiqueue.Client, start: Start, cli: Cli) -> None:
        await job(client)
        await entry(client, "doc-1", "chunk", ["one", "two"])
        process = start("doc-1", "--tenant", "acme")
        assert process.stdout is not None
        assert process.stdout.read(6) == "onetwo"
        code, err = interrupted(process)
        assert code == 130
        words = err.strip().splitlines()[-1].removeprefix("to continue: aiqueue tail ").split(" ")
        assert words[:3] == ["doc-1", "--tenant", "acme"]
        await entry(client, "doc-1", "chunk", ["three\n"])
        await entry(client, "doc-1", "result", 1)
        assert (await cli(*words)).stdout.startswith("three\n-- ")

    @pytest.mark.parametrize("event", ["failed", "cancelled"])
    async def test_a_job_that_came_to_nothing_is_exit_code_1(
        self, client: aiqueue.Client, cli: Cli, event: str
    ) -> None:
        await entry(client, "doc-1", event, {"reason": event, "error": "why"})
        for words in ([], ["--json"]):
            assert (await cli("doc-1", *words)).exit_code == 1

    async def test_an_unknown_job_and_a_wrong_cursor_are_said_on_one_line(
        self, client: aiqueue.Client, cli: Cli
    ) -> None:
        await entry(client, "doc-1", "result", 7)
        for words, code, said in (
            (["nobody"], 1, "no trace of job nobody"),
            (["doc-1", "--after", "the first one"], 2, "cursor"),
            (["doc-1", "--family", "agent.message"], 2, "inboxes"),
        ):
            done = await cli(*words)
            assert (done.exit_code, done.stdout) == (code, ""), words
            (only,) = done.stderr.splitlines()
            assert said in only


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a job id, or --family"),
        (["agent.tasks"], "`aiqueue tail --family agent.tasks`"),
        ([""], "job id"),
        (["doc-1", "--tenant", "a.b"], "tenant"),
        (["--family", "agent.tasks", "--after", "7"], "--after needs a job id"),
        (["--family", "agent.tasks", "--tenant", "*"], "tenant"),
        (["--family", "no.such"], "unknown family 'no.such'; declared families: agent"),
        (["--family", "agent.message"], "keeps no journals"),
    ],
)
async def test_what_cannot_be_followed_is_refused_on_one_line(cli: Cli, words: list[str], said: str) -> None:
    done = await cli(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    (only,) = done.stderr.splitlines()
    assert said in only
