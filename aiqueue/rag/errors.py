"""Errors of retrieval, below those of `aiqueue.errors`.

::

    BadInput
    ├── ParseFailed       a document that cannot be read, or holds no text
    └── FetchRefused      a path or URL that may not be read, or that never can be
    AIQueueError
    └── FetchFailed       a path or URL cannot be read now; a retry can help
"""

from __future__ import annotations

from ..errors import AIQueueError, BadInput


class ParseFailed(BadInput):
    """A document that cannot be read, holds no text, or exceeds a limit. `reason` says what to do about that."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the document cannot be read: {reason}")
        self.reason = reason


class FetchRefused(BadInput):
    """A path or URL that may not be read, or that never can be. `source`: as it was given. `reason` says why."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source[:200]!r} is not fetched: {reason}")
        self.source, self.reason = source, reason


class FetchFailed(AIQueueError):
    """A path or URL cannot be read now. `retry_after_s`: the wait that the server asks for; None: it does not say."""

    retryable = True

    def __init__(self, source: str, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{source[:200]!r} cannot be fetched now: {reason}; try again later")
        self.source, self.reason, self.retry_after_s = source, reason, retry_after_s
