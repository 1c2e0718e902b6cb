"""What is held against the store: passages against labels, chunks against an undisturbed run, versions against the
stream's order. Plain values only: a test needs no server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .labelled import Question, plain

DEPTH = 10  # passages that are asked for and looked at


@dataclass(frozen=True)
class Found:
    """What a passage says of itself. `heading`: the path of its headings, as "Install > Linux"."""

    document: str
    heading: str
    text: str


@dataclass(frozen=True)
class Scores:
    """Shares of the questions whose answer is among the first 1, 5 and 10, and the mean of 1 / its rank."""

    hit_1: float
    hit_5: float
    hit_10: float
    mrr: float


def answers(question: Question, found: Found) -> bool:
    """A passage of the labelled document; where a section is labelled, of that section: by its heading, or because it
    begins before the section and holds its heading.
    """
    if found.document != question.document:
        return False
    heading = plain(question.heading)
    path = {plain(each) for each in found.heading.split(" > ")}
    return not heading or heading in path or heading in plain(found.text)


def rank(question: Question, passages: Sequence[Found]) -> int:
    """From 1; 0: not among the first 10."""
    return next((n for n, each in enumerate(passages[:DEPTH], 1) if answers(question, each)), 0)


def scores(ranks: Iterable[int]) -> Scores:
    """Of the ranks of all questions of a set, 0 where nothing was found."""
    known = list(ranks)
    hits = [sum(0 < each <= depth for each in known) / len(known) for depth in (1, 5, DEPTH)]
    return Scores(*hits, mrr=sum(1 / each for each in known if each) / len(known))
