"""Context managers around the handlers of an agent's mail."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

import aiqueue
from aiqueue.agent import Mail

from ..support import eventually

ONCE = aiqueue.Backoff(attempts=1)
TRAIL: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("TRAIL", default=())


class Note(aiqueue.Message, kind="note"):
    text: str = ""


class Watched:
    """An agent with two context managers around its handlers, and what they and its handler have seen."""

    def __init__(self, *, in_thread: bool, **options: Any) -> None:
        self.events: list[str] = []
        self.threads: list[int] = []
        self.agent = aiqueue.Agent("ada", tenant="acme")
        self.agent.around(self.asynchronous)
        handler: Callable[[Mail[Any]], Any] = self.handle_in_thread if in_thread else self.handle
        self.agent.handle(Note, **{"retry": ONCE, **options})(handler)
        self.agent.around(self.plain)

    @asynccontextmanager
    async def asynchronous(self, mail: Mail[Any]) -> AsyncIterator[None]:
        with self.noted("async"):
            yield

    @contextmanager
    def plain(self, mail: Mail[Any]) -> Iterator[None]:
        self.threads.append(threading.get_ident())
        with self.noted("plain"):
            yield

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        TRAIL.set((*TRAIL.get(), name))
        try:
            yield
        except BaseException as error:
            self.events.append(f"{name} saw {type(error).__name__}")
            raise
        self.events.append(f"{name} out")

    async def handle(self, mail: Mail[Any]) -> None:
        self.handle_in_thread(mail)
        if mail.message.text == "hang":
            await asyncio.sleep(60)

    def handle_in_thread(self, mail: Mail[Any]) -> None:
        self.threads.append(threading.get_ident())
        self.events.append(f"{'+'.join(TRAIL.get())}: {mail.message.text}")
        if mail.message.text == "raise":
            raise ValueError("broken")


async def send(client: aiqueue.Client, text: str) -> None:
    await client.inboxes.send(Note(text=text), tenant="acme", to="ada", sender="bob")


async def letters(client: aiqueue.Client) -> list[Any]:
    return [each async for each in client.dead.find()]


@pytest.mark.parametrize("in_thread", [False, True], ids=["async", "thread"])
async def test_context_variables_reach_a_mails_handler_and_its_exceptions_come_out_at_each_yield(
    client: aiqueue.Client, in_thread: bool
) -> None:
    watched = Watched(in_thread=in_thread)
    async with watched.agent.running(client):
        await send(client, "first")
        await eventually(lambda: len(watched.events) == 3)
        await send(client, "raise")
        await eventually(lambda: len(watched.events) == 6)
        await eventually(lambda: letters(client))
    assert watched.events == [
        "async+plain: first", "plain out", "async out",
        "async+plain: raise", "plain saw ValueError", "async saw ValueError",
    ]  # fmt: skip
    assert watched.threads[0] == watched.threads[1]
    assert (watched.threads[0] != threading.get_ident()) == in_thread
    (letter,) = await letters(client)
    assert letter.error == "ValueError: broken"


async def test_a_mail_whose_exception_is_suppressed_is_not_handled_and_its_error_says_so(
    client: aiqueue.Client,
) -> None:
    watched = Watched(in_thread=False)

    @watched.agent.around
    @contextmanager
    def suppressing(mail: Mail[Any]) -> Iterator[None]:
        with suppress(ValueError):
            yield

    async with watched.agent.running(client):
        await send(client, "raise")
        await eventually(lambda: letters(client))
    (letter,) = await letters(client)
    assert "suppressing suppressed the handler's ValueError: broken" in letter.error
    assert watched.events[1:] == ["plain saw RuntimeError", "async saw RuntimeError"]


async def test_a_timeout_of_a_mails_handler_comes_out_at_each_yield(client: aiqueue.Client) -> None:
    watched = Watched(in_thread=False, timeout="50ms")
    async with watched.agent.running(client):
        await send(client, "hang")
        await eventually(lambda: letters(client))
    assert watched.events[1:] == ["plain saw CancelledError", "async saw CancelledError"]


async def test_a_function_that_ends_in_its_thread_after_its_timeout_is_seen_as_failed(client: aiqueue.Client) -> None:
    watched, goes_on = Watched(in_thread=True, timeout="50ms"), threading.Event()

    @watched.agent.around
    @contextmanager
    def waiting(mail: Mail[Any]) -> Iterator[None]:
        goes_on.wait(30)
        yield

    async with watched.agent.running(client):
        await send(client, "late")
        await eventually(lambda: letters(client))
        goes_on.set()
        await eventually(lambda: "plain saw Stale" in watched.events)
    assert watched.events == ["async saw CancelledError", "async+plain: late", "plain saw Stale"]
