"""Clients of the tests of child processes, on an account of their own with all streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

import aiqueue
from aiqueue.topology import provision

from ..support import Account


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client
