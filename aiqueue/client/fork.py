"""Forks: a client that was open in the parent process is not open in the child.

The child has a copy of the event loop, without the thread that runs it, and a connection whose socket is the parent's.
A call would wait for ever, or write between the parent's messages.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

NOT_OPEN_AFTER_FORK = (
    "the client was opened before this process was forked: open a client in each process (with gunicorn's preload, in "
    "post_fork)"
)


class Forked(Protocol):
    """A client that forgets what it has open."""

    def forget_after_fork(self) -> list[Any]:
        """Forget the connection and the event loop, and return both: they must not be cleaned up in the child."""


_clients: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []  # what the parent still uses


def close_in_forks(client: Forked) -> None:
    """Have `client` be closed in every process that is forked from now on."""
    _clients.add(client)


def _after_fork_in_child() -> None:
    for client in list(_clients):
        _kept.extend(client.forget_after_fork())


os.register_at_fork(after_in_child=_after_fork_in_child)
