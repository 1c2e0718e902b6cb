"""One execution of a request: it is paid for once, or says what may have been billed besides."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any, Final, NoReturn

from ..errors import AIQueueError, BadInput, Conflict, QueueFull, Unavailable
from ..job import Job, Reject, Retry
from ..units import Backoff
from .answers import Bill, answer_of, from_chunks, usage_of
from .budgets import BudgetSpent
from .call_notes import CallNotes, note_failure, note_giving_up, note_parking
from .fallbacks import answer_by_fallback, fallback_of, request_id_of
from .ledger import UsageRecord
from .paid_call import TEXT_MAX, PaidCall, begin_call
from .prices import MICROS
from .provider_errors import ProviderError
from .runtime import CallPlan, Request, Runtime
from .stored_chunks import ChunkWriter, read_chunks
from .usage_store import NoUsageStream

log = logging.getLogger(__name__)

REFUSALS_MAX: Final = 50  # as `ModelConfig.attempts`, for 429 and 503, which mean that the model works, and has no room
WAITS_MAX: Final = 30  # for calls under way that may leave room in the budget: some five minutes
START_WITHIN_S: Final = 0.8  # a call of a limited model begins within a second of its handler, or the limit may break
LIMIT_KEY: Final = "Aiq-Limit-Key"  # a header of jobs that a limit holds for
LATE_MAX: Final = 50  # attempts that have ended without a note, after which a call begins late
UNANSWERED_MAX: Final = 100  # the same, while the server does not answer, or the stream of usage is full
PARKED_JITTER_S: Final = 30.0  # after the end of a month, so that not all parked requests come at once
BACKOFF: Final = Backoff(first="1s", factor=2, cap="1m")
AT_ONCE: Final = Backoff(first="100ms", factor=2, cap="1s")  # at least, where a provider asks for less
_BUDGET_BACKOFF: Final = Backoff(first="250ms", factor=2, cap="15s")
_FULL: Final = frozenset({"rate_limited", "overloaded"})


async def answer_request(job: Job[Any]) -> dict[str, Any]:
    """Return the answer of a request, from one call of its model, or of a fallback.

    Raises Retry, and Reject with the reason in one line.
    """
    execution = _Execution(job.state, job)
    try:
        return await execution.run()
    except BadInput as error:
        raise Reject(str(error)) from None
    except (Unavailable, QueueFull, NoUsageStream) as error:
        if isinstance(error, NoUsageStream):
            job.state.warn_once(f"requests wait: {error}", about="usage")
        unnoted = execution.unnoted
        if unnoted is not None and unnoted + 1 >= UNANSWERED_MAX:
            raise Reject(str(error)) from None
        raise Retry(str(error), after=BACKOFF.delay_s(job.attempt if unnoted is None else unnoted + 1)) from None


class _Execution:
    """One execution of the handler of a job. It makes one call at most."""

    def __init__(self, runtime: Runtime, job: Job[Any]) -> None:
        self._runtime, self._job = runtime, job
        self._request: Request = job.message
        self._request_id = request_id_of(job)
        self._notes = CallNotes()
        self.unnoted: int | None = None  # attempts that have ended without a note; None: the notes are not read
        self._made = 0  # earlier calls
        self._lost = 0  # earlier calls that may be billed, or are, and whose answers are lost

    async def run(self) -> dict[str, Any]:
        started, job = time.monotonic(), self._job
        self._notes = CallNotes.read(await job.calls(), job.enqueued_at)
        self.unnoted = unnoted = self._notes.unnoted(job.attempt)
        plan = self._plan()
        usable = plan if isinstance(plan, CallPlan) else None
        if self._notes.calls and (answer := await self._look_back(usable)) is not None:
            job.settle(0)
            return answer
        if self._notes.gave_up:
            job.settle(0)
            return await self._fall_back(self._notes.gave_up)
        if not isinstance(plan, CallPlan):
            raise plan
        try:
            self._runtime.check(plan.model.provider)
        except BadInput as error:  # this worker cannot call it: the model may be well, and so are its fallbacks
            job.settle(0)
            await note_giving_up(job, str(error))
            return await self._fall_back(str(error))
        try:
            call = await begin_call(self._runtime, job, plan, self._made + 1, self._request_id)
        except BudgetSpent as error:
            job.settle(0)
            await self._wait_for_budget(error)
        within_s = None
        if LIMIT_KEY in job.headers and unnoted < LATE_MAX:
            within_s = START_WITHIN_S - (time.monotonic() - started)
            if within_s <= 0:
                await self._give_up_late(call, "what a call needs was stored too late for its limit")
        return await self._call(call, within_s)

    def _plan(self) -> CallPlan | BadInput:
        """Return the call to make; what is wrong with it as an error, because earlier calls are looked at first."""
        try:
            return self._runtime.plan(self._request, self._request.model, self._job.tenant)
        except BadInput as error:
            return error

    async def _give_up_late(self, call: PaidCall, why: str) -> NoReturn:
        """A call that begins too late for its limit is not made. Raises Retry."""
        self._job.settle(0)
        await call.undo()
        raise Retry(why, after=0.1)

    async def _call(self, call: PaidCall, within_s: float | None) -> dict[str, Any]:
        """Make the call, and return the answer."""
        job, on_chunk = self._job, None
        if getattr(self._request, "stream", False):
            on_chunk = ChunkWriter(job, call.id)
        try:
            reply = await call.send(on_chunk, within_s)
        except ProviderError as error:
            return await self._on_error(call, error)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, AIQueueError):  # once more is paid once more
                log.exception("job %s: what the provider has answered cannot be used", job.id)
                text = f"{call.record.provider}: an answer that cannot be used: {type(error).__name__}"
                return await self._on_error(call, ProviderError("refused", text, may_be_billed=True))
            call.leave(was_sent=True)
            raise
        if reply.usage is not None:
            job.settle(reply.usage.total_tokens)
        record = await call.end(reply.usage, latency_s=round(reply.latency_s, 6), first_token_s=reply.first_token_s)
        return self._answer(reply.answer, record, self._made + 1)

    def _answer(self, answer: dict[str, Any], record: UsageRecord, calls: int) -> dict[str, Any]:
        cost = None if record.cost_micros is None else record.cost_micros / MICROS
        bill = Bill(record.provider, record.model, cost, self._lost, calls, fallback_of(self._job))
        return answer_of(
            answer,
            bill,
            request_id=self._request_id,
            model=bill.fallback_of or self._request.model,
            reply_form=getattr(self._request, "reply_form", "openai"),
        )

    # -- earlier calls

    async def _look_back(self, plan: CallPlan | None) -> dict[str, Any] | None:
        """Settle the calls of earlier executions, and return the answer that one of them has left behind, if any.

        `plan`: None: the model is not known any more.
        """
        found = await asyncio.gather(*map(self._settle_earlier, self._notes.calls))  # at once: they share a write
        records = [each for each in found if each is not None]
        self._made = sum(not each.is_of_no_call for each in records)
        lost = [each for each in records if each.outcome != "failed"]
        self._lost = len(lost)
        if plan is None or not lost or not getattr(self._request, "stream", False):
            return None
        stored = await read_chunks(self._runtime.client, self._job)
        for record in reversed(lost):
            chunks = stored.get(record.call_id)
            answer = from_chunks(chunks, getattr(self._request, "n", None) or 1) if chunks else None
            if chunks and answer is not None:
                return await self._rebuild(plan, record, chunks, answer)
        return None

    async def _settle_earlier(self, call: str) -> UsageRecord | None:
        """Have the budget charge what the record of an earlier call says. Return it; None: the call was not made."""
        budgets, tenant = self._runtime.budgets, self._job.tenant
        record = await self._runtime.ledger.find(tenant, call) or await self._fence(call)
        key = await self._charged_key()
        if record is None:
            await budgets.release(tenant, call, key=key)
        elif record.outcome == "possibly_billed":
            await budgets.hold(tenant, call, month=record.month, key=key)
        else:
            await budgets.settle(tenant, call, record.charged_micros, month=record.month, key=key)
        return record

    async def _charged_key(self) -> str:
        """Return the API key whose budget the job's calls are charged to; "": none."""
        key = await self._runtime.api_keys.key_of(self._job.tenant, self._job.headers)
        return key.id if key is not None and key.budget is not None else ""

    async def _fence(self, call: str) -> UsageRecord | None:
        """See that an earlier execution which has not made this call yet, and may be stopped and not dead, never does:
        its record takes the place of the one that it would begin with. Return what it has begun with meanwhile.
        """
        job, model = self._job, self._request.model
        known = self._runtime.config.models.get(model)
        record = UsageRecord(
            call_id=call, job_id=job.id[:TEXT_MAX], request_id=self._request_id, tenant=job.tenant, model=model,
            provider=known.provider.name if known else "-", started_at=await self._runtime.now(), outcome="failed",
            cost_micros=0, attempt=0,
        )  # fmt: skip
        try:
            await self._runtime.ledger.begin(record)
        except Conflict:
            return await self._runtime.ledger.find(job.tenant, call)
        return None

    async def _rebuild(
        self, plan: CallPlan, record: UsageRecord, chunks: list[dict[str, Any]], answer: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the answer whose chunks an earlier execution has stored to their end. Its call is not made again."""
        log.info("job %s: the answer of call %s is made of its stored chunks", self._job.id, record.call_id)
        call = PaidCall(self._runtime, plan, record, 0, record.month, await self._charged_key())
        ended = await call.end(usage_of(answer))
        writer = ChunkWriter(self._job, record.call_id)
        for chunk in chunks:
            await writer(chunk)
        self._lost -= 1
        return self._answer(answer, ended, self._made)

    # -- what goes wrong

    async def _on_error(self, call: PaidCall, error: ProviderError) -> dict[str, Any]:
        """The provider has failed. Raises Retry, or returns the answer of a fallback."""
        job = self._job
        if error.kind == "late":
            await self._give_up_late(call, str(error))
        if not error.may_be_billed:
            job.settle(0)
        failures = [*self._notes.failures, error.kind]
        refused = sum(each in _FULL for each in failures)
        number = refused if error.kind in _FULL else len(failures) - refused
        if error.is_retryable and number < (REFUSALS_MAX if error.kind in _FULL else call.plan.model.attempts):
            await asyncio.gather(call.fail(is_billable=error.may_be_billed), note_failure(job, error.kind))
            if error.retry_after_s is None:
                raise Retry(str(error), after=BACKOFF.delay_s(number))
            after_s = max(error.retry_after_s, AT_ONCE.delay_s(number))
            raise Retry(str(error), after=after_s, pause="key" if error.pauses else None)
        await call.fail(is_billable=error.may_be_billed)
        self._made += 1
        self._lost += error.may_be_billed
        await note_giving_up(job, str(error))
        return await self._fall_back(str(error))

    async def _fall_back(self, why: str) -> dict[str, Any]:
        begun = self._notes.fallbacks
        return await answer_by_fallback(self._runtime, self._job, why, begun=begun, lost=self._lost, calls=self._made)

    async def _wait_for_budget(self, error: BudgetSpent) -> NoReturn:
        """The budget does not admit the call. Raises Retry or Reject."""
        notes = self._notes
        if error.may_fit_soon and notes.waits < WAITS_MAX:
            raise Retry(str(error), after=_BUDGET_BACKOFF.delay_s(notes.waits + 1)) from None
        if error.when_spent != "park" or error.is_too_dear:
            raise Reject(str(error)) from None
        if notes.parked and notes.parked != error.month:
            raise Reject(f"{error}; parked since {notes.parked}, and a request is parked for one month only") from None
        await note_parking(self._job, error.month)
        until_s = max(0.0, error.resets_at - await self._runtime.now())
        raise Retry(str(error), after=until_s + random.uniform(0, PARKED_JITTER_S)) from None  # noqa: S311
