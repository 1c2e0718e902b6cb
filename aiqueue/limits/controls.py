"""What operators and handlers set while the system runs: overrides of rules, and pauses. Stored, and watched by all."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .. import headers, subjects
from ..connection import Connection, Received, Subscription
from ..errors import BadInput
from ..topology import Topology
from .rules import Override, Rule, RuleId, Rules, make_rule

log = logging.getLogger(__name__)

VERSION = 1
PURGED_TTL = "60s"  # how long the marker of a deleted key stays
EXPIRED_TTL_S = 60  # how much longer than it holds something is stored
PAUSE_MAX_S = 31 * 86_400.0


class KeyPause(NamedTuple):
    """A value of a family's key is paused, over all tenants (None) or for one. Times: seconds since the epoch."""

    family: str
    key: str
    tenant: str | None
    until: float
    author: str
    why: str
    set_at: float


class Controls:
    """The overrides and pauses of one server. `rules` follows the overrides."""

    def __init__(self, connection: Connection, topology: Topology, rules: Rules, clock: Callable[[], float]) -> None:
        """`clock` returns the server's time."""
        self._connection, self._topology, self.rules, self._clock = connection, topology, rules, clock
        self.stream = topology.limits_stream.name
        self._ids: dict[str, RuleId] = {}  # by subject
        self._pauses: dict[tuple[str, str, str | None], KeyPause] = {}
        self._paused: dict[str, tuple[str, str, str | None]] = {}  # by subject
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

    # -- rules

    async def set_rule(self, fields: Mapping[str, Any], *, author: str, expires_in_s: float | None = None) -> Override:
        """Override a rule, or set one that is not declared, for everybody: within a second, and until it expires.

        `fields`: as in a table ``[[limit]]``. Without any limit, the override lifts the declared rule. Raises BadInput.
        """
        rule = make_rule(self._topology, fields, may_be_unlimited=True)
        if rule.is_unlimited and rule.id not in self.rules.declared:
            raise BadInput(
                f"there is no declared rule to lift for {rule.id}: give at least one of requests, cost, in_flight"
            )
        if expires_in_s is not None and not 1 <= expires_in_s <= 366 * 86_400:
            raise BadInput(f"an override expires after 1 second to 366 days, not {expires_in_s!r}")
        now = self._clock()
        override = Override(rule, author, now, None if expires_in_s is None else now + expires_in_s)
        plain = {"v": VERSION, **rule.plain(), **{key: getattr(override, key) for key in override._fields[1:]}}
        await self._store(self._subject("rule", rule.id), plain, expires_in_s)
        return override

    async def unset_rule(self, which: RuleId) -> bool:
        """Remove an override. Return False if there is none."""
        return await self._delete(self._subject("rule", which))

    # -- pauses

    async def pause(
        self, family: str, key: str, tenant: str | None = None, *, for_s: float, author: str, why: str = ""
    ) -> None:
        """Let no call of this key start for so many seconds, in any process. A pause never shortens a longer one.

        Raises BadInput.
        """
        if isinstance(for_s, bool) or not isinstance(for_s, int | float) or not 0 < for_s <= PAUSE_MAX_S:
            raise BadInput(f"a pause lasts up to {PAUSE_MAX_S:,.0f} seconds, not {for_s!r}")
        now = self._clock()
        pause = KeyPause(family, key, tenant, now + for_s, author, why, now)
        known = self._pauses.get((family, key, tenant))
        if known is not None and known.until >= pause.until:
            return
        subject = self._subject("pause", RuleId(family, key, tenant))
        data = json.dumps({"v": VERSION, **pause._asdict()}).encode()
        self._take(subject, data)  # here at once
        self._tell()
        await self._store(subject, {"v": VERSION, **pause._asdict()}, for_s)

    async def resume(self, family: str, key: str, tenant: str | None = None) -> bool:
        """End a pause. Return False if there is none."""
        return await self._delete(self._subject("pause", RuleId(family, key, tenant)))

    def paused_until(self, family: str, key: str, tenant: str) -> float:
        """Return until when a tenant's calls of this key are paused, by the server's time; 0 if they are not."""
        if not self._pauses:
            return 0.0
        found = (self._pauses.get((family, key, whom)) for whom in (None, tenant))
        return max((each.until for each in found if each is not None), default=0.0)

    def pauses(self) -> list[KeyPause]:
        """Return what is paused now."""
        now = self._clock()
        return [each for each in self._pauses.values() if each.until > now]

    # -- the store

    def _subject(self, what: str, which: RuleId) -> str:
        return subjects.limit(self.stream, what, which.family, which.key, subjects.limit_scope(which.tenant))

    async def _store(self, subject: str, plain: Mapping[str, Any], holds_s: float | None) -> None:
        told = {headers.MSG_ID: subjects.new_id()}
        if holds_s is not None:
            told[headers.TTL] = f"{math.ceil(holds_s) + EXPIRED_TTL_S}s"
        ack = await self._connection.store(subject, json.dumps(plain).encode(), told, timeout_s=10)
        self._see(subject, ack.seq, json.dumps(plain).encode())

    async def _delete(self, subject: str) -> bool:
        stored = await self._connection.last(self.stream, subject)
        if stored is None or headers.KV_OPERATION in stored.headers:
            return False
        told = {headers.MSG_ID: subjects.new_id(), headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub"}
        ack = await self._connection.store(subject, b"", {**told, headers.TTL: PURGED_TTL}, timeout_s=10)
        self._see(subject, ack.seq, b"")
        return True

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
        try:
            found = _parse(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is neither an override nor a pause that this aiqueue can read: %s", subject, error)
            return
        if isinstance(found, KeyPause):
            self._pauses[found[:3]] = found
            self._paused[subject] = found[:3]
        else:
            self._ids[subject] = found.rule.id
            self.rules.override(found.rule.id, found)


def _parse(data: bytes) -> Override | KeyPause:
    """Read a stored override or pause. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    plain = json.loads(data)
    if plain.pop("v") != VERSION:
        raise ValueError("its version is unknown")
    if "until" in plain:
        return KeyPause(**plain)
    which = RuleId(plain["family"], plain["key"], plain["tenant"])
    rule = Rule(which, plain["requests"], plain["cost"], plain["in_flight"], float(plain["window_s"]))
    return Override(rule, plain["author"], plain["set_at"], plain["expires_at"])
