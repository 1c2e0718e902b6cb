"""Stores of documents and vectors: SQLite by default, PostgreSQL with pgvector, and a suite for a user's own store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ...errors import BadInput

if TYPE_CHECKING:
    from .sqlite_store import SqliteStore
    from .upserter import Upserter

_MODULE_OF = {"PgVectorStore": "pgvector_store", "SqliteStore": "sqlite_store", "Upserter": "upserter"}
_EXTRA_OF = {"numpy": "rag", "psycopg": "pgvector"}

__all__ = ["PgVectorStore", "SqliteStore", "Upserter"]


def __getattr__(name: str) -> Any:
    """Import a store on first use: numpy and psycopg take their time, and may be missing."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise BadInput(f"{name} needs {error.name}: pip install 'aiqueue[{extra}]'") from None
    globals()[name] = value
    return value
