"""Has one worker heed the limits of keys: where a job waits, and which credit it starts with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from .. import attempt, headers
from ..attempt import Handler, Outcome, Postponed, Raised, Refused, WrongLane
from ..client import Client
from ..errors import AboveLimit, AIQueueError, DecodeError, NotFound
from ..job import Message
from ..lanes import Delivery, KeyGate, LanePull
from ..limits import PAUSE_MAX_S, BatchCall, Credit, CreditBatch, Limiter
from ..payload import parse_message
from ..topology import Family
from .context import Admission, JobContext
from .gate import Gate
from .opening import OpenedJob, PlainJob

log = logging.getLogger(__name__)

WAIT_S = 2.0  # how long a job waits here for its credit, with a slot; then it returns to its lane
PROMPT_S = 0.05  # the same in a lane that is pulled on without credits, because it may hold jobs of many keys
SOON_S = 0.1  # and for one that came without a credit to a lane that is pulled on with credits only from then on
WAITING_SHARE = 4  # of the slots, one in so many may be taken by jobs that wait for a credit
RETURN_S = 0.05
RETURN_MAX_S = 10.0  # of a job in a lane that is pulled on without credits: longer after each delivery
PAUSED_S = 1.0
FindToken = Callable[[Family, str, str], str]
Run = Callable[[Delivery, OpenedJob, Handler | None, JobContext], Awaitable[Outcome]]


def make_key_gate(
    client: Client, families: Collection[Family], changed: Callable[[], None], paused_changed: Callable[[], None]
) -> KeyGate | None:
    """Return what heeds the limits of these families, if one of them has any. See `KeyGate`."""
    if not any(each.limit_key for each in families):
        return None
    limiter = Limiter(client.connection, client.topology, client.limit_rules)
    return KeyGate(client.connection, client.topology, limiter, changed=changed, paused_changed=paused_changed)


async def start_keys(keys: KeyGate, families: Collection[Family]) -> bool:
    """Start what heeds the limits of these families. False: there are none on this server yet, because the bucket of
    limits is missing, and limits.toml has no rule for them. This worker then heeds none, as one of a former version.

    Raises NotFound (the bucket is missing, and there is a rule), Unavailable, AccessDenied.
    """
    try:
        await keys.start()
    except NotFound as error:
        served = {each.name for each in families}
        if any(each.family in served for each in keys.limiter.controls.rules.declared):
            raise
        log.warning("limits are not heeded until `aiqueue apply` has run and this worker starts again: %s", error)
        return False
    return True


def warn_of_no_field(handlers: Collection[Handler], families: Collection[Family]) -> None:
    """Log which of these families has limits that hold for no job: no message of a handler has the field."""
    for family in families:
        models = [each.model for each in handlers if each.key[0] == family.name]
        if family.limit_key is None or family.limit_key in family.header_fields or not models:
            continue
        if not any(_may_have(each, family.limit_key) for each in models):
            names = ", ".join(sorted(each.__name__ for each in models))
            log.warning("no job of %s is limited: no %s has its limit_key, %s", family.name, names, family.limit_key)


def _may_have(model: type[Any], field: str) -> bool:
    if not issubclass(model, Message) or model.model_config.get("extra") == "allow":
        return True
    names = {(name, each.alias, each.serialization_alias) for name, each in model.model_fields.items()}
    return any(field in each for each in names)


class Limiting:
    """The limits of one worker's jobs. `find_token` returns the key of the lane in which a tenant's jobs of a key wait;
    "": they have none of their own. `note_return` is told of lanes to which a job goes back for want of a credit.
    """

    def __init__(
        self,
        limiter: Limiter,
        job_gate: Gate,
        worker: str,
        slots: int,
        find_token: FindToken,
        note_return: Callable[[LanePull], None],
    ) -> None:
        self._limiter = limiter
        self._job_gate = job_gate
        self._find_token = find_token
        self._worker = worker
        self._waiting, self._waiting_max = 0, max(1, slots // WAITING_SHARE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._note_return = note_return

    def concerns(self, delivery: Delivery, opened: OpenedJob) -> bool:
        """Return whether a limit may hold for a job. False: nothing here has to be asked for it."""
        if delivery.lane.key.key or (opened.data is None and opened.family.limit_key):
            return True
        key = opened.family.limit_key and self._find_key(delivery, opened)
        return bool(key) and self._limiter.is_limited(opened.family.name, str(key), delivery.tenant)

    def may_start(self, delivery: Delivery, opened: OpenedJob, handler: Handler) -> bool:
        """Return whether a job needs no more than the `begin_credit` of its delivery: no limit concerns it, or its
        credit is here and says all.
        """
        pool, credit = delivery.lane.pool, delivery.credit
        if type(credit) is not CreditBatch or pool is None or opened.data is None:
            return not self.concerns(delivery, opened)
        if opened.data.get(opened.family.limit_key or "") != pool.key:
            return False
        if handler.cost is None:
            pool.is_priced = True
            return True
        cost = _cost_of(handler, opened)
        if isinstance(cost, Refused) or (call := credit.price(cost)) is None:
            return False
        pool.note_cost(cost)
        delivery.credit = call
        return True

    def _find_key(self, delivery: Delivery, opened: OpenedJob) -> str:
        """Return the value of the job's key. "": it has none.

        That of the body, so that no header makes a job pass for another's. A body that was not decoded has the header.
        """
        if opened.data is not None:
            return attempt.limit_key_of(opened, opened.family)
        return headers.limit_key(delivery.message.headers)

    def find_lane(self, delivery: Delivery, opened: OpenedJob) -> WrongLane | None:
        """Return where a job has to wait that is not in the lane of its key. None: it is in the right lane.

        A plain publisher's job moves to the priority that its header asks for, upwards too: the lane has its own order.
        """
        lane = delivery.lane.key
        if lane.key or lane.tenant == "*":
            return None
        key = self._find_key(delivery, opened)
        if not key or not self._limiter.is_limited(lane.family, key, delivery.tenant):
            return None
        token = self._find_token(opened.family, delivery.tenant, key)
        priority = lane.priority if opened.plain else attempt.wished_priority(opened.raw)
        return WrongLane(priority, token, key) if token else None

    async def run(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext, run: Run
    ) -> Outcome:
        """Run a delivery that a limit may hold for: `run` calls the handler once its admission lets the call begin."""
        gate = self._job_gate
        known = None if opened.plain else gate.find_outcome(delivery, opened)
        if known is not None and type(known) is not WrongLane:
            delivery.give_back_credit()
            return known
        if delivery.delivery_count == 1 or known is not None:
            moved = self.find_lane(delivery, opened)
            if moved is not None and gate.can_be_moved(delivery, moved.key):
                return moved
            if known is not None:
                delivery.give_back_credit()
                return known
        cost = _cost_of(handler, opened)
        if isinstance(cost, Refused):
            delivery.give_back_credit()
            return cost
        admission = LimitedCall(self, delivery, self._find_key(delivery, opened), cost)
        if opened.is_suspect:  # it waits for the trials of others, and would hold the credit meanwhile
            admission.end(None)
        elif (refusal := await admission.reserve()) is not None:
            return refusal
        context.admission = admission
        try:
            return await run(delivery, opened, handler, context)
        finally:
            admission.end(context.settled)

    async def begin(self, opened: OpenedJob, handler: Handler, message: Any, admission: Admission) -> Outcome | None:
        """Return None if a call in this process may start now, else the outcome of its job. The body of a suspect was
        read only now.
        """
        if not opened.is_suspect:
            return await admission.begin()
        cost = attempt.cost_of(handler, message)
        if isinstance(cost, Refused):
            return cost
        return await admission.begin(cost, attempt.limit_key_of(opened, opened.family))

    def pause_key(self, delivery: Delivery, opened: OpenedJob, context: JobContext | None, outcome: Raised) -> None:
        """A handler asks for no more calls of its key for a while: of all tenants, unless only its own are limited."""
        family, for_s = delivery.lane.key.family, outcome.after_s
        known = context.admission.key if context is not None and context.admission is not None else ""
        key = known or self._find_key(delivery, opened)
        if not key or not for_s:
            return
        controls = self._limiter.controls
        wide, narrow = controls.rules.choose(family, key, delivery.tenant, self._limiter.clock())
        tenant = delivery.tenant if wide is None and narrow is not None else None
        pausing = controls.pause(
            family,
            key,
            tenant,
            for_s=min(for_s, PAUSE_MAX_S),
            author=f"worker {self._worker}",
            why=f"a handler of kind {opened.kind} asked for it",
        )
        task = asyncio.create_task(_log_failure(pausing, f"{family}, key {key!r}, is not paused"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self, delivery: Delivery, key: str, cost: float, within_s: float) -> Credit | Outcome:
        """Return a credit, or the outcome of a job that cannot have one in this time. A job that is here goes before
        those that are asked for.
        """
        lane = delivery.lane
        family, tenant = lane.key.family, delivery.tenant
        lane.asking += 1
        try:
            if (credit := self._limiter.try_acquire(family, key, tenant, cost=cost)) is not None:
                return credit
            if self._waiting >= self._waiting_max or self._limiter.controls.is_paused(family, key, tenant):
                return self._postpone(delivery, key, cost)
            async with self._a_wait(within_s if lane.pool is not None else PROMPT_S):
                return await self._limiter.acquire(family, key, tenant, cost=cost, first=lane.pool is not None)
        except TimeoutError:
            return self._postpone(delivery, key, cost)
        except AboveLimit as error:
            return Refused("limit", str(error))
        except AIQueueError as error:
            log.warning("a job of %s waits for its limit: %s", lane.key, error)
            return Postponed(PAUSED_S)
        finally:
            lane.asking -= 1

    @asynccontextmanager
    async def _a_wait(self, within_s: float) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            async with asyncio.timeout(within_s):
                yield
        finally:
            self._waiting -= 1

    def _postpone(self, delivery: Delivery, key: str, cost: float) -> Outcome:
        lane = delivery.lane
        if lane.pool is None or lane.pool.key != key:  # pulled on although there may be no credit
            return Postponed(min(RETURN_MAX_S, RETURN_S * 2.0 ** min(delivery.delivery_count, 16)))
        lane.pool.note_return(cost)
        self._note_return(lane)
        return Postponed(RETURN_S)


class LimitedCall:
    """What a delivery may start with. `key`: "" until it is known; a body that was not decoded here is read in a child.

    1. `reserve`: a credit that came before the job, if it suffices, or one that is waited for. It may get old then.
    2. `begin`, just before each call of the handler: with this credit, or another one that is waited for.
    3. `end`, after the call. Without a credit in time the job returns to its lane, which is no attempt.

    A thread that goes on after the end, because of a timeout, keeps the credit until it ends: see `hold`.
    """

    def __init__(self, limiting: Limiting, delivery: Delivery, key: str, cost: float) -> None:
        self._limiting, self._delivery = limiting, delivery
        self.key, self._cost = key, cost
        credit, delivery.credit = delivery.credit, None
        self._credit = credit.single() if isinstance(credit, CreditBatch | BatchCall) else credit
        self._threads = 0  # that run for the call
        self._is_over = False  # it has ended, but for these
        self._used: float | None = None

    async def reserve(self) -> Outcome | None:
        """Return the outcome of a job that cannot have a credit now; None if it has one, or needs none."""
        pool = self._delivery.lane.pool
        if pool is None or pool.key != self.key:  # a job in the lane of another key starts with a credit of its own
            self._give_back()
        else:
            pool.note_cost(self._cost)
        if not self.key:
            return None
        credit = self._credit
        if credit is not None and credit.cost >= self._cost:
            credit.reduce(self._cost)
            return None
        within_s = WAIT_S if credit is not None or pool is None else SOON_S
        self._give_back()
        return await self._acquire(within_s)

    async def begin(self, cost: float | None = None, key: str = "") -> Outcome | None:
        """Return None if the call may start now, else the outcome of its job. `cost`, `key`: if unknown before.

        A credit that an earlier call began with is settled, as that call has used it.
        """
        if key and key != self.key:
            self._give_back()
            self.key = key
        if not self.key:
            return None
        self._cost = self._cost if cost is None else cost
        if self._credit is not None and (self._credit.is_begun or self._credit.cost < self._cost):
            self._give_back()
        while self._credit is None or not self._credit.begin():
            self._credit = None
            if (refusal := await self._acquire(WAIT_S)) is not None:
                return refusal
        return None

    async def _acquire(self, within_s: float) -> Outcome | None:
        found = await self._limiting.wait(self._delivery, self.key, self._cost, within_s)
        if not isinstance(found, Credit):
            return found
        self._credit = found
        return None

    def _give_back(self) -> None:
        """As `end`, where nothing is known of the use."""
        self.end(None)

    def hold(self) -> Callable[[], None]:
        """A thread begins to run for the call. Call what is returned when the thread has ended."""
        self._threads += 1
        return self._on_thread_ended

    def _on_thread_ended(self) -> None:
        self._threads -= 1
        if self._is_over:
            self.end(self._used)

    def end(self, used: float | None) -> None:
        """Settle the credit by what the handler says that it has used, or give it back if no call began. Safe twice."""
        if self._threads:
            self._is_over, self._used = True, used
            return
        credit, self._credit = self._credit, None
        if credit is None:
            return
        if credit.is_begun:
            credit.settle(used)
        else:
            credit.release()


async def _log_failure(work: Awaitable[object], problem: str) -> None:
    try:
        await work
    except AIQueueError as error:
        log.warning("%s: %s", problem, error)


def _cost_of(handler: Handler | None, opened: OpenedJob) -> float | Refused:
    """Return what a job costs, an upper bound; 0 without a function that says it, or if the body cannot be read."""
    if handler is None or handler.cost is None:
        return 0.0
    try:
        if isinstance(opened, PlainJob) and not handler.any_of:
            message = opened.message = parse_message(handler.model, opened.data or {})
        else:
            message = attempt.read_message(handler, opened.raw, opened)
    except DecodeError:
        return 0.0  # the call refuses it
    return attempt.cost_of(handler, message)
