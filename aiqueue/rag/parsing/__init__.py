"""From the bytes of a document to its parts: what format the bytes are, and a parser for each format.

Nothing here starts a process or waits. What a document may do to a parser is bounded outside, by `parse_pool`.
"""

from __future__ import annotations

from .registry import Parser, Parsers
from .sniffing import HEAD, DocumentSource

__all__ = ["HEAD", "DocumentSource", "Parser", "Parsers"]
