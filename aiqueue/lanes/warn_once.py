"""Warnings about what goes on until somebody mends it: said once, and not at each try."""

from __future__ import annotations

import logging

KNOWN_MAX = 1_000


class WarnOnce:
    """Logs each warning once, to one logger. After KNOWN_MAX warnings it begins anew."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._known: set[str] = set()

    def __call__(self, problem: str, *, about: str | None = None) -> None:
        """Log a problem. `about`: of all problems about the same, only the first is logged. None: the text says it."""
        key = problem if about is None else about
        if key not in self._known:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known.add(key)
            self._log.warning(problem)

    def forget(self, about: str) -> None:
        """What was wrong is well again: the next problem about the same is logged."""
        self._known.discard(about)
