"""A client with the calls of the integration guide: publish, subscribe and request, on any subject.

Subjects of the families get aiqueue's guarantees through the rooms below; all others are plain NATS. This room adds no
queue of its own: it may not store, pull or settle jobs.
"""

from __future__ import annotations

from .client import NATSClient
from .envelopes import create_envelope, decode, encode
from .message import Msg
from .publishing import Published
from .subscriptions import BusSubscription

__all__ = ["BusSubscription", "Msg", "NATSClient", "Published", "create_envelope", "decode", "encode"]
