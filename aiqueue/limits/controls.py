"""What operators and handlers set while the system runs: overrides of rules, and pauses. Stored, and watched by all."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .. import headers, subjects
from ..connection import Connection, Received, Stored, Subscription
from ..errors import BadInput, Conflict, NotFound, Unavailable
from ..topology import Topology
from ..units import short_duration, text
from .rules import (
    Override,
    Rule,
    RuleId,
    Rules,
    check_key,
    check_limits,
    collapse,
    find_limited_family,
    make_rule,
    parse_window,
)

log = logging.getLogger(__name__)

VERSION = 1
STORE_S = 10.0
EXPIRES_MAX_S = 366 * 86_400.0
EXPIRED_TTL_S = 60  # how much longer than it holds something is stored
PAUSE_MAX_S = 366 * 86_400.0
TRIES_MAX = 5  # of a write that others' writes come before
TEXT_MAX = 500  # characters of a name, and of why something is paused


class KeyPause(NamedTuple):
    """A value of a family's key is paused, over all tenants (None) or for one. Times: seconds since the epoch.

    `until`: infinity if only `Controls.resume` ends it; that is null where it is stored.
    """

    family: str
    key: str
    tenant: str | None
    until: float
    author: str
    why: str
    set_at: float

    def plain(self) -> dict[str, Any]:
        """Return the pause as it is stored, in JSON."""
        return {"v": VERSION, **self._asdict(), "until": None if math.isinf(self.until) else self.until}


class Controls:
    """The overrides and pauses of one server. `rules` follows the overrides."""

    def __init__(self, connection: Connection, topology: Topology, rules: Rules, clock: Callable[[], float]) -> None:
        """`clock` returns the server's time."""
        self._connection, self._topology, self.rules, self._clock = connection, topology, rules, clock
        self.stream = topology.limits_stream.name
        self._ids: dict[str, RuleId] = {}  # by subject
        self._pauses: dict[RuleId, KeyPause] = {}
        self._paused: dict[str, RuleId] = {}  # by subject
        self._seqs: dict[str, int] = {}
        self._subscriptions: list[Subscription] = []
        self.listeners: list[Callable[[], None]] = []  # called after each change
        self.current = asyncio.Event()  # cleared while changes may have been missed

    async def open(self) -> None:
        """Read what is stored, and follow it. Raises NotFound, Unavailable, AccessDenied."""
        for what in ("rule", "pause"):
            subject = subjects.limit_live(self.stream, subjects.bucket(self.stream, what, ">"))
            self._subscriptions.append(await self._connection.subscribe(subject, self._heard))
        await self._connection.flush()
        await self.reload()

    async def close(self) -> None:
        for each in self._subscriptions:
            await each.close()
        self._subscriptions.clear()

    async def reload(self) -> None:
        """Read everything again, after a lost connection. Raises NotFound, Unavailable, AccessDenied."""
        found: dict[str, tuple[int, bytes]] = {}
        for what in ("rule", "pause"):
            async for each in self._connection.read(self.stream, subjects.bucket(self.stream, what, ">")):
                found[each.subject] = each.seq, b"" if headers.KV_OPERATION in each.headers else each.data
        for subject in {*self._ids, *self._paused} - found.keys():
            self._take(subject, b"")
        for subject, (seq, data) in found.items():
            self._seqs[subject] = seq
            self._take(subject, data)
        self.current.set()
        self._tell()

    def now(self) -> float:
        """Return the server's time."""
        return self._clock()

    # -- rules

    async def set_rule(self, fields: Mapping[str, Any], *, author: str, expires_in_s: float | None = None) -> Override:
        """Override a rule, or set one that is not declared, for everybody: within a second, and until it expires.

        `fields`: as in a table ``[[limit]]``. Without any limit, the override lifts the rule that holds for
        the key: the declared one, or a more general one for this key only. Raises BadInput.
        """
        rule = make_rule(self._topology, fields, may_be_unlimited=True)
        if rule.is_unlimited and not self._has_rule_for(rule.id):
            raise BadInput(f"there is no rule to lift for {rule.id}: give at least one of requests, cost, in_flight")
        if expires_in_s is not None and not 1 <= expires_in_s <= EXPIRES_MAX_S:
            raise BadInput(
                f"an override expires after 1s to {short_duration(EXPIRES_MAX_S)}, not {short_duration(expires_in_s)}"
            )
        _check_text("author", author)
        now = self._clock()
        override = Override(rule, author, now, None if expires_in_s is None else now + expires_in_s)
        plain = {"v": VERSION, **rule.plain(), **{key: getattr(override, key) for key in override._fields[1:]}}
        await self._store(self._subject("rule", rule.id), plain, None)
        return override

    def _has_rule_for(self, which: RuleId) -> bool:
        self.rules.expire(self._clock())
        is_set = which in self.rules.declared or which in self.rules.overrides
        return is_set or self.rules.more_general(which, self._clock()) is not None

    async def unset_rule(self, which: RuleId) -> bool:
        """Remove an override. Return False if there is none that holds. Raises BadInput.

        The family need not be declared any more, nor have a limit_key.
        """
        if not isinstance(which.family, str) or not subjects.FAMILY.fullmatch(which.family):
            find_limited_family(self._topology, which.family)
        if not isinstance(which.key, str) or not which.key:
            raise BadInput(f"a key is a text, not {which.key!r:.80}")
        if which.tenant not in (None, "*"):
            subjects.token("tenant", which.tenant)
        removed = await self._delete("rule", which._replace(key=collapse(which.key)))
        if removed is None:
            find_limited_family(self._topology, which.family)
        return isinstance(removed, Override) and removed.holds(self._clock())

    # -- pauses

    async def pause(
        self,
        family: str,
        key: str,
        tenant: str | None = None,
        *,
        for_s: float | None,
        author: str,
        why: str = "",
        replaces: bool = False,
    ) -> KeyPause:
        """Let no call of this key start for so many seconds (None: until `resume`), in any process. Return the pause.

        A pause that ends later is not shortened: it stays, and is returned. `replaces`: it is replaced, and its
        beginning is kept. Raises BadInput.
        """
        which = self._paused_id(family, key, tenant)
        if for_s is not None and (
            isinstance(for_s, bool) or not isinstance(for_s, int | float) or not 0 < for_s <= PAUSE_MAX_S
        ):
            raise BadInput(f"a pause can last up to {short_duration(PAUSE_MAX_S)}, and must be above 0, not {for_s!r}")
        _check_text("author", author)
        _check_text("why", why)
        subject, now = self._subject("pause", which), self._clock()
        until = math.inf if for_s is None else now + for_s
        if replaces:
            former = self._read(await self._last(subject), subject)
            since = former.set_at if isinstance(former, KeyPause) and former.until > now else now
            pause = KeyPause(*which, until, author, why, since)
            await self._store(subject, pause.plain(), for_s)
            return pause
        known = self._pauses.get(which)
        if known is not None and known.until >= until:
            return known
        pause = KeyPause(*which, until, author, why, now)
        self._take(subject, json.dumps(pause.plain()).encode())  # here at once
        self._tell()
        return await self._store_longer(subject, pause, for_s)

    async def _store_longer(self, subject: str, pause: KeyPause, for_s: float | None) -> KeyPause:
        """Store a pause unless a longer one is stored: one that nobody here has heard of yet, perhaps."""
        seq = self._seqs.get(subject, 0)
        for tries_left in range(TRIES_MAX, 0, -1):
            try:
                await self._store(subject, pause.plain(), for_s, expected=seq)
            except Conflict:
                if tries_left == 1:
                    raise
                stored = await self._last(subject)
                found, seq = self._read(stored, subject), stored.seq if stored is not None else 0
                if isinstance(found, KeyPause) and found.until >= pause.until:
                    self._seqs[subject] = seq
                    self._take(subject, json.dumps(found.plain()).encode())
                    self._tell()
                    return found
            else:
                break
        return pause

    async def resume(self, family: str, key: str, tenant: str | None = None) -> KeyPause | None:
        """End the pause of exactly this key and tenant. Return it; None: there was none. Raises BadInput."""
        removed = await self._delete("pause", self._paused_id(family, key, tenant))
        return removed if isinstance(removed, KeyPause) and removed.until > self._clock() else None

    def _paused_id(self, family: str, key: str, tenant: str | None) -> RuleId:
        check_key(key)
        if tenant is not None:
            subjects.token("tenant", tenant)
        return RuleId(find_limited_family(self._topology, family).name, key, tenant)

    def paused_until(self, family: str, key: str, tenant: str) -> float:
        """Return until when a tenant's calls of this key are paused, by the server's time; 0 if they are not."""
        if not self._pauses:
            return 0.0
        found = (self._pauses.get(RuleId(family, key, whom)) for whom in (None, tenant))
        return max((each.until for each in found if each is not None), default=0.0)

    def is_paused(self, family: str, key: str, tenant: str) -> bool:
        """Return whether a pause holds for a tenant's calls of this key."""
        return bool(self._pauses) and self.paused_until(family, key, tenant) > self._clock()

    def is_limited(self, family: str, key: str, tenant: str) -> bool:
        """Return whether a rule or a pause holds for a tenant's calls of this key."""
        return any(self.rules.choose(family, key, tenant, self._clock())) or self.is_paused(family, key, tenant)

    def pauses(self) -> list[KeyPause]:
        """Return what is paused now."""
        now = self._clock()
        return [each for each in self._pauses.values() if each.until > now]

    # -- the store

    def _subject(self, what: str, which: RuleId) -> str:
        return subjects.limit(self.stream, what, which.family, which.key, subjects.limit_scope(which.tenant))

    async def _store(
        self, subject: str, plain: Mapping[str, Any], holds_s: float | None, *, expected: int | None = None
    ) -> None:
        told = {headers.MSG_ID: subjects.new_id()}
        if holds_s is not None:
            told |= await self._lifetime(subject, holds_s + EXPIRED_TTL_S, is_new=expected == 0)
        if expected is not None:
            told[headers.EXPECTED] = str(expected)
        data = json.dumps(plain).encode()
        ack = await self._connection.store(subject, data, told, timeout_s=STORE_S)
        self._see(subject, ack.seq, data)

    async def _delete(self, what: str, which: RuleId) -> Override | KeyPause | None:
        """Delete what is stored, and return it. None: nothing was, or nothing that can be read."""
        subject = self._subject(what, which)
        stored = await self._last(subject)
        if stored is None or headers.KV_OPERATION in stored.headers:
            return None
        told = {headers.MSG_ID: subjects.new_id(), headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub"}
        ack = await self._connection.store(subject, b"", told, timeout_s=STORE_S)  # for good, see `_lifetime`
        self._see(subject, ack.seq, b"")
        return self._read(stored, subject)

    async def _lifetime(self, subject: str, least_s: float, *, is_new: bool) -> dict[str, str]:
        """Return the header of a pause that is to expire: none if a message that it replaces does not expire.

        The newest message of a key must not expire before one that it has replaced: that one comes back after a kill -9
        of the server (docs/decisions/deleted-keys.md). `is_new`: the subject has no message.
        """
        try:
            former = None if is_new else await self._last(subject)
        except Unavailable:
            return {}
        if former is not None:
            if former.expires_at is None:
                return {}
            least_s = max(least_s, former.expires_at - self._clock())
        return {headers.TTL: f"{math.ceil(least_s)}s"}

    async def _last(self, subject: str) -> Stored | None:
        try:
            return await self._connection.last(self.stream, subject)
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None

    def _heard(self, message: Received) -> None:
        told = message.headers
        subject, seq = told.get("Nats-Subject", ""), headers.number(told.get("Nats-Sequence", ""))
        self._see(subject, seq, b"" if headers.KV_OPERATION in told else message.data)

    def _see(self, subject: str, seq: int, data: bytes) -> None:
        if seq > self._seqs.get(subject, 0):
            self._seqs[subject] = seq
            self._take(subject, data)
            self._tell()

    def _tell(self) -> None:
        for each in list(self.listeners):
            each()

    def _take(self, subject: str, data: bytes) -> None:
        """Take what is stored on a subject: an override, a pause, or nothing any more."""
        if not data:
            if (which := self._ids.pop(subject, None)) is not None:
                self.rules.override(which, None)
            if (paused := self._paused.pop(subject, None)) is not None:
                self._pauses.pop(paused, None)
            return
        found = self._parse(subject, data)
        if isinstance(found, KeyPause):
            self._forget_ended()
            self._pauses[RuleId(*found[:3])] = found
            self._paused[subject] = RuleId(*found[:3])
        elif found is not None:
            self._ids[subject] = found.rule.id
            self.rules.override(found.rule.id, found)

    def _forget_ended(self) -> None:
        """Forget pauses that have ended by themselves: the server deletes them without a word."""
        now = self._clock()
        for subject, which in list(self._paused.items()):
            if self._pauses[which].until <= now:
                del self._paused[subject], self._pauses[which]
                self._seqs.pop(subject, None)

    def _read(self, stored: Stored | None, subject: str) -> Override | KeyPause | None:
        is_deleted = stored is None or headers.KV_OPERATION in stored.headers
        return None if stored is None or is_deleted else self._parse(subject, stored.data)

    def _parse(self, subject: str, data: bytes) -> Override | KeyPause | None:
        """Read what is stored on a subject. None: this version cannot read it, or it is for another key or tenant than
        its subject, by which users are permitted to write it.
        """
        try:
            found = _parse(data)
        except (BadInput, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is neither an override nor a pause that this aiqueue can read: %s", subject, error)
            return None
        what, which = ("rule", found.rule.id) if isinstance(found, Override) else ("pause", RuleId(*found[:3]))
        if subject != self._subject(what, which):
            log.warning("%s is ignored: it is for %s, which has another subject", subject, which)
            return None
        return found


def _check_text(name: str, value: object) -> None:
    if len(text(name, value)) > TEXT_MAX:
        raise BadInput(f"{name} is above the limit of {TEXT_MAX} characters")


def _parse(data: bytes) -> Override | KeyPause:
    """Read a stored override or pause. Raises BadInput, ValueError, TypeError, KeyError or AttributeError for anything
    else.
    """
    plain = json.loads(data)
    if plain.pop("v") != VERSION:
        raise ValueError("its version is unknown")
    which = RuleId(plain["family"], plain["key"], plain["tenant"])
    if "until" in plain:
        until = math.inf if plain["until"] is None else _time(plain["until"])
        return KeyPause(*which, until, str(plain["author"]), str(plain["why"]), _time(plain["set_at"]))
    rule = Rule(which, **check_limits(plain), window_s=parse_window(plain, "window_s"))
    expires_at = None if plain["expires_at"] is None else _time(plain["expires_at"])
    return Override(rule, str(plain["author"]), _time(plain["set_at"]), expires_at)


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    return float(value)
