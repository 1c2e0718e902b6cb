"""What several tests need: real servers, and the only places where tests wait."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from aiqueue import supervisor
from aiqueue.server import find_binary

T = TypeVar("T")
Eventually = Callable[..., Awaitable[object]]

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02


@dataclass(frozen=True)
class Account:
    """Where a test works: nobody else is there. `url` holds no credentials."""

    url: str
    user: str
    password: str

    @property
    def address(self) -> tuple[str, int]:
        first = urlsplit(self.url.split(",")[0])
        return first.hostname or supervisor.HOST, first.port or 4222


class Server(Protocol):
    """The server of a test run: `pid` is None where it is not a process of ours."""

    url: str

    @property
    def pid(self) -> int | None: ...

    def take(self) -> Account: ...

    def give_back(self, account: Account) -> None: ...


class NatsProcess:
    """A nats-server of one's own, on a port of its own that it keeps over restarts; one user, JetStream on.

    `extra` is config text behind the default one and overrides it: max_payload, tls, authorization… Call `start`
    from the main thread: the kernel kills the server when the thread that started it ends (see `launch`).
    """

    def __init__(self, directory: Path, extra: str = "", *, config: Callable[[], str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = 0
        self.user = "test"
        self.password = secrets.token_hex(8)
        self.log = directory / "server.log"
        self._extra = extra
        self._more = config or self._one_user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{supervisor.HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def account(self) -> Account:
        return Account(self.url, self.user, self.password)

    def start(self) -> None:
        """Start it, if it does not run, and wait until it is ready (30 s, for loaded machines)."""
        if self._process is not None:
            return
        known = self.port
        for attempt in range(5):
            self.port = known or supervisor.free_port()
            self.write_config()
            try:
                self._process = supervisor.launch(find_binary(), self._config, self.log, within_s=30)
            except supervisor.LaunchError as error:
                if known or not error.port_taken or attempt == 4:
                    raise
            else:
                return

    def stop(self) -> None:
        """End it cleanly, if it runs."""
        self._end(supervisor.STOP_S)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        self._end(0)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nobody answers. All its threads have stopped when this returns."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def reload(self) -> None:
        """Have it read its config again, which takes effect some time later."""
        self.write_config()
        self._signal(signal.SIGHUP)

    def write_config(self) -> None:
        self._config.write_text(
            f'listen: "{supervisor.HOST}:{self.port}"\n'
            # Far above any disk: what streams reserve by max_bytes must not run out over a test run.
            f'jetstream {{ store_dir: ".", max_file_store: {2**50}, max_memory_store: {2**40} }}\n'
            f'log_file: "{self.log.name}"\n{self._more()}\n{self._extra}\n'
        )

    @property
    def _config(self) -> Path:
        return self.directory / "server.conf"

    def _one_user(self) -> str:
        return f'authorization {{ user: "{self.user}", password: "{self.password}" }}'

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(number)

    def _end(self, within_s: float) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            supervisor.stop(process, within_s)


class AccountPool:
    """One server for a whole test run, with accounts declared beforehand: one costs 0.4 ms and 25 KB at its start.

    When they are used up, it declares half as many again and has the server reload.
    """

    def __init__(self, directory: Path, size: int = 400) -> None:
        self._growth = max(size // 2, 1)
        self._declared: list[tuple[str, str]] = []
        self._taken = 0
        self._declare(size)
        self._server = NatsProcess(directory, config=self._accounts)
        self._server.start()
        self.url = self._server.url

    @property
    def pid(self) -> int | None:
        return self._server.pid

    def take(self) -> Account:
        grown = self._taken == len(self._declared)
        if grown:
            self._declare(self._growth)
            self._server.reload()
        account = Account(self.url, *self._declared[self._taken])
        if grown:
            wait_until(lambda: supervisor.ready(account.address, account.user, account.password), within=30)
        self._taken += 1
        return account

    def give_back(self, account: Account) -> None:
        """Delete its streams, so that a long run does not slow the server. The account is not used again."""
        with contextlib.suppress(OSError):  # a hygiene of the run, no claim of the test
            delete_streams(account)

    def end(self) -> None:
        self._server.kill()
        shutil.rmtree(self._server.directory, ignore_errors=True)

    def _declare(self, count: int) -> None:
        first = len(self._declared)
        self._declared += [(f"test-{i}", secrets.token_hex(8)) for i in range(first, first + count)]

    def _accounts(self) -> str:
        lines = (
            f'{user}: {{ jetstream: enabled, users: [{{ user: "{user}", password: "{password}" }}] }}'
            for user, password in self._declared
        )
        return "accounts {\n" + "\n".join(lines) + "\n}"


class WholeServer:
    """A server that is not ours, used by one test after the other; what a test leaves there is deleted."""

    def __init__(self, url: str) -> None:
        """`url` holds the credentials; several servers of one cluster are separated by commas."""
        parts = [urlsplit(part.strip()) for part in url.split(",")]
        bare = ",".join(f"{part.scheme}://{part.hostname}:{part.port or 4222}" for part in parts)
        self.url = bare
        self.pid: int | None = None
        self._account = Account(bare, unquote(parts[0].username or ""), unquote(parts[0].password or ""))

    def take(self) -> Account:
        return self._account

    def give_back(self, account: Account) -> None:
        delete_streams(account)


def stream_names(account: Account) -> list[str]:
    """The streams of an account, the first 1,024 of them. Raises OSError when the server does not answer."""
    answer = supervisor.ask(account.address, account.user, account.password, "$JS.API.STREAM.NAMES", within_s=10)
    if "error" in answer:
        raise ConnectionError(json.dumps(answer["error"]))
    return list(answer.get("streams") or [])


def delete_streams(account: Account) -> None:
    """Delete every stream of an account, and with them its buckets and consumers."""
    while names := stream_names(account):
        for name in names:
            supervisor.ask(
                account.address,
                account.user,
                account.password,
                f"$JS.API.STREAM.DELETE.{name}",
                within_s=10,
            )


async def eventually(fn: Callable[[], object], within: float = 5.0) -> object:
    """Call `fn`, plain or async, until it is true or, being a list of assertions, returns None; its last value.

    An AssertionError counts as not yet; anything else that it raises ends the wait. After `within` seconds the
    last AssertionError is raised.
    """
    import asyncio  # noqa: PLC0415 - the helpers above serve processes that need no loop

    deadline = time.monotonic() + within
    while True:
        failure: AssertionError | None = None
        try:
            value = fn()
            if inspect.isawaitable(value):
                value = await value
            if value is None or value:
                return value
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline:
            raise failure or AssertionError(f"not true within {within:g} s: {fn!r}")
        await asyncio.sleep(POLL_S)


def wait_until(fn: Callable[[], T], within: float = 10.0) -> T:
    """The first true value of `fn`, which must come within so many seconds. For tests without a loop."""
    deadline = time.monotonic() + within
    while not (value := fn()):
        assert time.monotonic() < deadline, f"not true within {within:g} s: {fn!r}"
        time.sleep(POLL_S)
    return value


def pause_between(steps: int, longest_s: float) -> Iterator[float]:
    """Sleep for `steps` different times up to `longest_s`: to meet a race at different moments."""
    for step in range(steps):
        time.sleep(longest_s * step / max(steps - 1, 1))
        yield longest_s * step / max(steps - 1, 1)


def processes(text: str) -> dict[int, str]:
    """The live processes whose command line holds `text`: pid and command. Those that only await their parent
    are not alive.
    """
    listed = subprocess.run(
        ["ps", "-axww", "-o", "pid=,stat=,command="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(None, 2) for line in listed.splitlines() if text in line)
    return {int(row[0]): row[2] for row in rows if len(row) == 3 and not row[1].startswith("Z")}
