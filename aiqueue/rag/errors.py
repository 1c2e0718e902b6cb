"""Errors of retrieval, below those of `aiqueue.errors`.

::

    BadInput
    ├── ParseFailed       a document that cannot be read, or holds no text
    └── FetchRefused      a path or URL that may not be read, or that never can be
    AIQueueError
    └── FetchFailed       a path or URL cannot be read now; a retry can help
    Unavailable
    └── StoreUnavailable  the store cannot be read or written now
    Corrupt
    └── StoreDamaged      a file of the store is damaged

`waits`, also of errors of your own parts: an operator or another worker has to act, so that documents wait for an hour.
"""

from __future__ import annotations

from typing import Final

from ..errors import AIQueueError, BadInput, Corrupt, Unavailable

CANNOT_BE_READ: Final = "the document cannot be read: "
"""How the text of each ParseFailed begins."""


class ParseFailed(BadInput):
    """A document that cannot be read, holds no text, or exceeds a limit. `reason` says what to do about that."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{CANNOT_BE_READ}{reason}")
        self.reason = reason


class FetchRefused(BadInput):
    """A path or URL that may not be read, or that never can be. `source`: as it was given. `reason` says why."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source[:200]!r} is not fetched: {reason}")
        self.source, self.reason = source, reason


class FetchFailed(AIQueueError):
    """A path or URL cannot be read now. `retry_after_s`: the wait that the server asks for; None: it does not say.

    `waits`: this host lacks its root, or space for a copy.
    """

    retryable = True

    def __init__(self, source: str, reason: str, *, retry_after_s: float | None = None, waits: bool = False) -> None:
        super().__init__(f"{source[:200]!r} cannot be fetched now: {reason}; try again later")
        self.source, self.reason, self.retry_after_s, self.waits = source, reason, retry_after_s, waits


class StoreUnavailable(Unavailable):
    """The store cannot be read or written now: a full disk, missing rights, a server that is away, a lock.

    `passes`: by itself, most likely soon, so that a question is tried again too.
    """

    waits = True

    def __init__(self, text: str, *, passes: bool = False) -> None:
        super().__init__(text)
        self.passes = passes


class StoreDamaged(Corrupt):
    """A file of the store is damaged. The text says what to do."""

    waits = True
