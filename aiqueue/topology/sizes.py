"""How many bytes the streams of a topology may take. The server sets them aside when it creates the streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .declared import Topology


class Reserved(NamedTuple):
    """Bytes that one copy of all streams sets aside, by storage. A server of a cluster holds at most one copy of each.

    Streams without `max_bytes` (those of parked jobs and of ticks) set nothing aside: they use what is left.
    """

    file: int
    memory: int


def reserved_bytes(topology: Topology) -> Reserved:
    """Return how many bytes a server sets aside for the streams of a topology."""
    file = memory = 0
    for spec in topology.streams.values():
        size = max(0, spec.config.get("max_bytes", 0))
        if spec.config["storage"] == "memory":
            memory += size
        else:
            file += size
    return Reserved(file, memory)
