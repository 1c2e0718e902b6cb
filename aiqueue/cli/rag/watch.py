"""``rag watch``: what changes in a directory is ingested, and what is deleted there is deleted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ...errors import AIQueueError, BadInput, JobFailed, ResultTimeout
from .. import output
from ..options import ServerOptions, duration_option, print_error
from .arguments import (
    NO_WORKER,
    ByPath,
    Exclude,
    Glob,
    Metadata,
    Tenant,
    is_worker_missing,
    parse_metadata,
    parse_place,
)
from .files import FoundFile, Patterns, find_files
from .pipeline import IngestOrder, IngestTotals, ingest_files

if TYPE_CHECKING:
    from ...client import Client
    from ..json_keys import WatchedJson

INTERVAL_MIN_S = 0.1
State = tuple[int, int]  # size and time of change
_BEGUN: State = (-1, -1)  # its job may be stored


class Changes(NamedTuple):
    """What has changed between two looks: files to ingest, and ids of files that are gone."""

    files: list[FoundFile]
    gone: list[str]


class Watched:
    """The files of a directory as they were ingested last.

    A file that changes is taken once it stays the same from one look to the next. At the first look all are taken.
    """

    def __init__(self) -> None:
        self._known: dict[str, State] = {}
        self._seen: dict[str, State] | None = None

    def look(self, files: Mapping[str, FoundFile], unread: Sequence[str] = ()) -> Changes:
        """Return what has changed since `note` was called, given the files that there are now.

        `unread`: ids of files and directories that cannot be read for now: what is known there is not gone.
        """
        states = {key: _state_of(each) for key, each in files.items()}
        before, self._seen = states if self._seen is None else self._seen, states
        changed = [
            each
            for key, each in files.items()
            if self._known.get(key) != states[key] and before.get(key) == states[key]
        ]
        return Changes(changed, [key for key in self._known if key not in files and not _is_below(key, unread)])

    def begin(self, changes: Changes) -> None:
        """These changes are tried: a file that is deleted before they are done may be stored, and so is gone."""
        for each in changes.files:
            self._known.setdefault(each.document_id, _BEGUN)

    def note(self, changes: Changes) -> None:
        """These changes are done: they are not changes any more."""
        for each in changes.files:
            self._known[each.document_id] = _state_of(each)
        for key in changes.gone:
            self._known.pop(key, None)


def _state_of(file: FoundFile) -> State:
    return file.size, file.changed_ns


def _is_below(document_id: str, unread: Sequence[str]) -> bool:
    return any(each in (".", document_id) or document_id.startswith(f"{each}/") for each in unread)


def watch(
    options: ServerOptions,
    watched: Annotated[Path, typer.Argument(metavar="DIR", parser=parse_place, help="Directory to watch.")],
    *,
    tenant: Tenant,
    glob: Glob = None,
    exclude: Exclude = None,
    metadata: Metadata = None,
    by_path: ByPath = False,
    interval: Annotated[
        float,
        duration_option("How often to look for changes."),
    ] = "2s",  # type: ignore[assignment]  # typer passes defaults to the parser too
    timeout: Annotated[
        float,
        duration_option("How long to wait for each document."),
    ] = "10m",  # type: ignore[assignment]
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print a JSON object for each document.")] = False,
) -> None:
    """Ingest a directory, then what changes in it, and delete what is deleted, until Ctrl-C.

    Looks at times and sizes of the files. At the start all files are ingested; those that are known unchanged cost
    little. What was deleted while nobody watched stays: see `rag ls` and `rag rm`.
    """
    if not watched.is_dir():
        raise BadInput(f"cannot watch {str(watched)!r}: it is not a directory")
    if interval < INTERVAL_MIN_S:
        raise BadInput(f"--interval must be at least {INTERVAL_MIN_S * 1000:.0f}ms")
    order = IngestOrder(tenant, parse_metadata(metadata), wait_s=timeout, by_path=by_path)
    options.run_with_client(
        lambda client: _watch(client, watched, Patterns(glob or (), exclude or ()), order, interval, as_json=json)
    )


async def _watch(
    client: Client, directory: Path, patterns: Patterns, order: IngestOrder, interval_s: float, *, as_json: bool
) -> None:
    import asyncio  # noqa: PLC0415

    from ...rag import RagDocument  # noqa: PLC0415

    if await is_worker_missing(client, RagDocument, order.tenant):
        output.print_line(f"{NO_WORKER}; documents wait for one", err=True)
    watched, told = Watched(), False
    while True:
        unread: list[str] = []
        try:
            files = await asyncio.to_thread(_look, directory, patterns, unread)
        except BadInput as error:  # such as a volume that is not mounted: nothing is deleted for that
            if not told:
                print_error(f"{error}; nothing is deleted, and the directory is looked for again")
            told = True
        else:
            told = False
            changes = watched.look(files, unread)
            watched.begin(changes)
            try:
                await _apply(client, changes, order, as_json=as_json)
            except AIQueueError as error:
                if not error.retryable:
                    raise
                print_error(f"{error}; this is tried again")
            else:
                watched.note(changes)
        await asyncio.sleep(interval_s)


def _look(directory: Path, patterns: Patterns, unread: list[str]) -> dict[str, FoundFile]:
    """Return the files by id. `unread`: gets the ids of what cannot be read for now. Raises BadInput."""
    if not directory.is_dir():
        raise BadInput(f"{str(directory)!r} is not a directory any more")
    return {
        each.document_id: each
        for each in find_files([directory], patterns, None, lambda which, _: unread.append(which))
    }


async def _apply(client: Client, changes: Changes, order: IngestOrder, *, as_json: bool) -> None:
    """Do what has changed, and say what has become of each document."""
    from ...rag import Rag  # noqa: PLC0415

    totals = IngestTotals(found=len(changes.files))
    await ingest_files(client, changes.files, order, totals)
    for each in changes.files:
        if (why := totals.failed.get(each.document_id)) is not None:
            _tell(each.document_id, "failed", why, as_json=as_json)
        else:
            problems = totals.problems.get(each.document_id)
            state = "completed" if problems is None else "completed_with_errors"
            _tell(each.document_id, state, "; ".join(problems or ()), as_json=as_json)
    for document_id in changes.gone:
        handle = await Rag(client).delete(document_id, tenant=order.tenant)
        try:
            await handle.result(order.wait_s)
        except (JobFailed, ResultTimeout) as error:
            _tell(document_id, "failed", f"not deleted: {error}", as_json=as_json)
        else:
            _tell(document_id, "deleted", "", as_json=as_json)


def _tell(document_id: str, state: str, why: str, *, as_json: bool) -> None:
    if as_json:
        shown: WatchedJson = {"document_id": document_id, "state": state, "reason": why}
        output.print_json(shown, lines=True)
        return
    told = " ".join(output.escape_controls(f"{document_id}{f': {why}' if why else ''}").split())
    output.print_line(f"{time.strftime('%H:%M:%S')}  {state.replace('_', ' ')}  {told}")
