"""The ``demo`` command: its options, the server it uses, and the cleanup, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from ... import subjects
from ...client import Client, connect
from ...config import Settings
from ...connection import to_its_end
from ...errors import AIQueueError, BadInput, NotFound
from ...server import DIRECTORY, EmbeddedServer, supervisor
from ...topology import provision
from ..options import FAILED, USAGE, print_error
from . import analysis, view
from .analysis import Gathered
from .handlers import Feed
from .ledger import FAMILIES
from .story import Demo
from .view import Screen

T = TypeVar("T")

TENANTS = ("acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "wonka")
START_S = 30.0  # for the private server to start, on a busy machine
STOP_S = 10.0  # for the private server to stop

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def demo(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="Directory with text files. Default: aiqueue's own files.")
    ] = None,
    tenants: Annotated[int, typer.Option(metavar="N", help="Number of tenants.", min=1, max=len(TENANTS))] = 3,
    keep: Annotated[bool, typer.Option("--keep", metavar="", help="Keep the server's data for inspection.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print only the report, as JSON.")] = False,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="NATS server URL. Default: NATS_URL, else a private server.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take URL and credentials from this context of the nats CLI.")
    ] = None,
) -> None:
    """Run a demo: text files pass through the queue, with retries, a dead letter and its replay.

    Processes the text files in PATH, on a private server unless a server is given. Takes less than a minute and cleans
    up after itself.

    Exit codes: 0 all jobs succeeded, 1 some did not.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for characters that the terminal cannot show
    screen = Screen(quiet=as_json)
    try:
        with _without_logs():
            source, gathered = _gather_documents(path)
            settings = Settings.load(url=url, context=context)
            report = _drive(lambda: _run(source, gathered, settings, TENANTS[:tenants], screen, keep=keep))
    except AIQueueError as error:
        print_error(str(error))
        raise typer.Exit(USAGE if isinstance(error, BadInput) else FAILED) from None
    except OSError as error:  # for example a full disk, or no temporary directory
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        print_error("interrupted" if keep else "interrupted; everything is cleaned up")
        raise typer.Exit(130) from None
    if as_json:
        screen.console.quiet = False
        screen.console.print(json.dumps(report, indent=2), markup=False, soft_wrap=True)
    raise typer.Exit(0 if report["ok"] else 1)


async def _run(
    source: str, gathered: Gathered, settings: Settings, tenants: tuple[str, ...], screen: Screen, *, keep: bool
) -> dict[str, Any]:
    """Run the whole demo and return the report."""
    count = len(gathered.documents)
    limit = f"the first {count}" if gathered.more else str(count)
    skipped = f" (skipped: {gathered.describe_skipped()})" if gathered.describe_skipped() else ""
    screen.say(f"{limit} documents from {source}{skipped}, for {len(tenants)} tenants")
    feed = Feed.of(gathered.documents)
    private = not settings.servers
    with _directory(keep=keep and private) as directory:
        if private:
            report = await _on_private(settings, screen, tenants, directory, feed)
        else:
            named = tuple(f"{tenant}-demo{secrets.token_hex(2)}" for tenant in tenants)
            report = await _on_named(settings, screen, named, directory, feed, keep=keep)
    for line, style in view.verdict(report):
        screen.say(line, style)
    kept = directory.exists()
    if kept:
        screen.say("The private server has stopped. Its data was kept; this starts it again:")
        screen.command(f"cd {shlex.quote(str(directory))} && aiqueue inspect")
    elif private:
        screen.say("The private server has stopped, and its files are deleted.")
    return {**report, "kept": str(directory) if kept else None}


async def _on_private(
    settings: Settings, screen: Screen, tenants: tuple[str, ...], directory: Path, feed: Feed
) -> dict[str, Any]:
    """Run on the private server of `directory`, without settings that are meant for another server."""
    other_server = ("url", "context", "user", "password", "token", "creds", "nkey", "tls_ca", "tls_cert", "tls_key")
    none = dict.fromkeys((*other_server, "tls_hostname", "inbox_prefix", "streams"))
    ours = {"directory": directory / DIRECTORY, "profile": "single", "tls_handshake_first": False}
    with contextlib.ExitStack() as held:

        def start() -> None:
            server = held.enter_context(EmbeddedServer.acquire(directory / DIRECTORY, within_s=START_S))
            screen.say(f"private server started on {server.url}")

        await to_its_end(asyncio.to_thread(start))
        client = Client(settings.model_copy(update={**none, **ours}))
        try:
            await to_its_end(client.open(declare=False))  # else a thread of it could make the directory again
            made = await provision.apply(client.connection, client.topology)
            created = [change.stream for change in made.changes if change.action == "create"]
            screen.say(f"{len(created)} streams created from streams/*.toml: {', '.join(created)}")
            return await Demo(client, screen, tenants, directory / "locks").run(feed)
        finally:
            await client.close()


async def _on_named(
    settings: Settings, screen: Screen, tenants: tuple[str, ...], directory: Path, feed: Feed, *, keep: bool
) -> dict[str, Any]:
    """Run on a shared server, with tenants of our own, whose data is deleted afterwards."""
    async with connect(settings=settings) as client:
        screen.say(f"using {client.connection.server}, with tenants {', '.join(tenants)}")
        topology = client.topology
        needed = {topology.family(family).stream for family in FAMILIES}
        needed |= {topology.journal_stream.name, topology.dead_stream.name}
        plan = await provision.plan(client.connection, topology)
        absent = [change.stream for change in plan.changes if change.action == "create" and change.stream in needed]
        if absent:
            raise NotFound(f"{client.connection.server} has no stream {', '.join(absent)}: run `aiqueue apply` first")
        try:
            return await Demo(client, screen, tenants, directory / "locks").run(feed)
        finally:
            if not keep:
                with contextlib.suppress(AIQueueError, TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await _delete_traces(client, tenants)


async def _delete_traces(client: Client, tenants: tuple[str, ...]) -> None:
    """Delete what a run left on a server: journals, dead letters, lanes, and jobs if it was interrupted."""
    topology = client.topology
    for family in (topology.family(name) for name in FAMILIES):
        for tenant in tenants:
            await client.connection.api(f"STREAM.PURGE.{family.stream}", {"filter": f"ai.{family.name}.{tenant}.*"})
            traces = {topology.dead_stream.name: subjects.dead(family.name, tenant)}
            if family.journal:
                traces[topology.journal_stream.name] = subjects.journal(family.journal, tenant, "*")
            for stream, subject in traces.items():
                await client.connection.api(f"STREAM.PURGE.{stream}", {"filter": subject})
            for priority in family.priorities:
                with contextlib.suppress(NotFound):
                    lane = family.lane_name(tenant, priority)
                    await client.connection.api(f"CONSUMER.DELETE.{family.stream}.{lane}")


def _gather_documents(path: Path | None) -> tuple[str, Gathered]:
    """Return a name for the source of the documents, and the documents. Raises BadInput."""
    if path is None:
        root, files = analysis.own_documents(Path(__file__).resolve().parents[2])
        return "aiqueue's own files", analysis.gather(root, files)
    try:
        if not path.is_dir():
            raise BadInput(f"{path} is not a directory" if path.exists() else f"no such directory: {path}")
        next(path.iterdir(), None)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    gathered = analysis.gather(path)
    if not gathered.documents:
        skipped = f" (skipped: {gathered.describe_skipped()})" if gathered.describe_skipped() else ""
        raise BadInput(f"no text files in {path}{skipped}")
    return str(path), gathered


@contextmanager
def _directory(*, keep: bool) -> Iterator[Path]:
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


def _drive(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
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
def _without_logs() -> Iterator[None]:
    """Suppress the library's log lines while the block runs: the demo prints the same events."""
    log, null_handler = logging.getLogger("aiqueue"), logging.NullHandler()
    propagated, log.propagate = log.propagate, False
    log.addHandler(null_handler)
    try:
        yield
    finally:
        log.removeHandler(null_handler)
        log.propagate = propagated
