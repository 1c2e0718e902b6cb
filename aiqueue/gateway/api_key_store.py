"""API keys as they are stored: the document of a key, without its token, and the bucket of all documents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from .. import headers, subjects
from ..errors import BadInput, Conflict, NotFound
from ..topology import Topology
from .bucket_room import check_room
from .budgets import AMOUNT_MAX, Budget

if TYPE_CHECKING:
    from ..connection import Connection, Stored  # it imports nats, which imports aiohttp where that is installed

VERSION: Final = 1
PREFIX: Final = "aiq-"
TOKEN_BYTES: Final = 32
TOKEN_CHARS_MAX: Final = 256
ID_CHARS: Final = 16  # of the token's hash
NAME_CHARS_MAX: Final = 100
MODELS_MAX: Final = 100
COUNT_MAX: Final = 10**9
STORE_S: Final = 5.0
TRIES_MAX: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What a holder of a token may do. The token itself is stored nowhere: `add` returns it once.

    - `id`: 16 hexadecimal digits, by which the key is listed and revoked. No secret.
    - `models`, `priorities`: what it may ask for. None: all.
    - `budget_micros`: what calls may cost in a month (UTC), in micro-dollars, besides the tenant's budget.
    - `requests_per_minute`, `tokens_per_minute`: over all models. None: no such limit.
    - `created_at`, `revoked_at`: seconds since the epoch, by the server's clock. `revoked_at`: None: the key is valid.
    """

    id: str
    tenant: str
    """Tenant in whose name the key asks."""
    name: str = ""
    """Text by which operators know the key."""
    models: tuple[str, ...] | None = None
    priorities: tuple[str, ...] | None = None
    budget_micros: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created_at: float = 0.0
    revoked_at: float | None = None
    hash: str = field(default="", repr=False)
    """SHA-256 of the key's token."""

    def __post_init__(self) -> None:
        """Raise BadInput, in one line, for what no API key is."""
        subjects.token("tenant", self.tenant)
        if not isinstance(self.name, str) or len(self.name) > NAME_CHARS_MAX or not self.name.isprintable():
            raise BadInput(f"the name of an API key is a line of at most {NAME_CHARS_MAX} characters")
        for what, names in (("models", self.models), ("priorities", self.priorities)):
            if names is not None and (not 1 <= len(names) <= MODELS_MAX or not all(map(_is_name, names))):
                raise BadInput(f"{what} of an API key are 1 to {MODELS_MAX} names, or None for all, not {names!r:.80}")
        limits = (
            ("requests_per_minute", self.requests_per_minute, COUNT_MAX),
            ("tokens_per_minute", self.tokens_per_minute, COUNT_MAX),
            ("budget_micros", self.budget_micros, AMOUNT_MAX),
        )
        for what, value, most in limits:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise BadInput(f"{what} of an API key is a whole number from 1 to {most:,}, not {value!r:.40}")

    @property
    def is_revoked(self) -> bool:
        """Whether requests with the key are refused."""
        return self.revoked_at is not None

    @property
    def budget(self) -> Budget | None:
        """The key's own budget, besides that of its tenant."""
        return None if self.budget_micros is None else Budget(self.tenant, self.budget_micros, key=self.id)

    def allows(self, model: str) -> bool:
        """Return whether this key may ask for a model, by its name in gateway.toml."""
        return self.models is None or model in self.models

    def allows_priority(self, priority: str) -> bool:
        """Return whether this key's requests may have a priority."""
        return self.priorities is None or priority in self.priorities

    def plain(self) -> dict[str, Any]:
        """Return all that is known of the key, but its hash."""
        plain = asdict(self)
        del plain["hash"]
        return plain

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Self:
        """Read a stored document. What a later version has added is ignored. Raises BadInput, TypeError."""
        given = {name: value for name, value in plain.items() if name in _FIELDS}
        for name in ("models", "priorities"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        found = cls(**given)
        times = [found.created_at] if found.revoked_at is None else [found.created_at, found.revoked_at]
        if not isinstance(found.hash, str) or id_of(found.hash) != found.id or not all(map(_is_time, times)):
            raise BadInput("it has no id, hash or time of an API key")
        return found


_FIELDS = frozenset(each.name for each in fields(ApiKey))


def new_token() -> str:
    """Return a new token: ``aiq-`` and 32 random bytes."""
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def hash_of(token: str) -> str:
    """Return what is stored of a token. A slow hash would protect nothing: a token is not guessed, but random."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def id_of(hashed: str) -> str:
    """Return the id of the key with this hash."""
    return hashed[:ID_CHARS]


class StoredApiKey(NamedTuple):
    """What the bucket holds under an id. `key`: None: it was deleted, or this version cannot read it."""

    id: str
    seq: int
    key: ApiKey | None
    problem: str = ""  # why it cannot be read


class ApiKeyStore:
    """Reads and writes the bucket of API keys on one server. Without state of its own."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self.connection = connection
        self.stream = topology.api_keys_stream.name

    async def now(self) -> float:
        """Return the server's time, in seconds since the epoch."""
        with self._explaining():
            await self.connection.clock.ensure(self.stream)
        return self.connection.clock.now()

    async def find(self, key_id: str) -> StoredApiKey | None:
        """Return what the stream's leader has under an id; None: nothing.

        Raises NotFound (no stream), Unavailable, AccessDenied.
        """
        with self._explaining():
            stored = await self.connection.last(self.stream, self._subject(key_id))
        return None if stored is None else _parse(stored)

    async def read(self, *, seq: int = 1) -> AsyncIterator[StoredApiKey]:
        """Yield what is stored, in the order of writes, from a sequence on. One server of a cluster may be behind.

        Raises NotFound, Unavailable, AccessDenied.
        """
        with self._explaining():
            async for stored in self.connection.read(self.stream, subjects.bucket(self.stream), seq=seq):
                yield _parse(stored)

    async def add(self, key: ApiKey) -> int:
        """Store a new key. Raises Conflict (its id is taken), QueueFull, NotFound, Unavailable, AccessDenied.

        The last tenth of the bucket is kept free: a full one would refuse to store that a key is revoked.
        """
        with self._explaining():
            await check_room(self.connection, self.stream, "API keys", "revocations")
        return await self._put(key, 0)

    async def revoke(self, key_id: str) -> StoredApiKey:
        """Store that a key is revoked, and return what is stored. Revoked again, it keeps its time.

        Raises BadInput (there is none, or it cannot be read), and as `add`.
        """
        for _ in range(TRIES_MAX):
            found = await self.find(key_id)
            if found is None or found.key is None:
                problem = found.problem if found is not None and found.problem else f"there is no API key {key_id[:80]}"
                raise BadInput(f"{problem}; `aiqueue gateway keys ls` lists them")
            if found.key.is_revoked:
                return found
            revoked = replace(found.key, revoked_at=round(await self.now(), 3))
            with contextlib.suppress(Conflict):
                return StoredApiKey(key_id, await self._put(revoked, found.seq), revoked)
        raise Conflict(f"API key {key_id} changes all the time: revoke it again")

    async def _put(self, key: ApiKey, expected: int) -> int:
        body = json.dumps({"v": VERSION, **key.plain(), "hash": key.hash}, separators=(",", ":")).encode()
        told = {headers.MSG_ID: subjects.new_id(), headers.EXPECTED: str(expected)}
        with self._explaining():
            return (await self.connection.store(self._subject(key.id), body, told, timeout_s=STORE_S)).seq

    def _subject(self, key_id: str) -> str:
        return subjects.bucket(self.stream, subjects.token("API key", key_id))

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None


def _parse(stored: Stored) -> StoredApiKey:
    *_, key_id = stored.subject.split(".")
    if headers.KV_OPERATION in stored.headers:
        return StoredApiKey(key_id, stored.seq, None)
    try:
        content = json.loads(stored.data)
        if content.pop("v", None) != VERSION:
            raise BadInput("this aiqueue does not know its version: update aiqueue")  # noqa: TRY301
        key = ApiKey.parse(content)
        if key.id != key_id:
            raise BadInput("it is of another id than its subject")  # noqa: TRY301
    except (BadInput, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        return StoredApiKey(key_id, stored.seq, None, f"what is stored as API key {key_id} cannot be read: {problem}")
    return StoredApiKey(key_id, stored.seq, key)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 256 and value.isprintable()


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def names_or_all(what: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names as a key has them. Raises BadInput for one text in place of several."""
    if isinstance(names, str):
        raise BadInput(f"{what} are several names: give a list, such as [{names[:40]!r}]")
    return None if names is None else tuple(dict.fromkeys(names))
