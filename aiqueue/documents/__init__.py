"""Documents: large bytes beside the jobs, stored once for each tenant and hash, deleted when nobody holds them.

May not know lanes, workers or journals.
"""

from __future__ import annotations

from .collector import Collected, Collector
from .holds import ListedDocument
from .objects import Source
from .store import Documents

__all__ = ["Collected", "Collector", "Documents", "ListedDocument", "Source"]
