"""Views that go on: what a terminal, a server and a clock need for it. `top` and `inspect --watch` are made of it.

Each view reads with a `Poller`, which knows how old its figures are. `run_view` shows them as a screen that is redrawn
where it has changed, or as lines.
"""

from __future__ import annotations

from .poller import Poller
from .run_view import View, run_view
from .styled import crop, fold, reverse
from .watched import WatchedOutput

__all__ = ["Poller", "View", "WatchedOutput", "crop", "fold", "reverse", "run_view"]
