"""Handlers that start processes, which child processes of the tests import by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import aiqueue

SLEEP_S = 600


class Start(aiqueue.Message, kind="start"):
    """`name`: the command line of what is started holds it. `then`: what the handler does after that."""

    name: str
    then: str = "wait"


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[int]:
    """In a child, start a process that is to live as long as the child."""
    name, worker = os.environ["STARTED"].split()
    yield 0 if os.getpid() == int(worker) else _start(name).pid


async def start_async(job: aiqueue.Job[Start]) -> Any:
    if job.message.then == "return":
        return {"pid": os.getpid(), "state": job.state}
    for each in STARTED_KINDS:
        await asyncio.to_thread(each, job.message.name)
    await asyncio.sleep(SLEEP_S)
    return None


def start_sync(job: aiqueue.Job[Start]) -> Any:
    for each in STARTED_KINDS:
        each(job.message.name)
    match job.message.then:
        case "die":
            os.abort()
        case "return":
            return os.getpid()
    time.sleep(SLEEP_S)
    return None


def _start(name: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", f"{SLEEP_S}.{name}"], **options)


def _start_in_own_session(name: str) -> None:
    _start(name, start_new_session=True)


def _start_in_own_group(name: str) -> None:
    _start(name, process_group=0)


def _start_orphan(name: str) -> None:
    """Start a process whose parent ends at once."""
    subprocess.run(f"sleep {SLEEP_S}.{name} &", shell=True, check=True)


def _start_orphan_in_own_group(name: str) -> None:
    subprocess.run(["bash", "-mc", f"sleep {SLEEP_S}.{name} &"], check=True)


def _fork(name: str) -> None:
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", f"{SLEEP_S}.{name}"])


STARTED_KINDS = (_start, _start_in_own_group, _start_orphan, _start_orphan_in_own_group, _fork, _start_in_own_session)
