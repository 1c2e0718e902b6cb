"""What is asked, and what should be found: paraphrased questions, and headings of the corpus.

The questions of `questions.json` were written from the documents, in a user's words, before any retrieval was run, and
committed first. The headings are drawn from the corpus by a fixed seed, by a reading of its own: not by what the
pipeline makes of a document.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .corpus import Page

QUESTIONS = Path(__file__).with_name("questions.json")
HEADINGS, SEED = 300, 20
ENOUGH = 400  # characters of a section's own text
WORDS = 2  # a heading of one word is no question
_NUMBER = re.compile(r"^(?:(?:Chapter|Appendix|Part)\s+\w+|[A-Z]?(?:\.?\d+)+)\.\s+")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")  # of a release: looked up, not asked for
_HEADING = re.compile(r"h[1-6]")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
_ASIDE = ("script", "style", "nav")  # besides these: what leads to other pages
_LEADS = {"navheader", "navfooter", "related", "sphinxsidebar", "menu", "toc"}


@dataclass(frozen=True)
class Question:
    """`document`: the id in which the answer is. `heading`: of the section; "": anywhere in the document."""

    text: str
    document: str
    heading: str = ""


def questions(known: Sequence[Page]) -> list[Question]:
    """The paraphrased ones whose documents are in the corpus."""
    ids = {each.document_id for each in known}
    rows = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    made = [Question(row["question"], f"{row['package']}/{row['document']}", row["heading"]) for row in rows]
    return [each for each in made if each.document in ids]


def headings(known: Sequence[Page], *, count: int = HEADINGS, seed: int = SEED) -> list[Question]:
    """Headings of sections with enough text, each of which stands once in the corpus."""
    found = [(page, heading, text) for page in known for heading, text in sections(page.file)]
    often = Counter(plain(heading) for _, heading, _ in found)
    fit = [
        Question(shown(heading), page.document_id, shown(heading))
        for page, heading, text in found
        if often[plain(heading)] == 1
        and len(text) >= ENOUGH
        and len(plain(heading).split()) >= WORDS
        and not _DATE.search(heading)
    ]
    return random.Random(seed).sample(fit, min(count, len(fit)))


def shown(heading: str) -> str:
    """A heading without its number and the sign of its link."""
    return _NUMBER.sub("", " ".join(heading.replace("¶", " ").split()))


def plain(heading: str) -> str:
    """How headings are compared."""
    return shown(heading).casefold()


def sections(file: Path) -> Iterator[tuple[str, str]]:
    """Each heading of a page with the text up to the next one."""
    content = file.read_text(encoding="utf-8", errors="replace")
    return _of_html(content) if file.suffix == ".html" else _of_markdown(content)


def _of_markdown(content: str) -> Iterator[tuple[str, str]]:
    parts = _LINE.split(_CODE.sub("", content))
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        yield heading, " ".join(text.split())


def _of_html(content: str) -> Iterator[tuple[str, str]]:
    from lxml import etree, html  # noqa: PLC0415 - of the extra `rag`

    root = html.document_fromstring(content.encode(), parser=html.HTMLParser(encoding="utf-8"))
    heading, text, walk = "", [""], etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        is_heading = isinstance(element.tag, str) and _HEADING.fullmatch(element.tag)
        if event == "end":
            text.append(element.tail or "")
        elif is_heading:
            if heading:
                yield heading, " ".join("".join(text).split())
            heading, text = " ".join(element.text_content().split()), []
            walk.skip_subtree()
        elif (
            not isinstance(element.tag, str) or element.tag in _ASIDE or _LEADS & set(element.get("class", "").split())
        ):
            walk.skip_subtree()
        else:
            text.append(element.text or "")
    if heading:
        yield heading, " ".join("".join(text).split())
