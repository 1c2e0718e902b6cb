"""The child pool of one worker: handlers in child processes, the protocol on their pipes, and suspects' quarantine.

A child process imports this room, so nothing that is loaded at import may need NATS or the network. (Several
`aiqueue work` processes are a worker pool, and live in `cli/`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .child import refuse_while_loading
from .forks import reset_signals_at_fork
from .pool import Processes
from .recipe import Recipe, find_global, find_object, find_reference, refer_to

if TYPE_CHECKING:
    from .quarantine import Quarantine, Suspect

__all__ = [
    "Processes", "Quarantine", "Recipe", "Suspect", "find_global", "find_object", "find_reference", "refer_to",
    "refuse_while_loading", "reset_signals_at_fork",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the quarantine where it is first used: a child needs neither it nor NATS."""
    if name not in ("Quarantine", "Suspect"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import quarantine  # noqa: PLC0415

    return getattr(quarantine, name)
