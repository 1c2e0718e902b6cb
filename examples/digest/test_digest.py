import time

import pytest
from digest import Digest, Nightly, Send, State, worker
from feeds import Feeds, Mailbox
from signup import sign_up

import aiqueue
from aiqueue import testing


@pytest.fixture
async def client(aiqueue_settings):
    async with testing.client(aiqueue_settings) as client:
        yield client


@pytest.fixture
def ctx():
    feeds = Feeds()
    feeds.pages = {"a": ["A1", "A2"], "b": ["B1"], "empty": [], "busy": "busy"}
    return State(feeds, Mailbox())


async def run(client, ctx, **options):
    return await testing.drain(client, worker, state=ctx, **options)


async def test_a_digest_is_sent(client, ctx):
    job = await client.enqueue(Digest(reader="anna", urls=["a", "b"]), tenant="digest")
    await run(client, ctx)
    assert await job.result(timeout=1) == 3
    assert ctx.mailbox.sent == [("anna", "A1\nA2\nB1")]


async def test_nothing_new_sends_nothing(client, ctx):
    job = await client.enqueue(Digest(reader="anna", urls=["empty"]), tenant="digest")
    await run(client, ctx)
    assert await job.result(timeout=1) == 0
    assert ctx.mailbox.sent == []


async def test_a_busy_feed_is_asked_again_later(ctx):
    done = await testing.perform(worker, Digest(reader="anna", urls=["busy"]), state=ctx, attempt=2)
    assert (done.outcome, done.after_s) == ("retry", 120)


async def test_an_unknown_feed_fails_at_once(client, ctx):
    job = await client.enqueue(Digest(reader="anna", urls=["nowhere"]), tenant="digest")
    await run(client, ctx)
    with pytest.raises(aiqueue.JobFailed, match="KeyError") as failed:
        await job.result(timeout=1)
    assert failed.value.attempt == 1


async def test_a_reader_is_welcomed_once_in_an_hour(client, ctx):
    assert await sign_up(client, "anna")
    assert not await sign_up(client, "anna")
    (welcome,) = await testing.assert_enqueued(client, Send, count=1)
    assert 3590 < welcome.due_at - time.time() <= 3600
    await run(client, ctx, delayed=True)
    assert ctx.mailbox.sent == [("anna", "Welcome!")]


async def test_every_reader_has_a_digest_in_the_morning(client, ctx):
    ctx.feeds.readers = {"anna": ["a"], "ben": ["b"]}
    await client.enqueue(Nightly(), tenant="digest")
    await run(client, ctx)
    assert sorted(ctx.mailbox.sent) == [("anna", "A1\nA2"), ("ben", "B1")]
    (tick,) = await client.schedules.next_times("nightly", 1, tenant="digest")
    assert (tick.hour, tick.minute) == (6, 0)
