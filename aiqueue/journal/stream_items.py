"""What a reader of a job's stream gets: items, each with a cursor behind it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import headers
from ..codec import secret_paths
from ..errors import BadInput
from ..payload import Document
from .entries import CANCELLED, FAILED, FINAL, RETRY, Entry

RESTART, GAP = "restart", "gap"  # events of items that are no entries

_NONCE = re.compile(r"[0-9a-f]{1,32}")
_CURSOR = re.compile(r"1-([0-9a-f]{8})" + r"-(\d{1,19})" * 5 + r"-([0-9a-f]*)")


@dataclass(frozen=True, slots=True)
class StreamItem:
    """What a reader of a job's stream gets: an entry of the journal, one chunk of it, a restart or a gap.

    - `event` **restart**: another attempt than the one of the items before writes from here on, from the start. `data`
      has its `attempt`, and `why` it runs.
    - `event` **gap**: entries are missing here, because they expired or the server had no space for them. `data` has
      the number of `chunks` if it is known.
    - `cursor`: pass it as `after` to a later stream, to go on behind this item.
    - `secrets`: which fields of `data` are secret; empty for none. `masked` leaves them out.
    - `document`: where a large result is stored. Of `follow`, `data` is then a reference to it, of a handle the result.
    """

    event: str
    data: Any
    attempt: int
    run: int
    time: float
    cursor: str
    secrets: str = ""
    document: Document | None = None

    def masked(self) -> StreamItem:
        """Return the item without its secrets, to be shown."""
        return replace(self, data=secret_paths.mask(self.data, self.secrets)) if self.secrets else self

    @property
    def final(self) -> bool:
        return self.event in FINAL


class Cursor(NamedTuple):
    """A position in a journal. The reader has `taken` items of entry `seq` of run `run`, and `left` are still to come.

    `nonce` names the attempt's writer that is read, and `number` the last of its entries that was read.
    """

    run: int = 0
    seq: int = 0
    taken: int = 0
    left: int = 0
    number: int = 0
    nonce: str = ""

    def encode(self, mark: str) -> str:
        """Return the text that users pass as `after`. `mark`: that of the journal's subject."""
        run, seq, taken, left, number, nonce = self
        return f"1-{mark}-{run}-{seq}-{taken}-{left}-{number}-{nonce}"

    @classmethod
    def decode(cls, text: str, subject: str) -> Cursor:
        """Return the position in a cursor's text. Raises BadInput for another text, or another job's cursor."""
        found = _CURSOR.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise BadInput(f"{text!r} is no cursor: pass the `cursor` of an item of this job's stream")
        if found[1] != subject_mark(subject):
            raise BadInput(f"cursor {text} is from another job's stream: pass one of this job's")
        run, seq, taken, left, number = (int(found[n]) for n in range(2, 7))
        return cls(run, seq, taken, left, number, found[7])


def subject_mark(subject: str) -> str:
    """Return what tells cursors of one journal from those of another."""
    return f"{zlib.crc32(subject.encode()):08x}"


def is_gap_before(entry: Entry, nonce: str, number: int, cursor: Cursor) -> bool:
    """Whether something is missing between the cursor and an entry: the rest of the cursor's entry, or earlier entries
    of the same writer. Entries that no attempt wrote (`nonce` is empty) have no number to tell by.
    """
    if entry.seq <= cursor.seq:
        return False
    expected = cursor.number + 1 if nonce == cursor.nonce else 1
    return cursor.left > 0 or (nonce != "" and number != expected)


def restarts_output(entry: Entry, nonce: str, cursor: Cursor) -> bool:
    """Whether another attempt than the cursor's writes its output from this entry on.

    An attempt that only ends the same run (retry, failed, cancelled) has no output, so it does not restart the stream.
    """
    if not nonce or nonce == cursor.nonce:
        return False
    return 0 < cursor.run < entry.run or entry.event not in (RETRY, FAILED, CANCELLED)


def is_outdated(item: StreamItem, head: Entry, subject: str) -> bool:
    """Whether an item was written before `head`, the newest entry of the journal on `subject`, by another attempt than
    that one: it makes the output anew. If that one has ended in a retry, a later one will.
    """
    newest, _ = writer_of(head, subject)
    is_of_newest = item.cursor.endswith(f"-{newest}") and head.event != RETRY
    return newest != "" and not is_of_newest and item.time <= head.time and not item.final


def writer_of(entry: Entry, subject: str) -> tuple[str, int]:
    """Return the nonce of the writer of an entry, and the entry's number among those of this writer. Both are in the
    Msg-Id. Empty and 0 for an entry that no attempt wrote.
    """
    parts = entry.msg_id.removeprefix(f"{subject}/").split("/")
    if len(parts) != 3 or not _NONCE.fullmatch(parts[0]):
        return "", 0
    number = parts[2]
    return parts[0], headers.number(number if number.isdigit() else number.partition("-")[0])
