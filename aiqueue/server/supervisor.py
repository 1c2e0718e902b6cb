"""Starts a nats-server and keeps it running: the small process behind the embedded server.

`server` runs this file by its path, in an interpreter without site-packages, so that it costs some 30 ms and
18 MB: standard library only, and nothing of aiqueue. The files of a directory::

    holders.lock      every process that uses the server holds it shared; exclusive means: nobody does
    supervisor.lock   held by the supervisor, which inherits it from the process that started it
    server.lock       held by the supervisor and by its nats-server, so that two never write to one store
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows; server.py refuses it before any lock is touched
    fcntl = None  # type: ignore[assignment]

HOST = "127.0.0.1"
USER = "aiqueue"
TICK_S = 0.25  # how long a server outlives its last holder, at most, before its shutdown starts
STOP_S = 5.0  # what a server gets for a clean shutdown, before SIGKILL
RECOVERY_S = 120.0  # what a server gets to read its store while somebody waits for it
BACKOFF_S = (0.1, 5.0)  # between restarts of a server that dies: first, and at most

# Below the ephemeral ports of Linux and macOS: a client that reconnects to one of those while nobody listens
# can be given that very port as its own, connect to itself, and so keep the server off it.
PORTS = range(20_000, 32_000)
PORT_TRIES = 20

_PASSWORD = re.compile(r"[A-Za-z0-9_-]{20,}")  # it goes into the config between quotes
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class LaunchError(Exception):
    """A nats-server that did not get ready. The text is one line with the server's own reason."""

    def __init__(self, reason: str, *, port_taken: bool = False) -> None:
        super().__init__(reason)
        self.port_taken = port_taken


class Place:
    """The files of one directory, by name."""

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
    binary: Path,
    config: Path,
    log: Path,
    *,
    within_s: float = 10.0,
    keep: Sequence[int] = (),
    give_up: Callable[[], bool] = lambda: False,
) -> subprocess.Popen[bytes]:
    """Start ``binary -c config`` and wait until it accepts connections with JetStream ready.

    `log` is the file that the config's ``log_file`` names; the server's stderr goes there too. It works in
    the config's directory (relative paths are fine), in a session of its own (no ^C of a terminal), and
    inherits the open files in `keep`. On Linux the kernel kills it when the *thread* that called this ends:
    call it from one that lives as long as the server should, the main one.

    Raises LaunchError after `within_s` seconds, when the server ends, and once `give_up()` is true; none is left then.
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
                umask=0o077,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - one system call, looked up before the fork
            )
    except OSError as error:
        raise LaunchError(f"{binary} does not start: {error.strerror}") from error
    try:
        _wait_ready(process, log, before[2] if before else 0, within_s, give_up)
    except BaseException:
        stop(process, 0)
        raise
    return process


def stop(process: subprocess.Popen[bytes], within_s: float = STOP_S) -> None:
    """End a server: SIGTERM, and SIGKILL after `within_s` seconds (0: at once). Safe on an ended one."""
    if within_s > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(within_s)
    process.kill()
    process.wait()


def die_with(parent: int) -> Callable[[], None] | None:
    """What to call in a child, so that the kernel kills it when its parent ends; None outside Linux."""
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return arrange


def ask(
    address: tuple[str, int], user: str, password: str, subject: str, *, name: str = "", within_s: float = 2.0
) -> dict[str, Any]:
    """The JSON answer to an empty request, over a connection of its own, without a client library.

    `within_s` bounds each wait for the server. Raises OSError when no server answers there, or not the one
    called `name`, when it refuses the credentials, and when nobody answers the subject (JetStream is off).
    """
    options = {"user": user, "pass": password, "verbose": False, "headers": True, "no_responders": True}
    inbox = f"_INBOX.{secrets.token_hex(8)}"
    request = f"CONNECT {json.dumps(options)}\r\nSUB {inbox} 1\r\nPUB {subject} {inbox} 0\r\n\r\n".encode()
    with socket.create_connection(address, timeout=within_s) as link, link.makefile("rb") as answer:
        info = answer.readline(65_536)
        if not info.startswith(b"INFO ") or (name and json.loads(info[5:]).get("server_name") != name):
            raise ConnectionError("it is not the NATS server")
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
    raise ConnectionError("it closed the connection")


def ready(address: tuple[str, int], user: str, password: str, *, name: str = "", within_s: float = 2.0) -> bool:
    """Whether a server with these credentials (and `name`, if given) answers there, with JetStream."""
    try:
        return "error" not in ask(address, user, password, "$JS.API.INFO", name=name, within_s=within_s)
    except (OSError, ValueError):
        return False


def free_port() -> int:
    """A port of PORTS on which nobody listens just now, tried at random."""
    for _ in range(PORT_TRIES):
        port = random.choice(PORTS)  # noqa: S311 - not a secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise LaunchError(f"{PORT_TRIES} ports of {PORTS.start} to {PORTS.stop} tried, all in use")


def owner_only(path: str, flags: int) -> int:
    """An opener for `open` that makes files which only their owner may read."""
    return os.open(path, flags, 0o600)


def open_lock(path: Path) -> int:
    """An open lock file, made where there is none. Not inherited by programs that this process executes."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting. The lock goes when all copies of `fd`, forked ones too, are gone."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_place(fd: int, path: Path) -> bool:
    """Whether `path` still is the open file: not once its directory was removed, made anew or not."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def read_state(path: Path) -> dict[str, Any]:
    """What the state file says, each value of its type; empty where the file is missing or damaged."""
    types = {"port": int, "user": str, "password": str, "name": str, "pid": int, "supervisor_pid": int}
    try:
        state = json.loads(path.read_bytes())
        typed = all(type(state[key]) is kind for key, kind in types.items())
        sound = typed and 0 < state["port"] < 65_536 and _PASSWORD.fullmatch(state["password"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return state if sound else {}


def last_words(text: str) -> str:
    """The line of a log that says most about its end: the last error, or the last line; without its stamp."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    grave = [line for line in lines if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server: ")]
    line = (grave or lines or ["it wrote no log"])[-1]
    return line.split("] ", 2)[-1][:300] if line.startswith("[") else line[:300]


def tail(path: Path, start: int = 0, limit: int = 65_536) -> str:
    """The last `limit` bytes of a log behind `start`, as text; empty where there is none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(size - limit, start if start <= size else 0))  # shorter than start: it was rotated
            return log.read().decode(errors="replace")
    except OSError:
        return ""


class Supervisor:
    """Keeps the server of one directory while anybody holds it. One thread; `run` returns when it is over."""

    def __init__(self, place: Place, binary: Path, asked_port: int | None) -> None:
        self._place = place
        self._binary = binary
        self._asked_port = asked_port
        self._holders = open_lock(place.holders)
        self._server_lock = open_lock(place.server)
        self._state = read_state(place.state)
        self._written: tuple[int, int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False  # somebody asked this process to end, or nobody needs it any more

    def run(self, report: Callable[[str], None]) -> None:
        """Start the server, `report` a problem or ``""``, and stay until nobody holds the directory."""
        wake = self._handle_signals()
        try:
            try:
                self._take_store()
                self._start()
            except (LaunchError, OSError) as error:
                report(str(error))
                return
            report("")
            self._keep(wake)
        finally:
            if self._process is not None:
                stop(self._process)
            if self._written is not None and not self._displaced():
                with contextlib.suppress(OSError):
                    self._save(pid=0, supervisor_pid=0)

    def _handle_signals(self) -> int:
        """Have SIGCHLD and a request to end wake the loop: the file to wait on."""
        wake, alarm = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(alarm, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        return wake

    def _end(self) -> None:
        self._ended = True

    def _take_store(self) -> None:
        """Wait for the end of a server whose supervisor was killed: it writes to the store until then."""
        started = time.monotonic()
        while not try_lock(self._server_lock):
            waited_s = time.monotonic() - started
            if waited_s > 1:  # only where no kernel kills it with its parent: not on Linux
                _kill_ours(self._state.get("pid", 0), self._place.config)
            if waited_s > STOP_S or self._over():
                raise LaunchError(f"another nats-server still uses {self._place.directory}")
            time.sleep(0.02)

    def _start(self) -> None:
        """A server on the asked port, the known one, or else a random one."""
        known = self._asked_port or self._state.get("port", 0)
        password = self._state.get("password") or secrets.token_urlsafe(24)
        for attempt in range(PORT_TRIES):
            port = known if known and attempt == 0 else free_port()
            name = f"aiqueue-{secrets.token_hex(6)}"  # who reaches this server can tell it from the one before
            _write(self._place.config, _config(port, password, name))
            try:
                self._process = launch(
                    self._binary,
                    self._place.config,
                    self._place.log,
                    within_s=RECOVERY_S,
                    keep=(self._server_lock,),
                    give_up=self._over,
                )
            except LaunchError as error:
                if not error.port_taken:
                    raise
                if self._asked_port:
                    raise LaunchError(f"port {port} is in use; ask for another one, or for none") from error
            else:
                self._state = {"port": port, "user": USER, "password": password, "name": name}
                self._save(pid=self._process.pid, supervisor_pid=os.getpid())
                return
        raise LaunchError(f"{PORT_TRIES} ports tried, all in use")

    def _keep(self, wake: int) -> None:
        delay_s, next_start = BACKOFF_S[0], 0.0
        while not self._over():
            select.select([wake], [], [], TICK_S)
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            if self._process is not None and self._process.poll() is None:
                if _identity(self._place.state) != self._written:  # damaged or deleted by somebody
                    with contextlib.suppress(OSError):  # a full disk; the next tick tries again
                        self._save()
                if time.monotonic() > next_start + BACKOFF_S[1]:
                    delay_s = BACKOFF_S[0]
            elif time.monotonic() >= next_start:
                with contextlib.suppress(LaunchError, OSError):
                    self._start()
                next_start = time.monotonic() + delay_s
                delay_s = min(delay_s * 2, BACKOFF_S[1])

    def _over(self) -> bool:
        """Whether to end. The exclusive lock, once had, is kept to the end: who comes now waits for it."""
        self._ended = self._ended or self._displaced() or try_lock(self._holders)
        return self._ended

    def _displaced(self) -> bool:
        return not in_place(self._holders, self._place.holders)

    def _save(self, **changes: int) -> None:
        self._state |= changes
        _write(self._place.state, json.dumps(self._state))
        self._written = _identity(self._place.state)


def _config(port: int, password: str, name: str) -> str:
    """The config of an embedded server: loopback only, one user, paths relative to its directory.

    The file limit is high on purpose: the server sets aside every stream's max_bytes, seven GiB as declared, and
    would refuse them on a nearly full disk. On a disk that is really full a stream takes nothing more until the
    server's next start (nats-server 2.15.1): `aiqueue doctor` looks at the room that is left.
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
        code = process.poll()  # asked before the log is read: an ended server writes no more
        text = tail(log, start)
        if code is not None:
            raise LaunchError(last_words(text), port_taken="address already in use" in text)
        if "Server is ready" in text:  # JetStream is started before the server listens
            return
        if time.monotonic() > deadline:
            raise LaunchError(f"not ready within {within_s:g} s; its log ends with: {last_words(text)}")
        if give_up():
            raise LaunchError("nobody waits for it any more")
        time.sleep(0.005)


def _kill_ours(pid: int, config: Path) -> None:
    """Kill a server by a pid read from a file, if that process still is the server with this config."""
    if pid <= 1:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = subprocess.run(  # noqa: S603 - fixed words and a number
            ["ps", "-ww", "-o", "command=", "-p", str(pid)],  # noqa: S607 - where it lies differs
            capture_output=True,
            timeout=2,
            check=False,
        ).stdout
        if command.rstrip().endswith(b"-c " + os.fsencode(config)):
            os.kill(pid, signal.SIGKILL)


def _write(path: Path, text: str) -> None:
    """Replace a file whole, readable by its owner only."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with open(new, "x", opener=owner_only, encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file: inode, time of change, size; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def main(directory: str, binary: str, port: str) -> None:
    """Supervise `directory`; `port` "0" is any. Says one JSON string on stdout: a problem, or ""."""

    def report(problem: str) -> None:
        with contextlib.suppress(OSError):  # who started this may be gone
            os.write(1, json.dumps(problem).encode() + b"\n")
        os.dup2(0, 1)  # stdin is /dev/null; who reads here shall see the end

    os.umask(0o077)
    Supervisor(Place(Path(directory)), Path(binary), int(port) or None).run(report)


if __name__ == "__main__":
    main(*sys.argv[1:4])
