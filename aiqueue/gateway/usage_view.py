"""Totals of usage by tenant, day and model: a stored view of the ledger, brought up to date when it is read."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, Self

from .. import subjects
from ..errors import Conflict
from .ledger import UsageLedger, UsageRecord, month_start, next_month_start
from .usage_store import UsageStore

log = logging.getLogger(__name__)

FLUSH_RECORDS = 20_000  # after how many the totals are stored, so that an update that is interrupted goes on from there
TRIES_MAX = 20
JITTER_S = 0.05
_POSITION = subjects.usage_month("totals", "all", "position")  # no month, so no tenant's totals
_BUSY = (
    "the totals of usage are brought up to date elsewhere all the time: try again later, or run "
    "`aiqueue gateway usage --rebuild`"
)


class Sums(NamedTuple):
    """Sums over calls. `unpriced`: calls with a known end whose cost is unknown. `held_micros`: the reservations of
    `possibly_billed` calls. Amounts are micro-dollars.
    """

    calls: int = 0
    """How many calls of providers were made."""
    failed: int = 0
    """How many of them failed."""
    possibly_billed: int = 0
    """How many of them the provider may bill, though their end is not known."""
    unpriced: int = 0
    prompt_tokens: int = 0
    """Tokens of the prompts."""
    completion_tokens: int = 0
    """Tokens of the answers."""
    cached_tokens: int = 0
    """Tokens of the prompts that the provider had in its cache."""
    cost_micros: int = 0
    """What the calls cost, in micro-dollars."""
    held_micros: int = 0

    def plus(self, other: Sums) -> Sums:
        """Return the sums of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Sums) -> Sums:
        """Return the sums without those of the other."""
        return Sums(*(a - b for a, b in zip(self, other, strict=True)))

    @classmethod
    def of(cls, record: UsageRecord) -> Self:
        """Return the sums of one call."""
        is_open = record.outcome == "possibly_billed"
        return cls(
            1, record.outcome == "failed", is_open, record.outcome == "ok" and record.cost_micros is None,
            record.prompt_tokens, record.completion_tokens, record.cached_tokens,
            0 if is_open else record.cost_micros or 0, record.reserved_micros if is_open else 0,
        )  # fmt: skip


class UsageTotal(NamedTuple):
    """The sums of a tenant's calls of a model on a day (UTC), "2026-11-29"."""

    tenant: str
    """Tenant that has made the calls."""
    day: str
    """Day of the calls in UTC, such as "2026-11-29"."""
    model: str
    """Name of the model in gateway.toml."""
    sums: Sums
    """Numbers of calls and tokens, and costs."""


@dataclass(slots=True)
class MonthTotals:
    """The stored totals of a tenant and month, with all records up to the sequence `seq`.

    `possibly_billed`: by hashed call id the day, model and sums that the record of such a call has added, and which go
    when its known end replaces it.
    """

    generation: int
    seq: int = 0
    days: dict[str, dict[str, Sums]] = field(default_factory=dict)
    possibly_billed: dict[str, tuple[str, str, Sums]] = field(default_factory=dict)

    def add(self, seq: int, record: UsageRecord) -> None:
        """Count a record, unless that was done. One of no call counts nothing."""
        if seq <= self.seq:
            return
        self.seq = seq
        call, sums, day = subjects.hashed(record.call_id), Sums.of(record), day_of(record.started_at)
        if former := self.possibly_billed.pop(call, None):
            day_before, model, counted = former
            self._set(day_before, model, self.days[day_before][model].minus(counted))
        if record.is_of_no_call:
            return
        models = self.days.setdefault(day, {})
        models[record.model] = models.get(record.model, Sums()).plus(sums)
        if record.outcome == "possibly_billed":
            self.possibly_billed[call] = day, record.model, sums

    def _set(self, day: str, model: str, sums: Sums) -> None:
        if any(sums):
            self.days[day][model] = sums
            return
        del self.days[day][model]
        if not self.days[day]:
            del self.days[day]

    def plain(self) -> dict[str, Any]:
        """Return the totals as they are stored, in JSON."""
        return {
            "generation": self.generation, "seq": self.seq,
            "days": {day: {model: list(sums) for model, sums in each.items()} for day, each in self.days.items()},
            "possibly_billed": {call: [day, model, list(s)] for call, (day, model, s) in self.possibly_billed.items()},
        }  # fmt: skip

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Self:
        """Read what is stored. Raises ValueError, TypeError, KeyError, AttributeError for anything else."""
        return cls(
            int(plain["generation"]), int(plain["seq"]),
            {day: {m: Sums(*map(int, s)) for m, s in each.items()} for day, each in plain["days"].items()},
            {call: (day, m, Sums(*map(int, s))) for call, (day, m, s) in plain["possibly_billed"].items()},
        )  # fmt: skip


class _Position(NamedTuple):
    """All records up to the sequence `seq` are in the totals of their generation. `stored_seq`: of the position."""

    generation: int = 0
    seq: int = 0
    stored_seq: int = 0


_Loaded = dict[tuple[str, str], tuple[MonthTotals, int]]  # by tenant and month, with the stored sequence


class UsageView:
    """The totals on one server. They can be lost: `rebuild` counts the records again."""

    def __init__(self, store: UsageStore, ledger: UsageLedger) -> None:
        self._store, self._ledger = store, ledger

    async def totals(self, month: str, *, tenant: str = "*", model: str = "") -> list[UsageTotal]:
        """Return the totals of a month (UTC), up to date, sorted by tenant, day and model. ``*`` and "": of all.

        Days whose first records may have expired are left out. Raises BadInput, Unavailable, NotFound, AccessDenied,
        Conflict (other readers bring it up to date all the time), QueueFull (the stream has no space for it).
        """
        month_start(month)
        for _ in range(TRIES_MAX):
            generation = await self._update()
            found: list[UsageTotal] = []
            async for stored in self._store.read(subjects.usage_filter("totals", tenant, month)):
                totals = _parse_totals(stored.content, generation)
                found += _rows(subjects.parse_usage(stored.subject)[0], totals)
            if (await self._position()).generation == generation:
                return self._select(found, model, await self._store.now())
        raise Conflict(_BUSY)  # the totals were begun anew, and what was read may not be all

    async def recount(self, month: str, *, tenant: str = "*", model: str = "") -> list[UsageTotal]:
        """Return the same from the records alone, without the view."""
        since, until = month_start(month), next_month_start(month)
        by_tenant: dict[str, MonthTotals] = defaultdict(lambda: MonthTotals(0))
        async for seq, record in self._ledger.records(tenant, since=since):
            if since <= record.started_at < until:
                by_tenant[record.tenant].add(seq, record)
        found = [row for name, totals in by_tenant.items() for row in _rows(name, totals)]
        return self._select(found, model, await self._store.now())

    async def rebuild(self) -> None:
        """Have the view counted again from all records: now, and by readers that are at work on it. Raises as `totals`.

        An interrupted rebuild goes on when the view is read.
        """
        for _ in range(TRIES_MAX):
            position = await self._position()
            try:
                # by the clock, so that it is above all that were, also where the position was deleted
                generation = max(position.generation + 1, int(await self._store.now() * 1000))
                await self._put_position(_Position(generation, 0, position.stored_seq))
            except Conflict:
                await asyncio.sleep(JITTER_S * random.random())  # noqa: S311
            else:
                await self._update()
                return
        raise Conflict(_BUSY)

    def _select(self, rows: Iterable[UsageTotal], model: str, now: float) -> list[UsageTotal]:
        whole_from = day_of(now - self._store.kept_s + 86400) if self._store.kept_s else ""
        return sorted(each for each in rows if each.day >= whole_from and model in ("", each.model))

    async def _update(self) -> int:
        """Count the records that are new, and return the generation of the totals."""
        for _ in range(TRIES_MAX):
            position = await self._position()
            try:
                return await self._catch_up(position)
            except Conflict:  # another reader counts too: what it has stored is not counted again
                await asyncio.sleep(JITTER_S * random.random())  # noqa: S311
        raise Conflict(_BUSY)

    async def _catch_up(self, position: _Position) -> int:
        loaded: _Loaded = {}
        count, last = 0, position.seq
        async for seq, record in self._ledger.records(seq=position.seq + 1):
            key = record.tenant, record.month
            if key not in loaded:
                loaded[key] = await self._load(*key, position.generation)
            loaded[key][0].add(seq, record)
            count, last = count + 1, seq
            if count % FLUSH_RECORDS == 0:
                position = await self._flush(loaded, position, last)
                loaded = {}
        await self._flush(loaded, position, last)
        return position.generation

    async def _flush(self, loaded: _Loaded, position: _Position, last: int) -> _Position:
        """Store the totals, and then how far they go: what is stored in between is not counted again."""
        if not loaded:
            return position
        for (tenant, month), (totals, stored_seq) in loaded.items():
            await self._store.put(subjects.usage_month("totals", tenant, month), totals.plain(), expected=stored_seq)
        return await self._put_position(_Position(position.generation, last, position.stored_seq))

    async def _load(self, tenant: str, month: str, generation: int) -> tuple[MonthTotals, int]:
        stored = await self._store.get(subjects.usage_month("totals", tenant, month))
        if stored is None:
            return MonthTotals(generation), 0
        totals = _parse_totals(stored.content, generation)
        if totals.generation > generation:
            raise Conflict("the totals of usage are being rebuilt")
        return totals, stored.seq

    async def _position(self) -> _Position:
        stored = await self._store.get(_POSITION)
        if stored is None:
            return _Position()
        try:
            return _Position(int(stored.content["generation"]), int(stored.content["seq"]), stored.seq)
        except (KeyError, TypeError, ValueError):
            return _Position(stored_seq=stored.seq)

    async def _put_position(self, position: _Position) -> _Position:
        content = {"generation": position.generation, "seq": position.seq}
        return position._replace(stored_seq=await self._store.put(_POSITION, content, expected=position.stored_seq))


def day_of(at: float) -> str:
    """Return the day (UTC) of a time in seconds since the epoch: "2026-11-29"."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _parse_totals(content: dict[str, Any], generation: int) -> MonthTotals:
    """Read stored totals. Those of a former generation, and what is no totals, count nothing."""
    try:
        found = MonthTotals.parse(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("stored totals of usage cannot be read (%s): run `aiqueue gateway usage --rebuild`", error)
        return MonthTotals(generation)
    return found if found.generation >= generation else MonthTotals(generation)


def _rows(tenant: str, totals: MonthTotals) -> list[UsageTotal]:
    return [UsageTotal(tenant, day, model, sums) for day, each in totals.days.items() for model, sums in each.items()]
