import pytest
from books import Books, Invoice
from invoices import Bill, BillAll, worker

import aiqueue
from aiqueue import testing


@pytest.fixture
def books():
    books = Books()
    books.orders = {"A-1": 10.0, "A-2": 2.5}
    return books


@pytest.fixture
async def client(aiqueue_settings):
    async with testing.client(aiqueue_settings) as client:
        yield client


@pytest.fixture
def do(client, books):
    async def do(message):
        job = await client.enqueue(message, tenant="invoices")
        await testing.drain(client, worker, state=books)
        return await job.result(timeout=5)

    return do


async def test_an_order_is_billed(do):
    result = await do(Bill(order="A-1"))
    assert result == Invoice(order="A-1", amount=10.0)


async def test_the_function_is_called_without_a_queue(books):
    assert (await testing.perform(worker, Bill(order="A-2"), state=books)).result.amount == 2.5


async def test_an_outage_is_waited_out(do, books):
    books.outages = 2
    result = await do(Bill(order="A-1"))
    assert result.amount == 10.0


async def test_an_outage_that_does_not_end_is_an_error(do, books):
    books.outages = 3
    with pytest.raises(aiqueue.JobFailed):
        await do(Bill(order="A-1"))
    assert books.outages == 0


async def test_an_unknown_order_is_not_tried_again(do):
    with pytest.raises(aiqueue.JobFailed, match="KeyError"):
        await do(Bill(order="B-9"))


async def test_all_orders_are_billed_on_the_first(client, do):
    assert await do(BillAll()) == 12.5
    (tick,) = await client.schedules.next_times("bill_all", 1, tenant="invoices")
    assert (tick.day, tick.hour, tick.minute) == (1, 3, 0)
