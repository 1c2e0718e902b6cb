"""Scenario: whether hybrid search finds at least what keywords and vectors find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from aiqueue.rag import VectorStore
from aiqueue.rag.types import Embedder, Mode

from ..scenarios import Finding, told
from . import corpus, judge, labelled, parts
from .bench import Asked, Ground, ground, of_pages

TENANT = "corpus"
MODES: tuple[Mode, ...] = ("keyword", "vector", "hybrid")
INGEST_S = 1_800.0


async def quality(asked: Asked) -> list[Finding]:
    """hybrid search against keyword and vector search, on questions and headings"""
    findings: list[Finding] = []
    async with ground(asked) as here:
        with corpus.pages(asked.corpus, here.directory) as every:
            pages = every[: asked.most or None]
            sets = {"questions": labelled.questions(pages), "headings": labelled.headings(pages)}
            with told(asked.say, f"{len(pages):,} pages ingested"):
                findings += await _ingest(here, pages)
        embedder, store = parts.open_embedder(), parts.open_store(here.store)
        try:
            await store.open(TENANT, embedder.name, embedder.dimensions)
            for name, questions in sets.items():
                with told(asked.say, f"{len(questions)} {name} asked"):
                    findings += await _of_set(name, questions, embedder, store, asked)
        finally:
            await store.close()
            await embedder.close()
    return findings


async def _ingest(here: Ground, pages: Sequence[corpus.Page]) -> list[Finding]:
    await here.fill(of_pages(pages), TENANT)
    left = await here.settled(INGEST_S)
    chunks, states = here.facts.chunks(TENANT), here.facts.states(TENANT)
    for state, reason in Counter(states.values()):
        if state != "completed":
            here.asked.say(f"  {state}: {reason}")
    return [
        Finding("pages", len(pages), at_least=1),
        Finding("jobs that are left", left, at_most=0),
        Finding("pages of which nothing is known", len({each.document_id for each in pages} - set(states)), at_most=0),
        Finding("pages that cannot be found", len(pages) - here.facts.documents(TENANT)),
        Finding("chunks", chunks.total()),
    ]


async def _of_set(
    name: str, questions: Sequence[labelled.Question], embedder: Embedder, store: VectorStore, asked: Asked
) -> list[Finding]:
    if not questions:
        return [Finding(f"{name}: none to this corpus", 0)]
    vectors = await embedder.embed([each.text for each in questions], tenant=TENANT)
    ranks: dict[str, list[int]] = {}
    for mode in MODES:
        ranks[mode] = []
        for question, vector in zip(questions, vectors, strict=True):
            passages = await store.search(TENANT, question.text, vector, judge.DEPTH, mode=mode)
            found = [judge.Found(each.document_id, f"{each.title} > {each.heading}", each.text) for each in passages]
            ranks[mode].append(judge.rank(question, found))
    if asked.keep is not None:
        _write(asked.keep / f"ranks-{name}.tsv", questions, ranks)
    by_mode: dict[str, judge.Scores] = {mode: judge.scores(ranks[mode]) for mode in MODES}
    for row in judge.table(name, len(questions), by_mode):
        asked.say(f"  {row}")
    return [Finding(name, len(questions)), *judge.compare(name, by_mode)]


def _write(path: Path, questions: Sequence[labelled.Question], ranks: dict[str, list[int]]) -> None:
    """The rank of each question's answer, by mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(*(ranks[mode] for mode in MODES), questions, strict=True)
    lines = ["\t".join([*MODES, "question", "document", "heading"])]
    lines += ["\t".join(map(str, [*numbers, each.text, each.document, each.heading])) for *numbers, each in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
