"""Server-sent events: their format, their ids, and their way to a client. For any ASGI framework."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Self

import pydantic_core

from ..errors import BadInput

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final[Mapping[str, str]] = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# A comment without the blank line that ends an event: OpenAI's client takes a comment and a blank line for an event
# without data, once it has seen an id.
PING: Final = b": ping\n"
PING_S: Final = 15.0
AHEAD_MAX, AHEAD_BYTES_MAX = 256, 256 * 1024  # events that are made before they are taken

_ID = re.compile(r"([A-Za-z0-9_-]{1,64})\.([0-9a-f-]{1,160})")


def event(data: Any, *, id: str = "", name: str = "") -> bytes:  # noqa: A002  (its name in the format)
    """Return one event, with data as JSON in one line: bytes are base64. `name`: "" is an ordinary message."""
    head = f"id: {id}\nevent: {name}\ndata: " if name else f"id: {id}\ndata: "
    made = head.encode() + pydantic_core.to_json(data, bytes_mode="base64", inf_nan_mode="null") + b"\n\n"
    return made if id else made.partition(b"\n")[2]


def event_id(job_id: str, cursor: str) -> str:
    """Return the id of an event: its job, and the cursor of its item. Who sends it back gets what follows."""
    return f"{job_id}.{cursor}"


def parse_event_id(text: str) -> tuple[str, str]:
    """Return the job's id and the cursor in an event's id. Raises BadInput."""
    found = _ID.fullmatch(text)
    if found is None:
        raise BadInput(f"Last-Event-ID {text[:80]!r} is no id of an event of this stream")
    return found[1], found[2]


class EventFlow:
    """Events on their way to a client: made by a task of its own, taken together when they come quickly, and comments
    in silence. ``async with EventFlow(parts) as flow: while (part := await flow.read()) is not None``.

    At most AHEAD_MAX events, or AHEAD_BYTES_MAX bytes and one event, are made ahead of a slow client.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], *, ping_s: float = PING_S) -> None:
        self._parts, self._ping_s = parts, ping_s
        self._made: deque[bytes] = deque()
        self._made_bytes = 0
        self._more, self._room = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # one for the whole stream: one a read costs more than the read
        self._read_at, self._is_quiet = 0.0, False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._make())
        self._task.add_done_callback(lambda _: self._more.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        if self._timer is not None:
            self._timer.cancel()
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # else asyncio logs that nobody has retrieved it

    async def _make(self) -> None:
        async for part in self._parts:
            self._made.append(part)
            self._made_bytes += len(part)
            self._more.set()
            while len(self._made) >= AHEAD_MAX or self._made_bytes >= AHEAD_BYTES_MAX:
                self._room.clear()
                await self._room.wait()

    async def begin(self, timeout_s: float) -> None:
        """Return when there is an event or the end, at the latest after `timeout_s`. Raises what making the first event
        raises.
        """
        assert self._task is not None
        try:
            async with asyncio.timeout(timeout_s):
                await self._more.wait()
        except TimeoutError:
            return
        if not self._made and self._task.done():
            self._task.result()

    async def read(self) -> bytes | None:
        """Return what there is, at least one event or a comment. None: the end. Raises what making an event raises,
        after all events before it were read.
        """
        assert self._task is not None
        loop = asyncio.get_running_loop()
        self._read_at, self._is_quiet = loop.time(), False
        if self._timer is None:
            self._timer = loop.call_later(self._ping_s, self._look, loop)
        while not self._made:
            if self._task.done():
                self._task.result()
                return None
            if self._is_quiet:
                return PING
            self._more.clear()
            await self._more.wait()
        part = self._made[0] if len(self._made) == 1 else b"".join(self._made)
        self._made.clear()
        self._made_bytes = 0
        self._room.set()
        return part

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake `read` if it has waited for `ping_s` seconds."""
        left_s = self._read_at + self._ping_s - loop.time()
        if left_s <= 0:
            self._is_quiet = True
            self._more.set()
            left_s = self._ping_s
        self._timer = loop.call_later(left_s, self._look, loop)
