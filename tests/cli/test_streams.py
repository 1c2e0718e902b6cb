"""What commands do with their standard streams: full devices, closed pipes, terminals, and JSON for other programs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.cli import output

from .. import forks
from ..support import ROOT, Account, create_streams

WORKER = """
import aiqueue

class Echo(aiqueue.Message, kind="echo"):
    pass

class Lost(aiqueue.Message, kind="lost"):
    pass

worker = aiqueue.Worker(concurrency=4)

@worker.handle(Echo)
async def echo(job: aiqueue.Job[Echo]) -> dict:
    await job.chunk({"score": float("inf")})
    return {"score": float("nan")}
"""
DATA = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()) | st.binary()
    | st.builds(lambda: 10**5000) | st.sets(st.integers()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()) | st.floats() | st.integers(), inner),
    max_leaves=8,
)  # fmt: skip

# Runs command lines one after the other, each in a process of its own. What all of them import is loaded once.
FORKS = """
import json, os, sys
import aiqueue
from aiqueue.cli import app, main

aiqueue.Client
for number, arguments in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(f"err-{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv[1:] = arguments
        main()
    with open(f"code-{number}", "w") as code:
        code.write(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""

Started = subprocess.Popen[str] | forks.Program
Start = Callable[..., Started]
ForkEach = Callable[..., list[tuple[int, str]]]


class Echo(aiqueue.Message, kind="echo"):
    pass


async def prepare(account: Account) -> None:
    """Create the streams."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)


async def store_some(account: Account) -> str:
    """Store a document and the job doc-1, and return the document's SHA-256."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await client.enqueue(Echo(), tenant="acme", unique="doc-1")
        return (await client.documents.put(b"some", tenant="acme")).sha256


@pytest.fixture
def start(account: Account, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a command on a server with all streams. Commands that still run at the end are killed."""
    others = ("AIQUEUE_", "NATS_", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment |= {f"AIQUEUE_{name.upper()}": getattr(account, name) for name in ("url", "user", "password")}
    environment["PYTHONPATH"] = str(ROOT)
    started: list[Started] = []
    (tmp_path / "app.py").write_text(WORKER)

    def start(*arguments: str, code: str = "", **options: Any) -> Started:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path, "env": environment, **options}
        if "preexec_fn" in options:
            command = [sys.executable, "-m", "aiqueue", *arguments]
            started.append(subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, **options))
        else:
            (tmp_path / "program.py").write_text(code)
            started.append(forks.start("program.py" if code else "aiqueue", *arguments, **options))
        return started[-1]

    asyncio.run(prepare(account))
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def fork_each(start: Start, tmp_path: Path) -> ForkEach:
    """A function that runs command lines with one stdout, and returns the exit code and stderr of each."""

    def fork_each(commands: list[list[str]], stdout: int | TextIO) -> list[tuple[int, str]]:
        code, _, err = finish(start(json.dumps(commands), code=FORKS, stdout=stdout))
        assert code == 0, err
        numbers = range(len(commands))
        return [(int((tmp_path / f"code-{n}").read_text()), (tmp_path / f"err-{n}").read_text()) for n in numbers]

    return fork_each


def finish(process: Started) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a process that ends by itself."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out or "", err or ""


def strict_json(text: str) -> Any:
    """Parse JSON as RFC 8259 has it: Python's parser would take NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text.encode()  # without lone surrogates
    return json.loads(text, parse_constant=refuse, parse_int=str)


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture
def commands(start: Start, account: Account) -> list[list[str]]:
    """Command lines with each way to print: typer's, text, tables, JSON and bytes."""
    sha = asyncio.run(store_some(account))
    return [
        ["--help"], ["--version"], ["apply", "--json"], ["inspect"], ["inspect", "doc-1"],
        ["enqueue", "echo", "{}", "--tenant", "acme", "--json"], ["dead", "ls"], ["dead", "replay", "--all"],
        ["documents", "get", sha, "--tenant", "acme"], ["inbox", "ls"], ["cancel", "doc-1", "--json"],
    ]  # fmt: skip


def test_output_on_a_full_device_is_one_line_and_exit_code_1(fork_each: ForkEach, commands: list[list[str]]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = fork_each(commands, stdout=full)
    for arguments, (code, err) in zip(commands, ended, strict=True):
        *before, line = err.splitlines()
        assert (code, line.startswith("error: ")) == (1, True), (arguments, err)
        assert "No space left on device" in line, arguments
        assert all("enqueued before" in each for each in before), (arguments, before)


def test_a_reader_that_left_gets_no_traceback(fork_each: ForkEach, commands: list[list[str]]) -> None:
    with closed_pipe() as pipe:
        ended = fork_each(commands, stdout=pipe)
    for arguments, (code, err) in zip(commands, ended, strict=True):
        assert code == 1, arguments
        assert not re.search("Traceback|Error|Exception", err), (arguments, err)


def test_a_full_stderr_leaves_the_exit_code(start: Start) -> None:
    for arguments, expected in ((["inspect", "nosuch"], 1), (["inspct"], 2), (["inspect"], 0)):
        with Path("/dev/full").open("w") as full:
            assert finish(start(*arguments, stderr=full))[0] == expected, arguments


def test_a_command_whose_streams_are_closed_does_its_work(start: Start) -> None:
    def close_streams() -> None:
        os.closerange(0, 3)

    process = start("enqueue", "echo", "{}", "--tenant", "acme", "--unique", "doc-1", preexec_fn=close_streams)
    assert process.wait(60) == 0
    assert finish(start("inspect", "doc-1"))[0] == 0


def test_enqueue_says_what_it_stored_before_its_reader_left(start: Start, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text("{}\n" * 3_000)
    process = start("enqueue", "echo", "@jobs.jsonl", "--tenant", "acme", "--json")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("{")
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert code == 1
    assert re.fullmatch(r"[\d,]+ jobs? enqueued before the output was closed by its reader\n", err)


def test_a_worker_goes_on_without_a_place_for_its_output(start: Start) -> None:
    with Path("/dev/full").open("w") as full:
        worker = start("work", "app:worker", stdout=full)
        code, out, err = finish(start("enqueue", "echo", "{}", "--tenant", "acme", "--wait", "--timeout", "30s"))
        assert code == 0, out + err
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0


def test_json_output_has_null_for_nan_and_infinity(start: Start) -> None:
    start("work", "app:worker")
    code, out, err = finish(
        start("enqueue", "echo", "{}", "--tenant", "acme", "--unique", "doc-1", "--wait", "--timeout", "30s", "--json")
    )
    assert code == 0, err
    assert strict_json(out)["result"] == {"score": None}
    assert strict_json(finish(start("inspect", "doc-1", "--json"))[1])["result"] == {"score": None}
    items = [strict_json(line) for line in finish(start("tail", "doc-1", "--json"))[1].splitlines()]
    assert [each["data"] for each in items if each["event"] in ("chunk", "result")] == [{"score": None}] * 2


@given(DATA)
def test_whatever_is_printed_as_json_is_json(value: Any) -> None:
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "print_line", printed.append)
        output.print_json(value, lines=True)
        output.print_json({"value": value, (1, frozenset()): value})  # a key that JSON does not have
    for text in printed:
        strict_json(text)


def test_json_of_data_that_is_nested_too_deeply_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    output.print_json(deep)
    strict_json(capsys.readouterr().out)


def test_ctrl_c_while_waiting_says_that_the_job_is_not_cancelled(start: Start) -> None:
    process = start("enqueue", "lost", "{}", "--tenant", "acme", "--unique", "doc-1", "--wait")
    assert process.stderr is not None
    assert "enqueued doc-1" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.split("\n")[1:] == [
        "job doc-1 is not cancelled: `aiqueue tail doc-1` follows it, `aiqueue cancel doc-1` cancels it", ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [["enqueue", "echo", "-", "--tenant", "acme"], ["documents", "put", "-", "--tenant", "acme"]]
)
def test_reading_from_a_terminal_is_said(start: Start, arguments: list[str]) -> None:
    ours, terminal = pty.openpty()
    process = start(*arguments, terminal=terminal)
    os.close(terminal)
    assert process.stderr is not None
    assert "Ctrl-D ends the input" in process.stderr.readline()
    os.write(ours, b"{}\n\x04")
    code, _, err = finish(process)
    os.close(ours)
    assert code == 0, err
