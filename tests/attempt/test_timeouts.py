"""Time limits: when tasks are cancelled, and when not."""

from __future__ import annotations

import asyncio
import time

import pytest

from aiqueue.attempt import Limits, timeouts
from aiqueue.attempt.timeouts import TaskLimit

SLACK_S = 0.002  # uvloop counts whole milliseconds


async def never(swallow: int = 0) -> float:
    """Wait until cancelled for the time after `swallow` others. Returns when that was, in monotonic seconds."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not swallow:
                return time.monotonic()
            swallow -= 1


async def test_each_task_is_cancelled_at_its_own_limit_in_whatever_order_they_start() -> None:
    limits, begun = Limits(), time.monotonic()
    after = [0.4, 0.1, 0.3, 0.1, 0.2]
    tasks = [asyncio.create_task(never()) for _ in after]
    await asyncio.sleep(0)
    for task, each in zip(tasks, after, strict=True):
        limits.start_task(task, each)  # type: ignore[arg-type]
    ended = [at - begun for at in await asyncio.wait_for(asyncio.gather(*tasks), 10)]
    assert all(at >= limit - SLACK_S for at, limit in zip(ended, after, strict=True))
    assert sorted(range(5), key=lambda i: (ended[i], i)) == sorted(range(5), key=lambda i: (after[i], i))


async def test_a_limit_that_is_stopped_cancels_nothing_and_those_behind_it_still_do() -> None:
    limits = Limits()
    kept, ended = asyncio.create_task(never()), asyncio.create_task(never())
    await asyncio.sleep(0)
    first = limits.start_task(kept, 0.05)  # type: ignore[arg-type]
    second = limits.start_task(ended, 0.15)  # type: ignore[arg-type]
    limits.stop(first)
    limits.stop(first)
    await asyncio.wait_for(ended, 10)
    assert second.expired
    assert not first.expired
    assert not kept.done()
    kept.cancel()
    await kept


async def test_a_limit_that_starts_after_all_others_have_ended_is_kept_too() -> None:
    limits = Limits()
    for _ in range(3):
        task = asyncio.create_task(never())
        await asyncio.sleep(0)
        limits.start_task(task, 0.02)  # type: ignore[arg-type]
        await asyncio.wait_for(task, 10)


async def test_a_task_that_swallows_cancellations_is_cancelled_again_up_to_ten_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timeouts, "REPEAT_S", 0.01)
    monkeypatch.setattr(timeouts, "TICK_S", 0.005)
    limits = Limits()
    twice, always = asyncio.create_task(never(2)), asyncio.create_task(never(100))
    await asyncio.sleep(0)
    of_twice, of_always = TaskLimit(twice), TaskLimit(always)  # type: ignore[arg-type]
    for limit in (of_twice, of_always):
        limits.start(limit, time.monotonic() + 0.01)
    await asyncio.wait_for(twice, 10)
    limits.stop(of_twice)
    assert of_twice.cancels == 3
    async with asyncio.timeout(10):
        while not caplog.records:
            await asyncio.sleep(0.01)
    assert of_always.cancels == timeouts.CANCELS_MAX
    assert not always.done()
    for _ in range(101):
        always.cancel()
        await asyncio.sleep(0)
    await always


class _Stubborn(asyncio.Future[None]):
    def cancel(self, _msg: object = None) -> bool:
        raise RuntimeError("no")


async def test_what_cannot_be_cancelled_keeps_its_limit_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    limits, stubborn = Limits(), _Stubborn()

    async def wait() -> None:
        await stubborn

    first, second = asyncio.create_task(wait()), asyncio.create_task(never())
    await asyncio.sleep(0)
    kept = limits.start_task(first, 0.02)
    limits.start_task(second, 0.05)  # type: ignore[arg-type]
    await asyncio.wait_for(second, 10)
    assert "cannot be cancelled" in caplog.text
    limits.stop(kept)
    stubborn.set_result(None)
    await first
