"""The command: its options, the server that it runs on, and leaving nothing behind however it ends."""

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
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ... import subjects
from ...client import Client, connect
from ...config import Settings
from ...errors import AIQueueError, BadInput, NotFound
from ...server import DIRECTORY, EmbeddedServer, supervisor
from ...topology import provision
from ..options import FAILED, USAGE, complain
from . import analysis, view
from .analysis import Gathered
from .handlers import Feed
from .ledger import FAMILIES
from .story import Demo
from .view import Screen

T = TypeVar("T")

TENANTS = ("acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "wonka")
START_S = 30.0  # what the private server gets to start, on a busy machine
STOP_S = 10.0  # what the private server gets to end

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def demo(
    path: Annotated[
        Path | None, typer.Argument(help="A directory with text files; default: aiqueue's own files.")
    ] = None,
    tenants: Annotated[int, typer.Option(help="How many tenants share the documents.", min=1, max=len(TENANTS))] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the server's data to look at it afterwards.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say nothing but the report, as JSON.")] = False,
    url: Annotated[str | None, typer.Option(help="Use this server and not a private one; also NATS_URL.")] = None,
    context: Annotated[str | None, typer.Option(help="The same, by a context of the nats command line tool.")] = None,
) -> None:
    """Watch documents go through the queue: retries, a dead letter, its replay.

    Works on the text files of PATH, on a private server; takes well under a minute and leaves nothing behind.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    screen = Screen(quiet=as_json)
    try:
        with _quiet_logs(), _ending_by_signal():
            what, gathered = _documents(path)
            report = _run(what, gathered, Settings.load(url=url, context=context), TENANTS[:tenants], screen, keep=keep)
    except AIQueueError as error:
        complain(str(error))
        raise typer.Exit(USAGE if isinstance(error, BadInput) else FAILED) from None
    except OSError as error:  # a full disk, no temporary directory; a library's own errors are none
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        complain("interrupted" if keep else "interrupted; nothing is left behind")
        raise typer.Exit(130) from None
    if as_json:
        screen.console.quiet = False
        screen.console.print(json.dumps(report, indent=2), markup=False, soft_wrap=True)
    raise typer.Exit(0 if report["ok"] else 1)


def _run(
    what: str, gathered: Gathered, settings: Settings, tenants: tuple[str, ...], screen: Screen, *, keep: bool
) -> dict[str, Any]:
    """The whole demo, from its first line to its last; the report."""
    count = len(gathered.documents)
    limit = f"the first {count}" if gathered.more else str(count)
    skipped = f" (skipped: {gathered.skipped()})" if gathered.skipped() else ""
    screen.say(f"{limit} documents from {what}{skipped}, for {len(tenants)} tenants")
    feed = Feed.of(gathered.documents)
    private = not settings.servers
    with _directory(keep=keep and private) as directory:
        if private:
            with EmbeddedServer.acquire(directory / DIRECTORY, within_s=START_S) as server:
                screen.say(f"private server started on {server.url}")
                report = _drive(lambda: _on_private(settings, screen, tenants, directory, feed))
        else:
            named = tuple(f"{tenant}-demo{secrets.token_hex(2)}" for tenant in tenants)
            report = _drive(lambda: _on_named(settings, screen, named, directory, feed, keep=keep))
    for line, style in view.verdict(report):
        screen.say(line, style)
    kept = directory.exists()
    if kept:
        screen.say("The private server has ended; it starts again for who looks at what it kept:")
        screen.command(f"cd {shlex.quote(str(directory))} && aiqueue inspect")
    elif private:
        screen.say("The private server has ended, and its files are gone.")
    return {**report, "kept": str(directory) if kept else None}


async def _on_private(
    settings: Settings, screen: Screen, tenants: tuple[str, ...], directory: Path, feed: Feed
) -> dict[str, Any]:
    """On the server of `directory`, whatever credentials and streams are meant for another one."""
    meant = ("url", "context", "user", "password", "token", "creds", "nkey", "tls_ca", "tls_cert", "tls_key")
    none = dict.fromkeys((*meant, "tls_hostname", "inbox_prefix", "streams"))
    ours = {"directory": directory / DIRECTORY, "profile": "single", "tls_handshake_first": False}
    client = Client(settings.model_copy(update={**none, **ours}))
    opening = asyncio.create_task(client.open(declare=False))
    try:
        await asyncio.shield(opening)  # interrupted on its way, it would not let go of the server
        made = await provision.apply(client.connection, client.topology)
        created = [change.stream for change in made.changes if change.action == "create"]
        screen.say(f"{len(created)} streams created from streams/*.toml: {', '.join(created)}")
        return await Demo(client, screen, tenants, directory / "locks").run(feed)
    finally:
        await asyncio.wait([opening])
        await client.close()


async def _on_named(
    settings: Settings, screen: Screen, tenants: tuple[str, ...], directory: Path, feed: Feed, *, keep: bool
) -> dict[str, Any]:
    """On a server that others may use: with tenants of our own, whose traces are removed."""
    async with connect(settings=settings) as client:
        screen.say(f"using {client.connection.server}, with tenants {', '.join(tenants)}")
        topology = client.topology
        needed = {topology.family(family).stream for family in FAMILIES}
        needed |= {topology.journal_stream.name, topology.dead_stream.name}
        differs = await provision.plan(client.connection, topology)
        absent = [change.stream for change in differs.changes if change.action == "create" and change.stream in needed]
        if absent:
            raise NotFound(f"{client.connection.server} has no {', '.join(absent)}: run `aiqueue apply` on it first")
        try:
            return await Demo(client, screen, tenants, directory / "locks").run(feed)
        finally:
            if not keep:
                with contextlib.suppress(AIQueueError, TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await _tidy(client, tenants)


async def _tidy(client: Client, tenants: tuple[str, ...]) -> None:
    """Remove what a run left on a server: journals, dead letters, lanes, and jobs if it was interrupted."""
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


def _documents(path: Path | None) -> tuple[str, Gathered]:
    """The documents and what to call them. Raises BadInput."""
    if path is None:
        root, files = analysis.own_documents(Path(__file__).resolve().parents[2])
        return "aiqueue's own files", analysis.gather(root, files)
    try:
        if not path.is_dir():
            raise BadInput(f"{path} is not a directory" if path.exists() else f"there is no directory {path}")
        next(path.iterdir(), None)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    gathered = analysis.gather(path)
    if not gathered.documents:
        skipped = f" (skipped: {gathered.skipped()})" if gathered.skipped() else ""
        raise BadInput(f"there is no text file in {path}{skipped}")
    return str(path), gathered


@contextmanager
def _directory(*, keep: bool) -> Iterator[Path]:
    """A directory for the private server and the locks. The server has ended when the block has, however it ended."""
    directory = Path(tempfile.mkdtemp(prefix="aiqueue-demo-"))
    try:
        yield directory
    finally:
        with _undisturbed():
            _await_end(supervisor.Place(directory / DIRECTORY))
            if keep:
                shutil.rmtree(directory / "locks", ignore_errors=True)
            else:
                shutil.rmtree(directory, ignore_errors=True)


def _await_end(place: supervisor.Place) -> None:
    """Wait until neither the supervisor nor its server holds its lock: a server would write into what is removed."""
    deadline = time.monotonic() + STOP_S
    for path in (place.supervisor, place.server):
        while path.exists() and time.monotonic() < deadline:
            lock = supervisor.open_lock(path)
            try:
                if supervisor.try_lock(lock):
                    break
            finally:
                os.close(lock)
            time.sleep(0.02)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals off for the moment that cleaning up takes."""
    with _handling(signal.SIG_IGN, signal.SIGINT, *_ENDING):
        yield


@contextmanager
def _ending_by_signal() -> Iterator[None]:
    """Let the signals that end a process unwind this one, so that it cleans up."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with _handling(end, *_heeded()):
        yield


def _drive(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """asyncio.run, which ^C and the signals that end a process cancel: once, and at no other place. An exception out
    of a signal handler would come up anywhere, half-way through the making of the loop or in the handler of a job.
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

    with _handling(end, *_heeded(signal.SIGINT)):
        try:
            return asyncio.run(run())
        except asyncio.CancelledError:
            if not ended:
                raise
    if ended[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + ended[0])


def _heeded(*more: signal.Signals) -> list[signal.Signals]:
    """The signals that end a process, and `more`, without those that this one was started to ignore."""
    return [number for number in (*_ENDING, *more) if signal.getsignal(number) is not signal.SIG_IGN]


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
def _quiet_logs() -> Iterator[None]:
    """Keep the library's log lines out of the picture: the story tells the same, job by job."""
    log, silent = logging.getLogger("aiqueue"), logging.NullHandler()
    propagated, log.propagate = log.propagate, False
    log.addHandler(silent)
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.propagate = propagated
