"""An order: charged, approved by a person if it is large, shipped, and refunded if that fails.

Moved from Temporal (docs/from-temporal-and-hatchet.md).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from warehouse import Bank, CardRefused, Store

import aiqueue
from aiqueue.errors import NotParked


class Order(aiqueue.Message[str], kind="order"):
    article: str
    cents: int


class Decision(aiqueue.Message[bool], kind="decision"):
    """What was decided about an order. It runs when somebody has decided, or when the time is over."""

    order: str


@dataclass
class Shop:
    bank: Bank = field(default_factory=Bank)
    store: Store = field(default_factory=Store)
    waiting: dict[str, str] = field(default_factory=dict)  # by order, the job that waits for a decision
    decisions: dict[str, bool] = field(default_factory=dict)  # in a real shop, both are in its database


@asynccontextmanager
async def lifespan() -> AsyncIterator[Shop]:
    yield Shop()


worker = aiqueue.Worker(lifespan=lifespan)


@worker.handle(Order, on={CardRefused: aiqueue.Reject}, timeout="2m")
async def order(job: aiqueue.Job[Order, Shop]) -> str:
    shop = job.state
    receipt = await job.step("charge", shop.bank.charge, job.id, job.message.cents)
    await job.progress(0.3, "charged")
    if job.message.cents > 50_000 and not await _is_approved(job):
        await job.step("refund", shop.bank.refund, receipt)
        raise aiqueue.Reject("not approved")
    try:
        parcel: str = await job.step("ship", shop.store.ship, job.message.article)
    except LookupError as error:
        await job.step("refund", shop.bank.refund, receipt)
        raise aiqueue.Reject(f"cannot be shipped: {error}") from error
    return parcel


async def _is_approved(job: aiqueue.Job[Order, Shop]) -> bool:
    """Wait for a decision, for three days at most. Until then, the job holds no slot."""
    decision = await job.enqueue(Decision(order=job.id), "decision", delay="3d")
    job.state.waiting[job.id] = decision.id
    if job.id in job.state.decisions:  # looked up after that, so that no decision is missed
        return job.state.decisions[job.id]
    (approved,) = await job.gather([decision])
    return approved


@worker.handle(Decision)
async def decision(job: aiqueue.Job[Decision, Shop]) -> bool:
    return job.state.decisions.get(job.message.order, False)


async def approve(client: aiqueue.Client, shop: Shop, order: str, *, approved: bool) -> None:
    """What the web side calls: note the decision, then wake the order if it waits."""
    shop.decisions[order] = approved
    if order in shop.waiting:
        with suppress(NotParked):  # the three days are over
            await (await client.job(shop.waiting[order], tenant="shop")).run_now()
