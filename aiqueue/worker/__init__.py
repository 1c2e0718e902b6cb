"""Workers: what a user declares (`Worker`), one run of it (`session`), one delivery (`runner`), its end (`settlement`).
And the responder, which answers requests for results.

This room is above the client. It may not know agents or the command line.
"""

from __future__ import annotations

from . import deaths
from .lifespan import Lifespan
from .rehearsal import SettledAttempt, rehearsing
from .responder import WAIT_MAX_S, Request, Responder
from .session import Session
from .worker import Worker, check_attempt_options, drain_both

__all__ = [
    "WAIT_MAX_S",
    "Lifespan",
    "Request",
    "Responder",
    "Session",
    "SettledAttempt",
    "Worker",
    "check_attempt_options",
    "deaths",
    "drain_both",
    "rehearsing",
]  # fmt: skip
