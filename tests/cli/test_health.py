"""What a supervisor reads: a worker's file, the exit code of ``aiqueue health``, systemd's socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli.app import app

from .. import forks
from ..support import ROOT, NatsProcess, create_streams, wait_until

APP = """
    import pathlib, time
    import aiqueue

    worker = aiqueue.Worker(concurrency=3, name="w")

    class Block(aiqueue.Message, kind="block"):
        until: str

    @worker.handle(Block, timeout="60s")
    async def block(job: aiqueue.Job[Block]) -> None:
        while not pathlib.Path(job.message.until).exists():
            time.sleep(0.05)
    """


class Block(aiqueue.Message, kind="block"):
    until: str


class Place:
    def __init__(self, directory: Path, server: NatsProcess) -> None:
        self.directory = directory
        self.server = server
        self.file = directory / "health.json"
        (directory / "app.py").write_text(textwrap.dedent(APP))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
        self.environment = {
            **kept, "PYTHONPATH": str(ROOT), "AIQUEUE_URL": server.url, "AIQUEUE_USER": server.user,
            "AIQUEUE_PASSWORD": server.password,
        }  # fmt: skip
        self.workers: list[forks.Program] = []

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aiqueue", *words]
        return subprocess.run(
            command, cwd=self.directory, env=self.environment, capture_output=True, text=True, check=False
        )

    def health(self, *words: str) -> Result:
        """Run ``aiqueue health`` on the worker's file, in this process."""
        return CliRunner().invoke(app, ["health", *words, str(self.file)])

    async def prepare(self) -> None:
        """Create the streams."""
        async with self.client() as client:
            await create_streams(client)

    async def enqueue(self, message: aiqueue.Message) -> None:
        async with self.client() as client:
            await client.enqueue(message, tenant="acme")

    def client(self) -> aiqueue.Client:
        return aiqueue.connect(self.server.url, user=self.server.user, password=self.server.password)

    def work(self, *options: str, **more: str) -> forks.Program:
        command = ["aiqueue", "work", *options, "app:worker"]
        made = forks.start(*command, cwd=self.directory, env={**self.environment, **more})
        self.workers.append(made)
        return made

    def report(self) -> dict[str, Any]:
        try:
            report: dict[str, Any] = json.loads(self.file.read_text())
        except FileNotFoundError:
            return {"state": "none"}
        return report

    def wait_state(self, state: str) -> None:
        wait_until(lambda: self.report()["state"] == state)


@pytest.fixture
def place(tmp_path: Path, own_server: Callable[..., NatsProcess]) -> Iterator[Place]:
    place = Place(tmp_path, own_server())
    asyncio.run(place.prepare())
    yield place
    for worker in place.workers:
        worker.kill()
        worker.wait()


def test_a_workers_file_says_how_it_is_from_its_start_to_its_end(place: Place) -> None:
    worker = place.work("--health-file", str(place.file))
    place.wait_state("ok")
    report = place.report()
    assert (report["pid"], report["worker"], report["slots"], report["running"], report["connected"]) == (
        worker.pid, "w", 3, 0, True,
    )  # fmt: skip
    assert place.run("health", str(place.file)).returncode == 0
    for options in (("--ready",), ("--json",)):
        assert place.health(*options).exit_code == 0
    # blocked: the file grows old
    over = place.directory / "over"
    asyncio.run(place.enqueue(Block(until=str(over))))
    wait_until(lambda: time.time() - place.report()["time"] > 1.5)
    seen = place.health("--within", "1s")
    assert seen.exit_code == 1
    assert "stale" in seen.stderr
    over.touch()
    wait_until(lambda: time.time() - place.report()["time"] < 1.5)
    wait_until(lambda: place.report()["done"] == 1)
    assert place.report()["last_delivery"] > time.time() - 60
    # without its server it is alive, and not ready
    place.server.kill()
    place.wait_state("disconnected")
    assert place.health().exit_code == 0
    assert place.health("--ready").exit_code == 1
    place.server.start()
    place.wait_state("ok")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert not place.file.exists()
    assert "no such file" in place.health().stderr


def test_a_worker_pool_gives_one_report_and_leaves_no_file(place: Place) -> None:
    pool = place.work("--processes", "2", "--health-file", str(place.file))
    place.wait_state("ok")
    report = place.report()
    assert (report["pid"], report["slots"], len(report["processes"])) == (pool.pid, 6, 2)
    os.kill(report["processes"][0]["pid"], signal.SIGSTOP)
    assert place.health("--within", "30s").exit_code == 0
    os.kill(report["processes"][0]["pid"], signal.SIGKILL)
    pool.send_signal(signal.SIGTERM)
    pool.wait(30)
    assert [each.name for each in place.directory.iterdir() if "health" in each.name] == []


def test_systemd_is_told_when_it_is_ready_and_that_it_is_alive(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(40)
        path = place.directory / "notify"
        listener.bind(str(path))
        worker = place.work(NOTIFY_SOCKET=str(path))
        while "READY=1" not in (said := listener.recv(4096).decode().splitlines()):
            assert said[0].startswith("STATUS=worker w: starting")
        assert "WATCHDOG=1" in said
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0


def test_a_file_that_cannot_be_written_ends_the_worker_with_one_line(place: Place) -> None:
    done = place.run("work", "--health-file", str(place.directory / "none" / "health"), "app:worker")
    assert done.returncode == 2
    assert "--health-file" in done.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_what_is_no_health_file_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from aiqueue.cli.health import read_report  # noqa: PLC0415
    from aiqueue.errors import BadInput  # noqa: PLC0415

    (tmp_path / "file").write_text(text)
    with pytest.raises(BadInput, match="not a health file"):
        read_report(tmp_path / "file")


def test_a_worker_that_stays_stalled_is_to_be_replaced() -> None:
    from aiqueue.cli.health import is_alive, merge_reports  # noqa: PLC0415

    assert is_alive({"state": "stalled", "stalled_s": 5.0})
    assert not is_alive({"state": "stalled", "stalled_s": 90.0})
    stalled = {"state": "stalled", "stalled_s": 90.0, "slots": 3}
    both = merge_reports([{"state": "ok", "slots": 2}, stalled], worker="pool")
    assert (both["state"], both["slots"], is_alive(both)) == ("stalled", 5, False)


def test_the_file_of_a_worker_of_the_former_version_is_read(tmp_path: Path) -> None:
    from aiqueue.cli.health import is_alive, read_report  # noqa: PLC0415

    file = tmp_path / "health.json"
    file.write_text(json.dumps({"state": "deaf", "deaf_s": 7.0, "time": time.time()}))
    report = read_report(file)
    assert (report["state"], report["stalled_s"], is_alive(report)) == ("stalled", 7.0, True)
