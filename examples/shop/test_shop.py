import pytest
from shop import Fetch, Mail, Report, Total, worker

import aiqueue
from aiqueue import testing


@pytest.fixture
async def client(aiqueue_settings):
    async with testing.client(aiqueue_settings) as client:
        yield client


@pytest.fixture
def get(client):
    async def get(message, **options):
        result = await client.enqueue(message, tenant="shop")
        await testing.drain(client, worker, **options)
        return await result.result(timeout=10)

    return get


async def test_a_page_is_fetched(get):
    assert await get(Fetch(url="https://example.org")) == "the page of https://example.org"


async def test_a_wrong_address_is_refused_at_once(get):
    with pytest.raises(aiqueue.JobFailed, match="only https") as failed:
        await get(Fetch(url="ftp://example.org"))
    assert failed.value.attempt == 1


async def test_a_host_that_is_down_is_asked_four_times(get):
    with pytest.raises(aiqueue.JobFailed, match="OSError") as failed:
        await get(Fetch(url="https://down.example"), delayed=True)
    assert failed.value.attempt == 4


async def test_mails_have_a_rate_limit(client, get):
    assert await get(Mail(to="anna@example.org")) == "sent to anna@example.org"
    (limit,) = await client.limits()
    assert limit.limit == "6 requests in 1m"


async def test_a_report_counts():
    assert (await testing.perform(worker, Report(customer="acme"))).result == 4


async def test_a_total_is_that_of_all_reports(get):
    assert await get(Total(customers=["acme", "globex"])) == 10
