"""A document that was fetched: a copy of its own, which nothing changes any more."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Final, Self

from .errors import FetchFailed, FetchRefused

MEMORY_BYTES_MAX: Final = 1024**2  # a larger document lies in a file that has no name, and so ends with its process


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Of one document: bytes (as stored, and as decompressed), seconds in all and for a connection, and redirects."""

    size_bytes_max: int = 256 * 1024**2
    total_s: float = 60.0
    connect_s: float = 10.0
    redirects_max: int = 5


@dataclass(frozen=True, slots=True)
class Fetched:
    """A document as it was at one moment: `content` in memory, or as an open file if it is large. Close it.

    `sha256`: of the content, as hex. `source`: the path or URL that it came from in the end.
    """

    content: bytes | IO[bytes]
    name: str
    source: str
    size_bytes: int
    sha256: str
    content_type: str = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the open file, if there is one. Safe twice."""
        if not isinstance(self.content, bytes):
            self.content.close()


@dataclass(slots=True)
class Collecting:
    """Content as it comes: hashed, counted, and moved from memory to a file when it grows."""

    source: str
    size_bytes_max: int
    _file: Any = field(default_factory=lambda: tempfile.SpooledTemporaryFile(MEMORY_BYTES_MAX))  # noqa: SIM115
    _hash: Any = field(default_factory=hashlib.sha256)
    _size: int = 0

    def add(self, piece: bytes) -> None:
        """Append a piece. Raises FetchRefused above the limit, FetchFailed if the disk does not take the piece."""
        self._size += len(piece)
        if self._size > self.size_bytes_max:
            raise too_large(self.source, self.size_bytes_max)
        self._hash.update(piece)
        try:
            self._file.write(piece)
        except OSError as error:
            raise FetchFailed(self.source, f"its copy cannot be written: {error.strerror}", waits=True) from error

    def close(self) -> None:
        """Throw the content away."""
        self._file.close()

    def finish(self, name: str, content_type: str = "") -> Fetched:
        """Return the document, which now owns the content."""
        self._file.seek(0)
        content = self._file
        if self._size <= MEMORY_BYTES_MAX:
            content = self._file.read()
            self._file.close()
        return Fetched(content, name, self.source, self._size, self._hash.hexdigest(), content_type)


def too_large(source: str, limit: int) -> FetchRefused:
    """Return the error for a document above the limit of bytes."""
    return FetchRefused(source, f"it is larger than {limit:,} bytes: split it, or raise limits.file in rag.toml")
