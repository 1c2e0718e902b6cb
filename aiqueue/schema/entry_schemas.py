"""The bodies that aiqueue itself makes, as schemas: of journal entries that are no results, and of replies."""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_HISTORY = {"type": "array", "description": "The attempts that have failed.", "items": {"type": "object"}}
ENTRIES: dict[str, dict[str, Any]] = {
    "started": {
        "summary": "An attempt has begun; only of jobs that were delivered, parked or claimed before.",
        "payload": {"type": "object"},
    },
    "progress": {
        "summary": "How far the job is.",
        "payload": {
            "type": "object",
            "properties": {"fraction": {"type": ["number", "null"], "description": "From 0 to 1."}, "note": _TEXT},
        },
    },
    "chunk": {"summary": "Parts of the job's output, in order.", "payload": {"type": "array"}},
    "retry": {
        "summary": "An attempt has failed, and another one follows.",
        "payload": {
            "type": "object",
            "properties": {"error": _TEXT, "delay_s": {"type": "number"}, "history": _HISTORY},
            "required": ["error"],
        },
    },
    "trial": {"summary": "The job is tried apart from others.", "payload": {"type": "object"}},
    "failed": {
        "summary": "The job has failed for good; it is a dead letter, too.",
        "payload": {
            "type": "object",
            "properties": {
                "reason": {**_TEXT, "description": "One word, such as attempts, rejected, invalid or unknown_kind."},
                "error": _TEXT,
                "history": _HISTORY,
            },
            "required": ["reason", "error"],
        },
    },
    "cancelled": {
        "summary": "The job was cancelled, and does not run again.",
        "payload": {"type": "object", "properties": {"reason": _TEXT, "error": _TEXT}},
    },
}
ENDINGS = ("failed", "cancelled")
LARGE_RESULT: dict[str, Any] = {
    "type": "object",
    "description": "The object {tenant}/{sha256} of the object store AI_DOCUMENTS is the result, in CBOR.",
    "properties": {
        "tenant": _TEXT, "sha256": {**_TEXT, "pattern": "^[0-9a-f]{64}$"}, "size": {"type": "integer"}, "name": _TEXT,
        "content_type": _TEXT,
    },
    "required": ["tenant", "sha256", "size"],
}  # fmt: skip
REPLY_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {**_TEXT, "description": "The name of the error, such as JobFailed."},
        "message": _TEXT,
        "retryable": {"type": "boolean", "description": "Whether the same request may be repeated."},
        "job_id": _TEXT,
    },
    "required": ["error", "message"],
}
