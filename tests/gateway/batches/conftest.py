"""Tests look often at whether a batch has ended."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiqueue.gateway.batches.client.POLL_S", 0.05)
