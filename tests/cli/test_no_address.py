"""Commands without a server's address: what is started and written, and what is said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue.cli.options import ServerOptions, with_remedy
from aiqueue.config import Settings
from aiqueue.errors import NotFound, SettingsError, Unavailable
from aiqueue.server import DIRECTORY, EmbeddedServer

from .. import forks
from ..support import ROOT, Account, processes, wait_until
from .test_cli import WORKER, clear_environment, one_line, run_main

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
READING = [
    "inspect", "inspect agent.tasks", "inspect doc-1", "doctor", "plan", "tail doc-1", "tail --family agent.tasks",
    "dead ls", "dead show 1", "limits ls", "pause", "schedule ls", "schedule show s --tenant acme",
    "schedule next s --tenant acme", "schedule prune --owner o", "inbox ls", "inbox read a --tenant acme",
    "documents ls", f"documents get {'0' * 64} --tenant acme", "gateway usage", "gateway keys ls",
    "rag ls --tenant acme",
    "rag status d --tenant acme", "rag stats --tenant acme", "server --print-url",
]  # fmt: skip
ACTING = [
    "cancel doc-1", "reschedule doc-1 --delay 1h", "dead replay --all", "dead purge --all --yes",
    "resume agent.tasks", "limits unset agent.tasks key", "schedule rm s --tenant acme",
    "schedule run s --tenant acme", "schedule pause s --tenant acme", "schedule resume s --tenant acme",
    "schedule prune --owner o --yes", "inbox rm a --tenant acme", "documents collect",
    f"documents rm {'0' * 64} --tenant acme", "gateway usage --rebuild", "gateway keys revoke k-1",
]  # fmt: skip
STARTING = [
    "work app:worker", "gateway serve", "respond", "enqueue echo {} --tenant acme", "apply", "cancel doc-1",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An otherwise empty working directory with a worker; nothing in the environment names a server."""
    for name in os.environ.keys() - clear_environment().keys() | POD.keys():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "app.py").write_text(WORKER)
    yield tmp_path / "work"
    wait_until(lambda: not processes(str(tmp_path)))


def test_errors_of_a_server_that_is_busy_or_has_just_started_say_what_to_do(place: Path) -> None:
    embedded, own = ServerOptions(), ServerOptions(url="nats://127.0.0.1:4222")
    unanswered = Unavailable("$JS.API.STREAM.INFO.AI_GATEWAY_BATCHES: no reply within 5 s")
    assert with_remedy(unanswered, own).endswith(": try again; `aiqueue doctor` checks the server")
    absent = NotFound("there is no stream KV_AI_PRESENCE: run `aiqueue apply` first")
    assert with_remedy(absent, embedded).endswith("creates its streams by itself, in some seconds")
    assert with_remedy(absent, own) == str(absent)
    assert with_remedy(NotFound("no such job"), embedded) == "no such job"


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, in the working directory."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    if "--processes" in command:  # the parent of a pool starts this program itself
        command_line = [sys.executable, "-m", "aiqueue", *command.split()]
        return subprocess.run(
            command_line, capture_output=True, text=True, check=False, timeout=40, env={**env, "PYTHONPATH": str(ROOT)}
        )
    pipe = subprocess.PIPE
    with forks.start("aiqueue", *command.split(), cwd=Path.cwd(), stdout=pipe, stderr=pipe, env=env) as started:
        out, err = started.communicate(timeout=40)
    assert started.returncode is not None
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def names(directory: Path) -> list[str]:
    """What is in a directory, without what Python makes when it imports the user's module."""
    return sorted(each.name for each in directory.iterdir() if each.name != "__pycache__")


@pytest.mark.parametrize("command", [*READING, *ACTING])
def test_what_stores_nothing_new_starts_no_server_and_makes_no_directory(place: Path, command: str) -> None:
    result = run_main(*command.split())
    assert result.returncode == 1
    assert one_line(result) == (
        f"error: no embedded server runs in {place / DIRECTORY}: start it with `aiqueue server`, or set NATS_URL to "
        "use another server"
    )
    assert names(place) == ["app.py"]


def test_what_changes_what_is_stored_starts_the_server_of_its_data(place: Path) -> None:
    (place / DIRECTORY).mkdir()
    result = run_main("cancel", "doc-1")
    assert (result.returncode, one_line(result).startswith("error: no trace of job doc-1")) == (1, True), result.stderr
    assert "server.conf" in names(place / DIRECTORY)


@pytest.mark.parametrize("command", [*STARTING, "work app:worker --processes 2", "inspect", "plan"])
def test_in_a_container_without_an_address_nothing_is_started_nor_written(place: Path, command: str) -> None:
    result = run(command, **POD)
    assert result.returncode == 2
    assert one_line(result) == (
        "error: no server address is set, and in a container (KUBERNETES_SERVICE_HOST is set) no embedded server is "
        "started: set NATS_URL, or url in aiqueue.toml; to start one in a directory that outlives the container, set "
        "AIQUEUE_DIRECTORY"
    )
    assert names(place) == ["app.py"]


async def test_a_program_in_a_container_without_an_address_gets_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*next(iter(POD.items())))
    with pytest.raises(SettingsError, match="no server address is set, and in a container"):
        await aiqueue.connect().open()
    with pytest.raises(SettingsError, match="no server address is set, and in a container"):
        await asyncio.to_thread(aiqueue.connect_sync().open)
    with pytest.raises(SettingsError, match="no server address is set, and in a container"):
        await aiqueue.NATSClient().connect()
    assert names(place) == ["app.py"]


@pytest.mark.parametrize("command", ["work app:worker", "enqueue echo {} --tenant acme", "inspect"])
def test_where_embedded_is_never_an_address_is_required(place: Path, command: str) -> None:
    (place / "aiqueue.toml").write_text('embedded = "never"')
    said = 'error: no server address is set, and embedded is "never" ({}): set NATS_URL, or url in aiqueue.toml'
    result = run(command)
    assert (result.returncode, one_line(result)) == (2, said.format(place / "aiqueue.toml"))
    result = run(f"{command} --directory data", AIQUEUE_EMBEDDED="never")
    assert (result.returncode, one_line(result)) == (2, said.format("environment variable AIQUEUE_EMBEDDED"))
    assert names(place) == ["aiqueue.toml", "app.py"]


@pytest.mark.parametrize("command", ["work app:worker", "enqueue echo {} --tenant acme", "inspect", "server", "demo"])
def test_an_empty_address_is_an_error(place: Path, command: str) -> None:
    result = run(command, NATS_URL="")
    assert result.returncode == 2
    assert one_line(result).startswith("error: environment variable NATS_URL: is empty: set it to a server's URL")
    assert names(place) == ["app.py"]


def test_a_directory_that_is_named_counts_as_asked_for_in_a_container(place: Path) -> None:
    for asked in ({"AIQUEUE_DIRECTORY": "data"}, {}):
        result = run("apply" if asked else "apply --directory other", **POD, **asked)
        assert (result.returncode, result.stderr) == (0, "")
    assert names(place) == ["app.py", "data", "other"]


class TestServer:
    @pytest.fixture
    def server(self, place: Path) -> Iterator[EmbeddedServer]:
        """What `aiqueue server` holds: a server without a stream."""
        with EmbeddedServer.acquire(place / DIRECTORY, within_s=20) as server:
            yield server

    @pytest.mark.usefixtures("server")
    def test_commands_of_a_container_use_a_server_that_runs(self) -> None:
        done = run("enqueue echo {} --tenant acme", **POD)
        assert (done.returncode, done.stderr) == (0, "")

    def test_what_only_reads_creates_no_stream(self, server: EmbeddedServer) -> None:
        result = run_main("plan")
        assert result.returncode == 3
        assert "create stream AI_AGENT_TASKS" in result.stdout
        account = Account(server.url, server.user, server.password)
        assert account.stream_names() == []

    async def test_its_url_is_printed_for_scripts(self, server: EmbeddedServer) -> None:
        printed = run("server --print-url", AIQUEUE_EMBEDDED="never")
        assert (printed.returncode, printed.stderr) == (0, "")
        assert printed.stdout == f"nats://{server.user}:{server.password}@127.0.0.1:{server.port}\n"
        async with aiqueue.connect(printed.stdout.strip()) as client:
            assert not client.embedded

    def test_its_url_has_no_port_to_choose(self, place: Path) -> None:
        result = run_main("server", "--print-url", "--port", "4333")
        assert (result.returncode, one_line(result)) == (
            2, "error: --port is for a server that is started, and --print-url starts none: give one of them",
        )  # fmt: skip
        assert names(place) == ["app.py"]


async def test_which_server_is_used_and_why_is_logged(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aiqueue.client")
    async with aiqueue.connect() as client:
        at = client.connection.server
        url, user, password = (getattr(client.connection.settings, name) for name in ("url", "user", "password"))
        assert caplog.messages == [f"using the server {at}, embedded in {place / DIRECTORY}"]
        (place / "aiqueue.toml").write_text(f'url = "{url}"')
        async with aiqueue.connect(user=user, password=password):
            assert caplog.messages[1:] == [f"using the server {at}, from {place / 'aiqueue.toml'}"]
        async with aiqueue.Client(Settings.load(url=url, user=user, password=password)):
            assert caplog.messages[2:] == [f"using the server {at}, from argument url"]
    assert re.fullmatch(r"nats://127\.0\.0\.1:\d+", at)
    with contextlib.suppress(FileNotFoundError):
        (place / "aiqueue.toml").unlink()
