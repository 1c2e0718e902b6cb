"""Tenants' API keys: who holds one, and whether one more request of it is within its limits."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from .. import subjects
from ..errors import AboveLimit, AIQueueError, BadInput, Conflict, QueueFull, Unavailable
from .api_key_store import (
    TOKEN_CHARS_MAX,
    ApiKey,
    ApiKeyStore,
    StoredApiKey,
    hash_of,
    id_of,
    names_or_all,
    new_token,
)

if TYPE_CHECKING:
    from ..client import Client
    from ..connection import Received
    from ..limits import Credit, Limiter

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5  # how often the bucket is asked for what is new, whatever was heard
STALE_S: Final = 1.0  # how old the last look may be for `admit`
LOOK_WAIT_S: Final = 5.0  # how long `admit` waits for the next one
FULL_LOOK_S: Final = 60.0  # how often everything is read, which also finds what was deleted without a marker
ADD_TRIES_MAX: Final = 3
FAMILY: Final = "gateway.requests"
LIMITED: Final = "gateway.keys"  # as limits know it: no family has this name, so no rule of limits.toml is meant
BEGIN_TRIES_MAX: Final = 20
ADMIT_S: Final = 0.25  # how long a request waits for room in its key's limits
ADMIT_MAX_S: Final = 5.0  # and for a server that does not answer
WINDOW_S: Final = 60.0


class KeyLimited(QueueFull):
    """A request is above a limit of its API key, and was not admitted. `retry_after_s`: when there is room for it.
    `what`: "requests" or "tokens" a minute.
    """

    what_is_full = "{} is at its limit"

    def __init__(self, key: ApiKey, what: str, limit: int, retry_after_s: float) -> None:
        reason = f"{what} of this minute are used"
        super().__init__(f"API key {key.id}", reason, limit=limit, retry_after_s=retry_after_s)
        self.what = what


class KeyRevoked(AIQueueError):
    """An API key was revoked after it was found. Nothing was admitted."""


class KeyCredit:
    """A request that its key's limits admit. Call `settle` when its answer has come, or it has failed."""

    __slots__ = ("_counts_tokens", "_credit")

    def __init__(self, credit: Credit | None = None, *, counts_tokens: bool = False) -> None:
        """`counts_tokens`: the key has a limit of tokens, so they were reserved."""
        self._credit = credit
        self._counts_tokens = counts_tokens

    def settle(self, tokens: float | None = None) -> None:
        """Count what was used, in place of what was reserved; None: as reserved. 0: nothing was. Safe twice."""
        if self._credit is not None:
            self._credit.settle(tokens if self._counts_tokens else None)


class ApiKeys:
    """The API keys on one server.

    `add`, `list`, `get` and `revoke` need an open client only. Between `start` and `close` a copy of all keys is kept,
    for `find` and `admit`: a key that is added or revoked anywhere is so here within a second. While the server does
    not answer, the copy stays, so no key that was revoked comes back, and none is refused that was not.
    """

    def __init__(self, client: Client) -> None:
        from ..connection import ChangeWatch  # noqa: PLC0415

        self._client = client
        self._store = ApiKeyStore(client.connection, client.topology)
        self._known: dict[str, StoredApiKey] = {}
        self._seq = 0  # up to which the bucket was read
        self._watch = ChangeWatch(
            client.connection, f"{subjects.API_KEYS}.>", self._look, what="API keys", key_of=_key_of,
            every_s=lambda: LOOK_S, regained=self._on_regained,
        )  # fmt: skip
        self._is_started = False
        self._looked_at = self._read_all_at = -math.inf
        self._looked = asyncio.Event()  # set after each look
        self._limiter: Limiter | None = None
        self._opening = asyncio.Lock()

    async def start(self) -> None:
        """Read all keys, and follow them.

        Raises NotFound (no stream: run `aiqueue apply`), Unavailable, AccessDenied.
        """
        await self._watch.start()
        self._is_started = True

    async def close(self) -> None:
        """Stop. Safe twice, and before `start`."""
        self._is_started = False
        await self._watch.stop()
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            await limiter.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- who asks

    def find(self, token: str) -> ApiKey | None:
        """Return the key with this token; None: there is none, or it was revoked. Asks no server."""
        if not self._is_started:
            raise BadInput("ApiKeys knows no key before start(): await it first")
        if not isinstance(token, str) or len(token) > TOKEN_CHARS_MAX:
            return None
        hashed = hash_of(token)
        found = self._known.get(id_of(hashed))
        if found is None or found.key is None or found.key.is_revoked:
            return None
        return found.key if hmac.compare_digest(found.key.hash, hashed) else None

    async def admit(self, key: ApiKey, *, tokens: float = 0.0) -> KeyCredit:
        """Count one request of a key, which uses so many tokens at most, against its limits. Call this before the
        request is stored; then `settle` what this returns.

        - Raises KeyLimited: not now; it says when.
        - Raises BadInput: the request alone is above the key's tokens a minute.
        - Raises KeyRevoked: the key was revoked meanwhile, perhaps while this process had no connection.
        - Raises Unavailable: the server has not answered for seconds.
        """
        await self._be_current()
        if key.id not in self._known:  # it is new, and not heard of here
            await self._ask_leader(key.id)
        known = self._known.get(key.id)
        if known is None or known.key is None or known.key.is_revoked:
            raise KeyRevoked(f"API key {key.id} was revoked")
        key = known.key
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return KeyCredit()
        limiter = await self._open_limiter()
        self._use_rule(limiter, key)
        try:
            for _ in range(BEGIN_TRIES_MAX):  # the rule of another key, which was new, may void what was granted
                credit = await self._acquire(limiter, key, tokens)
                if credit.begin():
                    return KeyCredit(credit, counts_tokens=key.tokens_per_minute is not None)
        except AboveLimit:
            raise BadInput(
                f"this request can use {tokens:,.0f} tokens, and API key {key.id} has {key.tokens_per_minute:,} a "
                "minute: lower max_tokens"
            ) from None
        raise Unavailable(f"the limits of API key {key.id} change all the time")

    async def _be_current(self) -> None:
        """Return when a look has begun a second ago at most. Raises Unavailable."""
        if not self._is_started:
            raise BadInput("ApiKeys admits no request before start(): await it first")
        try:
            async with asyncio.timeout(LOOK_WAIT_S):
                while time.monotonic() - self._looked_at > STALE_S:
                    self._looked.clear()
                    self._watch.wake.set()
                    await self._looked.wait()
        except TimeoutError:
            raise Unavailable(f"API keys have not been read for {time.monotonic() - self._looked_at:.0f} s") from None

    # -- limits

    async def _open_limiter(self) -> Limiter:
        from ..limits import Limiter, Rules  # noqa: PLC0415

        async with self._opening:
            if self._limiter is None:
                limiter = Limiter(self._client.connection, self._client.topology, Rules())
                await limiter.open()
                self._limiter = limiter
            return self._limiter

    def _use_rule(self, limiter: Limiter, key: ApiKey) -> None:
        from ..limits import Override, Rule, RuleId  # noqa: PLC0415

        rules, which = limiter.controls.rules, RuleId(LIMITED, key.id, None)
        if which not in rules.overrides:  # limits of a key do not change
            rule = Rule(which, key.requests_per_minute, key.tokens_per_minute, window_s=WINDOW_S)
            rules.override(which, Override(rule, "", key.created_at, None))

    async def _acquire(self, limiter: Limiter, key: ApiKey, tokens: float) -> Credit:
        """Reserve. Raises AboveLimit, KeyLimited, Unavailable."""
        asked: dict[str, Any] = {"cost": float(tokens) if key.tokens_per_minute is not None else 0.0, "weight": 1.0}
        credit = limiter.try_acquire(LIMITED, key.id, key.tenant, **asked)
        if credit is not None:
            return credit
        waiting = asyncio.ensure_future(limiter.acquire(LIMITED, key.id, key.tenant, **asked))
        try:
            for _ in range(int(ADMIT_MAX_S / ADMIT_S)):
                done, _pending = await asyncio.wait([waiting], timeout=ADMIT_S)
                if done:
                    return waiting.result()
                if (shortage := limiter.shortage(LIMITED, key.id, cost=asked["cost"])) is not None:
                    what, wait_s = shortage
                    limit = key.requests_per_minute if what == "requests" else key.tokens_per_minute
                    raise KeyLimited(key, "tokens" if what == "cost" else what, limit or 0, max(0.1, round(wait_s, 3)))
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.wait([waiting])
        raise Unavailable(f"the limits of API key {key.id} have not been read for {ADMIT_MAX_S:g} s")

    # -- what operators do

    async def add(
        self,
        tenant: str,
        *,
        name: str = "",
        models: Sequence[str] | None = None,
        priorities: Sequence[str] | None = None,
        budget_micros: int | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Store a new key of a tenant, and return it with its token, which nobody can be told again.

        None: all models and priorities, no limit, and no budget besides that of the tenant. `budget_micros`: in a month
        (UTC), in micro-dollars.

        Raises BadInput, NotFound (no stream: run `aiqueue apply`), QueueFull, AccessDenied, Unavailable.
        """
        given = names_or_all("priorities", priorities)
        known = self._client.topology.family(FAMILY).priorities
        if unknown := [each for each in given or () if each not in known]:
            raise BadInput(f"{FAMILY} has no priority {unknown[0]!r:.40}: it has {', '.join(known)}")
        key = ApiKey(
            id="", tenant=tenant, name=name, models=names_or_all("models", models), priorities=given,
            budget_micros=budget_micros, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        )  # fmt: skip
        key = replace(key, created_at=round(await self._store.now(), 3))
        for tries_left in range(ADD_TRIES_MAX, 0, -1):
            token = new_token()
            key = replace(key, id=id_of(hash_of(token)), hash=hash_of(token))
            try:
                self._take(StoredApiKey(key.id, await self._store.add(key), key))
            except Conflict:
                found = await self._store.find(key.id)
                if found is not None and found.key == key:
                    break  # an earlier try, whose PubAck was lost
                if tries_left == 1:
                    raise
            else:
                break
        return key, token

    async def list(self, tenant: str | None = None) -> list[ApiKey]:
        """Return the keys of a tenant (None: of all), also revoked ones, by tenant and in the order of their creation.

        What cannot be read is logged, and left out. Raises NotFound, AccessDenied, Unavailable.
        """
        if tenant is not None:
            subjects.token("tenant", tenant)
        newest: dict[str, StoredApiKey] = {}
        async for each in self._store.read():
            newest[each.id] = each
        _warn(newest.values())
        found = [each.key for each in newest.values() if each.key is not None and tenant in (None, each.key.tenant)]
        return sorted(found, key=lambda each: (each.tenant, each.created_at, each.id))

    async def get(self, key_id: str) -> ApiKey | None:
        """Return the key of this id as it is stored now, also a revoked one; None: there is none, or it cannot be read.

        Raises NotFound (no stream), AccessDenied, Unavailable.
        """
        found = await self._store.find(key_id)
        return None if found is None else found.key

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key, and return it: within a second it is refused everywhere. Requests that were accepted go on.
        Revoked again, it stays as it is.

        Raises BadInput if there is no such key; NotFound (no stream), AccessDenied, Unavailable.
        """
        revoked = await self._store.revoke(key_id)
        self._take(revoked)
        assert revoked.key is not None
        return revoked.key

    # -- the copy

    def _on_regained(self) -> None:
        """The connection was lost, and notices with it: nothing is admitted before the next look."""
        self._looked_at = -math.inf

    async def _look(self) -> None:
        """Read what is new, and every minute all there is. Raises NotFound, Unavailable, AccessDenied."""
        begun, noticed = time.monotonic(), self._watch.take_noticed()
        try:
            if begun - self._read_all_at >= FULL_LOOK_S:
                await self._read_all()
                self._read_all_at = begun
            else:
                async for each in self._store.read(seq=self._seq + 1):
                    self._seq = each.seq
                    self._take(each)
            for key_id in list(noticed):  # by a server of a cluster that is behind, it was not read yet
                await self._ask_leader(key_id)
                noticed.discard(key_id)
        finally:
            self._watch.noticed |= noticed  # those that the leader was not asked for
        self._looked_at = begun
        self._looked.set()

    async def _read_all(self) -> None:
        """Read everything, perhaps from a server of a cluster that is behind: where that is not what is known, the
        stream's leader is asked.
        """
        found = {each.id: each async for each in self._store.read()}
        self._seq = max((each.seq for each in found.values()), default=0)
        if not self._known:
            self._known = found
            _warn(found.values())
            return
        for key_id in found.keys() | self._known.keys():
            known, read = self._known.get(key_id), found.get(key_id)
            if known is None or read is None or known.seq != read.seq:
                await self._ask_leader(key_id)

    async def _ask_leader(self, key_id: str) -> None:
        stored = await self._store.find(key_id)
        if stored is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = stored
            _warn([stored])

    def _take(self, stored: StoredApiKey) -> None:
        known = self._known.get(stored.id)
        if self._is_started and (known is None or stored.seq > known.seq):
            self._known[stored.id] = stored
            _warn([stored])


def _key_of(message: Received) -> str:
    """Return the key of which a notice is: its message is the subject of what was stored, and its sequence."""
    key_id = message.headers.get("Nats-Subject", "").rpartition(".")[2]
    return key_id if subjects.TOKEN.fullmatch(key_id) else ""


def _warn(stored: Iterable[StoredApiKey]) -> None:
    for each in stored:
        if each.problem:
            log.warning("%s", each.problem)
