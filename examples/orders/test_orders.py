import pytest
from orders import Order, Shop, approve, worker
from warehouse import Bank, Store

import aiqueue
from aiqueue import testing


@pytest.fixture
def shop():
    store = Store()
    store.stock = {"tea": 1}
    return Shop(Bank(), store)


@pytest.fixture
async def client(aiqueue_settings):
    async with testing.client(aiqueue_settings) as client:
        yield client


@pytest.fixture
def execute(client, shop):
    async def execute(order, **options):
        handle = await client.enqueue(order, tenant="shop", unique="1")
        await testing.drain(client, worker, state=shop, **options)
        return await handle.result(timeout=5)

    return execute


async def test_an_order_is_charged_and_shipped(execute, shop):
    order = Order(article="tea", cents=500)
    assert await execute(order) == "parcel of tea"
    assert shop.bank.charges == {"1": 500}


async def test_an_outage_of_the_bank_is_waited_out(execute, shop):
    shop.bank.outages = 4
    order = Order(article="tea", cents=500)
    assert await execute(order, delayed=True) == "parcel of tea"


async def test_a_refused_card_is_charged_once_and_nothing_is_shipped(execute, shop):
    with pytest.raises(aiqueue.JobFailed):
        await execute(Order(article="tea", cents=200_000))
    assert shop.store.stock == {"tea": 1}


async def test_what_cannot_be_shipped_is_refunded(execute, shop):
    with pytest.raises(aiqueue.JobFailed):
        await execute(Order(article="coffee", cents=500))
    assert shop.bank.refunded == ["receipt-1"]


async def test_a_large_order_waits_for_approval(client, shop):
    order = Order(article="tea", cents=60_000)
    handle = await client.enqueue(order, tenant="shop", unique="1")
    await testing.drain(client, worker, state=shop)
    assert shop.store.stock == {"tea": 1}
    await approve(client, shop, "1", approved=True)
    await testing.drain(client, worker, state=shop)
    assert await handle.result(timeout=5) == "parcel of tea"


async def test_a_large_order_that_nobody_approves_is_refunded_after_three_days(execute, shop):
    order = Order(article="tea", cents=60_000)
    with pytest.raises(aiqueue.JobFailed):
        await execute(order, delayed=True)
    assert shop.bank.refunded == ["receipt-1"]


async def test_the_bank_is_asked_with_the_id_of_the_order(shop):
    done = await testing.perform(worker, Order(article="tea", cents=500), unique="1", state=shop)
    assert done.steps["charge"] == "receipt-1"
    shop.bank.outages = 1
    assert (await testing.perform(worker, Order(article="tea", cents=500), state=shop)).outcome == "retry"
    assert (await testing.perform(worker, Order(article="tea", cents=200_000), state=shop)).reason == "rejected"
