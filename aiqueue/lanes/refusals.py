"""Pull requests that the server refuses: the limits that it names are kept, and other refusals have a lane pause."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..units import seconds

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
GRANT_EXPIRES_S = 0.5
BATCH_MAX = 1_000_000
PAUSE_FIRST_S, PAUSE_CAP_S = 0.1, 5.0  # before the third request in a row, doubled for each later one
SHORT_EXPIRES_S = 1.0  # a standing pull that expires earlier is opened once in this time

_LIMIT = re.compile(r"Exceeded MaxRequest(Batch|Expires) of (\S+)", re.IGNORECASE)


@dataclass(slots=True)
class PullLimits:
    """What the server allows in the pull requests of one lane, as far as it has said so.

    `heartbeat_s`: how often the server says that a standing pull is open. `refusals`: requests refused in a row, apart
    from those that named a limit. `standing_paused`, `grants_paused`: no request of this kind is sent.
    """

    batch_max: int = BATCH_MAX
    heartbeat_s: float = field(default_factory=lambda: HEARTBEAT_S)
    expires_s: float = field(default_factory=lambda: EXPIRES_S)
    refusals: int = 0
    standing_paused: bool = False
    grants_paused: bool = False

    def standing_request(self, batch: int) -> dict[str, int | bool]:
        """Return a standing pull for at most `batch` jobs."""
        heartbeat_s = min(self.heartbeat_s, self.expires_s / 2)
        return {"batch": batch, "expires": int(self.expires_s * 1e9), "idle_heartbeat": int(heartbeat_s * 1e9)}

    def grant_request(self, batch: int, *, expires: bool) -> dict[str, int | bool]:
        """Return a grant of `batch` jobs.

        Of a lane that has as many jobs in flight as it may, the server (2.15.1) leaves it open without a word, until
        one of them ends. One that `expires` has an answer within GRANT_EXPIRES_S. If the lane is empty it has that no
        sooner, so others do not expire.
        """
        request: dict[str, int | bool] = {"batch": batch, "no_wait": True}
        if expires:
            request["expires"] = int(min(GRANT_EXPIRES_S, self.expires_s) * 1e9)
        return request

    def learn_limit(self, description: str) -> str:
        """Keep to the limit that the server's text names. Returns it for a log; "": no limit below ours is named."""
        found = _LIMIT.search(description)
        if found is None:
            return ""
        try:
            if found[1].lower() == "batch":
                allowed = int(found[2])
                if not 0 < allowed < self.batch_max:
                    return ""
                self.batch_max = allowed
                return f"{allowed} jobs"
            allowed_s = seconds(found[2])
        except ValueError:
            return ""
        if not 0 < allowed_s < self.expires_s:
            return ""
        self.expires_s = allowed_s
        return f"{allowed_s:g} s"

    def note_refusal(self) -> float:
        """Count a refusal, and return how long to pause, in seconds: 0.0 after the first, which may be a transition."""
        self.refusals += 1
        return 0.0 if self.refusals == 1 else min(PAUSE_CAP_S, PAUSE_FIRST_S * 2.0 ** min(self.refusals - 2, 16))
