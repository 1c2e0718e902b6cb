"""Ctrl-C, and what else a signal handler raises, while a thread waits for a stream."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import aiqueue
from aiqueue.payload.document_ref import Document, SyncDocumentReader

from ..support import Account, create_streams, wait_until

KINDS = pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


@pytest.fixture
def raised_by_signal(kind: type[BaseException]) -> Iterator[None]:
    """Have SIGUSR1 raise the exception in the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise kind

    before = signal.signal(signal.SIGUSR1, handle)
    yield
    signal.signal(signal.SIGUSR1, before)


def signal_when(condition: Callable[[], bool]) -> threading.Thread:
    """Send SIGUSR1 to this process when the condition holds, from another thread."""

    def send() -> None:
        wait_until(condition, within=25)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


async def apply_streams(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)


@KINDS
@pytest.mark.usefixtures("raised_by_signal")
def test_what_a_signal_raises_ends_a_stream_and_the_client_goes_on(account: Account, kind: type[BaseException]) -> None:
    asyncio.run(apply_streams(account))
    with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as client:
        handle = client.enqueue(Echo(), tenant="acme")
        thread = signal_when(lambda: bool(_steps(client)))  # the stream waits for its first item
        with pytest.raises(kind):
            list(handle.stream())
        thread.join()
        wait_until(lambda: not _steps(client), within=25)
        assert handle.status().state == "queued"


def _steps(client: aiqueue.SyncClient) -> list[asyncio.Task[Any]]:
    """The tasks of the client's event loop that wait for the next item of a stream."""
    assert client._loop is not None
    return [each for each in asyncio.all_tasks(client._loop) if "next" in repr(each.get_coro())]


@KINDS
@pytest.mark.usefixtures("raised_by_signal")
def test_what_a_signal_raises_ends_the_reading_of_a_document(kind: type[BaseException]) -> None:
    events: list[str] = []

    async def read_chunks(document: Document) -> AsyncGenerator[bytes, None]:
        yield b"first"
        try:
            events.append("waiting")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            events.append("closed")

    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()
    try:
        document = Document(tenant="acme", sha256="0" * 64, size=10)
        thread = signal_when(lambda: bool(events))
        with pytest.raises(kind):
            list(SyncDocumentReader(document, read_chunks, loop))
        thread.join()
        assert events == ["waiting", "closed"]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        loop.close()
