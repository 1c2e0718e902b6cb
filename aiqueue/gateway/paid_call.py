"""One call of a model, from its reservation to its record: so that whatever dies, the ledger says what may be billed.

The order: the job notes the call; the budget is reserved; the record is written as "possibly_billed"; the request is
sent; the record gets its known end; the budget is settled; the job's result is stored. A crash leaves a record that
says what can be billed at most, held by the budget. Where there is no budget, note and record are written together.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import AIQueueError, BadInput, QueueFull, Unavailable
from ..job import Job
from .budgets import BudgetSpent
from .call_notes import note_call, note_refusal
from .ledger import UsageRecord
from .provider_errors import ProviderError
from .providers import OnChunk, ProviderCall, Reply, Usage
from .runtime import CallPlan, Runtime
from .traced_call import note_reply, traced_call

log = logging.getLogger(__name__)

WRITE_TRIES_MAX: Final = 6  # of a known end, while the server does not answer
WRITE_PAUSE_S: Final = 0.2  # doubled after each
TEXT_MAX: Final = 512  # of a text in a record
BATCH: Final = "Gateway-Batch"  # a header of jobs: the batch whose reservation the call is taken from


@dataclass(slots=True)
class PaidCall:
    """A call whose reservation, record and note are stored, so that it may be made. Make it with `begin_call`.

    `record`: as it stands. `seq`: its sequence. `month`: that of the reservation; "": there is none. `key`: the API key
    whose budget has reserved, too; "": none has.
    """

    runtime: Runtime
    plan: CallPlan
    record: UsageRecord
    seq: int
    month: str
    key: str = ""

    @property
    def id(self) -> str:
        return self.record.call_id

    async def send(self, on_chunk: OnChunk | None, start_within_s: float | None = None) -> Reply:
        """Call the provider, within `start_within_s` or not at all. Raises ProviderError, and what `on_chunk` raises.
        Without a known end, what was reserved stays charged.
        """
        model = self.plan.model
        call = ProviderCall(model, self.plan.body, model.first_token_s, model.total_s, self.id, start_within_s)
        async with AsyncExitStack() as stack:
            try:
                provider = await stack.enter_async_context(self.runtime.provider(model.provider))
            except BadInput as error:  # its key has gone since the call was planned
                raise ProviderError("auth", str(error)) from None
            with traced_call(self.plan, self.id, is_streamed=on_chunk is not None) as span:
                try:
                    reply = await (provider.chat(call, on_chunk) if model.kind == "chat" else provider.embed(call))
                except ProviderError as error:
                    span.fail(error.kind)
                    raise
                note_reply(span, reply)
            return reply

    async def end(
        self,
        usage: Usage | None,
        *,
        latency_s: float | None = None,
        first_token_s: float | None = None,
    ) -> UsageRecord:
        """Record that the call has succeeded, and settle the budget. Returns the record that stands.

        Without a usage, the call counts what was reserved. If the server does not answer for some seconds, that stays
        what is recorded.
        """
        used = usage or Usage(self.plan.prompt_tokens_max, self.plan.completion_tokens_max)
        ended = replace(
            self.record,
            outcome="ok",
            latency_s=latency_s,
            first_token_s=first_token_s,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
            cache_write_tokens=used.cache_write_tokens,
            cost_micros=self._cost(used, is_known=usage is not None),
        )
        return await self._write_end(ended)

    async def fail(self, *, is_billable: bool, latency_s: float | None = None) -> None:
        """Record that the call has failed, and give back its reservation; hold it if the provider may bill the call."""
        if is_billable:
            await _persist(self._hold)
        else:
            await self._write_end(replace(self.record, outcome="failed", cost_micros=0, latency_s=latency_s))

    def leave(self, *, was_sent: bool) -> None:
        """The handler ends amid the call, because its job was cancelled or its worker stops: what is left to
        write is written behind it.
        """
        work = self.fail(is_billable=True) if was_sent else self.undo()
        self.runtime.finish(work, f"the end of call {self.id} of job {self.record.job_id} is not written")

    async def undo(self) -> None:
        """The call was not made: give back its reservation first, because its record may be refused."""
        if self.month:
            tenant, month = self.record.tenant, self.month
            await _persist(lambda: self.runtime.budgets.release(tenant, self.id, month=month, key=self.key))
        await self._write_end(replace(self.record, outcome="failed", cost_micros=0, attempt=0))

    def _cost(self, used: Usage, *, is_known: bool) -> int | None:
        price = self.plan.price
        if price is None:
            return None
        if not is_known:
            return self.record.reserved_micros
        return price.cost_micros(
            used.prompt_tokens, used.completion_tokens, used.cached_tokens, used.cache_write_tokens
        )

    async def _write_end(self, ended: UsageRecord) -> UsageRecord:
        standing = ended

        async def write() -> None:
            nonlocal standing
            standing = await self.runtime.ledger.record(ended, replaces=self.seq)
            if self.month:
                cost, month = standing.charged_micros, self.month
                await self.runtime.budgets.settle(ended.tenant, ended.call_id, cost, month=month, key=self.key)

        await _persist(write)
        return standing

    async def _hold(self) -> None:
        if self.month:
            await self.runtime.budgets.hold(self.record.tenant, self.id, month=self.month, key=self.key)


async def begin_call(runtime: Runtime, job: Job[Any], plan: CallPlan, number: int, request_id: str) -> PaidCall:
    """Reserve the budget, write the record, and note the call in the job: all that must be stored before it is made.

    `number`: of the job's calls, from 1. Raises BudgetSpent, PriceUnknown, QueueFull, Unavailable, Stale: do not call
    then. Nothing is left behind, or what is left is released.
    """
    call_id, tenant = secrets.token_hex(12), job.tenant
    reservation, bound = None, plan.bound_micros
    key = await runtime.api_keys.key_of(tenant, job.headers)
    of_key = key.budget if key is not None else None
    if runtime.budgets.budget_of(tenant) is not None or of_key is not None:
        await note_call(job, call_id)  # first, so that after a crash the reservation is found by it
        try:
            reservation = await runtime.budgets.reserve(
                tenant, call_id, bound, model=plan.model.name, of_key=of_key, pool=job.headers.get(BATCH, "")
            )
        except BudgetSpent:
            await note_refusal(job, call_id)
            raise
    month = reservation.month if reservation is not None else ""
    record = UsageRecord(
        call_id=call_id,
        job_id=job.id[:TEXT_MAX],
        request_id=request_id,
        tenant=tenant,
        model=plan.model.name,
        provider=plan.model.provider.name,
        started_at=reservation.at if reservation is not None else await runtime.now(),
        outcome="possibly_billed",
        reserved_micros=bound or 0,
        attempt=number,
        api_key=key.id if key is not None else "",
    )
    call = PaidCall(runtime, plan, record, 0, month, of_key.key if of_key is not None else "")
    writes: list[Awaitable[Any]] = [runtime.ledger.begin(record)]
    if reservation is None:
        writes.append(note_call(job, call_id))
    try:
        with runtime.together():
            ends = await asyncio.gather(*writes, return_exceptions=True)
    except asyncio.CancelledError:
        call.leave(was_sent=False)
        raise
    for each in ends:
        if isinstance(each, BaseException):
            call.leave(was_sent=False)
            raise each
    assert isinstance(ends[0], int)
    call.seq = ends[0]
    return call


async def _persist(write: Callable[[], Awaitable[object]]) -> None:
    """Repeat a write while the server does not answer, or has no space. In the end, log that it was not made: an answer
    that is paid for is not given up for its record.
    """
    for number in range(WRITE_TRIES_MAX):
        try:
            await write()
        except AIQueueError as error:
            if number == WRITE_TRIES_MAX - 1 or not isinstance(error, Unavailable | QueueFull):
                log.warning("the end of a call is not recorded, so that its reservation stays charged: %s", error)
                return
            await asyncio.sleep(WRITE_PAUSE_S * 2**number)
        else:
            return
