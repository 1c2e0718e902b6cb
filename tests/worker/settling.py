"""Handlers that state what they have used: child processes of the tests import them by name."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.errors import Stale

WRONG: dict[str, Any] = {"nan": float("nan"), "negative": -1, "infinite": float("inf"), "bool": True, "text": "7"}
LEFT: list[Callable[[], str]] = []  # what handlers left behind, for later jobs of the process to finish


class Use(aiqueue.Message, kind="use"):
    do: str
    path: str = ""  # a file that shows that the handler has settled


async def use(job: aiqueue.Job[Use]) -> Any:
    done = _use(job)
    if job.message.do in ("settle and hang", "settle when cancelled"):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if job.message.do == "settle when cancelled":
                job.settle(9)
            raise
    return done


def use_sync(job: aiqueue.Job[Use]) -> Any:
    done = _use(job)
    if job.message.do == "settle and hang":
        time.sleep(2)
    while job.message.do == "settle when cancelled" and not job.cancelled:
        time.sleep(0.005)
    if job.message.do == "settle when cancelled":
        job.settle(9)
    return done


def _use(job: aiqueue.Job[Use]) -> Any:
    match job.message.do:
        case "nothing":
            pass
        case "settle":
            job.settle(70)
        case "settle twice":
            job.settle(70)
            job.settle(12.5)
        case "settle nothing used":
            job.settle(0)
        case "settle and raise":
            job.settle(70)
            raise aiqueue.Reject("used, and failed")
        case "settle in a step":
            job.step_sync("call", job.settle, 70)
        case "settle and hang":
            job.settle(70)
        case "settle and die":
            job.settle(70)
            os._exit(9)
        case "leave a thread that settles":
            LEFT.append(_settle_later(job))
        case "settle what is left":
            return LEFT.pop()()
        case wrong if wrong in WRONG:
            job.settle(WRONG[wrong])
    if job.message.path:
        Path(job.message.path).touch()
    return os.getpid()


def _settle_later(job: aiqueue.Job[Use]) -> Callable[[], str]:
    """Settle a job from a thread as soon as its attempt is over, until that is refused; return how to wait for it."""
    said: list[str] = []

    def settle() -> None:
        while not said:
            try:
                job.settle(33)
            except Stale as stale:
                said.append(str(stale))

    thread = threading.Thread(target=settle, daemon=True)
    thread.start()

    def wait() -> str:
        thread.join(20)
        return said[0]

    return wait
