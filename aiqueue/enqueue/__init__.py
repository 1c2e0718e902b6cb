"""The way in: from a message to a stored job, one or many, now or later; and dead letters, which come back this way.

May not run handlers or wait for results.
"""

from __future__ import annotations

from .bulk import Bulk, Item, Items, Options, Progress
from .deadletter import DeadLetter, DeadLetters, FailedJob, Filter, history_of, history_text, trimmed
from .parking import Forwarder, Parking, Waiting, waiting
from .producer import Enqueued, Form, OnFull, Producer, due_time, duration, identity, patiently, relocate

__all__ = [
    "Bulk", "DeadLetter", "DeadLetters", "Enqueued", "FailedJob", "Filter", "Form", "Forwarder", "Item", "Items",
    "OnFull", "Options", "Parking", "Producer", "Progress", "Waiting", "due_time", "duration", "history_of",
    "history_text", "identity", "patiently", "relocate", "trimmed", "waiting",
]  # fmt: skip
