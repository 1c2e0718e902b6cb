"""What runs a demo: a private server in a directory of its own, signals, and the cleanup, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import typer

from ...client import Client
from ...config import Settings
from ...connection import to_its_end
from ...errors import AIQueueError, BadInput
from ...server import DIRECTORY, EmbeddedServer, supervisor
from ...topology import provision
from ..options import FAILED, USAGE, print_error
from .view import Screen

T = TypeVar("T")

START_S = 30.0  # for the private server to start, on a busy machine
STOP_S = 10.0  # for the private server to stop

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def open_screen(*, quiet: bool) -> Screen:
    """Make the screen of a demo."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for characters that the terminal cannot show
    return Screen(quiet=quiet)


def run_demo(work: Callable[[], dict[str, Any]], screen: Screen, *, keep: bool) -> NoReturn:
    """Run a demo, print its report as JSON if the screen is quiet, and exit: with 0 if the report says "ok"."""
    try:
        with without_logs():
            report = work()
    except AIQueueError as error:
        print_error(str(error))
        raise typer.Exit(USAGE if isinstance(error, BadInput) else FAILED) from None
    except OSError as error:  # for example a full disk, or no temporary directory
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        print_error("interrupted" if keep else "interrupted; everything is cleaned up")
        raise typer.Exit(130) from None
    if screen.console.quiet:
        screen.console.quiet = False
        screen.console.print(json.dumps(report, indent=2), markup=False, soft_wrap=True)
    raise typer.Exit(0 if report["ok"] else 1)


@asynccontextmanager
async def private_client(
    settings: Settings, directory: Path, say: Callable[[str], None], **more: Any
) -> AsyncIterator[Client]:
    """A client of a private server in `directory`, without settings that are meant for another server, once the streams
    are there. `more`: settings of the demo's own.
    """
    other_server = ("url", "context", "user", "password", "token", "creds", "nkey", "tls_ca", "tls_cert", "tls_key")
    none = dict.fromkeys((*other_server, "tls_hostname", "inbox_prefix", "streams", "families"))
    here = {"directory": directory / DIRECTORY, "embedded": "auto"}
    ours = {**here, "profile": "single", "size": "medium", "overlay": {}, "tls_handshake_first": False, **more}
    with contextlib.ExitStack() as held:

        def start() -> None:
            server = held.enter_context(EmbeddedServer.acquire(directory / DIRECTORY, within_s=START_S))
            say(f"private server started on {server.url}")

        await to_its_end(asyncio.to_thread(start))
        client = Client(settings.model_copy(update={**none, **ours}))
        try:
            await to_its_end(client.open(declare=False))  # else a thread of it could make the directory again
            made = await provision.apply(client.connection, client.topology)
            created = [change.stream for change in made.changes if change.action == "create"]
            say(f"{len(created)} streams created from streams/*.toml: {', '.join(created)}")
            yield client
        finally:
            await client.close()


@contextmanager
def private_directory(*, keep: bool) -> Iterator[Path]:
    """Make a temporary directory for the private server and the locks. When the block ends, the server has stopped."""
    directory = Path(tempfile.mkdtemp(prefix="aiqueue-demo-"))
    try:
        yield directory
    finally:
        _wait_for_end(supervisor.ServerFiles(directory / DIRECTORY))
        if keep:
            shutil.rmtree(directory / "locks", ignore_errors=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _wait_for_end(files: supervisor.ServerFiles) -> None:
    """Wait until neither the supervisor nor its server holds its lock, so that neither writes into the directory."""
    deadline = time.monotonic() + STOP_S
    for path in (files.supervisor, files.server):
        while path.exists() and time.monotonic() < deadline:
            lock = supervisor.open_lock(path)
            try:
                if supervisor.try_lock(lock):
                    break
            finally:
                os.close(lock)
            time.sleep(0.02)


def drive(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Call asyncio.run; Ctrl-C and terminating signals cancel its task once.

    An exception raised by a signal handler could instead surface anywhere: between the creation of a directory and the
    block that removes it, or in a callback that swallows all exceptions.
    """
    ended: list[int] = []
    cancel: list[Callable[[], object]] = []

    def end(number: int, _: FrameType | None) -> None:
        ended.append(number)
        if cancel and len(ended) == 1:
            cancel[0]()

    async def run() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        cancel.append(lambda: loop.call_soon_threadsafe(task.cancel))
        if ended:
            task.cancel()
        return await work()

    # without those that this process was started to ignore
    numbers = [each for each in (signal.SIGINT, *_ENDING) if signal.getsignal(each) is not signal.SIG_IGN]
    with _handling(end, *numbers):
        try:
            result = asyncio.run(run())
        except asyncio.CancelledError:
            if not ended:
                raise
        else:
            if not ended:  # the signal may have come when the task had ended
                return result
    if ended[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + ended[0])


@contextmanager
def _handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


@contextmanager
def without_logs() -> Iterator[None]:
    """Suppress the library's log lines while the block runs: the demo prints the same events."""
    log, null_handler = logging.getLogger("aiqueue"), logging.NullHandler()
    propagated, log.propagate = log.propagate, False
    log.addHandler(null_handler)
    try:
        yield
    finally:
        log.removeHandler(null_handler)
        log.propagate = propagated
