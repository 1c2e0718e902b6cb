"""Formats an event of a job's timeline as one line."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..inspect import TimelineEvent

_DESCRIBED = frozenset({  # events whose data `describe_event` puts into words
    "enqueued", "replayed", "parked", "due", "delivered", "started", "progress", "chunks", "retried",
    "attempt failed", "failed", "cancelled", "dead letter", "step", "waits",
})  # fmt: skip
DATA_CHARACTERS_MAX = 500  # of a result


def format_timestamp(at: float, *, with_day: bool = False) -> str:
    """Format a time in local time with milliseconds: "07:05:01.250"."""
    at = round(at, 3)
    day = "%Y-%m-%d " if with_day else ""
    return time.strftime(f"{day}%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03d}"


def format_span(value_s: float) -> str:
    """Format the seconds between two events: "12ms", "1.5s", "3m10s"."""
    if value_s >= 9.95:
        return output.format_age(value_s)
    return f"{value_s * 1000:.0f}ms" if value_s < 0.9995 else f"{value_s:.1f}s"


def describe_event(event: TimelineEvent) -> str:
    """Describe an event on one line. The longest part is last, because a terminal truncates the end."""
    parts = []
    took = (
        f" in {format_span(event.at - event.first_at)}" if event.at is not None and event.first_at is not None else ""
    )
    if event.event == "chunks":
        parts.append(f"{output.format_count(event.count, 'chunk')}{took}")
    elif event.count > 1:
        parts.append(f"{event.count:,} times{took}")
    if event.lost_chunks:
        parts.append(f"{output.format_count(event.lost_chunks, 'chunk')} lost: the server had no storage for them")
    if event.until is not None and event.at is not None:
        parked = event.event == "parked"
        until = output.format_time(event.until)
        parts.append(f"until {until}" if parked else f"next attempt in {format_span(event.until - event.at)}")
    if event.dead_seq:
        parts.append(f"dead letter {event.dead_seq}")
    parts += ["" if event.reason == event.event else event.reason, event.text]
    if event.event not in _DESCRIBED and not event.text:
        text = output.format_json(event.data, short=True)[: 4 * DATA_CHARACTERS_MAX]  # a result may have 50 MB
        parts.append(output.truncate(text, DATA_CHARACTERS_MAX))
    text = ": ".join(part for part in parts if part)
    return f"{text} (by {event.worker})" if event.worker and text else f"by {event.worker}" if event.worker else text
