"""The pull engine: which lanes there are, whose jobs are pulled next, how many, and the renewal of leases.

Also the pauses, which say on which lanes nobody pulls.

This room may not read a job's body or decide what becomes of a job. The room `limits/` (rates by key), which `lanes/`
and `worker/` ask before a job is pulled or started, is to stand below this room: limits do not belong in here.
"""

from __future__ import annotations

from .delivery import Delivery, LanePull
from .discovery import RECREATE_AFTER_S, LaneDiscovery
from .leases import Leases
from .pause_watch import PauseWatch
from .pauses import ActivePauses, Pause, PauseScope, StoredPauses
from .puller import Puller, prefetch
from .refusals import PullLimits
from .stalled import StalledLaneWatch
from .worker_records import EVERY_S, Record, WorkerRecords, serves

__all__ = [
    "EVERY_S", "RECREATE_AFTER_S", "ActivePauses", "Delivery", "LaneDiscovery", "LanePull", "Leases", "Pause",
    "PauseScope", "PauseWatch", "PullLimits", "Puller", "Record", "StalledLaneWatch", "StoredPauses", "WorkerRecords",
    "prefetch", "serves",
]  # fmt: skip
