"""Why the job of a schedule's tick is not there: before it was enqueued, or after it was skipped."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from ..connection import Connection
from ..errors import AccessDenied, NotFound, Unavailable
from ..topology import Topology
from ..units import short_duration
from .explanation import REMEDIES, Explanation
from .schedule_stats import read_documents

_TICK = re.compile(r"(.+)-(\d{8}T\d{6})(\d{3})?Z")  # schedules/document.py, tick_job_id
LATE_S = 5.0


async def explain_tick(
    connection: Connection, topology: Topology, job_id: str, *, tenant: str | None = None
) -> Explanation | None:
    """Return why there is no job of this id, if it is that of a tick of a schedule. None: it is not."""
    found = _TICK.fullmatch(job_id)
    if found is None:
        return None
    try:
        tick = datetime.strptime(found[2], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp() + int(found[3] or 0) / 1000
        documents, _ = await read_documents(connection, topology, tenant=tenant)
    except (ValueError, NotFound, AccessDenied, Unavailable):
        return None
    from ..schedules import tick_job_id  # noqa: PLC0415  (few use schedules)

    document = next((each for each in documents if tick_job_id(each.id, round(tick * 1000)) == job_id), None)
    if document is None:
        return None
    now, next_at = connection.clock.now(), None if document.next_ms is None else document.next_ms / 1000
    name = f"schedule {document.name}"
    if document.paused is not None and (next_at is None or tick >= next_at or tick > now):
        reason, text = "schedule_paused", f"{name} is paused: its tick enqueues no job before it is resumed"
    elif tick > now:
        when = short_duration(tick - now)
        reason, text = "schedule_not_due", f"it is the job of a tick of {name}, which is due in {when}"
    elif next_at is not None and tick >= next_at:
        late = short_duration(now - next_at)
        reason, text = "schedule_late", f"the tick of {name} has been due for {late}, and no worker has taken it"
    else:
        text = f"{name} has enqueued no job for this tick, or it has ended and nothing of it is kept"
        reason = "schedule_skipped"
    last = document.last
    evidence = [f"{document.fired:,} jobs enqueued, {document.skipped:,} ticks skipped, {document.misfired:,} late"]
    if last is not None:
        evidence.append(f"its last job is {last.job_id}")
    remedy = REMEDIES[reason].format(schedule=f"{document.id} --tenant {document.tenant}")
    until = tick if reason == "schedule_not_due" else None
    return Explanation(
        job_id, document.family, document.tenant, "unknown", reason, text, tuple(evidence), (), remedy, until
    )
