"""Schedules: jobs that come again and again. Here: when they fire.

A recurrence is a value without I/O. Only Cron needs APScheduler, which is imported when it is first asked for a tick.
"""

from __future__ import annotations

from .calendar_interval import Calendar
from .cron import Cron
from .every import Every
from .once import Once
from .recurrence import Recurrence, to_ms
from .wall_clock import UnknownZone

__all__ = [
    "Calendar",
    "Cron",
    "Every",
    "Once",
    "Recurrence",
    "UnknownZone",
    "to_ms",
]  # fmt: skip
