"""Pause and resume: calls of the client."""

from __future__ import annotations

import getpass
import socket

from ..connection import Connection
from ..lanes import Pause, StoredPauses
from ..topology import Topology
from ..units import Duration, flag, parse_duration


class PauseCalls:
    """The part of `Client` that pauses and resumes."""

    topology: Topology

    @property
    def connection(self) -> Connection:
        raise NotImplementedError

    async def pause(
        self,
        family: str,
        *,
        tenant: str | None = None,
        kind: str | None = None,
        duration: Duration | None = None,
        reason: str = "",
        now: bool = False,
        by: str | None = None,
    ) -> Pause:
        """Have no worker start jobs of a family, or of a tenant or kind of it, until they are resumed.

        Workers heed it within a second, also those that start later. Jobs can be enqueued and cancelled as ever, and
        those that run go on.
        - `duration` (seconds, "10m" or a timedelta; at most 366 days): the pause ends by itself after it.
        - `now=True`: jobs that run are stopped as by a drain, return to the queue, and use no attempt.
        - `reason` and `by` (default: the user and host of this process) are shown to operators.
        A pause of the same family, tenant and kind is replaced, and its beginning is kept.

        Raises BadInput (UnknownFamily, InvalidToken), AccessDenied, NotFound (the stream is missing: run `aiqueue
        apply`), QueueFull, Unavailable.
        """
        pauses = StoredPauses(self.connection, self.topology)
        scope = pauses.check_scope(family, tenant, kind)
        duration_s = None if duration is None else parse_duration("duration", duration)
        by = _user() if by is None else by
        return await pauses.begin(scope, by=by, reason=reason, duration_s=duration_s, now=flag("now", now))

    async def resume(self, family: str, *, tenant: str | None = None, kind: str | None = None) -> bool:
        """End the pause of exactly this family, tenant and kind. Return False if there is none.

        Other pauses stay: of one tenant, for example, if the whole family is resumed. Raises as `pause`.
        """
        pauses = StoredPauses(self.connection, self.topology)
        return await pauses.end(pauses.check_scope(family, tenant, kind)) is not None

    async def pauses(self) -> list[Pause]:
        """Return all pauses, sorted by family, tenant and kind. Raises AccessDenied, NotFound, Unavailable."""
        return await StoredPauses(self.connection, self.topology).read()


def _user() -> str:
    """Return who runs this process, such as "anna@host"."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as in a container
        name = "?"
    return f"{name}@{socket.gethostname()}"
