"""Pauses: whose jobs no worker starts until they are resumed, and where that is stored.

A pause is a key of the presence bucket. So it outlives workers, servers and the consumers of lanes
(docs/decisions/pausing.md).
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import AccessDenied, AIQueueError, BadInput, NotFound
from ..job import KIND
from ..subjects import Lane
from ..topology import Topology
from ..units import short_duration, text

PREFIX = "pause"
DURATION_MAX_S = 366 * 86_400.0
TEXT_MAX = 500  # characters of a reason, and of a name
ENDED_S = 10 * 86_400  # how long the key of a pause outlives its end, see `_store`


class PauseScope(NamedTuple):
    """Whose jobs are paused. `tenant`, `kind`, `key`: None means all of them. A pause with a `key` is stored with the
    limits (docs/decisions/pausing.md), and not here.
    """

    family: str
    tenant: str | None = None
    kind: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        tenant = f", tenant {self.tenant}" if self.tenant else ""
        kind = f", kind {self.kind}" if self.kind else ""
        return f"{self.family}{tenant}{kind}{f', key {self.key!r}' if self.key else ''}"

    @property
    def arguments(self) -> str:
        """What `aiqueue resume` takes to end a pause of exactly this, quoted for a shell."""
        named = (("tenant", self.tenant), ("kind", self.kind), ("key", self.key))
        return self.family + "".join(f" --{name} {shlex.quote(value)}" for name, value in named if value)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the key. A kind that is no token is hashed."""
        tenant = () if self.tenant is None else ("tenant", self.tenant)
        kind = () if self.kind is None else ("kind", subjects.foreign_id(self.kind))
        return (PREFIX, self.family, *tenant, *kind)

    def covers(self, family: str, tenant: str, kind: str) -> bool:
        """Return whether a job is among those that are paused."""
        return family == self.family and self.tenant in (None, tenant) and self.kind in (None, kind)


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause: no worker starts jobs of the family, or of a tenant or kind of it, or of a value of its `limit_key`
    (None: all), until it ends.

    `since`: when it began, and `until`: when it ends by itself (None: it does not), in seconds since the epoch. `by`:
    who has paused. `now`: jobs that ran were returned to the queue.
    """

    family: str
    """Family whose jobs are paused."""
    tenant: str | None
    """Tenant that is paused; None: all tenants."""
    kind: str | None
    """Kind of jobs that is paused; None: all kinds."""
    since: float
    by: str = ""
    reason: str = ""
    """Why, as the operator has said; empty: nothing was said."""
    until: float | None = None
    """When the pause ends by itself, in seconds since the epoch; None: it does not."""
    now: bool = False
    key: str | None = None
    """Value of the limited key that is paused; None: all values."""

    @property
    def scope(self) -> PauseScope:
        """What is paused: the family, tenant, kind and key together."""
        return PauseScope(self.family, self.tenant, self.kind, self.key)

    def __str__(self) -> str:
        """Return a sentence without the times, such as "agent.tasks, tenant acme is paused by anna: too slow"."""
        by, reason = f" by {self.by}" if self.by else "", f": {self.reason}" if self.reason else ""
        return f"{self.scope} is paused{by}{reason}"


class ActivePauses:
    """The pauses of one moment. False if there is none."""

    def __init__(self, pauses: Iterable[Pause] = ()) -> None:
        self._by_scope = {
            each.scope._replace(key=subjects.hashed(each.key)) if each.key else each.scope: each for each in pauses
        }

    def __bool__(self) -> bool:
        return bool(self._by_scope)

    def of_lane(self, lane: Lane) -> Pause | None:
        """Return the pause of all jobs in a lane, if there is one. Tenant ``*``: the lane that all tenants share."""
        scopes = [PauseScope(lane.family), PauseScope(lane.family, lane.tenant)]
        if lane.key:
            scopes += [each._replace(key=lane.key) for each in scopes]
        return self._first(scopes)

    def of_job(self, family: str, tenant: str, kind: str, key: str = "") -> Pause | None:
        """Return the pause of a job, if there is one: the widest of several. `key`: of its lane."""
        if not self._by_scope:
            return None
        scopes = [
            PauseScope(family), PauseScope(family, tenant), PauseScope(family, None, kind),
            PauseScope(family, tenant, kind),
        ]  # fmt: skip
        if key:
            scopes += [PauseScope(family, None, None, key), PauseScope(family, tenant, None, key)]
        return self._first(scopes)

    def _first(self, scopes: Iterable[PauseScope]) -> Pause | None:
        return next((self._by_scope[each] for each in scopes if each in self._by_scope), None)


class StoredPauses:
    """Reads and writes the stored pauses."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self.stream = topology.presence_stream.name

    async def read(self) -> list[Pause]:
        """Return the pauses that have not ended, sorted by family, tenant and kind.

        Raises Unavailable, NotFound (the stream is missing), AccessDenied.
        """
        await self._connection.clock.ensure(self.stream)
        now = self._connection.clock.now()
        found = [parse_pause(each) async for each in self._connection.read(self.stream, self.filter)]
        active = [each for each in found if each is not None and not has_ended(each, now)]
        return sorted(active, key=lambda each: (each.family, each.tenant or "", each.kind or ""))

    async def read_if_allowed(self) -> list[Pause]:
        """As `read`, for views: none if the stream is missing, or this user may not read it. Raises Unavailable."""
        try:
            return await self.read()
        except (NotFound, AccessDenied):
            return []

    @property
    def filter(self) -> str:
        """The filter over the subjects of all pauses."""
        return subjects.bucket(self.stream, PREFIX, ">")

    def check_scope(self, family: object, tenant: object, kind: object) -> PauseScope:
        """Return whose jobs are meant. Raises UnknownFamily, InvalidToken, and BadInput for an inbox family or a wrong
        kind.
        """
        declared = self._topology.family(family)  # type: ignore[arg-type]
        if declared.role != "work":
            raise BadInput(
                f"the mail of {declared.name} cannot be paused: stop the agent, and its inbox keeps the mail"
            )
        if kind is not None and (not isinstance(kind, str) or not KIND.fullmatch(kind)):
            raise BadInput(f"kind {kind!r} must be 1 to 128 characters of A-Z a-z 0-9 _ . : -")
        return PauseScope(declared.name, None if tenant is None else subjects.token("tenant", tenant), kind)

    async def begin(
        self, scope: PauseScope, *, by: str, reason: str = "", duration_s: float | None = None, now: bool = False
    ) -> Pause:
        """Store a pause, and tell the workers. One of the same scope is replaced, and its `since` is kept.

        Raises BadInput, AccessDenied, NotFound (the stream is missing), QueueFull, Unavailable.
        """
        if duration_s is not None and not 0 < duration_s <= DURATION_MAX_S:
            raise BadInput(f"a pause can last up to {short_duration(DURATION_MAX_S)}, and must be above 0")
        for name, value in (("by", by), ("reason", reason)):
            if len(text(name, value)) > TEXT_MAX:
                raise BadInput(f"{name} has {len(value):,} characters, above the limit of {TEXT_MAX}")
        await self._connection.clock.ensure(self.stream)
        since = started_at = self._connection.clock.now()
        former = await self._last(scope)
        if former is not None and not has_ended(former, since):
            since = former.since
        until = None if duration_s is None else started_at + duration_s
        pause = Pause(*scope[:3], round(since, 3), by, reason, until and round(until, 3), now)
        body = {key: getattr(pause, key) for key in pause.__slots__ if key != "key"}
        await self._store(scope, json.dumps(body).encode(), duration_s)
        return pause

    async def end(self, scope: PauseScope) -> Pause | None:
        """End the pause of exactly this scope, and tell the workers. Return it; None: there was none.

        Raises as `begin`.
        """
        await self._connection.clock.ensure(self.stream)
        former = await self._last(scope)
        if former is None:
            return None
        await self._store(scope, b"", 0, {headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub"})
        return None if has_ended(former, self._connection.clock.now()) else former

    async def _last(self, scope: PauseScope) -> Pause | None:
        try:
            stored = await self._connection.last(self.stream, subjects.bucket(self.stream, *scope.tokens))
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None
        return parse_pause(stored) if stored is not None else None

    async def _store(
        self, scope: PauseScope, body: bytes, holds_s: float | None, fields: Mapping[str, str] | None = None
    ) -> None:
        """Store a key. It outlives its end by days: where the newest message of a key expires, a former one comes back
        after a kill -9 of the server, until the records of workers have pushed it out (docs/decisions/deleted-keys.md).
        """
        told = {headers.MSG_ID: subjects.new_id(), **(fields or {})}
        if holds_s is not None:
            told[headers.TTL] = f"{math.ceil(holds_s) + ENDED_S}s"
        subject = subjects.bucket(self.stream, *scope.tokens)
        await self._connection.store(subject, body, told)
        with contextlib.suppress(AIQueueError):  # workers look by themselves, too
            await self._connection.publish(subjects.PAUSES, subject.encode())


def has_ended(pause: Pause, now: float) -> bool:
    """Return whether a pause has ended by itself. `now`: seconds since the epoch, by the server's clock."""
    return pause.until is not None and pause.until <= now


def parse_pause(stored: Stored) -> Pause | None:
    """Return the stored pause; None for a deleted key, and for a scope that this version does not know.

    The subject says whose jobs are paused. What the body lacks, as one that an operator has written, has its default.
    """
    scope = _parse_scope(stored.subject.split(".")[3:])
    if scope is None or headers.KV_OPERATION in stored.headers:
        return None
    try:
        body: Any = json.loads(stored.data)
    except (ValueError, RecursionError):
        body = {}
    body = body if isinstance(body, dict) else {}
    kind = body.get("kind")
    if scope.kind is not None and isinstance(kind, str) and kind and subjects.foreign_id(kind) == scope.kind:
        scope = scope._replace(kind=kind)
    since, until = _number(body.get("since")), _number(body.get("until"))
    by, reason = (value if isinstance(value := body.get(key), str) else "" for key in ("by", "reason"))
    return Pause(*scope[:3], stored.time if since is None else since, by, reason, until, body.get("now") is True)


def _parse_scope(tokens: list[str]) -> PauseScope | None:
    """Return the scope of a key's tokens behind the prefix, with the token of its kind. None: of another form."""
    match tokens:
        case [component, operation]:
            return PauseScope(f"{component}.{operation}")
        case [component, operation, "tenant", tenant]:
            return PauseScope(f"{component}.{operation}", tenant)
        case [component, operation, "kind", kind]:
            return PauseScope(f"{component}.{operation}", None, kind)
        case [component, operation, "tenant", tenant, "kind", kind]:
            return PauseScope(f"{component}.{operation}", tenant, kind)
    return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
