"""The roster of agents and their presence: a key-value bucket, which `nats kv` can read.

Keys:
1. ``agent.{tenant}.{agent}``: an agent's card. It stays until the agent is unregistered.
2. ``live.{tenant}.{agent}``: a process serves the inbox. The key is a `PresenceLock`, so it expires by its TTL.
3. ``died.{tenant}.{agent}``: how many processes in a row died over which mail.
4. A name without a tenant: the lock of a duty that one process does for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import AIQueueError, BadInput, Conflict, NotFound
from ..topology import Topology

CARD, LIVE, DIED = "agent", "live", "died"
CARD_BYTES_MAX = 16_384
DIED_TTL = "1h"
PURGED_TTL = "60s"  # how long the marker of a deleted lock stays: longer than the lock itself would
CARD_PURGED_TTL = "720h"  # and that of a card, which may come back then, by a kill -9 of the server
ACQUIRE_TRIES_MAX = 4


class Card(NamedTuple):
    """An agent's entry on the roster. `registered_at`: seconds since the epoch."""

    tenant: str
    agent: str
    kinds: tuple[str, ...]
    capabilities: tuple[str, ...]
    description: str
    registered_at: float

    def plain(self) -> dict[str, Any]:
        """Return the card as it is stored, in JSON."""
        return {"name": self.agent, **{key: value for key, value in self._asdict().items() if key != "agent"}}


class Presence:
    """Access to the bucket of cards and presence keys."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.presence_stream.name

    async def register(
        self,
        tenant: str,
        agent: str,
        *,
        kinds: Sequence[str] = (),
        capabilities: Sequence[str] = (),
        description: str = "",
    ) -> Card:
        """Put an agent on its tenant's roster, or replace its card.

        Raises BadInput, QueueFull, Unavailable, NotFound.
        """
        subject = self._key_subject(CARD, tenant, agent)
        for what, names in (("kinds", kinds), ("capabilities", capabilities)):
            if isinstance(names, str) or not all(isinstance(each, str) for each in names):
                raise BadInput(f"{what} must be a list of strings, not {names!r}")
        stored = await _read_key(self._connection, self.stream, subject)
        former = _parse_card(stored) if stored is not None else None
        registered_at = former.registered_at if former else time.time()
        card = Card(tenant, agent, tuple(kinds), tuple(capabilities), description, registered_at)
        body = json.dumps(card.plain()).encode()
        if len(body) > CARD_BYTES_MAX:
            raise BadInput(f"the card of {agent} is {len(body):,} bytes, above the limit of {CARD_BYTES_MAX:,}")
        if card != former:
            await self._connection.store(subject, body, {headers.MSG_ID: subjects.new_id()})
        return card

    async def unregister(self, tenant: str, agent: str) -> bool:
        """Remove an agent from the roster; its mail stays. Return False if the agent was not on the roster."""
        subject = self._key_subject(CARD, tenant, agent)
        stored = await _read_key(self._connection, self.stream, subject)
        if stored is None or headers.KV_OPERATION in stored.headers:
            return False
        await self._connection.store(subject, b"", {**_purge_headers(), headers.TTL: CARD_PURGED_TTL})
        return True

    async def card(self, tenant: str, agent: str) -> Card | None:
        """Return the card of an agent; None if the agent is not registered."""
        stored = await _read_key(self._connection, self.stream, self._key_subject(CARD, tenant, agent))
        return _parse_card(stored) if stored is not None else None

    async def roster(self, tenant: str | None = None) -> list[Card]:
        """Return the cards of a tenant's agents; None: of all tenants. Raises InvalidToken, Unavailable, NotFound."""
        cards = [_parse_card(each) async for each in self._read_keys(CARD, tenant)]
        return [each for each in cards if each is not None]

    async def online(self, tenant: str | None = None) -> dict[tuple[str, str], float]:
        """Return (tenant, agent) of each inbox that a process serves now, with the time since when."""
        found = {}
        async for stored in self._read_keys(LIVE, tenant):
            key = subjects.parse_agent_key(stored.subject)
            if key is not None and headers.KV_OPERATION not in stored.headers:
                since = _parse_value(stored).get("since")
                found[key] = float(since) if isinstance(since, int | float) else stored.time
        return found

    async def record_death(self, tenant: str, agent: str, seq: int) -> int:
        """Record that a process died while the mail `seq` was the oldest it held.

        Return how many processes in a row died over this mail, with less than an hour between two deaths.
        """
        subject = self._key_subject(DIED, tenant, agent)
        stored = await _read_key(self._connection, self.stream, subject)
        known = _parse_value(stored) if stored is not None else {}
        before = known.get("times") if known.get("seq") == seq else 0
        times = before + 1 if isinstance(before, int) else 1
        body = json.dumps({"seq": seq, "times": times}).encode()
        await self._connection.store(subject, body, {headers.MSG_ID: subjects.new_id(), headers.TTL: DIED_TTL})
        return times

    def inbox_lock(self, tenant: str, agent: str, ttl_s: float) -> PresenceLock:
        """Return the lock of an inbox. The process that holds the lock serves the inbox."""
        return PresenceLock(self._connection, self.stream, self._key_subject(LIVE, tenant, agent), ttl_s)

    def duty_lock(self, name: str, ttl_s: float) -> PresenceLock:
        """Return the lock of a duty that one process does for all. The key is `name`."""
        return PresenceLock(self._connection, self.stream, subjects.bucket(self.stream, name), ttl_s)

    def _key_subject(self, what: str, tenant: str, agent: str) -> str:
        return subjects.bucket(self.stream, what, subjects.token("tenant", tenant), subjects.token("agent", agent))

    def _read_keys(self, what: str, tenant: str | None) -> Any:
        tenant_token = "*" if tenant is None else subjects.token("tenant", tenant)
        return self._connection.read(self.stream, subjects.bucket(self.stream, what, tenant_token, "*"))


class PresenceLock:
    """A key with a TTL that one process holds at a time.

    Writes use optimistic concurrency: the server rejects a write that names a stale sequence. `session` identifies the
    holder in the key's value.
    """

    def __init__(self, connection: Connection, stream: str, subject: str, ttl_s: float) -> None:
        self._connection = connection
        self._stream = stream
        self._subject = subject
        self._ttl = f"{ttl_s:g}s"
        self._seq = 0
        self.session = subjects.new_id()
        self.since = 0.0
        self.held = False

    async def acquire(self) -> bool:
        """Take the lock if no other process holds it. Raises Unavailable, NotFound, QueueFull."""
        self.since = time.time()
        for _ in range(ACQUIRE_TRIES_MAX):
            stored = await _read_key(self._connection, self._stream, self._subject)
            if stored is not None and headers.KV_OPERATION not in stored.headers:
                if _parse_value(stored).get("session") != self.session:
                    self.held = False
                    return False
                self._seq = stored.seq
            else:
                self._seq = stored.seq if stored is not None else 0
            if await self._write():
                self.held = True
                return True
        return False

    async def renew(self) -> bool:
        """Extend the lock by its TTL. Return False if another process holds it now. Raises Unavailable."""
        return await self._write() or await self.acquire()

    async def release(self) -> None:
        """Delete the key. Safe twice and unheld. If the server does not answer, the key expires by its TTL."""
        if not self.held:
            return
        self.held = False
        try:
            await self._connection.store(
                self._subject, b"", {**_purge_headers(), headers.EXPECTED: str(self._seq)}, timeout_s=2.0
            )
        except AIQueueError:
            return

    async def _write(self) -> bool:
        """Write the key. Return False if another process has written it since."""
        key_headers = {headers.MSG_ID: subjects.new_id(), headers.TTL: self._ttl, headers.EXPECTED: str(self._seq)}
        body = json.dumps({"since": self.since, "session": self.session}).encode()
        try:
            ack = await self._connection.store(self._subject, body, key_headers, timeout_s=5.0)
        except Conflict:
            return False
        self._seq = ack.seq
        return True


async def _read_key(connection: Connection, stream: str, subject: str) -> Stored | None:
    try:
        return await connection.last(stream, subject)
    except NotFound:
        raise NotFound(f"there is no stream {stream}: has `aiqueue apply` been run on this server?") from None


def _purge_headers() -> dict[str, str]:
    return {
        headers.MSG_ID: subjects.new_id(), headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub",
        headers.TTL: PURGED_TTL,
    }  # fmt: skip


def _parse_value(stored: Stored) -> Mapping[str, Any]:
    """Return the JSON object in a key's value; an empty one if another program stored something else."""
    try:
        value = json.loads(stored.data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _parse_card(stored: Stored) -> Card | None:
    """Return the card in a key; None if the key is deleted, or is not that of an agent."""
    key = subjects.parse_agent_key(stored.subject)
    if key is None or headers.KV_OPERATION in stored.headers:
        return None
    if not all(subjects.TOKEN.fullmatch(each) for each in key):
        return None
    value = _parse_value(stored)
    lists = [value.get(name) for name in ("kinds", "capabilities")]
    kinds, capabilities = (tuple(str(one) for one in each) if isinstance(each, list) else () for each in lists)
    registered_at = value.get("registered_at")
    at = float(registered_at) if isinstance(registered_at, int | float) else stored.time
    return Card(*key, kinds, capabilities, str(value.get("description") or ""), at)
