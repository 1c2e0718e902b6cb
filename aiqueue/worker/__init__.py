"""Workers: what a user declares, one run of it (`Session`), and what becomes of each job (`settlement`).

Above the client. May not know agents, responders or the command line.
"""

from __future__ import annotations

from .worker import Worker, checked

__all__ = ["Worker", "checked"]
