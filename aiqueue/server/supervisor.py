"""The small process behind the embedded server: starts a nats-server and keeps it running.

`embedded` runs this file by its path, in an interpreter without site-packages, so that it costs about 30 ms and
18 MB. It may import only the standard library, nothing of aiqueue. The files of a directory::

    holders.lock      each process that uses the server locks it shared; an exclusive lock means that none does
    supervisor.lock   locked by the supervisor, which inherits the lock from the process that started it
    server.lock       locked by the supervisor and its nats-server, so that two servers never write to one store
    state.json        port, user, password, pids, the server's name (0600)
    server.conf, server.log, supervisor.log, jetstream/
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which `embedded` refuses before any lock is used
    fcntl = None  # type: ignore[assignment]

HOST = "127.0.0.1"
USER = "aiqueue"
TICK_S = 0.25  # maximum time from the end of the last holder to the shutdown of the server
STOP_S = 5.0  # for a clean shutdown, before SIGKILL
ANSWER_S = 10.0  # for a server that has just started to answer, on a busy machine
RECOVERY_S = 120.0  # for the server to read its store while a process waits for it
BACKOFF_S = (0.1, 5.0)  # delay between restarts of a server that dies: first, maximum

# Below the ephemeral ports of Linux and macOS. A client that reconnects to an ephemeral port without a listener can get
# that port as its own source port, connect to itself, and so block the port for the server.
PORTS = range(20_000, 32_000)
PORT_TRIES = 20

_PASSWORD = re.compile(r"[A-Za-z0-9_-]{20,}")  # written into the config between quotes
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class LaunchError(Exception):
    """A nats-server did not become ready. The text is one line with the server's reason."""

    def __init__(self, reason: str, *, port_taken: bool = False) -> None:
        super().__init__(reason)
        self.port_taken = port_taken


class ServerFiles:
    """The paths of the files in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.holders = directory / "holders.lock"
        self.supervisor = directory / "supervisor.lock"
        self.server = directory / "server.lock"
        self.state = directory / "state.json"
        self.config = directory / "server.conf"
        self.log = directory / "server.log"
        self.errors = directory / "supervisor.log"


def launch(
    binary: Path, config: Path, log: Path, *, within_s: float = 10.0, keep: Sequence[int] = (),
    env: Mapping[str, str] | None = None, give_up: Callable[[], bool] = lambda: False,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start ``binary -c config`` and wait until it accepts connections with JetStream ready.

    `log`: the ``log_file`` of the config, to which the server's stderr is appended too. The server runs in the config's
    directory, in its own session, so that Ctrl-C does not reach it, with the open files in `keep` and the environment
    `env` (None: this process's). On Linux the kernel kills it when the *thread* that called this ends.

    Raises LaunchError after `within_s` seconds, if the server exits, or once `give_up()` is true; it is then stopped.
    """
    before = _identity(log)
    try:
        with open(log, "ab", opener=owner_only) as stderr:
            process = subprocess.Popen(  # noqa: S603 - the caller's binary
                [binary, "-c", config],
                cwd=config.parent,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=keep,
                env=env,
                umask=0o077,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - one system call, resolved before the fork
            )
    except OSError as error:
        raise LaunchError(f"cannot run {binary}: {error.strerror}") from error
    try:
        _wait_ready(process, log, before[2] if before else 0, within_s, give_up)
    except BaseException:
        stop(process, 0)
        raise
    return process


def stop(process: subprocess.Popen[bytes], within_s: float = STOP_S) -> None:
    """Stop a server with SIGTERM, and SIGKILL after `within_s` seconds (0: at once). Safe if it has already ended."""
    if within_s > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
    process.kill()
    process.wait()


def die_with(parent: int) -> Callable[[], None] | None:
    """Return a function to call in a child, so that the kernel kills it when `parent` ends; None outside Linux."""
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)

    return arrange


def ask(
    address: tuple[str, int], user: str, password: str, subject: str, *, name: str = "", within_s: float = 2.0
) -> dict[str, Any]:
    """Send an empty request over a connection of its own and return the JSON reply, without a client library.

    `within_s` bounds each wait for the server. Raises OSError if no server answers, if the server has another name
    than `name`, if it rejects the credentials, or if the subject has no responder (JetStream is off).
    """
    options = {"user": user, "pass": password, "verbose": False, "headers": True, "no_responders": True}
    inbox = f"_INBOX.{secrets.token_hex(8)}"
    request = f"CONNECT {json.dumps(options)}\r\nSUB {inbox} 1\r\nPUB {subject} {inbox} 0\r\n\r\n".encode()
    with socket.create_connection(address, timeout=within_s) as link, link.makefile("rb") as answer:
        info = answer.readline(65_536)
        if not info.startswith(b"INFO ") or (name and json.loads(info[5:]).get("server_name") != name):
            raise ConnectionError("not the expected NATS server")
        link.sendall(request)
        while line := answer.readline(65_536):
            if line.startswith(b"MSG "):
                value = json.loads(answer.read(int(line.split()[-1])))
                return value if isinstance(value, dict) else {}
            if line.startswith(b"HMSG "):
                raise ConnectionError("JetStream is off")
            if line.startswith(b"-ERR"):
                raise ConnectionError(line.decode(errors="replace").strip())
            if line.startswith(b"PING"):
                link.sendall(b"PONG\r\n")
    raise ConnectionError("the server closed the connection")


def ready(address: tuple[str, int], user: str, password: str, *, name: str = "", within_s: float = 2.0) -> bool:
    """Return whether a server with JetStream, these credentials (and `name`, if given) answers at the address."""
    try:
        return "error" not in ask(address, user, password, "$JS.API.INFO", name=name, within_s=within_s)
    except (OSError, ValueError):
        return False


def free_port() -> int:
    """Return a random port of PORTS without a listener. Raises LaunchError."""
    for _ in range(PORT_TRIES):
        port = random.choice(PORTS)  # noqa: S311 - not a secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise LaunchError(f"{PORT_TRIES} random ports from {PORTS.start} to {PORTS.stop} are all in use")


def owner_only(path: str, flags: int) -> int:
    """Open a file for `open(opener=)`, so that a new file is readable by its owner only."""
    return os.open(path, flags, 0o600)


def open_lock(path: Path) -> int:
    """Open a lock file, and create it if missing. Programs that this process executes do not inherit it."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Try to lock an open file without waiting. It is locked until all copies of `fd`, forked ones too, are closed."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_place(fd: int, path: Path) -> bool:
    """Return whether `path` still is the open file. It is not after its directory was removed or recreated."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def read_state(path: Path) -> dict[str, Any]:
    """Return the validated contents of the state file; empty if the file is missing or damaged."""
    types = {"port": int, "user": str, "password": str, "name": str, "pid": int, "supervisor_pid": int}
    try:
        state = json.loads(path.read_bytes())
        typed = all(type(state[key]) is kind for key, kind in types.items())
        valid = typed and 0 < state["port"] < 65_536 and _PASSWORD.fullmatch(state["password"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return state if valid else {}


def last_log_line(text: str) -> str:
    """Return the last error in a log, or else its last line, without the time stamp."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server: ")]
    line = (errors or lines or ["the log is empty"])[-1]
    return line.split("] ", 2)[-1][:300] if line.startswith("[") else line[:300]


def tail(path: Path, start: int = 0, limit: int = 65_536) -> str:
    """Return the last `limit` bytes of a log after position `start`, as text; empty if there is no log."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(size - limit, start if start <= size else 0))  # shorter than `start`: the log was rotated
            return log.read().decode(errors="replace")
    except OSError:
        return ""


class Supervisor:
    """Keeps the server of one directory running while a process holds the directory. Uses one thread."""

    def __init__(self, files: ServerFiles, binary: Path, asked_port: int | None) -> None:
        self._files = files
        self._binary = binary
        self._asked_port = asked_port
        self._holders = open_lock(files.holders)
        self._server_lock = open_lock(files.server)
        self._state = read_state(files.state)
        self._written: tuple[int, int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False  # by a signal, or because no process holds the directory any more

    def run(self, report: Callable[[str], None]) -> None:
        """Start the server, `report` a problem or ``""``, and return when no process holds the directory any more."""
        wake = self._handle_signals()
        try:
            try:
                self._wait_for_store()
                self._start()
            except (LaunchError, OSError) as error:
                report(str(error))
                return
            report("")
            self._keep_running(wake)
        finally:
            if self._process is not None:
                stop(self._process)
            if self._written is not None and not self._is_displaced():
                with contextlib.suppress(OSError):
                    self._save(pid=0, supervisor_pid=0)

    def _handle_signals(self) -> int:
        """Let SIGCHLD and requests to end wake the loop. Return the file to wait on."""
        wake, alarm = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_end())
        return wake

    def _request_end(self) -> None:
        self._ended = True

    def _wait_for_store(self) -> None:
        """Wait for the end of a server whose supervisor was killed, because it still writes to the store."""
        started = time.monotonic()
        while not try_lock(self._server_lock):
            waited_s = time.monotonic() - started
            if waited_s > 1:  # outside Linux, where the kernel does not kill the server with its supervisor
                _kill_server(self._state.get("pid", 0), self._files.config)
            if waited_s > STOP_S or self._should_end():
                raise LaunchError(f"another nats-server still uses {self._files.directory}")
            time.sleep(0.02)

    def _start(self) -> None:
        """Start the server on the requested port, the last used one, or a random one. Raises LaunchError."""
        known = self._asked_port or self._state.get("port", 0)
        password = self._state.get("password") or secrets.token_urlsafe(24)
        for attempt in range(PORT_TRIES):
            if self._should_end():
                raise LaunchError("no process uses this directory any more")  # and another supervisor may have it
            port = known if known and attempt == 0 else free_port()
            name = f"aiqueue-{secrets.token_hex(6)}"  # distinguishes this server from the previous one
            _write(self._files.config, _config(port, password, name))
            try:
                self._process = launch(
                    self._binary, self._files.config, self._files.log,
                    within_s=RECOVERY_S, keep=(self._server_lock,), give_up=self._should_end,
                )  # fmt: skip
            except LaunchError as error:
                if not error.port_taken:
                    raise
                if self._asked_port:
                    raise LaunchError(
                        f"port {port} is in use; choose another port, or none for a random one"
                    ) from error
            else:
                if not ready((HOST, port), USER, password, name=name, within_s=ANSWER_S):
                    stop(self._process, 0)
                    raise LaunchError(f"{self._files.config} was overwritten while the server started")
                self._state = {"port": port, "user": USER, "password": password, "name": name}
                self._save(pid=self._process.pid, supervisor_pid=os.getpid())
                return
        raise LaunchError(f"{PORT_TRIES} ports are all in use")

    def _keep_running(self, wake: int) -> None:
        delay_s, next_start = BACKOFF_S[0], 0.0
        while not self._should_end():
            select.select([wake], [], [], TICK_S)
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            if self._process is not None and self._process.poll() is None:
                if _identity(self._files.state) != self._written:  # damaged or deleted from outside
                    with contextlib.suppress(OSError):  # a full disk; the next tick tries again
                        self._save()
                if time.monotonic() > next_start + BACKOFF_S[1]:
                    delay_s = BACKOFF_S[0]
            elif time.monotonic() >= next_start:
                with contextlib.suppress(LaunchError, OSError):
                    self._start()
                next_start = time.monotonic() + delay_s
                delay_s = min(delay_s * 2, BACKOFF_S[1])

    def _should_end(self) -> bool:
        """Return whether to end. The exclusive lock, once taken, is kept, so that new holders wait until the end."""
        self._ended = self._ended or self._is_displaced() or try_lock(self._holders)
        return self._ended

    def _is_displaced(self) -> bool:
        return not in_place(self._holders, self._files.holders)

    def _save(self, **changes: int) -> None:
        self._state |= changes
        _write(self._files.state, json.dumps(self._state))
        self._written = _identity(self._files.state)


def _config(port: int, password: str, name: str) -> str:
    """Return the config of an embedded server: loopback only, one user, paths relative to its directory.

    The file limit is high on purpose: the server reserves every stream's max_bytes, 7 GiB as declared, and would
    refuse the streams on a nearly full disk. Once the disk is really full, a stream accepts nothing until the server
    is restarted (nats-server 2.15.1). `aiqueue doctor` checks the free space.
    """
    return f"""\
# Written by aiqueue at every start; changes are lost.
server_name: "{name}"
listen: "{HOST}:{port}"
max_payload: 1048576
authorization {{ user: "{USER}", password: "{password}" }}
jetstream {{ store_dir: ".", max_file_store: 1TB }}
log_file: "server.log"
logfile_size_limit: 4194304
logfile_max_num: 3
"""


def _wait_ready(
    process: subprocess.Popen[bytes], log: Path, start: int, within_s: float, give_up: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + within_s
    while True:
        code = process.poll()  # before the log is read, so that the log of an ended server is complete
        text = tail(log, start)
        if code is not None:
            raise LaunchError(last_log_line(text), port_taken="address already in use" in text)
        if "Server is ready" in text:  # JetStream is started before the server listens
            return
        if time.monotonic() > deadline:
            raise LaunchError(f"not ready within {within_s:g} s; the log ends with: {last_log_line(text)}")
        if give_up():
            raise LaunchError("the start was given up, because every process that waited for the server has ended")
        time.sleep(0.005)


def _kill_server(pid: int, config: Path) -> None:
    """Kill the process `pid`, read from a file, if it still is the server with this config."""
    if pid <= 1:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = subprocess.run(  # noqa: S603 - fixed arguments and a number
            ["ps", "-ww", "-o", "command=", "-p", str(pid)],  # noqa: S607 - its location differs
            capture_output=True,
            timeout=2,
            check=False,
        ).stdout
        if command.rstrip().endswith(b"-c " + os.fsencode(config)):
            os.kill(pid, signal.SIGKILL)


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, readable by its owner only."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with open(new, "x", opener=owner_only, encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return inode, modification time and size of a file, None if there is none. A change of the file changes them."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def main(directory: str, binary: str, port: str) -> None:
    """Supervise `directory`; `port` "0": any. Writes one JSON string to stdout: a problem, or "" once started."""

    def report(problem: str) -> None:
        with contextlib.suppress(OSError):  # the process that started this one may be gone
            os.write(1, json.dumps(problem).encode() + b"\n")
        os.dup2(0, 1)  # stdin is /dev/null; closes the pipe, so that its reader sees the end

    os.umask(0o077)
    Supervisor(ServerFiles(Path(directory)), Path(binary), int(port) or None).run(report)


if __name__ == "__main__":
    main(*sys.argv[1:4])
