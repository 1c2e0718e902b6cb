"""What a user of the service may see of a job: no tracebacks, texts of exceptions, names of hosts, or secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..journal import StreamItem

TOLD: Final = frozenset({"rejected", "deadline", "cancelled"})  # reasons whose text was written for the caller
# By event: the fields of its data that are shown. Other events' data are shown whole.
_SHOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "started": (), "trial": (), "retry": ("delay_s",), "restart": ("attempt",),
    "failed": ("reason",), "cancelled": ("reason",),
}  # fmt: skip


def public_data(item: StreamItem) -> Any:
    """Return the data of an item of a job's stream as users may see them.

    - **chunk**, **progress**, **result**, **gap**: as they are, without secrets
    - **started**, **trial**: `attempt`. **restart**: its `attempt`. **retry**: `attempt` and `delay_s`
    - **failed**, **cancelled**: `reason`, and `error` if the handler has rejected the job by `Reject`, or its deadline
      is over
    """
    shown = _SHOWN.get(item.event)
    if shown is None:
        return item.masked().data
    data = item.data if isinstance(item.data, Mapping) else {}
    found = {"attempt": item.attempt} if item.event in ("started", "trial", "retry") else {}
    found |= {name: data[name] for name in shown if name in data}
    if item.event == "failed":
        found |= public_failure(data)
    return found


def public_failure(failure: Mapping[str, Any]) -> dict[str, Any]:
    """Return `reason` of a failed job, and its `error` if that text was written for the caller."""
    reason = failure.get("reason")
    return {"reason": reason, "error": failure.get("error")} if reason in TOLD else {"reason": reason}
