"""What a handler raises about its job."""

from __future__ import annotations

from ..backoff import DELAY_MAX_S
from ..errors import BadInput
from ..units import Duration, parse_duration


class Retry(Exception):
    """Raise this in a handler to retry the job `after` a delay: seconds or "30s", at most 365 days; None: its backoff.

    The attempt counts: when all attempts are used up, the job becomes a dead letter.
    """

    reason = "the handler asked for a retry"  # for subclasses whose __init__ does not call this one
    after_s: float | None = None

    def __init__(self, reason: str = reason, *, after: Duration | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = None if after is None else parse_duration("after", after)
        if self.after_s is not None and self.after_s > DELAY_MAX_S:
            raise BadInput(f"after must be at most 365 days, not {after!r}: use Reject for a job that cannot succeed")


class Reject(Exception):
    """Raise this in a handler if the job can never succeed. It becomes a dead letter at once, with `reason`."""

    reason = "the handler rejected the job"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason
