"""A job that is gone without an outcome is not taken for one that succeeded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import aiqueue
from aiqueue.errors import JobGone, ResultDisabled
from aiqueue.journal import outcome_watch

from ..support import Eventually, NatsProcess, create_streams

pytestmark = pytest.mark.families("agent.tasks")
STREAM = "AI_AGENT_TASKS"


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells a waiter of a purge, so it is seen at the next poll."""
    monkeypatch.setattr(outcome_watch, "POLL_S", 0.2)


def silent(concurrency: int = 1, hold: asyncio.Event | None = None) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=concurrency)

    @worker.handle(Ping, result=False)
    async def ping(job: aiqueue.Job[Ping]) -> None:
        if hold is not None:
            await hold.wait()

    return worker


async def is_stored(client: aiqueue.Client, handle: aiqueue.Handle) -> bool:
    return await client.connection.get(STREAM, handle._enqueued.seq) is not None


async def awaited(handle: aiqueue.Handle) -> asyncio.Task[object]:
    """A wait for the result that has seen the job stored."""
    seen = asyncio.Event()

    class Watch(outcome_watch.OutcomeWatch):
        def _note_seen(self) -> None:
            super()._note_seen()
            seen.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome_watch, "OutcomeWatch", Watch)
        task = asyncio.create_task(handle.result(25))
        async with asyncio.timeout(25):
            await seen.wait()
    return task


async def test_purged_while_a_worker_is_busy_with_jobs_before_it(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome_watch, "SEEN_FOR_S", 0.1)  # the worker acks nothing here
    seen = []
    note_seen = outcome_watch.OutcomeWatch._note_seen

    def note(watch: outcome_watch.OutcomeWatch) -> None:
        note_seen(watch)
        seen.append(watch._seen)

    monkeypatch.setattr(outcome_watch.OutcomeWatch, "_note_seen", note)
    hold = asyncio.Event()
    async with silent(hold=hold).running(client):
        await client.enqueue(Ping(), tenant="acme")
        second = await client.enqueue(Ping(), tenant="acme")
        waiting = await awaited(second)
        await eventually(lambda: any(seen))
        await client.connection.api(f"STREAM.PURGE.{STREAM}", {"filter": "ai.agent.tasks.acme.*", "seq": 2**40})
        with pytest.raises(JobGone):
            await waiting
        hold.set()


async def test_purged_while_no_worker_runs_after_one_that_was_there(client: aiqueue.Client) -> None:
    async with silent().running(client):
        ended = await client.enqueue(Ping(), tenant="acme")
        with pytest.raises(ResultDisabled):
            await ended.result(25)
    await asyncio.sleep(outcome_watch.CLOCK_SLACK_S)  # the lane's consumer was active long ago
    handle = await client.enqueue(Ping(), tenant="acme")
    waiting = await awaited(handle)
    await client.connection.api(f"STREAM.PURGE.{STREAM}")
    for each in (waiting, handle.result(25)):
        with pytest.raises(JobGone):
            await each
    with pytest.raises(ResultDisabled):  # the one that ran, asked again
        await ended.result(25)


async def test_taken_by_a_mirror(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Ping(), tenant="acme")
    waiting = await awaited(handle)
    config = {"name": "COPY", "storage": "memory", "mirror": {"name": STREAM}}
    await client.connection.api("STREAM.CREATE.COPY", config)
    with pytest.raises(JobGone, match="aiqueue doctor"):
        await waiting


async def test_taken_by_another_programs_consumer_that_acks_it(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Ping(), tenant="acme")
    waiting = await awaited(handle)
    request = {"stream_name": STREAM, "config": {"durable_name": "peek", "ack_policy": "explicit"}}
    await client.connection.api(f"CONSUMER.CREATE.{STREAM}.peek", request)
    inbox = client.connection.new_inbox()
    await client.connection.subscribe(inbox, lambda message: client.connection.tell(message.reply, b"+ACK"))
    await client.connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.peek", b'{"batch": 1}', reply=inbox)
    with pytest.raises(JobGone):
        await waiting


async def test_expired(client: aiqueue.Client) -> None:
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    handle = await client.enqueue(Ping(), tenant="acme")
    waiting = await awaited(handle)
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_age": 10**8, "duplicate_window": 10**8})
    with pytest.raises(JobGone):
        await waiting


async def test_purged_between_two_attempts(client: aiqueue.Client, eventually: Eventually) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Ping, retry=aiqueue.Backoff(attempts=3, first=4.0, jitter=0))  # below what is parked
    async def ping(job: aiqueue.Job[Ping]) -> None:
        raise ValueError("not yet")

    async with worker.running(client):
        handle = await client.enqueue(Ping(), tenant="acme")

        async def has_failed() -> bool:
            return (await handle.status()).state == "retrying"

        await eventually(has_failed)
    await client.connection.delete(STREAM, handle._enqueued.seq)
    with pytest.raises(JobGone):
        await handle.result(25)
    stream = handle.stream(timeout=25)
    assert (await anext(stream)).event == "retry"  # what there is comes first
    with pytest.raises(JobGone):
        await anext(stream)


@pytest.mark.parametrize(("seen_for_s", "error"), [(outcome_watch.SEEN_FOR_S, ResultDisabled), (0.0, JobGone)])
async def test_a_delivered_job_that_goes_just_after_the_wait_began_may_have_been_acked_just_before(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, seen_for_s: float, error: type[Exception]
) -> None:
    """The server removes a job a little after its ack: who begins to wait in between hears no ack. A deletion does the
    same to the waiter.
    """
    monkeypatch.setattr(outcome_watch, "SEEN_FOR_S", seen_for_s)
    config = client.topology.family("agent.tasks").lane_config("acme", "normal")
    call = f"CONSUMER.CREATE.{STREAM}.acme-normal.{config['filter_subject']}"
    await client.connection.api(call, {"stream_name": STREAM, "config": config})
    handle = await client.enqueue(Ping(), tenant="acme")
    arrived, inbox = asyncio.Event(), client.connection.new_inbox()
    await client.connection.subscribe(inbox, lambda message: arrived.set())
    await client.connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.acme-normal", b'{"batch": 1}', reply=inbox)
    async with asyncio.timeout(25):
        await arrived.wait()
    waiting = await awaited(handle)
    await client.connection.delete(STREAM, handle._enqueued.seq)
    with pytest.raises(error):
        await waiting


async def test_a_job_of_a_handler_without_results_ends_as_before(client: aiqueue.Client) -> None:
    async with silent(concurrency=8).running(client):
        handles = [await client.enqueue(Ping(n=n), tenant="acme") for n in range(50)]
        waits = [handle.result(25) for handle in handles]
        found = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(each) for each in found} == {ResultDisabled}
        again = await asyncio.gather(*(handle.result(25) for handle in handles), return_exceptions=True)
        assert {type(each) for each in again} == {ResultDisabled}
        assert not any([await is_stored(client, handle) for handle in handles])


async def test_a_job_without_a_result_ends_as_before_where_the_server_has_a_domain(
    own_server: Callable[..., NatsProcess],
) -> None:
    server = own_server(storage="domain: hub")
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        hold = asyncio.Event()
        async with silent(hold=hold).running(client):
            handle = await client.enqueue(Ping(), tenant="acme")
            waiting = await awaited(handle)  # it listens to the acks while the job is stored
            hold.set()
            with pytest.raises(ResultDisabled):
                await waiting
