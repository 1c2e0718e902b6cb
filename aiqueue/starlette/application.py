"""The client of an application: open while the application runs, and found by its requests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from starlette.types import Scope

from .. import subjects
from ..client import Client, check_client, connect
from ..errors import BadInput, SettingsError

KEY: Final = "aiqueue"  # in the state of the application, and of its requests


@dataclass(slots=True)
class OpenStreams:
    """The streams that an application sends. `stopping`: the server stops, and they end. `count`: how many are open."""

    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0


@dataclass(slots=True)
class WebState:
    """What requests share. `tenant`: that of all requests; None: each has its own, see `set_tenant`."""

    client: Client
    tenant: str | None = None
    streams: OpenStreams = field(default_factory=OpenStreams)


def lifespan(
    client: Client | None = None, *, tenant: str | None = None
) -> Callable[[Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """Return a lifespan that keeps a client open: ``Starlette(lifespan=lifespan())``.

    - `client`: default: that of ``aiqueue.connect()``, made when the application starts. One that is open already is
      used, and left open.
    - `tenant`: the tenant of all requests, for a service that has only one. Otherwise `set_tenant` gives each request
      its own.

    In a lifespan of your own: ``async with aiqueue.starlette.lifespan()(app) as state: yield state``.

    When the server is told to stop (SIGTERM, SIGINT), streams of `sse` end at once, and browsers come back to the next
    process; otherwise they would keep this one from stopping. The application does not start if no server answers:
    raises Unavailable, AccessDenied, SettingsError, as `Client.open`.
    """
    if client is not None:
        check_client(client)
    if tenant is not None:
        subjects.token("tenant", tenant)

    @asynccontextmanager
    async def run(app: Any) -> AsyncIterator[dict[str, Any]]:
        used = client or connect()
        was_open = _is_open(used)
        await used.open()
        state = WebState(used, tenant)
        setattr(app.state, KEY, state)
        try:
            with _at_stop_signals(state.streams.stopping.set):
                yield {KEY: state}
        finally:
            state.streams.stopping.set()
            delattr(app.state, KEY)
            if not was_open:
                await used.close()

    return run


def find_state(scope: Scope) -> WebState | None:
    """Return what the application of a request has opened; None: it has no lifespan of aiqueue."""
    found = scope.get("state", {}).get(KEY) or getattr(scope["app"].state, KEY, None)
    return found if isinstance(found, WebState) else None


def state_of(scope: Scope) -> WebState:
    """Return what the application of a request has opened. Raises SettingsError if it has no lifespan of aiqueue."""
    found = find_state(scope)
    if found is None:
        hint = "pass lifespan=lifespan() to it, and yield its state in a lifespan of your own"
        raise SettingsError(f"the application has not opened the queue: {hint}")
    return found


def _is_open(client: Client) -> bool:
    try:
        return client.connection is not None
    except BadInput:
        return False


@contextlib.contextmanager
def _at_stop_signals(call: Callable[[], None]) -> Iterator[None]:
    """Call a function, too, when the server is told to stop. Servers wait for open responses before the application
    hears of it. Signals that nobody handles, and other threads than the main one, are left alone.
    """
    loop, ours = asyncio.get_running_loop(), {}

    def chain(former: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(call)
            former(number, frame)

        return handle

    for number in (signal.SIGINT, signal.SIGTERM):
        former = signal.getsignal(number)
        if callable(former):
            handler = chain(former)
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)
                ours[number] = handler, former
    try:
        yield
    finally:
        for number, (handler, former) in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, former)
