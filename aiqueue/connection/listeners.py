"""Callbacks that others add and take away, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

C = TypeVar("C")


class Listeners(Generic[C]):
    """Callbacks, in the order in which they were added. Each wait for a job's outcome adds one: thousands come and go,
    so none is searched for.
    """

    def __init__(self) -> None:
        self._callbacks: dict[object, C] = {}

    def add(self, callback: C) -> Callable[[], None]:
        """Add a callback. Returns a function that takes it away; safe twice."""
        key = object()
        self._callbacks[key] = callback

        def remove() -> None:
            self._callbacks.pop(key, None)

        return remove

    def all(self) -> list[C]:
        """Return the callbacks that there are now."""
        return list(self._callbacks.values())
