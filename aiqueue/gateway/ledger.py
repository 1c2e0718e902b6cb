"""The ledger: one record for each call of a model, the truth about what was used and what it cost."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, Self, get_args

from .. import subjects
from ..errors import BadInput, ConfigMismatch, Conflict
from .usage_store import StoredUsage, UsageStore

log = logging.getLogger(__name__)

Outcome = Literal["ok", "failed", "possibly_billed"]
TEXT_MAX = 512
COUNT_MAX = 2**53
TRIES_MAX = 5
_TEXTS = ("call_id", "job_id", "request_id", "tenant", "model", "provider")
_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens", "reserved_micros", "attempt")


def month_of(at: float) -> str:
    """Return the month (UTC) of a time in seconds since the epoch: "2026-11"."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def month_start(month: str) -> float:
    """Return when a month begins, in seconds since the epoch. Raises BadInput."""
    try:
        found = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    except (ValueError, TypeError):
        found = None
    if found is None or len(month) != 7:
        raise BadInput(f"{month!r:.40} is no month: give one such as 2026-11")
    return found.timestamp()


def next_month_start(month: str) -> float:
    """Return when the month after this one begins, in seconds since the epoch. Raises BadInput."""
    return month_start(month_of(month_start(month) + 32 * 86400))


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """What one call of a model has used.

    - `call_id`: any text, another one for each call of a tenant.
    - `outcome`: "ok", "failed", or "possibly_billed": the call was begun, and nobody knows how it ended.
    - `started_at`: seconds since the epoch, by the server's clock. With a budget, the reservation's `at`: so budget and
      record are of the same month.
    - `cost_micros`: micro-dollars; None: unknown. `reserved_micros`: what the call could have cost at most.
    - `attempt`: the number of the job's call, from 1; 0: it was given up before it was made.
    - `api_key`: the id of the API key that has asked for it; "": none has.
    """

    call_id: str
    job_id: str
    """Id of the job that has made the call."""
    request_id: str
    """Id of the request, as its sender has named it."""
    tenant: str
    """Tenant that is charged."""
    model: str
    """Name of the called model in gateway.toml."""
    provider: str
    """Name of the provider in gateway.toml."""
    started_at: float
    outcome: Outcome
    latency_s: float | None = None
    """Seconds from `started_at` to the end of the call; None: not known."""
    first_token_s: float | None = None
    """Seconds from `started_at` to the first chunk of a stream; None: not known, or no stream."""
    prompt_tokens: int = 0
    """Tokens of the prompt, those of the provider's cache included."""
    completion_tokens: int = 0
    """Tokens of the answer."""
    cached_tokens: int = 0
    """Tokens of the prompt that were read from the provider's cache."""
    cache_write_tokens: int = 0
    """Tokens of the prompt that were put into the provider's cache."""
    cost_micros: int | None = None
    reserved_micros: int = 0
    attempt: int = 1
    api_key: str = ""

    def __post_init__(self) -> None:
        """Raise BadInput for what cannot be stored and read again."""
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) or not 1 <= len(value) <= TEXT_MAX or not _is_encodable(value):
                raise BadInput(f"{name} of a usage record is a text of 1 to {TEXT_MAX} characters, not {value!r:.80}")
        subjects.token("tenant", self.tenant)
        if self.api_key != "":
            subjects.token("API key", self.api_key)
        if self.outcome not in get_args(Outcome):
            raise BadInput(f"outcome of a usage record is ok, failed or possibly_billed, not {self.outcome!r:.80}")
        for name in _COUNTS + (("cost_micros",) if self.cost_micros is not None else ()):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= COUNT_MAX:
                raise BadInput(f"{name} of a usage record is a whole number from 0, not {value!r:.80}")
        for name in ("started_at", "latency_s", "first_token_s"):
            value = getattr(self, name)
            if value is None and name != "started_at":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**35:
                raise BadInput(f"{name} of a usage record is a number of seconds from 0, not {value!r:.80}")

    @property
    def charged_micros(self) -> int:
        """What a budget is charged for the call: its cost, or its reservation if it was possibly billed."""
        return self.reserved_micros if self.outcome == "possibly_billed" else self.cost_micros or 0

    @property
    def month(self) -> str:
        """The month (UTC) in which the call began, as budgets count it: "2026-11"."""
        return month_of(self.started_at)

    @property
    def is_of_no_call(self) -> bool:
        """Whether the call was given up before it was made, so that the record counts nothing."""
        return self.attempt == 0

    def plain(self) -> dict[str, Any]:
        """Return the record as it is stored, in JSON."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Self:
        """Read a stored record. What a later version has added is ignored. Raises BadInput, TypeError."""
        return cls(**{key: value for key, value in plain.items() if key in _FIELDS})


_FIELDS = tuple(each.name for each in fields(UsageRecord))


class UsageLedger:
    """The records of calls of models on one server. They are kept for the `max_age` of their stream, 400 days."""

    def __init__(self, store: UsageStore) -> None:
        self._store = store

    async def begin(self, record: UsageRecord) -> int:
        """Store the first record of a call that is about to be made, "possibly_billed" until its end is known.

        Return its sequence, which `record` takes as `replaces`. Raises as `record`, and Conflict for a known call.
        """
        return await self._store.put(subjects.usage(record.tenant, record.call_id), record.plain(), expected=0)

    async def record(self, record: UsageRecord, *, replaces: int = 0) -> UsageRecord:
        """Store the record of a call, once for its `call_id`, and return the one that stands.

        - `replaces`: what `begin` has returned, which saves looking for it.
        - Repeated, it changes nothing. Of two records with a known end, the first stands.
        - A known end replaces "possibly_billed", and keeps its time of start. Never the other way round.
        - Raises Unavailable, also if it may have been stored: repeat it.
        - Raises QueueFull (the stream is full), NotFound, AccessDenied.
        """
        subject = subjects.usage(record.tenant, record.call_id)
        expected = replaces
        for _ in range(TRIES_MAX):
            try:
                await self._store.put(subject, record.plain(), expected=expected)
            except Conflict:
                found = await self._store.get(subject)
                if found is None:  # it was deleted meanwhile
                    expected = 0
                    continue
                standing = self._parse(found)
                if standing.outcome != "possibly_billed" or record.outcome == "possibly_billed":
                    self._warn(standing, record)
                    return standing
                record = replace(record, started_at=standing.started_at)
                expected = found.seq
            else:
                return record
        raise Conflict(f"the record of call {record.call_id} of tenant {record.tenant} changes all the time")

    async def find(self, tenant: str, call_id: str) -> UsageRecord | None:
        """Return the record of a call, None if there is none. Raises Unavailable, NotFound, AccessDenied."""
        found = await self._store.get(subjects.usage(tenant, call_id))
        return None if found is None else self._parse(found)

    async def records(
        self, tenant: str = "*", *, seq: int = 1, since: float | None = None
    ) -> AsyncIterator[tuple[int, UsageRecord]]:
        """Yield records and their sequences, in the order in which they were stored, of a tenant or of all.

        `since`: only those stored then or later. What cannot be read is logged, and left out.
        """
        async for stored in self._store.read(subjects.usage_filter("usage", tenant), seq=seq, since=since):
            try:
                yield stored.seq, self._parse(stored)
            except ConfigMismatch as error:
                log.warning("%s", error)

    async def charged_micros(self, tenant: str, month: str, key: str = "") -> int:
        """Return what the calls that a tenant began in a month have cost; a possibly billed one: its reservation.
        `key`: only the calls of this API key.
        """
        found = [each async for _, each in self.records(tenant, since=month_start(month)) if each.month == month]
        return sum(each.charged_micros for each in found if key in ("", each.api_key))

    def _parse(self, found: StoredUsage) -> UsageRecord:
        tenant, token, _ = subjects.parse_usage(found.subject)
        try:
            record = UsageRecord.parse(found.content)
            if (record.tenant, subjects.hashed(record.call_id)) != (tenant, token):
                raise BadInput("it is for another tenant or call than its subject")  # noqa: TRY301
        except (BadInput, TypeError) as error:
            problem = f"what is stored on {found.subject} is no record of usage ({error})"
            cure = f"delete it with `nats stream rmm {self._store.stream} {found.seq}`"
            raise ConfigMismatch(f"{problem}: {cure}") from None
        return record

    @staticmethod
    def _warn(standing: UsageRecord, record: UsageRecord) -> None:
        is_known = "possibly_billed" not in (standing.outcome, record.outcome)
        if is_known and standing != replace(record, started_at=standing.started_at):
            log.warning(
                "call %s of tenant %s was recorded before (%s, cost %s): that stays, and %s, cost %s, is dropped",
                record.call_id, record.tenant, standing.outcome, standing.cost_micros, record.outcome,
                record.cost_micros,
            )  # fmt: skip


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
