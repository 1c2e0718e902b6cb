"""The pull engine: which lanes there are, how many jobs to pull from each, whose turn it is, and leases.

May not read a job's body or decide what becomes of a job. Limits that bound pulls belong in a room below this one.
"""

from __future__ import annotations

from .discovery import REMAKE_AFTER_S, Lanes
from .leases import Leases
from .puller import Delivery, LanePull, Puller, prefetch
from .stalled import StalledLaneWatch

__all__ = ["REMAKE_AFTER_S", "Delivery", "LanePull", "Lanes", "Leases", "Puller", "StalledLaneWatch", "prefetch"]
