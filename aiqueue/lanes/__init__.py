"""The pull engine: which lanes there are, whose jobs are pulled next, how many, and the renewal of leases.

Also the pauses, which say on which lanes nobody pulls.

This room may not read a job's body or decide what becomes of a job. What a limit allows is known by the room
`limits/`, which `key_gate` asks before a job of a limited key is pulled.
"""

from __future__ import annotations

from .delivery import Delivery, LanePull
from .discovery import RECREATE_AFTER_S, LaneDiscovery
from .key_gate import KeyGate
from .leases import LEASE_PARTS, Leases
from .pause_watch import PauseWatch
from .pauses import ActivePauses, Pause, PauseScope, StoredPauses
from .puller import Puller, prefetch
from .refusals import PullLimits
from .shared_consumer import SharedConsumer, SharedConsumerOptions
from .stalled import StalledLaneWatch
from .warn_once import WarnOnce
from .worker_records import EVERY_S, Record, WorkerRecords, has_line, serves, without_key_lanes

__all__ = [
    "EVERY_S", "LEASE_PARTS", "RECREATE_AFTER_S", "ActivePauses", "Delivery", "KeyGate", "LaneDiscovery", "LanePull",
    "Leases", "Pause", "PauseScope", "PauseWatch", "PullLimits", "Puller", "Record", "SharedConsumer",
    "SharedConsumerOptions", "StalledLaneWatch", "StoredPauses", "WarnOnce",
    "WorkerRecords", "has_line", "prefetch", "serves", "without_key_lanes",
]  # fmt: skip
