"""The seam: the only place that speaks to nats-py, its errors and its client's habits."""

from .answers import PubAck
from .frames import Headers, Received, Status, Stored, ack_info, timestamp
from .link import Connection
from .subscription import Subscription

__all__ = [
    "Connection", "Headers", "PubAck", "Received", "Status", "Stored", "Subscription", "ack_info", "timestamp",
]  # fmt: skip
