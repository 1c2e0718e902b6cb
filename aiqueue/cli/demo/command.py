"""The ``demo`` command: its options, the server it uses, and the cleanup, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import subjects
from ...client import Client, connect
from ...config import Settings
from ...errors import AIQueueError, BadInput, NotFound
from ...topology import provision
from . import analysis, view
from .analysis import Gathered
from .handlers import Feed
from .ledger import FAMILIES
from .running import STOP_S, drive, open_screen, private_client, private_directory, run_demo
from .story import Demo
from .view import Screen

TENANTS = ("acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "wonka")


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
    screen = open_screen(quiet=as_json)

    def work() -> dict[str, Any]:
        source, gathered = _gather_documents(path)
        settings = Settings.load(url=url, context=context)
        return drive(lambda: _run(source, gathered, settings, TENANTS[:tenants], screen, keep=keep))

    run_demo(work, screen, keep=keep)


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
    with private_directory(keep=keep and private) as directory:
        if private:
            report = await _on_private(settings, screen, tenants, directory, feed)
        else:
            named = tuple(f"{tenant}-demo{secrets.token_hex(2)}" for tenant in tenants)
            report = await _on_named(settings, screen, named, directory, feed, keep=keep)
    for line, style in view.verdict(report):
        screen.say(line, style)
    kept = directory.exists()
    if kept:
        screen.say("The private server has stopped. Its data was kept. This starts it again, for `aiqueue inspect`:")
        screen.command(f"cd {shlex.quote(str(directory))} && aiqueue server")
    elif private:
        screen.say("The private server has stopped, and its files are deleted.")
    return {**report, "kept": str(directory) if kept else None}


async def _on_private(
    settings: Settings, screen: Screen, tenants: tuple[str, ...], directory: Path, feed: Feed
) -> dict[str, Any]:
    """Run on the private server of `directory`."""
    async with private_client(settings, directory, screen.say) as client:
        return await Demo(client, screen, tenants, directory / "locks").run(feed)


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
