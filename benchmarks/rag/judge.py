"""What is held against the store: passages against labels, chunks against an undisturbed run, versions against the
stream's order. Plain values only: a test needs no server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..scenarios import Finding
from .facts import StoredChunk
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
    return Scores(hits[0], hits[1], hits[2], sum(1 / each for each in known if each) / len(known))


# -- kills


@dataclass(frozen=True)
class Embedded:
    """How many chunks were embedded with kills and without, of those whose text stands once in the corpus.

    `in_flight`: of each killed worker, how many it had embedded that were not stored when it was dead.
    """

    undisturbed: int
    disturbed: int
    in_flight: Sequence[int]

    @property
    def unexplained(self) -> int:
        """Those above the undisturbed run that no kill explains."""
        return max(0, self.disturbed - self.undisturbed - sum(self.in_flight))


def embedded(
    stored: Counter[StoredChunk], undisturbed: Counter[bytes], disturbed: Counter[bytes],
    killed: Sequence[tuple[Counter[bytes], Counter[bytes]]],
) -> Embedded:  # fmt: skip
    """From the hashes of the texts that embedders were given.

    `killed`: of each kill, what that worker had embedded, and what was kept when it was dead. Raises RuntimeError if
    chunks were embedded as other texts than their own.
    """
    often = Counter(each.text for each in stored.elements())
    once = {text for text, count in often.items() if count == 1}
    if missing := sum(text not in undisturbed for text in once):
        raise RuntimeError(f"{missing:,} of {len(once):,} stored chunks were not embedded by their own text")
    in_flight = [sum(count for text, count in has.items() if text in once and not kept[text]) for has, kept in killed]
    return Embedded(
        sum(undisturbed[text] for text in once), sum(disturbed[text] for text in once), in_flight
    )  # fmt: skip


# -- versions


@dataclass(frozen=True)
class Act:
    """What was stored for a document, at a place in the stream. `mark`: what its text says of itself; "": deleted."""

    seq: int
    mark: str


def wrong_versions(acts: Mapping[str, Sequence[Act]], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The documents of which something else is found than the last act by the stream's order."""
    found = []
    for document, all_acts in acts.items():
        last = max(all_acts, key=lambda act: act.seq)
        marks = {act.mark for act in all_acts if act.mark and any(act.mark in text for text in texts.get(document, ()))}
        if marks != ({last.mark} if last.mark else set()):
            found.append(document)
    return found


# -- quality


def table(name: str, questions: int, by_mode: Mapping[str, Scores]) -> list[str]:
    """The rows of the table in the docs."""
    return [
        f"| {questions} {name}, {mode} | {each.hit_1:.2f} / {each.hit_5:.2f} / {each.hit_10:.2f} | {each.mrr:.3f} |"
        for mode, each in by_mode.items()
    ]


def compare(name: str, by_mode: Mapping[str, Scores]) -> list[Finding]:
    """What each mode found, and what is demanded: hybrid at least the others, in hit@5 and MRR."""
    findings = [
        Finding(f"{name}, {mode}, {measure}", getattr(scores, field))
        for mode, scores in by_mode.items()
        for measure, field in (("hit@1", "hit_1"), ("hit@5", "hit_5"), ("hit@10", "hit_10"), ("MRR", "mrr"))
    ]
    hybrid = by_mode["hybrid"]
    for mode in ("keyword", "vector"):
        other = by_mode[mode]
        findings += [
            Finding(f"{name}, hybrid beyond {mode}, hit@5", hybrid.hit_5 - other.hit_5, at_least=0),
            Finding(f"{name}, hybrid beyond {mode}, MRR", hybrid.mrr - other.mrr, at_least=0),
        ]
    return findings
