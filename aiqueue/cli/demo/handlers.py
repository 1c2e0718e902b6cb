"""The demo's messages, the documents it enqueues, and its handlers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...client import Client
from ...job import Job, Message, Reject
from ...units import Backoff
from ...worker import Worker
from . import analysis
from .analysis import TextFile
from .ledger import ANALYSIS, Ledger

FEED_S = 11.0  # the documents are enqueued over this time, so that there is something to watch
FEED_STEP_MAX_S = 0.2
BROKEN_NAME = "injected/meeting-notes.txt"
BROKEN = (
    "Compte rendu de la réunion du comité qualité\n\n"
    "Les participants ont décidé que la mise à jour des dépôts est une priorité pour le trimestre. Le budget n'a pas "
    "été modifié. Les résultats de la première étape sont très satisfaisants, et le délai prévu sera respecté.\n"
).encode("cp1252")


class DemoDocument(Message, kind="demo.document", family="rag.ingest"):
    """A document to ingest, as raw bytes."""

    document_id: str
    path: str
    content: bytes


class Analyse(Message, kind="demo.analyse", family="agent.tasks"):
    """A text to analyse."""

    task_id: str
    path: str
    text: str


class DocumentLocked(Exception):
    """The document's lock file exists already."""


class DemoHandlers:
    """The handlers and their shared state. `charsets` are tried in order to decode a document."""

    def __init__(self, client: Client, ledger: Ledger, locks: Path) -> None:
        self._client = client
        self._ledger = ledger
        self._locks = locks
        self.charsets = ["utf-8-sig"]

    def worker(self) -> Worker:
        worker = Worker(tenants=self._ledger.tenants, concurrency=8, drain_timeout="2s", name="demo")
        retry = Backoff(attempts=6, first="800ms", cap="5s", jitter=0.2)
        worker.handle(DemoDocument, retry=retry, timeout="20s")(self.ingest)
        worker.handle(Analyse, retry=retry, timeout="20s")(self.analyse)
        return worker

    async def ingest(self, job: Job[DemoDocument]) -> dict[str, Any]:
        """Decode a document, split it into pieces and enqueue its analysis."""
        document = job.message
        with self._ledger.running(job), self.lock(job.id):
            text = self._decode(document.content)
            pieces = analysis.split_text(text)
            await job.progress(0.5, f"{len(pieces)} pieces")
            track = self._ledger.expect(ANALYSIS, job.tenant, job.id, document.path)
            # The analysis has the document's id, so a second attempt at this job does not enqueue it twice.
            await self._client.enqueue(
                Analyse(task_id=job.id, path=document.path, text=text), tenant=job.tenant, priority=job.priority
            )
            track.stored = True
            return {"characters": len(text), "pieces": len(pieces)}

    def analyse(self, job: Job[Analyse]) -> dict[str, Any]:
        """Analyse a text. A plain function, which runs in a thread and does not block the event loop."""
        with self._ledger.running(job):
            return analysis.analyse(job.message.path, job.message.text)

    @contextmanager
    def lock(self, document_id: str) -> Iterator[None]:
        """Hold the lock file of a document while the block runs. Raises DocumentLocked."""
        path = self._locks / f"{document_id}.lock"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise DocumentLocked("another job is working on this document") from None
        try:
            yield
        finally:
            path.unlink()

    def _decode(self, content: bytes) -> str:
        for charset in self.charsets:
            try:
                return content.decode(charset)
            except UnicodeDecodeError as error:
                problem = (
                    f"not {charset.removesuffix('-sig').upper()}: byte 0x{content[error.start]:02x} at {error.start}"
                )
        raise Reject(problem)


@dataclass(frozen=True)
class Feed:
    """The documents to enqueue, with the injected broken one, and the document that is locked at first."""

    documents: tuple[tuple[str, TextFile], ...]  # with their ids
    locked: tuple[str, TextFile]
    injected: str  # the id of the broken document
    step_s: float

    @classmethod
    def of(cls, sources: Sequence[TextFile]) -> Feed:
        position = (len(sources) + 2) // 3
        all_sources = [*sources[:position], TextFile(BROKEN_NAME, BROKEN), *sources[position:]]
        documents = tuple((_document_id(index, each.name), each) for index, each in enumerate(all_sources))
        step_s = min(FEED_STEP_MAX_S, FEED_S / len(documents))
        return cls(documents, documents[min(1, position - 1)], documents[position][0], step_s)


def _document_id(index: int, name: str) -> str:
    return f"{index:03d}-{re.sub(r'[^A-Za-z0-9]+', '-', name)[-50:].strip('-')}"
