"""One nats-server for a whole test run, with an account of its own for each test."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import urlsplit

from ..errors import EmbeddedError
from ..server import find_binary, supervisor

START_S = 30.0  # for loaded machines
PORT_TRIES = 5
POLL_S = 0.02
MEMORY = Path("/dev/shm")  # noqa: S108  (on Linux; only a directory of our own in it is used)
MEMORY_MIN = 2**30  # bytes that must be free there: Docker gives 64 MiB
IN_MEMORY = "aiqueue-tests-"
STORE_MAX, MEMORY_MAX = 2**50, 2**40  # far above any disk: what the streams of all accounts reserve must not run out


@dataclass(frozen=True, slots=True)
class ServerAccount:
    """An account of a server: its streams are nobody else's. `url` holds no credentials."""

    url: str
    user: str
    """User name to connect with."""
    password: str = field(repr=False)
    """Password to connect with."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first server."""
        first = urlsplit(self.url.split(",")[0])
        return first.hostname or supervisor.HOST, first.port or 4222

    def stream_names(self) -> list[str]:
        """Return the account's streams, the first 1,024 of them. Raises OSError when the server does not answer."""
        answer = supervisor.ask(self.address, self.user, self.password, "$JS.API.STREAM.NAMES", within_s=10)
        if "error" in answer:
            raise ConnectionError(json.dumps(answer["error"]))
        return list(answer.get("streams") or [])

    def delete_streams(self) -> None:
        """Delete the account's streams, and with them its buckets and consumers. Raises OSError."""
        for _ in self.deletion():
            pass

    def deletion(self) -> Generator[None]:
        """As `delete_streams`, and yields once the server has been told to: what is left is to wait for its answers.

        All over one connection: this is done after each of many tests.
        """
        options = {"user": self.user, "pass": self.password, "verbose": False, "headers": True, "no_responders": True}
        with socket.create_connection(self.address, timeout=10) as link, link.makefile("rb") as answers:
            link.sendall(f"CONNECT {json.dumps(options)}\r\nSUB _INBOX.tests 1\r\n".encode())
            while True:
                _send_all(link, ["STREAM.NAMES"])
                (listed,) = _read_all(link, answers, 1)
                names = listed.get("streams") or []
                _send_all(link, [f"STREAM.DELETE.{name}" for name in names])
                yield
                _read_all(link, answers, len(names))
                if len(names) == listed.get("total", 0):
                    return


def _send_all(link: socket.socket, requests: list[str]) -> None:
    """Send empty requests to the JetStream API. Raises OSError."""
    link.sendall("".join(f"PUB $JS.API.{each} _INBOX.tests 0\r\n\r\n" for each in requests).encode())


def _read_all(link: socket.socket, answers: BinaryIO, count: int) -> list[dict[str, Any]]:
    """Return the next `count` answers. Raises OSError."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        line = answers.readline()
        if not line or line.startswith((b"-ERR", b"HMSG")):
            raise ConnectionError(f"the server did not answer the JetStream API: {line!r}")
        if line.startswith(b"PING"):
            link.sendall(b"PONG\r\n")
        if line.startswith(b"MSG "):
            found.append(json.loads(answers.read(int(line.split()[-1]) + 2)))
    return found


class AccountServer:
    """A nats-server on a free port of 127.0.0.1, from `start` to `end`, with accounts that tests take one by one.

    `directory` holds its data, and is deleted in the end. `accounts`: how many are declared when it starts; one costs
    0.4 ms then. When they are used up, half as many again are declared, and the server reloads its configuration.

    Start it in the main thread: on Linux the kernel kills the server when the thread that started it ends, which is
    how the server ends with a test run that is killed.
    """

    def __init__(self, directory: Path, *, accounts: int = 120) -> None:
        self.directory = directory
        self.url = ""
        self._port = 0
        self._growth = max(accounts // 2, 1)
        self._declared: list[tuple[str, str]] = []
        self._taken = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._deletion: Generator[None] | None = None
        self._declare(accounts)

    @property
    def pid(self) -> int | None:
        """The process of the server; None before `start` and after `end`."""
        return None if self._process is None else self._process.pid

    def start(self) -> Self:
        """Start the server, and wait until it is ready. Safe twice. Raises BinaryMissing, EmbeddedError."""
        if self._process is not None:
            return self
        binary = find_binary()
        self.directory.mkdir(parents=True, exist_ok=True)
        for number in range(PORT_TRIES):
            try:
                self._port = supervisor.free_port()
                self._write_config()
                log = self.directory / "server.log"
                # its streams hold little: rarer garbage collections cost less
                environment = {"GOGC": "400", **os.environ}
                self._process = supervisor.launch(binary, self._config, log, within_s=START_S, env=environment)
            except supervisor.LaunchError as error:
                if not error.port_taken or number == PORT_TRIES - 1:
                    raise EmbeddedError(f"the server for tests in {self.directory} does not start: {error}") from error
            else:
                break
        self.url = f"nats://{supervisor.HOST}:{self._port}"
        return self

    def end(self) -> None:
        """Kill the server and delete its data. Safe twice."""
        process, self._process = self._process, None
        if process is not None:
            if self._deletion is not None:
                self._deletion.close()
            supervisor.stop(process, 0)
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def take(self) -> ServerAccount:
        """Return an account that is empty, and that nobody else gets. Raises EmbeddedError if the server has ended."""
        grown = self._taken == len(self._declared)
        if grown:
            self._declare(self._growth)
            self._write_config()
            if self._process is not None:
                self._process.send_signal(signal.SIGHUP)
        account = ServerAccount(self.url, *self._declared[self._taken])
        if grown:
            self._wait_until_ready(account)
        self._taken += 1
        return account

    def return_account(self, account: ServerAccount) -> None:
        """Delete what is in an account, so that a long run does not slow the server. It is not used again.

        The server is still at it when this returns: the next test need not wait.
        """
        self._end_deletion()
        with suppress(OSError):  # a hygiene of the run, no claim of the test
            self._deletion = account.deletion()
            next(self._deletion, None)

    def _end_deletion(self) -> None:
        """Wait for the end of the former deletion."""
        if self._deletion is not None:
            with suppress(OSError):
                for _ in self._deletion:
                    pass

    @property
    def _config(self) -> Path:
        return self.directory / "server.conf"

    def _declare(self, count: int) -> None:
        first = len(self._declared)
        self._declared += [(f"test-{i}", secrets.token_hex(8)) for i in range(first, first + count)]

    def _write_config(self) -> None:
        accounts = "\n".join(
            f'{user}: {{ jetstream: enabled, users: [{{ user: "{user}", password: "{password}" }}] }}'
            for user, password in self._declared
        )
        self._config.write_text(
            f'listen: "{supervisor.HOST}:{self._port}"\n'
            f'jetstream {{ store_dir: ".", max_file_store: {STORE_MAX}, max_memory_store: {MEMORY_MAX} }}\n'
            f'log_file: "server.log"\naccounts {{\n{accounts}\n}}\n'
        )

    def _wait_until_ready(self, account: ServerAccount) -> None:
        """Wait until the server has read its configuration again."""
        deadline = time.monotonic() + START_S
        while not supervisor.ready(account.address, account.user, account.password):
            if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                raise EmbeddedError(f"the server for tests does not answer: {self.directory / 'server.log'} says why")
            time.sleep(POLL_S)


@contextmanager
def directory_in_memory(otherwise: Path) -> Iterator[Path]:
    """Give a new directory for a server's data, in memory where there is enough: streams cost half as much there.

    `otherwise`: where it is on other systems, or if the variable TMPDIR is set. What runs have left that were killed is
    deleted: nobody locks it any more.
    """
    if "TMPDIR" in os.environ or not _has_memory():
        yield otherwise
        return
    for left in MEMORY.glob(f"{IN_MEMORY}*"):
        with suppress(OSError):
            _delete_unless_locked(left)
    directory = Path(tempfile.mkdtemp(prefix=IN_MEMORY, dir=MEMORY))
    lock = supervisor.open_lock(directory / "lock")
    try:
        supervisor.try_lock(lock)
        yield directory / "server"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _has_memory() -> bool:
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return False
    found = os.statvfs(MEMORY)
    return found.f_bavail * found.f_frsize >= MEMORY_MIN


def _delete_unless_locked(directory: Path) -> None:
    """Raises OSError, also for a directory that is being made, and for another user's."""
    lock = os.open(directory / "lock", os.O_RDWR)
    try:
        if supervisor.try_lock(lock):
            shutil.rmtree(directory)
    finally:
        os.close(lock)


def settings_of_account(account: ServerAccount) -> Any:
    """Return the settings of the working directory, as `aiqueue.connect` uses them, for a test's account.

    What says where the server is, and who connects, is not taken from there. So is the profile: one server is no
    cluster. Raises SettingsError.
    """
    from ..config import Settings  # noqa: PLC0415  (it loads pydantic, which a test without a client does not need)

    return Settings.load(
        url=account.url, user=account.user, password=account.password, profile="single"
    ).model_copy(
        update=dict.fromkeys(
            ("context", "token", "creds", "nkey", "tls_ca", "tls_cert", "tls_key", "tls_hostname", "inbox_prefix")
        )
        | {"tls_handshake_first": False}
    )  # fmt: skip
