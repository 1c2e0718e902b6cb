"""Budgets of tenants a month: reserved before a call, and settled after it, so that no call begins above a budget."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .. import subjects
from ..errors import AIQueueError, BadInput, ConfigMismatch, Conflict, QueueFull, Unavailable
from .budget_use import CALLS_MAX, BudgetUse
from .ledger import UsageLedger, month_of, month_start, next_month_start
from .prices import PriceUnknown, format_usd
from .usage_store import StoredUsage, UsageStore

log = logging.getLogger(__name__)

EACH = "*"
WRITE_S = 15.0  # how long a change waits for its turn while other processes write
GATHER_S = 0.02  # how long settlements wait for others, and for a reservation, to share a write with
READS_FIRST = 3
JITTER_S = 0.002
DOCUMENTS_MAX = 1_000  # that a process keeps in memory
AMOUNT_MAX = 2**53


@dataclass(frozen=True, slots=True)
class Budget:
    """What a tenant may spend in a month (UTC): `month_micros`, in micro-dollars.

    `tenant`: ``*`` for each tenant that has no budget of its own. `when_spent`: whether a call that it does not admit
    is refused, or waits for the next month. `key`: id of an API key, whose calls this budget is for; "": all calls.
    """

    tenant: str
    month_micros: int
    when_spent: Literal["refuse", "park"] = "refuse"
    key: str = ""

    def __post_init__(self) -> None:
        """Raise BadInput for values that no budget has."""
        if self.tenant != EACH:
            subjects.token("tenant", self.tenant)
        _check_amount(self.month_micros)
        if self.when_spent not in ("refuse", "park"):
            raise BadInput(f"when_spent is refuse or park, not {self.when_spent!r:.40}")


@dataclass(frozen=True, slots=True)
class Reservation:
    """`amount_micros` for the call `call_id` of `tenant` in `month`. `at`: its start, in seconds since the epoch."""

    tenant: str
    call_id: str
    month: str
    amount_micros: int
    at: float


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """What is known of the budget of a `tenant`, or of its API key, in a `month`. Amounts are micro-dollars.

    `spent_micros`: what calls have cost. `reserved_micros`: for those that are under way, or whose process has died.
    `held_micros`: for those that were possibly billed, or are older. `reserved_calls`, `held_calls`: how many these
    are. `oldest_at`: when the oldest was reserved. `limit_micros`: as heard. `key`: id of the API key; "": none.
    """

    tenant: str
    month: str
    limit_micros: int
    spent_micros: int
    reserved_micros: int
    held_micros: int
    reserved_calls: int
    held_calls: int
    oldest_at: float | None
    key: str = ""

    @property
    def charged_micros(self) -> int:
        """What counts against the limit: what is spent, reserved and held."""
        return self.spent_micros + self.reserved_micros + self.held_micros


class BudgetSpent(AIQueueError):
    """A budget does not admit a call. Nothing was reserved.

    - `resets_at`: when the next month begins, in seconds since the epoch.
    - `is_too_dear`: the call alone is above the whole budget: waiting does not help.
    - `may_fit_soon`: it would fit if calls under way cost less than they have reserved.
    """

    def __init__(self, budget: Budget, tenant: str, month: str, needed: int, use: BudgetUse) -> None:
        self.tenant, self.month, self.when_spent = tenant, month, budget.when_spent
        self.needed_micros, self.limit_micros = needed, budget.month_micros
        self.spent_micros, self.reserved_micros, self.held_micros = use.spent, use.reserved, use.held
        self.resets_at = next_month_start(month)
        self.is_too_dear = needed > budget.month_micros
        self.may_fit_soon = not self.is_too_dear and use.charged - use.reserved + needed <= budget.month_micros
        self.retryable = not self.is_too_dear
        spent = f"{format_usd(use.spent)} spent"
        if use.reserved:
            spent += f", {format_usd(use.reserved)} reserved for calls under way"
        if use.held:
            spent += f", {format_usd(use.held)} held for calls that were possibly billed"
        raised = "use a key with a larger budget" if budget.key else "raise the budget in gateway.toml"
        cure = f"lower max_tokens, {raised}, or wait until {month_of(self.resets_at)}"
        if self.is_too_dear:
            cure = f"lower max_tokens, or {raised}"
        whose = f"API key {budget.key} of tenant {tenant}" if budget.key else f"tenant {tenant}"
        self.key = budget.key
        super().__init__(
            f"{whose} has a budget of {format_usd(budget.month_micros)} for {month} ({spent}), and this call "
            f"can cost up to {format_usd(needed)}: {cure}"
        )


Act = Callable[[BudgetUse], Literal["changed", "unchanged"] | AIQueueError]


@dataclass(slots=True)
class _BudgetChange:
    """A change of a document that waits for its write. `act` is called with a draft, perhaps several times.

    `undo`: what to write if the caller has left meanwhile. `gives`: it makes room, and is written before what takes.
    """

    act: Act
    done: asyncio.Future[bool]
    gives: bool
    creates: bool = False
    undo: Act | None = None


class Budgets:
    """The budgets on one server, as this process reserves from them. Tenants and keys without one are not charged."""

    def __init__(self, store: UsageStore, ledger: UsageLedger, budgets: Iterable[Budget] = ()) -> None:
        self._store, self._ledger = store, ledger
        self._budgets: Mapping[str, Budget] = {}
        self._documents: OrderedDict[tuple[str, str, str], _BudgetDocument] = OrderedDict()
        self.use_budgets(budgets)

    def use_budgets(self, budgets: Iterable[Budget]) -> None:
        """Replace the budgets, from the next call on. What was spent and reserved stays."""
        self._budgets = {each.tenant: each for each in budgets}

    def budget_of(self, tenant: str) -> Budget | None:
        """Return the budget that holds for a tenant. None: there is none."""
        return self._budgets.get(tenant) or self._budgets.get(EACH)

    async def close(self) -> None:
        """End the writes under way. Changes that wait for theirs fail with Unavailable."""
        for each in self._documents.values():
            await each.close()
        self._documents.clear()

    async def reserve(
        self,
        tenant: str,
        call_id: str,
        amount_micros: int | None,
        *,
        model: str = "",
        of_key: Budget | None = None,
        pool: str = "",
    ) -> Reservation | None:
        """Reserve what a call can cost at most, and return the reservation. None: the call has no budget.

        Repeated with the same `call_id` in the month, it returns the first reservation: one call is charged once. A
        cancelled call of this method leaves no reservation behind. `amount_micros`: None, the price of `model` is
        unknown. `of_key`: the budget of the call's API key: both that and the tenant's must have room. `pool`: the
        `call_id` of a reservation for several calls, from which this one is taken.

        Raises BudgetSpent, PriceUnknown, QueueFull (5,000 calls are under way, or the stream is full), Unavailable: do
        not call then; a reservation that may have been stored is found again by its `call_id`.
        """
        budgets = [each for each in (of_key, self.budget_of(tenant)) if each is not None]
        if not budgets:
            return None
        if amount_micros is None:
            raise PriceUnknown(tenant, model)
        needed, at = _check_amount(amount_micros), await self._store.now()
        reservation = await self._reserve(budgets[0], tenant, call_id, needed, at, pool)
        try:
            for each in budgets[1:]:
                await self._reserve(each, tenant, call_id, needed, at, pool)
        except BaseException:
            await self._document(tenant, reservation.month, budgets[0].key).begin_change(_releasing(call_id))
            raise
        return reservation

    async def _reserve(
        self, budget: Budget, tenant: str, call_id: str, needed: int, at: float, pool: str
    ) -> Reservation:
        month, call = month_of(at), subjects.hashed(call_id)
        granted, aside = [needed, at], subjects.hashed(pool) if pool else ""

        def act(use: BudgetUse) -> Literal["changed", "unchanged"] | AIQueueError:
            match use.reserve(call, needed, at, budget.month_micros, aside):
                case "reserved":
                    granted[:] = [needed, at]
                    return "changed"
                case "known":
                    granted[:] = [use.calls[call].amount, float(use.calls[call].at)]
                    return "unchanged"
                case "full":
                    reason = f"{CALLS_MAX:,} calls are under way"
                    return QueueFull(f"the budget of tenant {tenant}", reason, limit=CALLS_MAX)
            return BudgetSpent(budget, tenant, month, needed, use)

        document = self._document(tenant, month, budget.key)
        await document.change(act, gives=False, creates=True, undo=_releasing(call_id))
        return Reservation(tenant, call_id, month, int(granted[0]), granted[1])

    async def settle(self, tenant: str, call_id: str, cost_micros: int, *, month: str = "", key: str = "") -> bool:
        """Charge what a call has cost, in place of its reservation, also after `hold`.

        `month`: the reservation's; without it this month and the one before are searched. `key`: the id of the call's
        API key, if that has a budget. False: there is no such reservation (any more), so a repetition charges nothing.
        Raises Unavailable: repeat it.
        """
        call, cost = subjects.hashed(call_id), _check_amount(cost_micros)
        return await self._change_call(tenant, month, key, lambda use: use.settle(call, cost))

    async def release(self, tenant: str, call_id: str, *, month: str = "", key: str = "") -> bool:
        """Drop the reservation of a call that was not made, or costs nothing. Returns and raises as `settle`."""
        call = subjects.hashed(call_id)
        return await self._change_call(tenant, month, key, lambda use: use.release(call))

    async def hold(self, tenant: str, call_id: str, *, month: str = "", key: str = "") -> bool:
        """Let the reservation of a possibly billed call count as spent. Returns and raises as `settle`."""
        call = subjects.hashed(call_id)
        return await self._change_call(tenant, month, key, lambda use: use.hold(call))

    async def stats(self, month: str, tenant: str = "*", *, keys: bool = False) -> list[BudgetStats]:
        """Return the budgets that were used in a month, by tenant; `keys`: those of API keys, by tenant and key.

        Raises Unavailable, NotFound, AccessDenied.
        """
        month_start(month)
        pattern, now = subjects.usage_filter("budget", tenant, month, "*" if keys else ""), await self._store.now()
        return sorted([each async for each in self._stats(pattern, now)], key=lambda each: (each.tenant, each.key))

    async def _stats(self, pattern: str, now: float) -> AsyncIterator[BudgetStats]:
        async for stored in self._store.read(pattern):
            (tenant, month, key), use = subjects.parse_usage(stored.subject), parse_use(stored, self._store.stream)
            use.hold_old(now)
            reserved = [each.at for each in use.calls.values() if not each.held]
            yield BudgetStats(
                tenant, month, use.limit, use.spent, use.reserved, use.held, len(reserved),
                len(use.calls) - len(reserved), float(min(reserved)) if reserved else None, key,
            )  # fmt: skip

    async def _change_call(self, tenant: str, month: str, key: str, change: Callable[[BudgetUse], bool]) -> bool:
        months = [month]
        if not month:
            if self.budget_of(tenant) is None and not key:
                return False
            this = month_of(await self._store.now())
            months = [this, month_of(month_start(this) - 86400)]
        act: Act = lambda use: "changed" if change(use) else "unchanged"  # noqa: E731
        for each in months:
            documents = [self._document(tenant, each, whose) for whose in dict.fromkeys(("", key))]
            changes = [document.begin_change(act) for document in documents]  # all, whatever becomes of the caller
            if any([await change for change in changes]):
                return True
        return False

    def _document(self, tenant: str, month: str, key: str = "") -> _BudgetDocument:
        which = subjects.token("tenant", tenant), month, key
        found = self._documents.get(which)
        if found is None:
            found = self._documents[which] = _BudgetDocument(self._store, self._ledger, *which)
            for each in [each for each, known in self._documents.items() if known.is_idle and each != which]:
                if len(self._documents) <= DOCUMENTS_MAX:
                    break
                del self._documents[each]
        self._documents.move_to_end(which)
        return found


def _releasing(call_id: str) -> Act:
    call = subjects.hashed(call_id)
    return lambda use: "changed" if use.release(call) else "unchanged"


class _BudgetDocument:
    """The document of a month and a tenant, or its API key, as this process writes it: one write at a time serves all
    that wait.
    """

    def __init__(self, store: UsageStore, ledger: UsageLedger, tenant: str, month: str, key: str) -> None:
        self._store, self._ledger, self._tenant, self._month, self._key = store, ledger, tenant, month, key
        self._subject = subjects.usage_month("budget", tenant, month, key)
        self._waiting: list[_BudgetChange] = []
        self._writing: list[_BudgetChange] = []  # served by the write under way
        self._reads_first = 0  # before so many writes, because other processes write too
        self._taker = asyncio.Event()  # set while a reservation waits
        self._task: asyncio.Task[None] | None = None
        self._use: BudgetUse | None = None  # None: read it first
        self._seq = 0

    @property
    def is_idle(self) -> bool:
        return self._task is None or self._task.done()

    async def change(self, act: Act, *, gives: bool, creates: bool = False, undo: Act | None = None) -> bool:
        """Return when `act` is stored: whether it has changed anything. Raises what `act` returns, and Unavailable."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        change = _BudgetChange(act, done, gives, creates, undo)
        self._add(change)
        try:
            return await done
        except asyncio.CancelledError:
            if done.done() and not done.cancelled() and done.exception() is None and done.result():
                self._undo(change)  # it was written just before
            raise

    def begin_change(self, act: Act) -> asyncio.Future[bool]:
        """As `change` of one that gives, without waiting. It is written also if nobody awaits it."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody awaits it
        self._add(_BudgetChange(act, future, gives=True))
        return future

    def _add(self, change: _BudgetChange) -> None:
        self._waiting.append(change)
        if not change.gives:
            self._taker.set()
        if self.is_idle:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        left, self._waiting = self._waiting, []
        _end(left)

    async def _run(self) -> None:
        while self._waiting:
            if all(each.gives for each in self._waiting):  # nobody waits for room: more may come for the same write
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._taker.wait()
            self._taker.clear()
            # what gives comes first: it makes room, also for what has waited before it
            self._writing = sorted(self._waiting, key=lambda each: not each.gives)
            self._waiting = []
            try:
                async with asyncio.timeout(WRITE_S):
                    await self._write(self._writing)
            except TimeoutError:
                self._fail(Unavailable(f"{self._subject}: no turn to write it", maybe_stored=True))
            except AIQueueError as error:
                self._fail(error)
            finally:
                left, self._writing = self._writing, []
                _end(left)

    async def _write(self, batch: list[_BudgetChange]) -> None:
        """Write what the changes make of the document as it is stored now, however often others write it meanwhile."""
        is_fresh = False
        if self._reads_first:
            self._use = None
        creates = any(each.creates for each in batch)
        while True:
            batch[:] = [each for each in batch if each.gives or not each.done.cancelled()]
            if not batch:
                return
            if self._use is None or (creates and self._seq == 0):
                await self._load(may_create=creates)
                is_fresh = True
            assert self._use is not None
            draft = self._use.copy()
            outcomes = [each.act(draft) for each in batch]
            if "changed" in outcomes or (creates and self._seq == 0):
                try:
                    seq = await self._store.put(self._subject, draft.plain(), expected=self._seq)
                except Conflict:
                    self._use, self._reads_first = None, READS_FIRST
                    await asyncio.sleep(JITTER_S * random.random())  # noqa: S311
                    continue
                self._use, self._seq = draft, seq
            elif not is_fresh:  # nothing was written, which would have shown that this is what is stored
                self._use = None
                continue
            for each, outcome in zip(batch, outcomes, strict=True):
                self._settle(each, outcome)
            return

    async def _load(self, *, may_create: bool) -> None:
        """Read the document. A new one counts what the tenant has spent in the month before it had a budget."""
        stored = await self._store.get(self._subject)
        if stored is not None:
            self._reads_first = READS_FIRST if stored.seq != self._seq else max(0, self._reads_first - 1)
            self._use, self._seq = parse_use(stored, self._store.stream), stored.seq
            return
        spent = await self._ledger.charged_micros(self._tenant, self._month, self._key) if may_create else 0
        self._use, self._seq = BudgetUse(spent), 0

    def _settle(self, change: _BudgetChange, outcome: Literal["changed", "unchanged"] | AIQueueError) -> None:
        if not change.done.done():
            if isinstance(outcome, AIQueueError):
                change.done.set_exception(outcome)
            else:
                change.done.set_result(outcome == "changed")
        elif outcome == "changed":
            self._undo(change)

    def _undo(self, change: _BudgetChange) -> None:
        """Write what undoes a change whose caller has left."""
        if change.undo is not None:
            self.begin_change(change.undo)

    def _fail(self, error: AIQueueError) -> None:
        """Fail what was to be written. If it is stored nevertheless, the next write is rejected and reads it."""
        for each in self._writing:
            if not each.done.done():
                each.done.set_exception(error)
            elif isinstance(error, Unavailable) and error.maybe_stored:
                self._undo(each)


def _end(changes: list[_BudgetChange]) -> None:
    for each in changes:
        if not each.done.done():
            each.done.set_exception(Unavailable("the budgets were closed", maybe_stored=True))


def parse_use(stored: StoredUsage, stream: str) -> BudgetUse:
    """Read a stored budget. Raises ConfigMismatch, which says what to do."""
    try:
        return BudgetUse.parse(stored.content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cure = f"delete it with `nats stream rmm {stream} {stored.seq}`: it is made again from the records of usage"
        raise ConfigMismatch(f"what is stored on {stored.subject} is no budget ({error}): {cure}") from None


def _check_amount(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= AMOUNT_MAX:
        raise BadInput(f"an amount is a whole number of micro-dollars from 0, not {value!r:.40}")
    return value
