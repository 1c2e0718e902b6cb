"""Pages that generated pages lead to, from docs/reference. They stand here once: pages move."""

from __future__ import annotations

from typing import Final

CONFIGURATION: Final = "configuration.md"
DOCUMENTS: Final = "../guides/documents.md"
FAMILIES: Final = "families.md"
GATEWAY: Final = "../guides/gateway.md"
GATEWAY_CONFIG: Final = "../guides/gateway-config.md"
HISTORY: Final = "../operations/history.md"
LIMITS: Final = "../guides/limits.md"
OPERATORS: Final = "../operations/operators.md"
RAG: Final = "../guides/rag.md"
RAG_SETUP: Final = "../guides/rag-setup.md"
SCHEDULES: Final = "../guides/schedules-in-code.md"
SCHEMAS: Final = "../guides/schemas.md"
TRACING: Final = "../guides/tracing.md"
TROUBLESHOOTING: Final = "../operations/troubleshooting.md"
WIRE_CONTRACT: Final = "wire-contract.md"


def upwards(link: str) -> str:
    """Return a link for a page in a folder of docs/reference."""
    return f"../{link}"
