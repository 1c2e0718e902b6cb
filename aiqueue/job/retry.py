"""What a handler raises about its job."""

from __future__ import annotations

from typing import Literal

from ..errors import BadInput
from ..units import DELAY_MAX_S, Duration, parse_duration


class Retry(Exception):
    """Raise this in a handler to retry the job `after` a delay: seconds or "30s", at most 365 days; None: its backoff.

    The attempt counts: when all attempts are used up, the job becomes a dead letter.

    ``pause="key"`` also pauses the job's key, the value of its family's `limit_key`, for that long: no
    job of the key starts in any process. It is for a provider that answers 429 with a Retry-After. A pause that lasts
    longer already is not shortened. For a job without a key it does nothing, and is logged; so for mail and requests.

    Raises BadInput for another `pause`, for one without `after`, and for an invalid `after`.
    """

    reason = "the handler asked for a retry"  # for subclasses whose __init__ does not call this one
    after_s: float | None = None
    pause: Literal["key"] | None = None

    def __init__(
        self, reason: str = reason, *, after: Duration | None = None, pause: Literal["key"] | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = None if after is None else parse_duration("after", after)
        if self.after_s is not None and self.after_s > DELAY_MAX_S:
            raise BadInput(f"after must be at most 365 days, not {after!r}: use Reject for a job that cannot succeed")
        if pause not in (None, "key"):
            raise BadInput(f'pause must be "key" or None, not {pause!r:.80}')
        if pause is not None and after is None:
            raise BadInput(f'pause={pause!r} needs after=, how long to pause the key, such as after="20s"')
        self.pause = pause


class Reject(Exception):
    """Raise this in a handler if the job can never succeed. It becomes a dead letter at once, with `reason`."""

    reason = "the handler rejected the job"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason
