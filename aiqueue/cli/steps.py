"""How a step of a job's timeline is told on one line."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..inspect import Step

_TOLD = frozenset({  # whose data is told in words
    "enqueued", "replayed", "parked", "due", "delivered", "started", "progress", "chunks", "retried",
    "attempt failed", "failed", "cancelled", "dead letter",
})  # fmt: skip
DATA_MAX = 500  # characters of a result


def moment(at: float, *, with_day: bool = False) -> str:
    """A time for people to the millisecond, in local time."""
    at = round(at, 3)
    day = "%Y-%m-%d " if with_day else ""
    return time.strftime(f"{day}%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03d}"


def span(value_s: float) -> str:
    """A time between two steps."""
    if value_s >= 9.95:
        return output.age(value_s)
    return f"{value_s * 1000:.0f}ms" if value_s < 0.9995 else f"{value_s:.1f}s"


def says(step: Step) -> str:
    """What a step says: what is long at its end, which is cut at the edge of a terminal."""
    parts = []
    took = f" in {span(step.at - step.first_at)}" if step.at is not None and step.first_at is not None else ""
    if step.event == "chunks":
        parts.append(f"{output.count(step.count, 'chunk')}{took}")
    elif step.count > 1:
        parts.append(f"{step.count:,} times{took}")
    if step.lost:
        parts.append(f"{output.count(step.lost, 'chunk')} lost for want of room")
    if step.until is not None and step.at is not None:
        parked = step.event == "parked"
        parts.append(f"until {output.clock(step.until)}" if parked else f"again after {span(step.until - step.at)}")
    if step.dead_seq:
        parts.append(f"dead letter {step.dead_seq}")
    parts += ["" if step.reason == step.event else step.reason, step.says]
    if step.event not in _TOLD:
        parts.append(output.cut(output.pretty(step.data, short=True), DATA_MAX))
    told = ": ".join(part for part in parts if part)
    return f"{told} (by {step.worker})" if step.worker and told else f"by {step.worker}" if step.worker else told
