"""Schedules: jobs that come again and again. When they fire, that each tick has one job wherever workers die, and what
programs do with them.

A recurrence is a value without I/O. Only Cron needs APScheduler, which is imported when it is first asked for a tick.
This room may not run handlers.
"""

from __future__ import annotations

from .calendar_interval import Calendar
from .cron import Cron
from .declarations import DeclaredSet, DeclaredSets, UndeclaredSchedule
from .declarer import Declared, Declarer
from .document import FiredTick, Misfire, Missed, Overlap, ScheduleDocument, SchedulePause, ScheduleSpec, tick_job_id
from .every import Every
from .jobs import MakeMessage, Makers, MessageMaker, Tick
from .once import Once
from .parsing import StoredMessage, When, encode_stored, parse_recurrence
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
    "Declared",
    "DeclaredSet",
    "DeclaredSets",
    "Declarer",
    "Every",
    "FiredTick",
    "MakeMessage",
    "Makers",
    "MessageMaker",
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
    "StoredMessage",
    "StoredSchedule",
    "Tick",
    "Ticker",
    "Ticks",
    "UndeclaredSchedule",
    "UnknownZone",
    "When",
    "encode_stored",
    "list_ticks",
    "parse_recurrence",
    "tick_job_id",
    "to_ms",
]  # fmt: skip
