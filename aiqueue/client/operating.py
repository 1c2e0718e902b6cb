"""What operators do with many jobs at once: calls of the client."""

from __future__ import annotations

from functools import partial

from ..config import Redact, Settings
from ..enqueue import DeadLetters
from .auditing import Audit
from .cancel import Canceller
from .job_calls import Jobs
from .redacting import load_redact
from .scheduling import ScheduleCalls


class OperatorCalls(ScheduleCalls):
    """The part of `Client` for operators."""

    settings: Settings

    @property
    def dead(self) -> DeadLetters:
        """Dead letters: `find`, `get`, `replay`, `purge`."""
        return DeadLetters(self.connection, self.topology, self.key_lanes)

    @property
    def audit(self) -> Audit:
        """Who has done what: `find`, and `act` for tools of operators."""
        return Audit(self.connection, self.topology, self.settings)

    @property
    def redact(self) -> Redact | None:
        """The hook of the settings that hides parts of messages from lists. Raises SettingsError if it is missing."""
        return load_redact(self.settings)

    @property
    def jobs(self) -> Jobs:
        """Jobs by what they have in common: `page`, `list`; `plan` and `act` on all that a filter selects.

        `page` and `list` raise SettingsError if the hook `redact` of the settings is missing.
        """
        return Jobs(
            self.connection,
            self.topology,
            canceller=Canceller(self.connection, self.topology),
            dead=self.dead,
            audit=self.audit,
            redact=partial(load_redact, self.settings),
        )
