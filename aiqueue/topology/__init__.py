"""Families and streams as `streams/*.toml` declares them, and `provision`, which brings a server to that.

`provision` is loaded when first imported: all else here is plain values, read without a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .declared import Family, StreamSpec, Topology

if TYPE_CHECKING:
    from . import provision  # noqa: TC004 -- loaded by whoever imports it: it needs NATS, and a child must not

__all__ = ["Family", "StreamSpec", "Topology", "provision"]
