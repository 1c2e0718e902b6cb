"""Pause and resume: calls of the client."""

from __future__ import annotations

from ..errors import BadInput
from ..inspect import pause_of, read_pauses
from ..lanes import Pause, StoredPauses
from ..units import Duration, flag, parse_duration
from .limiting import LimitCalls, name_user


class PauseCalls(LimitCalls):
    """The part of `Client` that pauses and resumes."""

    async def pause(
        self,
        family: str,
        *,
        tenant: str | None = None,
        kind: str | None = None,
        key: str | None = None,
        duration: Duration | None = None,
        reason: str = "",
        now: bool = False,
        by: str | None = None,
    ) -> Pause:
        """Have no worker start jobs of a family, or of a tenant, a kind or a key of it, until they are resumed.

        Workers heed it within a second, also those that start later. Jobs can be enqueued and cancelled as ever, and
        those that run go on.
        - `key`: a value of the family's `limit_key`, such as a model. Not together with `kind` or `now`.
        - `duration` (seconds, "10m" or a timedelta; at most 366 days): the pause ends by itself after it.
        - `now=True`: jobs that run are stopped as by a drain, return to the queue, and use no attempt.
        - `reason` and `by` (default: the user and host of this process) are shown to operators.
        A pause of the same family, tenant, kind and key is replaced, and its beginning is kept.

        Raises BadInput (UnknownFamily, InvalidToken), AccessDenied, NotFound (the stream is missing: run `aiqueue
        apply`), QueueFull, Unavailable.
        """
        duration_s = None if duration is None else parse_duration("duration", duration)
        by, now = name_user() if by is None else by, flag("now", now)
        if key is not None:
            _check_alone(kind, now=now)
            if isinstance(key, str) and "*" in key:
                raise BadInput(f"a pause is of one value of the key, not of a pattern such as {key!r:.80}")
            controls = await self._controls()
            return pause_of(
                await controls.pause(family, key, tenant, for_s=duration_s, author=by, why=reason, replaces=True)
            )
        pauses = StoredPauses(self.connection, self.topology)
        scope = pauses.check_scope(family, tenant, kind)
        return await pauses.begin(scope, by=by, reason=reason, duration_s=duration_s, now=now)

    async def resume(
        self, family: str, *, tenant: str | None = None, kind: str | None = None, key: str | None = None
    ) -> bool:
        """End the pause of exactly this family, tenant, kind and key. Return False if there is none.

        Other pauses stay: of one tenant, for example, if the whole family is resumed. Raises as `pause`.
        """
        if key is not None:
            _check_alone(kind)
            return await (await self._controls()).resume(family, key, tenant) is not None
        pauses = StoredPauses(self.connection, self.topology)
        return await pauses.end(pauses.check_scope(family, tenant, kind)) is not None

    async def pauses(self) -> list[Pause]:
        """Return all pauses, sorted by family, tenant, kind and key. Raises AccessDenied, NotFound, Unavailable."""
        return await read_pauses(self.connection, self.topology)


def _check_alone(kind: str | None, *, now: bool = False) -> None:
    if kind is not None:
        raise BadInput("a pause is of a kind or of a key: give one of them")
    if now:
        raise BadInput("jobs of a key that run go on: leave `now` out, or pause their family, tenant or kind")
