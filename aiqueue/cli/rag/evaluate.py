"""``rag eval``: how well questions find their documents, by each kind of search."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import BadInput
from .. import output, parallel
from ..options import Json, ServerOptions
from ..output import Column
from .arguments import Tenant, parse_place
from .opened_store import run_with_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...client import Client
    from ...rag import LabelledQuestion, Mode, Passage, RagConfig, Scores, VectorStore


EMBEDDED_AT_ONCE = 256


def evaluate(
    options: ServerOptions,
    questions: Annotated[
        Path, typer.Argument(metavar="QUESTIONS.json", parser=parse_place, help="Questions with their documents.")
    ],
    *,
    tenant: Tenant,
    missed: Annotated[
        bool, typer.Option("--missed", metavar="", help="Also list the questions that hybrid search did not answer.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure how well questions find their documents: keyword, vector and hybrid search. Runs where the store is.

    The file is a JSON list of {"question": "…", "document": "guide.md"}. "document" may be a list of ids; with
    "heading": "…" the passage must be of that section; "where": {…} filters. hit@k is the share of questions whose
    answer is among the first k passages, MRR the mean of 1 / its rank.
    """
    from ...rag import read_questions  # noqa: PLC0415

    asked = read_questions(questions)

    async def run(client: Client, config: RagConfig, store: VectorStore) -> list[Scores]:
        return await _evaluate(client, config, store, tenant, asked)

    scores = run_with_parts(options, tenant, run)
    if json:
        output.print_json([asdict(each) for each in scores])
        return
    columns = [Column("search"), *(Column(each, right=True) for each in ("hit@1", "hit@5", "hit@10", "MRR", "ms each"))]
    rows = [
        [each.mode, *(f"{value:.3f}" for value in (each.hit_1, each.hit_5, each.hit_10, each.mrr)),
         f"{each.took_s / each.questions * 1000:.1f}"]
        for each in scores
    ]  # fmt: skip
    output.print_table(columns, rows)
    output.print_line(f"{output.format_count(len(asked), 'question')}; one standard error of hit@k is at most "
                      f"{0.5 / len(asked) ** 0.5:.3f}")  # fmt: skip
    if missed:
        for text in scores[-1].missed:
            output.print_line(f"  missed  {output.truncate(text, None)}")


async def _any_stored(store: VectorStore, tenant: str, document_ids: Sequence[str]) -> bool:
    for each in document_ids:
        found = await store.document(tenant, each)
        if found is not None and found.indexed_version is not None:
            return True
    return False


async def _evaluate(
    client: Client, config: RagConfig, store: VectorStore, tenant: str, asked: Sequence[LabelledQuestion]
) -> list[Scores]:
    from ...rag import EVALUATED_MODES, evaluate, open_embedder  # noqa: PLC0415

    if not (await store.stats(tenant)).documents:
        raise BadInput(f"tenant {tenant} has no documents here: `aiqueue rag ingest` some first")
    embedder = open_embedder(client, config)
    try:
        await store.open(tenant, embedder.name, embedder.dimensions)
        if lost := [each.text for each in asked if not await _any_stored(store, tenant, each.documents)]:
            which = f"{len(lost):,} of {output.format_count(len(asked), 'question')}"
            output.print_line(
                f"{which} count as missed: {tenant} has none of their documents, such as of {lost[0][:80]!r}", err=True
            )
        texts = list(dict.fromkeys(each.text for each in asked))
        vectors: dict[str, Any] = {}  # before the searches, which alone are timed
        for at in range(0, len(texts), EMBEDDED_AT_ONCE):
            part = texts[at : at + EMBEDDED_AT_ONCE]
            vectors.update(zip(part, await embedder.embed(part, tenant=tenant), strict=True))

        async def search(question: LabelledQuestion, mode: Mode, k: int) -> Sequence[Passage]:
            vector = None if mode == "keyword" else vectors[question.text]
            found = await store.search(tenant, question.text, vector, k, where=question.where, mode=mode)
            advance(1)
            return found

        with parallel.progress_bar("asking", len(asked) * len(EVALUATED_MODES), unit="questions") as advance:
            return [await evaluate(asked, mode, search) for mode in EVALUATED_MODES]
    finally:
        await embedder.close()
