"""The ranking recipe: how the answers of a keyword search and of a vector search become one. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import BadInput
from ..types import Mode

K_MAX = 1_000
CANDIDATES_MIN = 100  # taken from each of the two searches
HEADING_SHARE = 0.35  # of a chunk's vector; the rest is its body's
HEADING_WEIGHT = 2.0  # of words in headings, for BM25
KEYWORD_SHARE = 0.5  # of the score; the rest is the vector's


def check_k(k: int) -> int:
    """Return `k`. Raises BadInput unless it is 1 to 1,000."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= K_MAX:
        raise BadInput(f"k {k!r}: give a number of passages from 1 to {K_MAX:,}")
    return k


def check_mode(mode: str) -> None:
    """Raises BadInput for an unknown mode."""
    if mode not in ("hybrid", "keyword", "vector"):
        raise BadInput(f"mode {mode!r}: give hybrid, keyword or vector")


def candidates_of(k: int) -> int:
    """Return how many candidates each search is asked for, so that the best `k` of both are among them."""
    return max(CANDIDATES_MIN, 2 * k)


def scaled(scores: Mapping[int, float]) -> dict[int, float]:
    """Return the scores scaled to 0 (the lowest) to 1 (the highest). Scores that are all equal become 1."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    span = high - low
    return {row: (score - low) / span if span > 0 else 1.0 for row, score in scores.items()}


def fuse(
    keyword: Mapping[int, float], vector: Mapping[int, float], k: int, mode: Mode = "hybrid"
) -> list[tuple[int, float]]:
    """Return the best `k` rows as (row, score from 0 to 1), best first; of equal ones the lower row number first.

    Both arguments hold scores by row, higher is better. In hybrid mode half of a score is of each search, and a row
    that only one of them found gets nothing of the other. If one of them found no row, the other decides alone.
    """
    if mode == "keyword" or not vector:
        sums = scaled(keyword)
    elif mode == "vector" or not keyword:
        sums = scaled(vector)
    else:
        sums = {row: KEYWORD_SHARE * score for row, score in scaled(keyword).items()}
        for row, score in scaled(vector).items():
            sums[row] = sums.get(row, 0.0) + (1 - KEYWORD_SHARE) * score
    return sorted(sums.items(), key=lambda each: (-each[1], each[0]))[:k]


def check_question(vector: object, k: int, mode: str) -> None:
    """Raises BadInput unless `k` is 1 to 1,000 and the mode is known and has its vector."""
    check_k(k)
    check_mode(mode)
    if mode == "vector" and vector is None:
        raise BadInput("mode 'vector': give a vector")
