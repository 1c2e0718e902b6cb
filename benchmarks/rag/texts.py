"""Made documents of 1 to 2 KB, of the sentences of the project's own documents, and questions of their words."""

from __future__ import annotations

import functools
import random
import re

from .corpus import ROOT

BYTES = (1_000, 2_000)
WORDS = (4, 9)  # of a question


@functools.cache
def sentences() -> tuple[str, ...]:
    prose = [each.read_text(encoding="utf-8") for each in sorted((ROOT / "docs").rglob("*.md"))]
    lines = re.split(r"(?<=[.!?])\s+", " ".join(re.sub(r"```.*?```", "", each, flags=re.DOTALL) for each in prose))
    return tuple(" ".join(each.split()) for each in lines if 40 <= len(each) <= 300)


def document(number: int, seed: int = 1) -> str:
    """The document of a number, the same each time."""
    chance = random.Random(f"{seed}-{number}")
    size, made = chance.randint(*BYTES), [f"Note {number}."]
    while sum(map(len, made)) + len(made) < size:
        made.append(chance.choice(sentences()))
    return " ".join(made)[: BYTES[1]]


def question(chance: random.Random) -> str:
    """Some words of a sentence."""
    words = re.findall(r"\w{3,}", chance.choice(sentences())) or ["queue"]
    chance.shuffle(words)
    return " ".join(words[: chance.randint(*WORDS)])
