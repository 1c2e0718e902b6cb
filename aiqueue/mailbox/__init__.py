"""Mail between agents: its form, the inboxes that store it, and which agents there are.

May not handle mail: that is `agent`.
"""

from __future__ import annotations

from .inbox import Inboxes, InboxStats, Sent, Unread
from .mail import BOUNCE, Bounce, Correspondent, Envelope, Mail, envelope
from .presence import Hold

__all__ = [
    "BOUNCE", "Bounce", "Correspondent", "Envelope", "Hold", "InboxStats", "Inboxes", "Mail", "Sent", "Unread",
    "envelope",
]  # fmt: skip
