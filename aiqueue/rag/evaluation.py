"""How well questions find their documents: hit@k and MRR of keyword, vector and hybrid search."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import BadInput
from .messages import QUERY_CHARS_MAX
from .store.filters import parse_where
from .types import Mode, Passage

DEPTH: Final = 10  # passages that are asked for and looked at
QUESTIONS_MAX: Final = 100_000
FILE_BYTES_MAX: Final = 64 * 1024 * 1024
EVALUATED_MODES: Final[tuple[Mode, ...]] = ("keyword", "vector", "hybrid")
"""The modes of search that `evaluate` compares, in this order."""
EXAMPLE: Final = '[{"question": "…", "document": "…"}]'
_KEYS = ("question", "document", "heading", "where")


@dataclass(frozen=True, slots=True)
class LabelledQuestion:
    """A question, and where its answer is: in one of `documents`, by id, and there, if `heading` is not empty, in a
    passage of a section of this heading, or that holds it. `where`: a filter, None: none.
    """

    text: str
    """The question that is asked."""
    documents: tuple[str, ...]
    heading: str = ""
    where: Mapping[str, Any] | None = None

    def is_answered_by(self, passage: Passage) -> bool:
        """Return whether a passage is what the question is looking for."""
        if passage.document_id not in self.documents:
            return False
        heading = _plain(self.heading)
        path = {_plain(each) for each in passage.heading.split(" > ")}
        return not heading or heading in path or heading in _plain(passage.text)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one mode: shares of the questions whose answer is among the first 1, 5 and 10 passages, and the mean of 1 /
    its rank. `took_s`: of all searches. `missed`: the questions whose answer is not among the first 10.
    """

    mode: Mode
    """Mode of search that is scored."""
    questions: int
    """How many questions were asked."""
    hit_1: float
    """Share of the questions whose answer is the first passage."""
    hit_5: float
    """Share of the questions whose answer is among the first 5 passages."""
    hit_10: float
    """Share of the questions whose answer is among the first 10 passages."""
    mrr: float
    """Mean of 1 / rank of the answer, 0 where it is not among the first 10."""
    took_s: float
    missed: tuple[str, ...]


Search = Callable[[LabelledQuestion, Mode, int], Awaitable[Sequence[Passage]]]


def read_questions(path: Path) -> list[LabelledQuestion]:
    """Read a JSON file: a list of ``{"question": …, "document": id or list of ids, "heading": …, "where": {…}}``. The
    last two are optional, and further keys are passed over.

    Raises BadInput, in one line with the number of the question, from 1.
    """
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}") from None
    if len(text) > FILE_BYTES_MAX:
        raise BadInput(f"{str(path)!r} is above the limit of {FILE_BYTES_MAX // 1024**2} MiB")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is not a JSON list of questions, {EXAMPLE}: {error}") from None
    if not isinstance(data, list) or not 1 <= len(data) <= QUESTIONS_MAX:
        raise BadInput(f"{str(path)!r} must be a JSON list of 1 to {QUESTIONS_MAX:,} questions: {EXAMPLE}")
    return [_read_question(f"{str(path)!r}, question {number}", each) for number, each in enumerate(data, 1)]


def _read_question(where: str, data: Any) -> LabelledQuestion:
    if not isinstance(data, dict):
        raise BadInput(f'{where}: must be {{"question": "…", "document": "…"}}')
    text, documents, heading, conditions = (data.get(each) for each in _KEYS)
    if not isinstance(text, str) or not text.strip() or len(text) > QUERY_CHARS_MAX:
        raise BadInput(f"{where}: question must be a text of 1 to {QUERY_CHARS_MAX:,} characters")
    documents = [documents] if isinstance(documents, str) else documents
    if not isinstance(documents, list) or not documents or not all(isinstance(each, str) for each in documents):
        raise BadInput(f"{where}: document must be the id of a document, or a list of ids")
    if "" in documents:
        raise BadInput(f"{where}: the id of a document is empty")
    if heading is not None and not isinstance(heading, str):
        raise BadInput(f"{where}: heading must be a text")
    if conditions is not None:
        try:
            parse_where(conditions)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    return LabelledQuestion(text, tuple(documents), heading or "", conditions)


async def evaluate(questions: Sequence[LabelledQuestion], mode: Mode, search: Search) -> Scores:
    """Ask all questions in one mode, one after the other, and return how well they were answered."""
    ranks: list[int] = []
    started = time.monotonic()
    for each in questions:
        passages = (await search(each, mode, DEPTH))[:DEPTH]
        ranks.append(next((rank for rank, found in enumerate(passages, 1) if each.is_answered_by(found)), 0))
    took_s = time.monotonic() - started
    hits = [sum(0 < rank <= depth for rank in ranks) / len(ranks) for depth in (1, 5, DEPTH)]
    missed = tuple(each.text for each, rank in zip(questions, ranks, strict=True) if not rank)
    mrr = sum(1 / rank for rank in ranks if rank) / len(ranks)
    return Scores(mode, len(ranks), hits[0], hits[1], hits[2], mrr, took_s, missed)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
