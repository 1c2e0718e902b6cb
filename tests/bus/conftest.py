"""One account with the streams for all tests of a file, and clients of both kinds on it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

import aiqueue
from aiqueue.topology import provision

from ..support import Account, Server


@pytest.fixture(scope="module")
def shared(nats_server: Server) -> Iterator[Account]:
    taken = nats_server.take()

    async def apply() -> None:
        async with aiqueue.connect(taken.url, user=taken.user, password=taken.password) as client:
            await provision.apply(client.connection, client.topology)

    asyncio.run(apply())
    yield taken
    nats_server.return_to_queue(taken)


@pytest.fixture
def tenant() -> str:
    """One that no other test has."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
async def bus(shared: Account) -> AsyncIterator[aiqueue.NATSClient]:
    async with aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password) as bus:
        yield bus


@pytest.fixture
def client(bus: aiqueue.NATSClient) -> aiqueue.Client:
    """The typed client of the same connection."""
    return bus.client
