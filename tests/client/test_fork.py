"""A client that was opened before a fork, as by a web server that loads its app before it forks its workers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

PARENT = """
    import asyncio, os, sys, time
    import aiqueue
    from aiqueue.errors import AIQueueError, BadInput, Unavailable

    class Task(aiqueue.Message, kind="task"):
        n: int = 0

    def refused(call, error, text):
        started_at = time.monotonic()
        try:
            call()
        except error as found:
            assert text in str(found), found
        else:
            raise AssertionError("no error")
        assert time.monotonic() - started_at < 10, "at once, and not after the 20 s of the call"
"""

SYNC = """
    client = aiqueue.connect_sync().open()
    job = client.enqueue(Task(), tenant="acme", timeout=20)
    items = job.stream(timeout=20)
    child = os.fork()
    if child == 0:
        for call in (
            lambda: client.enqueue(Task(), tenant="acme", timeout=20), lambda: job.result(20), lambda: next(items),
            lambda: list(client.enqueue_many([Task()], tenant="acme")),
            lambda: client.documents.put(b"x", tenant="acme"),
        ):
            refused(call, BadInput, "open a client in each process")
        client.close()
        with client:
            assert client.enqueue(Task(), tenant="acme", timeout=20).id
            refused(lambda: job.result(20), Unavailable, "not open")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in range(100):
        client.enqueue(Task(), tenant="acme", timeout=20)
    assert job.status().state == "queued"
    client.close()
    print("parent is done")
"""

ASYNC = """
    async def main():
        async with aiqueue.connect() as client:
            job = await client.enqueue(Task(), tenant="acme", timeout=20)
            child = os.fork()
            if child == 0:
                try:
                    asyncio._set_running_loop(None)  # as in a process that a web server forks
                    asyncio.run(in_child(client, job))
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            for _ in range(100):
                await client.enqueue(Task(), tenant="acme", timeout=20)
            assert (await job.status()).state == "queued"
            print("parent is done")

    async def in_child(client, job):
        try:
            async with asyncio.timeout(10):
                await client.enqueue(Task(), tenant="acme", timeout=20)
        except BadInput as error:
            assert "open a client in each process" in str(error), error
        else:
            raise AssertionError("no error")
        try:
            async with asyncio.timeout(10):
                await job.result(20)
        except Unavailable as error:
            assert "is not open" in str(error), error
        async with client:
            assert (await client.enqueue(Task(), tenant="acme", timeout=20)).id

    asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("program", [SYNC, ASYNC], ids=["sync", "async"])
def test_in_a_forked_process_a_client_says_at_once_that_it_has_to_be_opened_there_and_the_parents_goes_on(
    shared: Any, program: str
) -> None:
    environment = {
        "AIQUEUE_URL": shared.url, "AIQUEUE_USER": shared.user, "AIQUEUE_PASSWORD": shared.password,
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(PARENT) + textwrap.dedent(program)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert run.stdout == "parent is done\n"
