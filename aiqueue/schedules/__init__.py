"""Schedules: jobs that come again and again. Here: when they fire.

A recurrence is a value without I/O. Only Cron needs APScheduler, which is imported at its first use.
"""

from __future__ import annotations

from .every import Every
from .once import Once
from .recurrence import Recurrence, to_ms

__all__ = [
    "Every",
    "Once",
    "Recurrence",
    "to_ms",
]  # fmt: skip
