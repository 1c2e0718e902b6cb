"""A client and a worker on the account of the file."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import aiqueue

from ..support import Account
from .apps import APPS, Served, serving, worker


@pytest.fixture
async def queue(shared: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        yield client


@pytest.fixture
async def working(queue: aiqueue.Client) -> AsyncIterator[None]:
    async with worker.running(queue):
        yield


@pytest.fixture(params=APPS)
async def served(request: pytest.FixtureRequest, queue: aiqueue.Client, tenant: str) -> AsyncIterator[Served]:
    """The service in both frameworks."""
    async with serving(APPS[request.param](queue), tenant) as served:
        yield served
