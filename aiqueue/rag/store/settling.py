"""What becomes of a version of a document: decided in one place, for every store. Pure.

The order in which versions arrive decides nothing. What is found is the highest version that was stored and not
deleted since; what is shown is the highest version that was begun.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..types import PutOutcome

STAGED_KEPT_S = 2 * 24 * 3600.0  # batches of a version of which nothing more was staged


@dataclass(frozen=True, slots=True)
class Known:
    """What a store knows of a document. `shown`: the newest version that was begun; 0: none.

    `settled`: the newest version that was stored or deleted; 0: none. `indexed`: it was stored, and not deleted.
    """

    shown: int = 0
    settled: int = 0
    indexed: bool = False
    content_hash: str = ""


def settle_put(known: Known, version: int, content_hash: str) -> PutOutcome:
    """What storing this version is: "new" replaces the chunks, "same" moves the version, "old" changes nothing."""
    if version < known.settled or (version == known.settled and not known.indexed):
        return "old"
    return "same" if known.indexed and known.content_hash == content_hash else "new"


def settle_move(known: Known, version: int, content_hash: str) -> bool:
    """Whether the stored chunks, which have this hash, become this version's."""
    return settle_put(known, version, content_hash) == "same"


def settle_delete(known: Known, version: int) -> bool:
    """Whether the document is now deleted by this version. An equal version that was stored is deleted."""
    return version >= known.settled


def accepts_note(known: Known, version: int) -> bool:
    """Whether a note about this version is shown: not of an older one, and not of one that was stored or deleted."""
    return version >= known.shown and version > known.settled
