"""Mail between agents: its form, the inboxes that store it, the roster of agents and their presence.

May not handle mail: that is `agent`.
"""

from __future__ import annotations

from .inbox import Inboxes, InboxStats, Sent, Unread
from .mail import BOUNCE, FAMILY, Bounce, Envelope, Mail, ReplySender, parse_envelope
from .presence import PresenceLock

__all__ = [
    "BOUNCE", "FAMILY", "Bounce", "Envelope", "InboxStats", "Inboxes", "Mail", "PresenceLock", "ReplySender", "Sent",
    "Unread", "parse_envelope",
]  # fmt: skip
