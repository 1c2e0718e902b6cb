"""Lifespans that take the client, and handlers that use it: child processes of the tests import them by name."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiqueue

from .heading import Seen


@dataclass
class State:
    client: aiqueue.Client
    pid: int


class Ask(aiqueue.Message, kind="ask"):
    n: int = 0


@asynccontextmanager
async def open_state(client: aiqueue.Client) -> AsyncIterator[State]:
    yield State(client, os.getpid())


async def use_client(job: aiqueue.Job[Ask, State]) -> Any:
    handle = await job.state.client.enqueue(Seen(n=job.message.n), tenant="acme")
    return [await handle.result(25), job.state.pid == os.getpid(), os.getpid()]
