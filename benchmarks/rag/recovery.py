"""Scenarios in which workers die, and in which versions overtake each other: what the store holds is right."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aiqueue.enqueue import DeadLetter
from aiqueue.rag.messages import RagDelete, RagDocument

from ..scenarios import Finding, told
from . import corpus, judge, texts, witness
from .bench import Asked, Ground, ground, of_pages

CALM, HARMED = "calm", "harmed"
INGEST_S = 1_800.0
STEP_S = 0.05
VERSIONS = 12  # of each document
DELAY_S = 0.05  # up to so much before each call of the embedder
LATE = 0.3  # of the documents: they get a version while dead letters are replayed


async def kills(asked: Asked) -> list[Finding]:
    """kill -9 of one of two workers every 3 s: the chunks of an undisturbed run, little embedded twice"""
    async with ground(asked, witnessed=True) as here:
        with corpus.pages(asked.corpus, here.directory) as every:
            documents = list(of_pages(every[: asked.most or None]))
        with told(asked.say, f"{len(documents):,} pages ingested undisturbed"):
            await here.fill(documents, CALM)
            left = await here.settled(INGEST_S)
        killed: list[tuple[Counter[bytes], Counter[bytes]]] = []
        with told(asked.say, f"{len(documents):,} pages ingested with kills"):
            await here.fill(documents, HARMED)
            await _kill_until_settled(here, killed)
            left += await here.settled(INGEST_S)
        calm, harmed = here.facts.chunks(CALM), here.facts.chunks(HARMED)
        counted = judge.embedded(
            calm, witness.embedded(here.witness, CALM), witness.embedded(here.witness, HARMED), killed
        )
        calm_states, harmed_states = (here.facts.states(each) for each in (CALM, HARMED))
        different = [each for each, state in calm_states.items() if harmed_states.get(each) != state]
        for each in different[:5]:
            asked.say(f"  {each}: {calm_states[each]}, with kills {harmed_states.get(each)}")
    return [
        Finding("pages", len(documents), at_least=1),
        Finding("kills", len(killed), at_least=1),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        Finding("jobs that are left", left, at_most=0),
        Finding("chunks", calm.total(), at_least=1),
        Finding("chunks that are missing, or are others", (calm - harmed).total(), at_most=0),
        Finding("chunks that are there and should not be", (harmed - calm).total(), at_most=0),
        Finding("documents in another state", len(different), at_most=0),
        Finding("chunks embedded undisturbed, of unique text", counted.undisturbed, at_least=1),
        Finding("chunks embedded with kills", counted.disturbed),
        Finding("of them, in flight in a worker when it was killed", sum(counted.in_flight)),
        Finding("most in flight in one worker", max(counted.in_flight, default=0)),
        Finding("embedded again that no kill explains", counted.unexplained, at_most=0),
        Finding("embedded, as a share of undisturbed", counted.disturbed / max(1, counted.undisturbed)),
    ]


async def _kill_until_settled(here: Ground, killed: list[tuple[Counter[bytes], Counter[bytes]]]) -> None:
    """Kill the older worker every few seconds, and start another, until no job is left. Raises RuntimeError."""
    due, end = time.monotonic() + here.asked.kill_s, time.monotonic() + INGEST_S
    while left := sum((await here.stored()).values()):
        if time.monotonic() > end:
            raise RuntimeError(f"{left:,} jobs were left after {INGEST_S:g} s and {len(killed)} kills")
        if time.monotonic() >= due:
            due += here.asked.kill_s
            victim = here.workers.alive[0]
            pids = [victim.pid, *_children(victim.pid)]
            here.workers.kill(victim)
            has = sum((witness.embedded(here.witness, HARMED, pid) for pid in pids), Counter[bytes]())
            killed.append((has, here.facts.kept(HARMED)))
            here.workers.start()
        await asyncio.sleep(STEP_S)


def _children(pid: int) -> list[int]:
    """The processes that a worker has started, which end with it: one of them may try suspects."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass
class History:
    """Versions and deletes of documents, as they are enqueued. `chance` decides what comes next."""

    here: Ground
    chance: random.Random
    acts: dict[str, list[judge.Act]]
    sick: int = 0  # versions that cannot be embedded at first
    _marks: Iterator[int] = field(default_factory=itertools.count)

    async def add(self, document: str, kind: str) -> None:
        """`kind`: "put", "delete", or "sick": a version that ends as a dead letter until the embedder is well."""
        mark = "" if kind == "delete" else f"mark{next(self._marks)}x"
        self.sick += kind == "sick"
        body = f"{mark}. {witness.POISON if kind == 'sick' else ''} {texts.document(self.chance.randrange(10**6))}"
        message = RagDocument(document_id=document, content=body) if mark else RagDelete(document_id=document)
        handle = await self.here.client.enqueue(message, tenant=CALM)
        self.acts[document].append(judge.Act(handle._run, mark))

    async def add_many(self, document: str) -> None:
        for _ in range(VERSIONS):
            await self.add(document, self.chance.choices(("put", "delete", "sick"), (7, 2, 2))[0])

    async def letters(self) -> list[DeadLetter]:
        return [each async for each in self.here.client.dead.find()]

    async def replay(self) -> int:
        """Replay all dead letters, with new versions of some documents beside them; how many there were."""
        letters = await self.letters()
        late = [each for each in self.acts if self.chance.random() < LATE]
        await asyncio.gather(*map(self.here.client.dead.replay, letters), *(self.add(each, "put") for each in late))
        return len(letters)

    @property
    def deleted(self) -> int:
        """How many documents should not be found."""
        return sum(not max(each, key=lambda act: act.seq).mark for each in self.acts.values())


async def versions(asked: Asked) -> list[Finding]:
    """versions that overtake each other, deletes and replayed dead letters: the last one by the stream is found"""
    acts: dict[str, list[judge.Act]] = {f"doc-{number}.txt": [] for number in range(asked.versioned)}
    async with ground(asked, witnessed=True, delay_s=DELAY_S) as here:
        history = History(here, random.Random(asked.seed), acts)
        (here.witness / witness.SICK).touch()
        with told(asked.say, f"{asked.versioned * VERSIONS:,} versions of {asked.versioned} documents"):
            await asyncio.gather(*map(history.add_many, acts))
            left = await here.settled()
        (here.witness / witness.SICK).unlink()
        with told(asked.say, "dead letters replayed, with new versions beside them"):
            replayed = await history.replay()
            left += await here.settled()
        letters = len(await history.letters())
        found = here.facts.texts(CALM)
        wrong = judge.wrong_versions(acts, found)
        for document in wrong[:5]:
            asked.say(f"  {document}: {acts[document]}, found: {[each[:40] for each in found.get(document, [])]}")
    return [
        Finding("documents", len(acts)),
        Finding("versions and deletes", sum(map(len, acts.values()))),
        Finding("versions that cannot be embedded at first", history.sick, at_least=1),
        Finding("dead letters that were replayed", replayed, at_least=1),
        Finding("of them, by no fault of their own", max(0, replayed - history.sick), at_most=0),
        Finding("dead letters that are left", letters, at_most=0),
        Finding("documents whose last act is a delete", history.deleted, at_least=1),
        Finding("jobs that are left", left, at_most=0),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        Finding("documents of which not the last version is found", len(wrong), at_most=0),
    ]
