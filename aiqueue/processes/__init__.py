"""Handlers in child processes: the pool, the protocol on the pipes, the child's side, and the quarantine of suspects.

A child imports this room: what it loads at import may not need NATS or the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .child import refuse_while_loading
from .pool import Processes, Recipe

if TYPE_CHECKING:
    from .quarantine import Quarantine, Suspect

__all__ = ["Processes", "Quarantine", "Recipe", "Suspect", "refuse_while_loading"]


def __getattr__(name: str) -> Any:
    """Load the quarantine where it is first used: a child needs neither it nor NATS."""
    if name not in ("Quarantine", "Suspect"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import quarantine  # noqa: PLC0415

    return getattr(quarantine, name)
