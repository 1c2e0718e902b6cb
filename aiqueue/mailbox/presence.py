"""Which agents there are, and which are there now: a key-value bucket that `nats kv` reads too.

``agent.{tenant}.{agent}`` is a card and stays until it is taken out; ``live.{tenant}.{agent}`` is there while a process
serves the inbox, and goes by its TTL; who holds such a key is alone: see `Hold`. ``died.{tenant}.{agent}`` says over
which mail such processes have died.
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
GONE_TTL = "60s"  # how long the mark of a key that was taken out stays
TAKE_TRIES_MAX = 4


class Card(NamedTuple):
    """What an agent says of itself. `registered_at`: seconds since the epoch."""

    tenant: str
    agent: str
    kinds: tuple[str, ...]
    capabilities: tuple[str, ...]
    description: str
    registered_at: float

    def plain(self) -> dict[str, Any]:
        """As it is stored, in JSON."""
        return {"name": self.agent, **{key: value for key, value in self._asdict().items() if key != "agent"}}


class Presence:
    """The bucket."""

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
        subject = self._subject(CARD, tenant, agent)
        for what, words in (("kinds", kinds), ("capabilities", capabilities)):
            if isinstance(words, str) or not all(isinstance(each, str) for each in words):
                raise BadInput(f"{what} is a list of words, not {words!r}")
        known = await _last(self._connection, self.stream, subject)
        former = _card(known) if known is not None else None
        enqueued_at = former.registered_at if former else time.time()
        card = Card(tenant, agent, tuple(kinds), tuple(capabilities), description, enqueued_at)
        body = json.dumps(card.plain()).encode()
        if len(body) > CARD_BYTES_MAX:
            raise BadInput(f"the card of {agent} is {len(body):,} bytes, above the limit of {CARD_BYTES_MAX:,}")
        if card != former:
            await self._connection.store(subject, body, {headers.MSG_ID: subjects.new_id()})
        return card

    async def unregister(self, tenant: str, agent: str) -> bool:
        """Take an agent off the roster; its mail stays. False if it was not there."""
        subject = self._subject(CARD, tenant, agent)
        known = await _last(self._connection, self.stream, subject)
        if known is None or headers.KV_OPERATION in known.headers:
            return False
        await self._connection.store(subject, b"", _gone())
        return True

    async def card(self, tenant: str, agent: str) -> Card | None:
        stored = await _last(self._connection, self.stream, self._subject(CARD, tenant, agent))
        return _card(stored) if stored is not None else None

    async def roster(self, tenant: str | None = None) -> list[Card]:
        """The registered agents of a tenant, or of all. Raises InvalidToken, Unavailable, NotFound."""
        found = [_card(each) async for each in self._all(CARD, tenant)]
        return [each for each in found if each is not None]

    async def online(self, tenant: str | None = None) -> dict[tuple[str, str], float]:
        """(tenant, agent) of those whose inbox is served now, and since when."""
        found = {}
        async for stored in self._all(LIVE, tenant):
            parts = stored.subject.split(".")
            if len(parts) == 5 and headers.KV_OPERATION not in stored.headers:
                since = _plain(stored).get("since")
                found[parts[3], parts[4]] = float(since) if isinstance(since, int | float) else stored.time
        return found

    async def died(self, tenant: str, agent: str, seq: int) -> int:
        """Remember that a process died with this mail as the oldest in its hands. How often that was in a row, with
        less than an hour between two.
        """
        subject = self._subject(DIED, tenant, agent)
        known = await _last(self._connection, self.stream, subject)
        told = _plain(known) if known is not None else {}
        before = told.get("times") if told.get("seq") == seq else 0
        times = before + 1 if isinstance(before, int) else 1
        body = json.dumps({"seq": seq, "times": times}).encode()
        await self._connection.store(subject, body, {headers.MSG_ID: subjects.new_id(), headers.TTL: DIED_TTL})
        return times

    def hold(self, tenant: str, agent: str, ttl_s: float) -> Hold:
        """The key that says: this inbox is served, and by whom."""
        return Hold(self._connection, self.stream, self._subject(LIVE, tenant, agent), ttl_s)

    def duty(self, word: str, ttl_s: float) -> Hold:
        """A key for what one process does for all: it is `word`."""
        return Hold(self._connection, self.stream, subjects.bucket(self.stream, word), ttl_s)

    def _subject(self, what: str, tenant: str, agent: str) -> str:
        return subjects.bucket(self.stream, what, subjects.token("tenant", tenant), subjects.token("agent", agent))

    def _all(self, what: str, tenant: str | None) -> Any:
        whose = "*" if tenant is None else subjects.token("tenant", tenant)
        return self._connection.read(self.stream, subjects.bucket(self.stream, what, whose, "*"))


class Hold:
    """A key with a TTL that one process has at a time: it is written only where the sequence is the expected one."""

    def __init__(self, connection: Connection, stream: str, subject: str, ttl_s: float) -> None:
        self._connection = connection
        self._stream = stream
        self._subject = subject
        self._ttl = f"{ttl_s:g}s"
        self._seq = 0
        self.session = subjects.new_id()
        self.since = 0.0
        self.held = False

    async def take(self) -> bool:
        """Have it, if nobody has. Raises Unavailable, NotFound, QueueFull."""
        self.since = time.time()
        for _ in range(TAKE_TRIES_MAX):
            there = await _last(self._connection, self._stream, self._subject)
            if there is not None and headers.KV_OPERATION not in there.headers:
                if _plain(there).get("session") != self.session:
                    self.held = False
                    return False
                self._seq = there.seq
            else:
                self._seq = there.seq if there is not None else 0
            if await self._write():
                self.held = True
                return True
        return False

    async def keep(self) -> bool:
        """Tell that it is held still; False: another one has it. Raises Unavailable."""
        return await self._write() or await self.take()

    async def release(self) -> None:
        """Give it up. Safe twice and unheld; where the server is away the TTL does it."""
        if not self.held:
            return
        self.held = False
        try:
            await self._connection.store(
                self._subject, b"", {**_gone(), headers.EXPECTED: str(self._seq)}, timeout_s=2.0
            )
        except AIQueueError:
            return

    async def _write(self) -> bool:
        told = {headers.MSG_ID: subjects.new_id(), headers.TTL: self._ttl, headers.EXPECTED: str(self._seq)}
        body = json.dumps({"since": self.since, "session": self.session}).encode()
        try:
            ack = await self._connection.store(self._subject, body, told, timeout_s=5.0)
        except Conflict:
            return False
        self._seq = ack.seq
        return True


async def _last(connection: Connection, stream: str, subject: str) -> Stored | None:
    try:
        return await connection.last(stream, subject)
    except NotFound:
        raise NotFound(f"there is no stream {stream}: has `aiqueue apply` been run on this server?") from None


def _gone() -> dict[str, str]:
    return {
        headers.MSG_ID: subjects.new_id(), headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub", headers.TTL: GONE_TTL,
    }  # fmt: skip


def _plain(stored: Stored) -> Mapping[str, Any]:
    """The JSON of a value; empty for what anybody else has put there."""
    try:
        value = json.loads(stored.data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _card(stored: Stored) -> Card | None:
    parts = stored.subject.split(".")
    if len(parts) != 5 or headers.KV_OPERATION in stored.headers:
        return None
    if not all(subjects.TOKEN.fullmatch(each) for each in parts[3:]):
        return None
    told = _plain(stored)
    words = [told.get(key) for key in ("kinds", "capabilities")]
    kinds, capabilities = (tuple(str(one) for one in each) if isinstance(each, list) else () for each in words)
    enqueued_at = told.get("registered_at")
    at = float(enqueued_at) if isinstance(enqueued_at, int | float) else stored.time
    return Card(parts[3], parts[4], kinds, capabilities, str(told.get("description") or ""), at)
