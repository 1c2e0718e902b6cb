"""One account with the streams, and one process of each plain client, for all tests of a file."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue.topology import provision

from ..support import Account, Server
from . import clients
from .clients import Plain


@pytest.fixture(scope="module")
def shared(nats_server: Server) -> Iterator[Account]:
    taken = nats_server.take()

    async def apply() -> None:
        async with aiqueue.connect(taken.url, user=taken.user, password=taken.password) as client:
            await provision.apply(client.connection, client.topology)

    asyncio.run(apply())
    yield taken
    nats_server.return_to_queue(taken)


@pytest.fixture(scope="session")
def node_problem() -> str:
    return clients.node_problem()


@pytest.fixture(scope="module", params=["nats-py", "node"])
def plain(request: pytest.FixtureRequest, shared: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """A process that has only a NATS client, of each kind."""
    log: Path = tmp_path_factory.mktemp("plain") / "stderr"
    if request.param == "node":
        if problem := request.getfixturevalue("node_problem"):
            pytest.skip(f"the Node.js client is not tried: {problem}")
        client = clients.node(shared, log)
    else:
        client = clients.python(shared, log)
    yield client
    client.end()


@pytest.fixture
def tenant() -> str:
    """One that no other test has."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
async def client(shared: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        yield client
