"""From a message to its body and back, from a job's result to the type that its message declares, and the document as a
field of either.

This room may not know jobs: a message is a pydantic model here.
"""

from __future__ import annotations

from .document_ref import (
    Document,
    DocumentReader,
    HeldDocument,
    SteppedGenerator,
    SyncDocumentReader,
    document_in,
    find_documents,
    may_contain_documents,
    reference_headers,
    run_from_thread,
)
from .messages import encode_message, error_text, parse_message, schema_nodes
from .results import R, R_co, TypedModel, parse_result

__all__ = [
    "Document", "DocumentReader", "HeldDocument", "R", "R_co", "SteppedGenerator", "SyncDocumentReader", "TypedModel",
    "document_in", "encode_message", "error_text", "find_documents", "may_contain_documents", "parse_message",
    "parse_result", "reference_headers", "run_from_thread", "schema_nodes",
]  # fmt: skip
