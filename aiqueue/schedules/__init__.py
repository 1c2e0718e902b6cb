"""Schedules: jobs that come again and again. When they fire, that each tick has one job wherever workers die, and what
programs do with them.

A recurrence is a value without I/O. Only Cron needs APScheduler, which is imported when it is first asked for a tick.
This room may not run handlers.
"""

from __future__ import annotations

from .calendar_interval import Calendar
from .cron import Cron
from .document import FiredTick, Misfire, Missed, Overlap, ScheduleDocument, SchedulePause, ScheduleSpec, tick_job_id
from .every import Every
from .jobs import MakeMessage, Makers, Tick
from .once import Once
from .recurrence import Recurrence, to_ms
from .schedules import Added, AskedJob, Schedules, list_ticks
from .store import ScheduleStore, StoredSchedule
from .ticker import Ticker
from .ticks import Ticks
from .wall_clock import UnknownZone

__all__ = [
    "Added",
    "AskedJob",
    "Calendar",
    "Cron",
    "Every",
    "FiredTick",
    "MakeMessage",
    "Makers",
    "Misfire",
    "Missed",
    "Once",
    "Overlap",
    "Recurrence",
    "ScheduleDocument",
    "SchedulePause",
    "ScheduleSpec",
    "ScheduleStore",
    "Schedules",
    "StoredSchedule",
    "Tick",
    "Ticker",
    "Ticks",
    "UnknownZone",
    "list_ticks",
    "tick_job_id",
    "to_ms",
]  # fmt: skip
