import asyncio

from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.lanes import Delivery, LanePull, Puller
from aiqueue.lanes.puller import prefetch
from aiqueue.subjects import Lane
from aiqueue.worker.session import Session

from ..support import Account, Eventually, create_streams


@given(st.integers(1, 10_000), st.floats(0, 1e6))
def test_prefetch_is_at_most_the_concurrency(concurrency: int, handler_s: float) -> None:
    assert 0 <= prefetch(concurrency, handler_s) <= concurrency


def test_prefetch_is_full_for_fast_handlers_and_none_for_slow_or_unknown_ones() -> None:
    assert prefetch(20, 0.001) == 20
    assert prefetch(20, 2.0) == 0
    assert prefetch(20, None) == 0


class Echo(aiqueue.Message, kind="echo"):
    pass


async def test_credits_are_counted_off_when_grants_end_and_when_pulls_are_lost(
    account: Account, eventually: Eventually
) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        worker = aiqueue.Worker(concurrency=8)

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            pass

        def is_balanced(session: Session) -> bool:
            """Whether all lanes wait with a standing pull, and the puller's counters are the sums of the lanes'."""
            lanes = list(session.puller.lanes)
            granted, standing = sum(lane.granted for lane in lanes), sum(bool(lane.standing_request) for lane in lanes)
            counters = session.puller.granted, session.puller._standing_count
            return session.running == 0 and (granted, standing) == counters == (0, 3)

        async with worker.running(client) as session:
            for _ in range(3):
                for tenant in ("a", "b", "c"):
                    for _ in range(5):
                        await client.enqueue(Echo(), tenant=tenant)
                await eventually(lambda: is_balanced(session))
                for lane in session.puller.lanes:  # a grant whose answer is lost
                    session.puller._open_grant(lane, 3)
                session.puller.restart_pulls()
                await eventually(lambda: is_balanced(session))


async def test_jobs_that_are_requested_already_are_not_requested_twice(
    account: Account, eventually: Eventually
) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        worker, release = aiqueue.Worker(concurrency=2), asyncio.Event()

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            await release.wait()

        for _ in range(20):
            await client.enqueue(Echo(), tenant="acme")
        async with worker.running(client) as session:
            await eventually(lambda: session.running == 2 and session.puller.granted == 0)
            for _ in range(2):
                session.puller.refill(3, 0)  # before the server has answered the first
            assert session.puller.granted == 3
            release.set()


async def test_the_first_job_of_a_lane_that_seemed_empty_brings_those_behind_it_without_a_poll(
    account: Account, eventually: Eventually
) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        connection, family = client.connection, client.topology.family("agent.tasks")
        config = family.lane_config("acme", "normal")
        name, subject = config["durable_name"], config["filter_subject"]
        request = {"stream_name": family.stream, "config": config}
        await connection.api(f"CONSUMER.CREATE.{family.stream}.{name}.{subject}", request)
        for _ in range(5):
            await client.enqueue(Echo(), tenant="acme")
        got: list[Delivery] = []

        def deliver(delivery: Delivery) -> None:
            got.append(delivery)
            puller.refill(1, 0)

        puller = Puller(connection, deliver=deliver, gone=lambda lane: None, changed=lambda: puller.refill(1, 0))
        await puller.open()
        try:
            puller.add(LanePull(Lane("agent.tasks", "acme", "normal"), family.stream, name, 30.0, pending=0))
            puller.refill(1, 0)
            await eventually(lambda: len(got) == 5)
        finally:
            await puller.close()
