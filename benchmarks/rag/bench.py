"""What the scenarios stand on: a server, worker processes with an embedder that writes down what it is given, and the
files of their store.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.cli.health import read_report
from aiqueue.errors import NotFound
from aiqueue.rag.messages import RagDocument

from .. import scenarios
from ..common import until
from ..scenarios import Fleet, System, running
from . import corpus, texts
from .facts import Facts

STREAM = "AI_RAG_INGEST"
READY_S = 90.0
WORKER, WITNESSED = "aiqueue.rag:worker", "benchmarks.rag.app:worker"
WITNESS_ENV, DELAY_ENV = "AIQUEUE_BENCH_WITNESS", "AIQUEUE_BENCH_DELAY"
STEP_S = 0.05
CONTENT_TYPES = {".html": "text/html", ".md": "text/markdown"}


@dataclass(frozen=True, kw_only=True)
class Asked(scenarios.Asked):
    """What the command line asked for. `documents`: of a round of throughput; `memory`: when memory is read, in
    documents; `chunks`, `askers`, `rate` (documents a second), `seconds`: of the questions under load; `kill_s`:
    between kills; `most`: pages of the corpus, 0: all.
    """

    corpus: Path | None = None
    most: int = 0
    workers: int = 2
    rounds: int = 3
    documents: int = 10_000
    chunks: int = 20_000
    askers: int = 10
    rate: float = 100.0
    seconds: float = 60.0
    memory: tuple[int, int] = (5_000, 50_000)
    versioned: int = 200
    kill_s: float = 3.0
    say: Callable[[str], None] = lambda _: None


class Ground(System):
    """A system with workers that ingest and answer. `witnessed`: their embedders write down what they are given;
    `delay_s`: and wait up to so long before each call.
    """

    def __init__(
        self,
        asked: Asked,
        directory: Path,
        *,
        workers: int | None = None,
        witnessed: bool = False,
        delay_s: float = 0.0,
    ) -> None:
        super().__init__(directory, STREAM, seed=asked.seed)
        self.asked = asked
        self.store, self.witness = directory / "store", directory / "witness"
        self.witness.mkdir()
        self.facts = Facts(self.store)
        self._count, self._delay_s = workers or asked.workers, delay_s
        self._worker = WITNESSED if witnessed else WORKER

    # -- start and end

    def write_files(self) -> None:
        (self._streams / "rag.toml").write_text(f"[store]\npath = {json.dumps(str(self.store))}\n")

    async def start(self) -> None:
        places: list[tuple[list[str], dict[str, str]]] = [
            ([f"--health-file={self._health(n)}"], {}) for n in range(self._count)
        ]
        env = {**self.env, WITNESS_ENV: str(self.witness), DELAY_ENV: str(self._delay_s)}
        program = ["-m", "aiqueue", "work", self._worker, "--log-level=warning"]
        self.workers = Fleet(program, env, self.directory / "workers.log", places)
        self.workers.start()
        await until(self._ready, lambda: f"the workers were not ready; they said: {self.tail()}", within_s=READY_S)

    def _health(self, number: int) -> Path:
        return self.directory / f"worker-{number}.json"

    def _ready(self) -> bool:
        if any(each.code is not None for each in self.workers.alive):
            raise RuntimeError(f"a worker ended by itself: {self.tail()}")
        try:
            return all(read_report(self._health(n))["state"] == "ok" for n in range(self._count))
        except NotFound:
            return False

    # -- what happens

    async def fill(self, documents: Iterable[RagDocument], tenant: str) -> list[aiqueue.Handle[Any]]:
        """Enqueue many, in this order."""
        handles = []
        async for outcome in self.client.enqueue_many(documents, tenant=tenant, on_full="wait", timeout=600):
            if isinstance(outcome, Exception):
                raise outcome
            handles.append(outcome)
        return handles

    async def stored_documents(self, tenant: str, count: int, *, within_s: float) -> None:
        """Wait until so many can be found. Raises RuntimeError, and at once when a worker has ended by itself."""
        end = time.monotonic() + within_s
        while (found := await asyncio.to_thread(self.facts.documents, tenant)) < count:
            if any(each.code is not None for each in self.workers.alive):
                raise RuntimeError(f"a worker ended by itself: {self.tail()}")
            if time.monotonic() > end:
                states = {state for state, _ in self.facts.states(tenant).values()}
                raise RuntimeError(f"{found:,} of {count:,} documents were stored in {within_s:g} s; states: {states}")
            await asyncio.sleep(STEP_S)

    async def settled(self, within_s: float = 300.0) -> int:
        """Wait until no job is left; how many are."""
        return await self.left(within_s)


@asynccontextmanager
async def ground(asked: Asked, **options: Any) -> AsyncIterator[Ground]:
    """A system of its own with workers that are ready, and nothing left of it afterwards. `options`: see `Ground`."""
    async with running(lambda path: Ground(asked, path, **options), keep=asked.keep) as made:
        yield made


def made(first: int, count: int, seed: int) -> Iterable[RagDocument]:
    """Made documents of 1 to 2 KB."""
    for number in range(first, first + count):
        yield RagDocument(
            document_id=f"note-{number}.txt", content=texts.document(number, seed), content_type="text/plain"
        )


def of_pages(pages: Sequence[corpus.Page]) -> Iterable[RagDocument]:
    for page in pages:
        yield RagDocument(
            document_id=page.document_id, content=page.file.read_bytes(), name=page.file.name,
            content_type=CONTENT_TYPES[page.file.suffix],
        )  # fmt: skip


async def asked_pace(rate: float, seconds: float, say: Callable[[int], Any]) -> None:
    """Call `say(number)` so often a second, without waiting for it to end."""
    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            group.create_task(say(number))
