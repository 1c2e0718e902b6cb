"""The embedded nats-server of a directory, and the small process that supervises it.

May not know streams or jobs. The supervisor is run by its path, without site-packages: it may not import aiqueue.
"""

from __future__ import annotations

from . import supervisor
from .container import find_container
from .embedded import DIRECTORY, EmbeddedServer, find_binary, find_directory

__all__ = ["DIRECTORY", "EmbeddedServer", "find_binary", "find_container", "find_directory", "supervisor"]
