"""Pages that generated pages lead to, from docs/reference. They stand here once: pages move."""

from __future__ import annotations

from typing import Final

CONFIGURATION: Final = "../configuration.md"
DOCUMENTS: Final = "../documents.md"
GATEWAY: Final = "../gateway.md"
HISTORY: Final = "../history.md"
LIMITS: Final = "../limits.md"
OPERATORS: Final = "../operators.md"
RAG: Final = "../rag.md"
SCHEDULES: Final = "../schedules.md"
SCHEMAS: Final = "../schemas.md"
TRACING: Final = "../tracing.md"
TROUBLESHOOTING: Final = "../troubleshooting.md"
WIRE_CONTRACT: Final = "../wire-contract.md"


def upwards(link: str) -> str:
    """Return a link for a page in a folder of docs/reference."""
    return f"../{link}"
