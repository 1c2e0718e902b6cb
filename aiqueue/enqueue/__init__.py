"""Enqueueing: from a message to a stored job, one or many, now or delayed. And dead letters, which are enqueued again.

This room may not run handlers or wait for results.
"""

from __future__ import annotations

from .bulk import Bulk, Items
from .child_jobs import ChildJobs, StoredChild, inherited_headers, lane_of_child
from .deadletter import DeadLetter, DeadLetters, FailedJob, Filter, history_of, history_text, last_trace, trimmed
from .fingerprints import Fingerprints, find_fingerprint, fingerprint_of, fingerprint_of_body, id_reused, is_other_body
from .forwarder import CONSUMER as FORWARDER
from .forwarder import Forwarder
from .ids import ON_DUPLICATE, FreshId, JobId, check_on_duplicate, id_of_key, resolve_job_id, with_header, with_step
from .key_lanes import KeyLanes, has_listeners, key_headers, stated_key
from .parents import Parents
from .parking import ASIDE_KEY, SOON_S, ParkedJob, Parking, parse_parked_job, resolve_due_at
from .pending import BulkOptions, Item, ProgressCallback
from .producer import AttachedJob, Enqueued, Producer, move_to_lane
from .refusals import OnFull, retry_while_full
from .take_out import (
    ParkedCopy,
    copy_msg_id,
    delete_other_copies,
    find_original,
    note_on_its_way,
    park_copy,
)
from .templates import JobTemplate, checked_headers, checked_lane, headers_of_caller, headers_of_job
from .traces import start_send

__all__ = [
    "ASIDE_KEY", "FORWARDER", "ON_DUPLICATE", "SOON_S", "AttachedJob", "Bulk", "BulkOptions", "ChildJobs",
    "DeadLetter", "DeadLetters", "Enqueued", "FailedJob", "Filter", "Fingerprints", "Forwarder", "FreshId",
    "Item", "Items", "JobId", "JobTemplate", "KeyLanes", "OnFull", "Parents", "ParkedCopy", "ParkedJob",
    "Parking", "Producer", "ProgressCallback", "StoredChild", "check_on_duplicate", "checked_headers",
    "checked_lane", "copy_msg_id", "delete_other_copies", "find_fingerprint", "find_original",
    "fingerprint_of", "fingerprint_of_body", "has_listeners", "headers_of_caller", "headers_of_job", "history_of",
    "history_text", "id_of_key", "id_reused", "inherited_headers", "is_other_body", "key_headers", "lane_of_child",
    "last_trace", "move_to_lane", "note_on_its_way", "park_copy", "parse_parked_job", "resolve_due_at",
    "resolve_job_id", "retry_while_full", "start_send", "stated_key", "trimmed", "with_header", "with_step",
]  # fmt: skip
