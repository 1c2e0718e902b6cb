"""A typed client and one process of each plain client, on the account of a file's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aiqueue

from ..support import Account
from . import clients
from .clients import Plain


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
async def client(shared: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        yield client
