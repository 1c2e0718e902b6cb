"""How `aiqueue work` starts and ends: by signals, and by what the user's code does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiqueue

from .. import forks
from ..support import Account

pytestmark = pytest.mark.families("agent.tasks")
APP = """
    import asyncio, contextlib, os, sys, time
    import aiqueue
    import aiqueue.cli.worker_process

    aiqueue.cli.worker_process.END_S = 1.0  # not 8: the tests wait for it

    class Task(aiqueue.Message, kind="task"):
        do: str = ""

    @contextlib.asynccontextmanager
    async def lifespan():
        how = os.environ.get("LIFESPAN", "")
        if how == "raises at the start":
            raise RuntimeError("no model")
        if how == "raises in a group":
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        if how == "exits":
            sys.exit(0)
        if how == "hangs at the start":
            print("hanging", flush=True)
            await asyncio.sleep(600)
        yield
        if how == "raises at the end":
            raise RuntimeError("no goodbye")
        if how == "hangs at the end":
            await asyncio.sleep(600)
        if how == "swallows at the end":
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(600)
        if how == "blocks at the end":
            time.sleep(600)

    async def fail():
        raise RuntimeError("no model")

    async def leave():
        sys.exit(0)

    worker = aiqueue.Worker(lifespan=lifespan, drain_timeout="1s")

    @worker.handle(Task)
    async def task(job):
        if job.message.do == "exit":
            left = asyncio.create_task(leave())
            await asyncio.sleep(600)
        return "done"
    """


class Task(aiqueue.Message, kind="task"):
    do: str = ""


class Work:
    """`aiqueue work app:worker` on an account, or on any address."""

    def __init__(self, directory: Path, environment: dict[str, str], *options: str) -> None:
        (directory / "app.py").write_text(textwrap.dedent(APP))
        self.process = forks.start(
            *("aiqueue", "work", "app:worker", *options),
            cwd=directory, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for(self, text: str) -> None:
        """Wait for a line on stdout."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(self.process.communicate()[1])

    def end(self, within_s: float) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        output, errors = self.process.communicate(timeout=within_s)
        return self.process.returncode, output, errors


@contextlib.contextmanager
def working(directory: Path, environment: dict[str, str], *options: str) -> Iterator[Work]:
    work = Work(directory, environment, *options)
    try:
        yield work
    finally:
        work.process.kill()
        work.process.communicate()


@pytest.fixture
def at(account: Account, client: aiqueue.Client) -> dict[str, str]:
    """The environment in which a worker finds the account."""
    return {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_connection_ends_the_worker_at_once(tmp_path: Path, number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        with working(tmp_path, {"AIQUEUE_URL": url, "AIQUEUE_CONNECT_TIMEOUT": "120"}) as work:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                work.process.send_signal(number)
                code, output, errors = work.end(within_s=20)
    assert (code, errors) == (0, "")
    assert "stopped before it had started" in output


def test_a_signal_while_the_lifespan_starts_ends_the_worker_at_once(tmp_path: Path, at: dict[str, str]) -> None:
    with working(tmp_path, {**at, "LIFESPAN": "hangs at the start"}) as work:
        work.wait_for("hanging")
        work.process.terminate()
        code, output, _ = work.end(within_s=20)
    assert code == 0
    assert "stopped before it had started" in output


@pytest.mark.parametrize("how", ["raises at the start", "raises in a group", "exits"])
def test_a_lifespan_that_fails_at_the_start_is_reported_on_one_line(
    tmp_path: Path, at: dict[str, str], how: str
) -> None:
    with working(tmp_path, {**at, "LIFESPAN": how}) as work:
        code, _, errors = work.end(within_s=60)
    assert code == 1
    used, line = errors.splitlines()
    assert "using the server " in used
    said = "SystemExit: 0" if how == "exits" else "RuntimeError: no model"
    assert re.match(rf"error: .*{said} \(.*app\.py, line \d+\)", line)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises at the end", r"did not end: RuntimeError: no goodbye \(.*app\.py, line \d+\)"),
        ("hangs at the end", "did not end within 1 s of its drain: does its lifespan hang"),
        ("swallows at the end", "did not end within 1 s of its drain: does its lifespan hang"),
        ("blocks at the end", "did not end within 1 s of its drain: does its lifespan hang"),
    ],
)
def test_a_lifespan_that_fails_or_hangs_at_the_end_ends_the_worker_with_one_line(
    tmp_path: Path, at: dict[str, str], how: str, said: str
) -> None:
    with working(tmp_path, {**at, "LIFESPAN": how}, "--log-level=error") as work:
        work.wait_for("worker ")
        work.process.terminate()
        code, _, errors = work.end(within_s=40)
    assert code == 1
    assert len(errors.splitlines()) == 1, errors
    assert re.search(said, errors)


async def test_sys_exit_in_a_task_of_a_handler_ends_the_worker_with_a_failure_after_its_drain(
    tmp_path: Path, at: dict[str, str], client: aiqueue.Client
) -> None:
    with working(tmp_path, at, "--log-level=error") as work:
        work.wait_for("worker ")
        await client.enqueue(Task(do="exit"), tenant="acme")
        code, output, errors = work.end(within_s=40)
    assert code == 1
    assert re.search(
        r"error: the worker has ended because a task of a handler raised SystemExit: 0 \(.*app\.py, line \d+\)", errors
    )
    assert "some jobs did not finish in time and go to other workers" in output
