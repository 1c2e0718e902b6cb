import pytest
from calls import Call, Transcription, worker
from models import Models

import aiqueue
from aiqueue import testing

CALL = Call(customer="anna", audio="a|b")
WORK = Transcription(customer="anna", audio="a|b")


@pytest.fixture
def models():
    return Models()


@pytest.fixture
async def client(aiqueue_settings):
    async with testing.client(aiqueue_settings) as client:
        yield client


async def run(client, models, call=CALL):
    handle = await client.enqueue(call, tenant="calls")
    await testing.drain(client, worker, state=models)
    return await handle.result(timeout=5)


async def test_a_call_is_cut_into_pieces(models):
    assert (await testing.perform(worker, WORK, state=models)).steps["split"] == ["a", "b"]


async def test_a_call_is_summarised(client, models):
    assert await run(client, models) == "A B"


async def test_a_busy_model_is_an_error_that_is_tried_again(client, models):
    models.busy = 3
    assert await run(client, models) == "A B"


async def test_a_call_that_is_too_long_is_not_tried_again(models):
    done = await testing.perform(worker, Transcription(customer="anna", audio="x" * 101), state=models)
    assert (done.outcome, done.reason) == ("failed", "rejected")


async def test_a_failure_is_told(client, models):
    models.busy = 4
    with pytest.raises(aiqueue.JobFailed, match="busy"):
        await run(client, models)
    assert models.told == ["anna"]


async def test_a_customer_has_two_calls_at_once(client):
    (limit,) = await client.limits()
    assert limit.limit == "2 in flight"
