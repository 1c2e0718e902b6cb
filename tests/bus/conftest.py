"""The tests of the bus have the typed client of its connection."""

from __future__ import annotations

import pytest

import aiqueue


@pytest.fixture
def client(bus: aiqueue.NATSClient) -> aiqueue.Client:
    """The typed client of the same connection."""
    return bus.client
