"""The seam: the only place that speaks to nats-py, its errors and its client's habits."""

from .frames import (
    HEADERS_MAX,
    Headers,
    PubAck,
    Received,
    Status,
    Stored,
    ack_info,
    block,
    delivery_number,
    read_headers,
    timestamp,
)
from .link import Connection
from .service import Answer, Endpoint, Service
from .subscription import Subscription
from .window import Publish

__all__ = [
    "HEADERS_MAX", "Answer", "Connection", "Endpoint", "Headers", "PubAck", "Publish", "Received", "Service", "Status",
    "Stored", "Subscription", "ack_info", "block", "delivery_number", "read_headers", "timestamp",
]  # fmt: skip
