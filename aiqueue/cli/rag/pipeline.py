"""Stores documents as jobs, waits for what becomes of them, and sums that up."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AIQueueError, BadInput, JobFailed, JobGone, ResultDisabled, ResultTimeout
from .. import output, parallel
from .files import FoundFile

if TYPE_CHECKING:
    from ...client import Client, Handle
    from ...job import JobSpec
    from ..json_keys import IngestJson

AT_ONCE = 256  # results that are awaited
SHOWN = 20  # documents with problems, in text


@dataclass(frozen=True)
class IngestOrder:
    """What is ingested how. `wait_s`: for each document; None: not at all. `by_path`: the worker reads the files."""

    tenant: str
    metadata: dict[str, Any] = field(default_factory=dict)
    priority: str = "normal"
    wait_s: float | None = None
    by_path: bool = False


@dataclass
class IngestTotals:
    """What has become of documents, by id. `problems`: of those that are completed with errors, a line each. `doing`:
    how far a document is that is ingested alone.
    """

    found: int = 0
    stored: int = 0
    completed: int = 0
    chunks: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    doing: tuple[float, str] = (0.0, "")
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> int:
        return self.completed + len(self.problems) + len(self.failed)

    def fail(self, document_id: str, why: str) -> None:
        self.failed[document_id] = why

    def as_data(self) -> IngestJson:
        return {
            "found": self.found, "stored": self.stored, "completed": self.completed, "chunks": self.chunks,
            "completed_with_errors": [{"document_id": each, "problems": why} for each, why in self.problems.items()],
            "failed": [{"document_id": each, "reason": why} for each, why in self.failed.items()],
            "took_s": round(time.monotonic() - self.started, 3),
        }  # fmt: skip


async def ingest_files(client: Client, files: Sequence[FoundFile], order: IngestOrder, totals: IngestTotals) -> None:
    """Store the files as jobs, and wait for their ends if the order says so. What goes wrong is in `totals`.

    Raises Unavailable and the like: then no further file is read.
    """
    sent: deque[str] = deque()
    first: AIQueueError | None = None

    async def jobs() -> AsyncIterator[JobSpec]:
        import asyncio  # noqa: PLC0415

        for each in files:
            if first is not None:
                return
            if (job := await asyncio.to_thread(_job_of, each, order, totals)) is not None:
                sent.append(each.document_id)
                yield job

    async def stored() -> AsyncIterator[tuple[str, Handle]]:
        nonlocal first
        outcomes = client.enqueue_many(jobs(), tenant=order.tenant, priority=order.priority, on_full="wait")
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                document_id = sent.popleft()
                if not isinstance(outcome, AIQueueError):
                    totals.stored += 1
                    yield document_id, outcome
                    continue
                totals.fail(document_id, str(outcome))
                if not isinstance(outcome, BadInput):
                    first = first or outcome
        if first is not None:
            raise first

    async def finish(item: tuple[str, Handle]) -> None:
        if order.wait_s is None:
            return
        async with _following(item[1], order.wait_s, totals):
            await _finish(*item, order.wait_s, totals)

    await parallel.for_each(stored(), finish, at_once=AT_ONCE)


def _job_of(file: FoundFile, order: IngestOrder, totals: IngestTotals) -> JobSpec | None:
    """Return the job of a file; None if it cannot be one, which `totals` then says."""
    from ...job import JobSpec  # noqa: PLC0415
    from ...payload import parse_message  # noqa: PLC0415
    from ...rag import RagDocument, id_headers  # noqa: PLC0415

    fields: dict[str, Any] = {"document_id": file.document_id, "metadata": order.metadata}
    try:
        if order.by_path:
            fields["path"] = _sent_path(file.path)
        else:
            fields |= {"content": _read(file.path), "name": file.name}
        return JobSpec(parse_message(RagDocument, fields), headers=id_headers(file.document_id))
    except OSError as error:
        totals.fail(file.document_id, f"cannot be read: {error.strerror}")
    except BadInput as error:
        totals.fail(file.document_id, str(error))
    return None


def _read(path: Path) -> bytes:
    """Return the content of a file. Raises OSError, and BadInput above the limit."""
    from ...rag import CONTENT_BYTES_MAX  # noqa: PLC0415

    with path.open("rb") as opened:
        content = opened.read(CONTENT_BYTES_MAX + 1)
    if len(content) > CONTENT_BYTES_MAX:
        raise BadInput(
            f"above the limit of {CONTENT_BYTES_MAX // 1024**2} MiB: list its directory in `roots` of this tenant in "
            "rag.toml, and use --by-path"
        )
    return content


def _sent_path(path: Path) -> str:
    """Return a path as the worker opens it. Raises BadInput for one that no job can hold."""
    sent = os.path.abspath(path)  # noqa: PTH100  (resolve() would follow links, out of the roots)
    try:
        sent.encode()
    except UnicodeEncodeError:
        raise BadInput("its path is not UTF-8, and no job can hold it: leave --by-path out, or rename it") from None
    return sent


@contextlib.asynccontextmanager
async def _following(handle: Handle, timeout_s: float, totals: IngestTotals) -> AsyncIterator[None]:
    """Keep `totals.doing` up to date during the block, if this is the only document, and somebody looks."""
    import asyncio  # noqa: PLC0415

    async def follow() -> None:
        with contextlib.suppress(AIQueueError):  # which the result says
            async with contextlib.aclosing(handle.stream(timeout=timeout_s)) as items:
                async for item in items:
                    if item.event == "progress" and isinstance(item.data, dict):
                        totals.doing = (item.data.get("fraction") or 0.0, item.data.get("note") or "")

    if totals.found != 1 or not sys.stderr.isatty():
        yield
        return
    following = asyncio.create_task(follow())
    try:
        yield
        await asyncio.wait([following], timeout=1)  # it ends with the job
    finally:
        following.cancel()
        await asyncio.wait([following])


async def _finish(document_id: str, handle: Handle, wait_s: float, totals: IngestTotals) -> None:
    try:
        result = await handle.result(wait_s)
    except JobFailed as error:
        totals.fail(document_id, error.error)
        return
    except (JobGone, ResultDisabled, ResultTimeout) as error:
        totals.fail(document_id, str(error))
        return
    result = result if isinstance(result, dict) else {}
    totals.chunks += result.get("chunks") or 0
    if result.get("state") == "completed_with_errors":
        totals.problems[document_id] = [str(each) for each in result.get("problems") or ()]
    else:
        totals.completed += 1


def print_totals(totals: IngestTotals, *, waited: bool) -> None:
    """Print what has become of the documents, and of each one with problems which and why."""
    from ...rag import CANNOT_BE_READ  # noqa: PLC0415
    from ...units import short_duration  # noqa: PLC0415

    took_s = max(time.monotonic() - totals.started, 1e-6)
    documents = output.format_count(totals.found, "document")
    if not waited:
        output.print_line(f"{totals.stored:,} of {documents} enqueued, {len(totals.failed):,} not")
    else:
        counts = f"{totals.completed:,} completed, {len(totals.problems):,} with errors, {len(totals.failed):,} failed"
        chunks, rate = output.format_count(totals.chunks, "chunk"), totals.ended / took_s
        shown = f" ({rate:,.0f}/s)" if rate >= 1 else ""
        output.print_line(f"{documents}: {counts}, {chunks}, in {short_duration(took_s)}{shown}")
    _print_each("with errors", {each: "; ".join(why) for each, why in totals.problems.items()}, "yellow")
    _print_each("failed", {each: why.removeprefix(CANNOT_BE_READ) for each, why in totals.failed.items()}, "red")


def _print_each(what: str, by_id: dict[str, str], style: str) -> None:
    for document_id in list(by_id)[:SHOWN]:
        line = " ".join(output.escape_controls(f"{document_id}: {by_id[document_id]}").split())
        output.print_line(f"  {output.apply_style(what, style)}  {line}")
    if len(by_id) > SHOWN:
        output.print_line(f"  and {len(by_id) - SHOWN:,} more {what}: --json lists all")


@contextlib.contextmanager
def bar(totals: IngestTotals) -> Iterator[Callable[[], None]]:
    """Show on stderr how many documents have ended, at which rate, and how many failed; on a terminal only.

    Yields a function that draws it anew.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    shown = Progress(
        SpinnerColumn(), TextColumn("ingesting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with shown:
        task = shown.add_task("ingesting", total=totals.found, note="")

        def draw() -> None:
            rate = totals.ended / max(time.monotonic() - totals.started, 1e-6)
            failed = f", {len(totals.failed):,} failed" if totals.failed else ""
            fraction, doing = totals.doing
            done = max(totals.ended, fraction)
            shown.update(task, completed=done, total=totals.found, note=doing or f"{rate:,.0f}/s{failed}")

        yield draw
