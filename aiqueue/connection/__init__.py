"""The connection to NATS: the only room that imports nats-py.

Here: connecting and reconnecting, publishing with PubAcks and in atomic batches, subscriptions, request and reply,
JetStream API calls, reading streams, headers and ack subjects, NATS micro services, and the translation of every error
of nats-py and JetStream into `aiqueue.errors`.

Not here: anything that knows jobs, lanes, agents, journals or the declared streams. This room imports `errors`,
`headers` and `config` only. Other rooms import the names below from `aiqueue.connection`, and never its modules.
"""

from . import deferred_aiohttp  # noqa: F401  (before nats-py is imported)
from .atomic import store_together
from .change_watch import ChangeWatch
from .clock import ServerClock
from .connection import Connection
from .frames import (
    HEADERS_MAX,
    Headers,
    PubAck,
    Received,
    Status,
    Stored,
    ack_frame,
    ack_info,
    block,
    check_size,
    delivery_number,
    read_headers,
    timestamp,
)
from .nats_client import to_its_end
from .publish_types import Publish
from .reading import is_still_stored, read_last, wait_current
from .service import Answer, Endpoint, Service
from .subscription import Subscription

__all__ = [
    "HEADERS_MAX", "Answer", "ChangeWatch", "Connection", "Endpoint", "Headers", "PubAck", "Publish", "Received",
    "ServerClock", "Service", "Status", "Stored", "Subscription", "ack_frame", "ack_info", "block", "check_size",
    "delivery_number", "is_still_stored", "read_headers", "read_last", "store_together", "timestamp",
    "to_its_end", "wait_current",
]  # fmt: skip
