"""The demo's work: collects text files from a directory and analyses them. No server, no queue."""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENTS_MAX = 300
DOCUMENT_BYTES_MAX = 512 * 1024
FILES_VISITED_MAX = 20_000  # a demo in a home directory must not walk for minutes
TERMS_MAX = 150  # per document: a result is a message, not a copy of the text
LANGUAGE_WORDS_MIN = 20
CHUNK_WORDS = 200

_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "node_modules", "site-packages", "dist", "build", "target", "venv"})
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")
_PROSE = frozenset({".md", ".txt", ".rst", ".adoc", ".html", ""})
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_VOWELS = re.compile(r"[aeiouy]+")
_HEADINGS = {
    ".md": re.compile(r"^#{1,6}\s+(.+)$", re.MULTILINE),
    ".toml": re.compile(r"^\[+([^\]]+)\]", re.MULTILINE),
    ".py": re.compile(r"^\s*(?:async\s+def|def|class)\s+(\w+)", re.MULTILINE),
}
_COMMON = {
    "en": "the of and to in is that it for as with was on are be this by not or from at which an its has",
    "de": "der die das und ist nicht ein eine zu den mit von auf für im dem sich auch als wird sind",
    "fr": "le la les des et est une un dans pour que qui sur pas au avec du ce sont nous",
    "es": "el los las de y es una un en por que con para del se no al como más son",
    "it": "il lo gli di e una un in per che con del non della sono si al come più",
    "nl": "de het een en van is niet in op te dat zijn met voor aan er ook als bij wordt",
}
_EMPTY = """
    about after again also another because been before being between both cannot could does done down each either
    even ever every first from have here into just like made make many more most much must need none only once other
    over same self should since some such than them then there these they those through true false type under until
    upon used uses very what when where whether while will within without would your their
"""
_STOPWORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
_STOPPED = frozenset(_EMPTY.split()).union(*_STOPWORDS.values())


@dataclass(frozen=True)
class TextFile:
    """A text file and its content. `name` is its path relative to the directory, with "/"."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Gathered:
    """The documents of a directory and the numbers of skipped files. `more`: the limits were reached."""

    documents: tuple[TextFile, ...]
    binary: int = 0
    unreadable: int = 0
    too_large: int = 0
    empty: int = 0
    more: bool = False

    def describe_skipped(self) -> str:
        """Describe the skipped files: "2 binary, 1 empty", or an empty text."""
        counts = {
            "binary": self.binary, "unreadable": self.unreadable, "above 512 KiB": self.too_large, "empty": self.empty
        }  # fmt: skip
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def gather(root: Path, paths: Iterable[Path] | None = None) -> Gathered:
    """Return the text files below `root` (or of `paths`), in the order of their names, within the limits above.

    Hidden files, caches and symbolic links are skipped and not counted. Unreadable files are counted, not raised.
    """
    documents: list[TextFile] = []
    skipped: Counter[str] = Counter()
    more = False
    for visited, path in enumerate(_walk(root) if paths is None else paths):
        if len(documents) >= DOCUMENTS_MAX or visited >= FILES_VISITED_MAX:
            more = True
            break
        content = _read(path)
        if isinstance(content, str):
            skipped[content] += 1
        else:
            name = path.relative_to(root).as_posix()
            # names are printed and sent as text, so without control characters and undecodable bytes
            documents.append(TextFile("".join(c if c.isprintable() else "?" for c in name), content))
    return Gathered(tuple(documents), **skipped, more=more)


def own_documents(package: Path) -> tuple[Path, list[Path]]:
    """Return aiqueue's own text files and the directory of their names: in a checkout those of the project, else those
    of the installed package.
    """
    root = package.parent
    if (root / "pyproject.toml").is_file() and (root / "streams").is_dir():
        found = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("streams/*.toml"), *package.rglob("*.py")]
        return root, sorted(found)
    return package, sorted([*package.rglob("*.py"), *package.rglob("*.toml")])


def _walk(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in _SKIPPED_DIRECTORIES)
        for name in sorted(files):
            path = Path(directory, name)
            if not name.startswith(".") and not path.is_symlink():
                yield path


def _read(path: Path) -> bytes | str:
    """Return the content of a text file, or the reason to skip it."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would block forever
            return "unreadable"
        if found.st_size > DOCUMENT_BYTES_MAX:
            return "too_large"
        with path.open("rb") as file:
            content = file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError:
        return "unreadable"
    if sum(content.count(byte) for byte in _CONTROL) * 100 > len(content) or b"\0" in content:
        return "binary"
    # a text that is not UTF-8 grows when it is decoded, and is enqueued again as UTF-8
    grown = len(content.decode("cp1252", "replace").encode()) if not _is_utf8(content) else len(content)
    if grown > DOCUMENT_BYTES_MAX:
        return "too_large"
    return content if content.strip() else "empty"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def suffix_of(name: str) -> str:
    """Return the suffix of a document's name in lower case: ``.md``."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a name, not a path on this machine


def headings(name: str, text: str) -> list[str]:
    """Return the headings of a Markdown text, the tables of a TOML file or the definitions of a Python module."""
    pattern = _HEADINGS.get(suffix_of(name), _HEADINGS[".md"])
    return [match.strip() for match in pattern.findall(text)]


def split_text(text: str, words: int = CHUNK_WORDS) -> list[str]:
    """Split `text` between paragraphs into pieces of at least `words` words; the last may be shorter."""
    pieces: list[str] = []
    pending: list[str] = []
    count = 0
    for paragraph in re.split(r"\n\s*\n", text):
        pending.append(paragraph)
        count += len(paragraph.split())
        if count >= words:
            pieces.append("\n\n".join(pending))
            pending, count = [], 0
    return [*pieces, "\n\n".join(pending)] if pending else pieces


def analyse(name: str, text: str) -> dict[str, Any]:
    """Analyse one document and return plain data.

    `reading_ease` is Flesch's score (1948; 100 is easy, 0 is hard), None unless the text is English prose. `terms`
    are the counts of its most frequent words, without stop words.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    language = guess_language(words)
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    counted = Counter(word for word in words if len(word) > 3 and word not in _STOPPED)
    terms = dict(sorted(counted.items(), key=lambda each: (-each[1], each[0]))[:TERMS_MAX])
    prose = language == "en" and suffix_of(name) in _PROSE
    return {
        "words": len(words),
        "sentences": sentences,
        "headings": len(headings(name, text)),
        "language": language,
        "reading_ease": round(reading_ease(words, sentences), 1) if prose else None,
        "terms": terms,
    }


def guess_language(words: Sequence[str]) -> str:
    """Return the language whose common words are the most frequent, "?" if there are too few."""
    counted = Counter(words)
    hits = {language: sum(counted[word] for word in known) for language, known in _STOPWORDS.items()}
    best = max(hits, key=lambda language: (hits[language], language))
    enough = len(words) >= LANGUAGE_WORDS_MIN and hits[best] * 20 >= len(words)
    return best if enough else "?"


def reading_ease(words: Sequence[str], sentences: int) -> float:
    """Return Flesch's reading ease of an English text. Syllables are estimated as groups of vowels."""
    if not words:
        return 0.0
    syllables = sum(max(1, len(_VOWELS.findall(word)) - word.endswith("e")) for word in words)
    return 206.835 - 1.015 * len(words) / max(1, sentences) - 84.6 * syllables / len(words)


def distinctive(documents: Mapping[str, Sequence[Mapping[str, int]]], count: int) -> dict[str, list[str]]:
    """Return for each group of documents (term counts) its `count` most distinctive terms, by tf-idf.

    A term's weight is the sum over the group's documents of 1 + log(occurrences), times log(all documents / documents
    with the term). Ties are broken alphabetically, so that the same texts give the same result.
    """
    everything = [terms for group in documents.values() for terms in group]
    spread = Counter(term for terms in everything for term in terms)
    found: dict[str, list[str]] = {}
    for name, group in documents.items():
        weights: Counter[str] = Counter()
        for terms in group:
            for term, occurrences in terms.items():
                weights[term] += (1 + math.log(occurrences)) * math.log((1 + len(everything)) / spread[term])  # type: ignore[assignment]
        found[name] = sorted(weights, key=lambda term: (-weights[term], term))[:count]
    return found
