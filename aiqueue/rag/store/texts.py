"""Words: what is indexed of a text, and what is searched for of a question. The same for every store."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ...errors import BadInput

QUERY_CHARACTERS_MAX = 20_000  # of a question; what follows is not searched for
TERMS_MAX = 64  # different terms of a question
TERM_CHARACTERS_MAX = 128
ID_BYTES_MAX = 2_000  # PostgreSQL indexes no longer keys
FREQUENT_SHARE = 0.05  # a term in more chunks than this is dropped
RAREST_KEPT = 3
COMMON_SHARE = 0.2  # a term in more chunks than this is not kept beside a rarer one, but costs most of the search
COMMON_CHUNKS_MIN = 1_000  # so many are scored at once

# The scripts that are written without spaces: kana, Han, Thai, Lao, Khmer, Myanmar. Hangul has spaces.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EACH_UNSPACED = re.compile(f"([{_UNSPACED}])")
_TERM = re.compile(rf"[{_UNSPACED}]+|(?:(?![{_UNSPACED}])[^\W_])+")
_SURROGATE_OR_NUL = re.compile("[\ud800-\udfff\x00]")

_ENGLISH = """
a about above after again against all also am an and any are as at be because been before being below between both
but by can could did do does doing down during each few for from further get had has have having he her here hers
him his how i if in into is it its just me more most my no nor not of off on once only or other our out over own s
same she should so some such t than that the their them then there these they this those through to too under until
up us use used using very want was way we were what when where which while who whom why will with would you your
"""
STOP_WORDS = frozenset(_ENGLISH.split())


def clean(text: str) -> str:
    """Return the text with U+FFFD for each NUL and lone surrogate, which databases refuse."""
    if text.isascii():
        return text.replace("\x00", "\ufffd") if "\x00" in text else text
    return _SURROGATE_OR_NUL.sub("\ufffd", text)


def check_document_id(document_id: str) -> str:
    """Return the id. Raises BadInput if no store can keep it."""
    if not isinstance(document_id, str) or not document_id:
        raise BadInput(f"document id {document_id!r}: give a text that is not empty")
    if _SURROGATE_OR_NUL.search(document_id):
        raise BadInput(f"document id {document_id[:80]!r}: remove its NULs and lone surrogates")
    if (size := len(document_id.encode())) > ID_BYTES_MAX:
        raise BadInput(f"document id {document_id[:80]!r}… has {size:,} bytes: at most {ID_BYTES_MAX:,} are allowed")
    return document_id


def index_text(text: str) -> str:
    """Return what the keyword index gets of a text: a space on both sides of each letter of an unspaced script."""
    return text if text.isascii() else _EACH_UNSPACED.sub(r" \1 ", text)


def index_heading(title: str, heading: str) -> str:
    """Return the indexed heading of a chunk. It begins with the title of the document."""
    return index_text(heading if heading.startswith(title) else f"{title} {heading}")


def terms_of(text: str) -> list[str]:
    """Return up to 64 different search terms of a text, in its order: one or two words, only letters and digits.

    Stop words are left out. Of an unspaced script each pair of neighbours is a term of two words.
    """
    found: dict[str, None] = {}
    for match in _TERM.finditer(clean(text[:QUERY_CHARACTERS_MAX]).lower()):
        word = match[0]
        if _EACH_UNSPACED.match(word):
            found |= dict.fromkeys(" ".join(word[i : i + 2]) for i in range(max(1, len(word) - 1)))
        elif word not in STOP_WORDS and len(word) <= TERM_CHARACTERS_MAX:
            found[word] = None
        if len(found) >= TERMS_MAX:
            break
    return list(found)[:TERMS_MAX]


def select_terms(terms: Sequence[str], chunks: int, count: Callable[[str, int], int]) -> list[str]:
    """Return the terms to search for: none that is in more than 5 % of the chunks, but at least the 3 rarest.

    Of these 3, those in more than 20 % and 1,000 of the chunks are left out, unless no term is rarer. `count(term,
    limit)` returns in how many chunks a term is, or `limit` if in more. Terms in no chunk are left out.
    """
    cutoff = max(RAREST_KEPT, int(chunks * FREQUENT_SHARE))
    counted = {term: count(term, cutoff + 1) for term in terms}
    rare = [term for term, chunks_with in counted.items() if 0 < chunks_with <= cutoff]
    if len(rare) >= RAREST_KEPT:
        return rare
    frequent = {term: count(term, chunks + 1) for term, chunks_with in counted.items() if chunks_with > cutoff}
    common = max(COMMON_CHUNKS_MIN, int(chunks * COMMON_SHARE))
    by_count = sorted(frequent, key=frequent.__getitem__)
    kept = [term for term in by_count if frequent[term] <= common][: RAREST_KEPT - len(rare)]
    if not rare and not kept:
        kept = by_count[:1]
    return rare + [term for term in frequent if term in kept]
