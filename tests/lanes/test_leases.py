"""Leases: who is sent a heartbeat, and who is not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

import aiqueue
from aiqueue.lanes import Leases

from ..support import Account, Eventually


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        yield client


async def test_a_held_lease_is_renewed_every_third_of_it_and_no_sooner(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    heartbeats: Counter[str] = Counter()
    await client.connection.subscribe("reply.*", lambda message: heartbeats.update([message.subject]))
    leases = Leases(client.connection, shortest_s=0.6)
    began = time.monotonic()
    leases.hold_lease("reply.long", 3_600, time.monotonic())
    leases.hold_lease("reply.short", 0.6, time.monotonic())
    leases.hold_lease("reply.dropped", 0.6, time.monotonic())
    leases.drop_lease("reply.dropped")
    leases.start()
    try:
        await eventually(lambda: heartbeats["reply.short"] >= 5)
        assert time.monotonic() - began >= 5 * 0.2
    finally:
        await leases.stop()
    assert heartbeats.keys() == {"reply.short"}
