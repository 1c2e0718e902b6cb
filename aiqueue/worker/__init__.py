"""Workers: what a user declares (`Worker`), one run of it (`session`), one delivery (`runner`), its end (`settlement`).

This room is above the client. It may not know agents, responders or the command line.
"""

from __future__ import annotations

from .session import Session
from .worker import Worker, check_attempt_options

__all__ = ["Session", "Worker", "check_attempt_options"]
