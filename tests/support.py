"""What several tests need: real servers, and the only places where tests wait."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import unquote, urlsplit

import pytest

from aiqueue import Client
from aiqueue.testing import clients
from benchmarks.chaos.servers import Account, Cluster, NatsProcess, poll_s, wait_until

__all__ = ["ROOT", "Account", "Cluster", "NatsProcess", "wait_until"]

Eventually = Callable[..., Awaitable[object]]

ROOT = Path(__file__).resolve().parent.parent


class Server(Protocol):
    """The server of a test run: `pid` is None where it is not a process of ours."""

    url: str

    @property
    def pid(self) -> int | None: ...

    def take(self) -> Account: ...

    def return_account(self, account: Account) -> None: ...


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

    def return_account(self, account: Account) -> None:
        account.delete_streams()


async def create_streams(client: Client) -> None:
    """Create all streams of the client's topology on an empty account."""
    await clients.create_streams(client)


async def check_cancelled_start(
    monkeypatch: pytest.MonkeyPatch, kind: type, start: Callable[[], Coroutine[Any, Any, object]]
) -> None:
    """Cancel the start of a child process, before its first frame is read, and assert that the child has ended then."""
    started: asyncio.Future[Any] = asyncio.Future()

    async def receive(child: Any) -> Any:
        started.set_result(child)
        await asyncio.Event().wait()

    monkeypatch.setattr(kind, "_receive", receive)
    starting = asyncio.create_task(start())
    child = await started
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert child._process.returncode is not None  # the event loop knows of its end
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


async def eventually(fn: Callable[[], object], within: float = 25.0) -> object:
    """Call `fn`, plain or async, until it is true or, being a list of assertions, returns None; its last value.

    An AssertionError counts as not yet; anything else that it raises ends the wait. After `within` seconds the
    last AssertionError is raised.
    """
    began = time.monotonic()
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
        if time.monotonic() > began + within:
            raise failure or AssertionError(f"not true within {within:g} s: {fn!r}")
        await asyncio.sleep(poll_s(began))


def pause_between(steps: int, longest_s: float) -> Iterator[float]:
    """Sleep for `steps` different times up to `longest_s`: to meet a race at different moments."""
    for step in range(steps):
        time.sleep(longest_s * step / max(steps - 1, 1))
        yield longest_s * step / max(steps - 1, 1)


def whole_lines(log: Path) -> list[str]:
    """The lines of a file that a process may be writing, none if the file does not exist.

    What follows the last line feed is left out: a line may be half written when it is read.
    """
    return log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []


def processes(text: str) -> dict[int, str]:
    """The live processes whose command line holds `text`: pid and command. Those that only await their parent
    are not alive.
    """
    return {pid: command for pid, _, command in _living() if text in command}


def children(parent: int) -> set[int]:
    """The live processes that a process has started."""
    return {pid for pid, its_parent, _ in _living() if its_parent == parent}


def _living() -> Iterator[tuple[int, int, str]]:
    """Each live process: its pid, its parent's and its command. `/proc` costs a quarter of `ps`: tests ask and ask."""
    proc = Path("/proc")
    if not (proc / "self/stat").exists():
        listed = subprocess.run(
            ["ps", "-axwwo", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True
        )
        rows = (line.split(None, 3) for line in listed.stdout.splitlines())
        yield from (
            (int(row[0]), int(row[1]), row[3])
            for row in rows
            if len(row) == 4 and row[2][0] != "Z" and row[3][:3] != "ps "
        )
        return
    for pid in filter(str.isdecimal, os.listdir(proc)):  # noqa: PTH208 - there may be thousands
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, *_ = (proc / pid / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                command = (proc / pid / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(pid), int(parent), command.rstrip()


class Relay:
    """A way to a server that can be cut: what goes over it is passed on byte for byte."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def mend(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """End what goes over it, and listen no more."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection(*self._to)
        self._writers |= {writer, out}
        await asyncio.gather(_pass_on(reader, out), _pass_on(there, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def tls_config(certificates: Path) -> str:
    """The config of a server that needs TLS, with what the fixture `certificates` has made."""
    return f'tls {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key", timeout: 5 }}'
