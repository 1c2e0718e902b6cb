"""What operators do with many jobs at once: calls of the client."""

from __future__ import annotations

from ..config import Settings
from .job_calls import Jobs
from .redacting import load_redact
from .scheduling import ScheduleCalls


class OperatorCalls(ScheduleCalls):
    """The part of `Client` for operators."""

    settings: Settings

    @property
    def jobs(self) -> Jobs:
        """Jobs by what they have in common: `page`, `list`. Raises SettingsError if the hook `redact` is missing."""
        return Jobs(self.connection, self.topology, load_redact(self.settings))
