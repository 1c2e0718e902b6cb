from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.lanes.puller import prefetch
from aiqueue.topology import provision
from aiqueue.worker.session import Session

from ..support import Account, Eventually


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
        await provision.apply(client.connection, client.topology)
        worker = aiqueue.Worker(concurrency=8)

        @worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            pass

        def is_balanced(session: Session) -> bool:
            """Whether nothing is in hand, and the sum of the credits is that of the lanes."""
            lanes = list(session.puller.lanes)
            granted = sum(lane.granted for lane in lanes)
            return len(lanes) == 3 and session.running == 0 and session.puller.granted == granted == 0

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
