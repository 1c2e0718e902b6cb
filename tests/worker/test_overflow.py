"""Results whose jobs were acknowledged before the server had space for them."""

from __future__ import annotations

import pytest

from aiqueue.errors import AIQueueError, DiskFull, Unavailable
from aiqueue.worker import overflow
from aiqueue.worker.overflow import Overflow


async def test_a_result_that_waits_for_space_outlives_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 0.0)
    monkeypatch.setattr(overflow, "CAP_S", 0.01)
    problems: list[AIQueueError] = [
        DiskFull("AI_RESULTS", "full"),
        Unavailable("no reply within 30 s"),
        DiskFull("AI_RESULTS", "full"),
    ]
    written: list[bool] = []

    async def write() -> None:
        if problems:
            raise problems.pop(0)
        written.append(True)

    waiting = Overflow()
    assert not await waiting.write_or_defer("ai.results.acme.1", write)
    await waiting.wait(10)
    assert written == [True]
    assert problems == []


async def test_a_result_that_another_attempt_forbids_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 0.0)
    problems: list[AIQueueError] = [DiskFull("AI_RESULTS", "full"), AIQueueError("another attempt has ended this job")]

    async def write() -> None:
        raise problems.pop(0)

    waiting = Overflow()
    assert not await waiting.write_or_defer("ai.results.acme.1", write)
    await waiting.wait(10)
    assert problems == []
    assert "its result is lost: another attempt has ended this job" in caplog.text
