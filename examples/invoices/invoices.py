"""Invoices. Moved from taskiq (docs/from-arq-and-taskiq.md)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from books import Books, Down, Invoice

import aiqueue


class Bill(aiqueue.Message[Invoice], kind="bill"):
    order: str


class BillAll(aiqueue.Message[float], kind="bill-all"):
    pass


@asynccontextmanager
async def lifespan() -> AsyncIterator[Books]:
    yield Books()


worker = aiqueue.Worker(lifespan=lifespan, owner="invoices")
ONCE = aiqueue.Backoff(attempts=1)


@worker.handle(Bill, timeout=60, retry=ONCE, on={Down: aiqueue.Backoff(attempts=3, first="1s", factor=1)})
async def bill(job: aiqueue.Job[Bill, Books]) -> Invoice:
    amount = await job.state.amount(job.message.order)
    return Invoice(order=job.message.order, amount=amount)


@worker.schedule("0 3 1 * *", tenant="invoices")
@worker.handle(BillAll, retry=ONCE)
async def bill_all(job: aiqueue.Job[BillAll, Books]) -> float:
    bills = await job.gather([(order, Bill(order=order)) for order in job.state.orders])
    return sum(each.amount for each in bills)
