"""Families and streams as `streams/*.toml` declares them, and `provision`, which creates and updates them on a server.

May not know jobs. Only `provision` needs a connection, so it is loaded on first import; the rest is plain values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .declared import LIMITS_FILE, Family, StreamSpec, Topology, list_directories
from .file_keys import FileKey
from .selection import WITH_FAMILIES
from .sizes import Reserved, reserved_bytes

if TYPE_CHECKING:
    from . import changes, problems, provision, stamps, tables  # noqa: TC004 -- lazy: it imports NATS, which a child process must not

__all__ = [
    "LIMITS_FILE", "WITH_FAMILIES", "Family", "FileKey", "Reserved", "StreamSpec", "Topology", "changes",
    "list_directories", "problems", "provision", "reserved_bytes", "stamps", "tables",
]  # fmt: skip
