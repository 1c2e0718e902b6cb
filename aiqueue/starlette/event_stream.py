"""A job's stream as the response to a browser's EventSource."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..client import Handle
from ..errors import AIQueueError, BadInput, Unavailable
from ..journal import StreamItem
from . import server_events
from .application import OpenStreams, find_state
from .problems import problem_of
from .public_items import public_data

log = logging.getLogger(__name__)

STATUS_S: Final = 1.0  # how long the status waits for the first event, or for an error in its place
RETRY_MS: Final = (500, 1_500)  # when a browser connects again: not all of them at the same time
END_S: Final = 5.0  # how long a slow client may take for the end of a stream when the server stops
ENDED: Final = "end"  # in place of a cursor: the job has ended, and has no final item


def sse(
    handle: Handle[Any], after: str | None = None, *, details: bool = False, ping_s: float = server_events.PING_S
) -> EventStream:
    """Return a job's stream as server-sent events, for EventSource: to be returned by the endpoint.

    A chunk is an ordinary message with the chunk as JSON. Others are events by the name of the item: started, progress,
    retry, restart (discard the output so far), gap, and at the end result, failed or cancelled; ended, if the job's
    handler keeps no result; problem, if the stream has failed. See `public_data` for what their data have; `details`:
    all that the journal has, tracebacks among it, but no secrets.

    `after`: the id of the last event that the client has, as `last_event_id` returns it: only what follows is sent. Who
    has all is answered with 204, so that EventSource does not connect again. After `ping_s` seconds of silence comes a
    comment, by which proxies keep the connection.

    Raises BadInput if `after` is no event of this job. What is found out within a second, such as JobGone, is raised
    before the status is sent.
    """
    return EventStream(handle, after, details=details, ping_s=ping_s)


class EventStream(Response):
    """The response that `sse` returns. It follows the job only while its client is connected."""

    def __init__(self, handle: Handle[Any], after: str | None, *, details: bool, ping_s: float) -> None:
        super().__init__(headers=dict(server_events.HEADERS), media_type=server_events.MEDIA_TYPE)
        del self.headers["content-length"]
        self._handle, self._details, self._ping_s = handle, details, ping_s
        self._cursor = _cursor_of(handle, after)
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._cursor == ENDED:
            await _send_no_content(send)
        elif scope["method"] == "HEAD":
            await self._begin(send)
            await self._end(send)
        else:
            state = find_state(scope)
            await self._serve(state.streams if state is not None else OpenStreams(), receive, send)

    async def _serve(self, streams: OpenStreams, receive: Receive, send: Send) -> None:
        """Send the stream until it ends, its client has gone, or the server stops."""
        gone, stopping = asyncio.create_task(_wait_gone(receive)), asyncio.create_task(streams.stopping.wait())
        sending = asyncio.create_task(self._send(send))
        streams.count += 1
        try:
            await asyncio.wait([gone, stopping, sending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            streams.count -= 1
            for task in (gone, stopping, sending):
                task.cancel()
            await asyncio.wait([gone, stopping, sending])
        if not sending.cancelled():
            sending.result()
        elif gone.cancelled():  # the server stops: the browser comes back to another process
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_S):
                    await self._begin(send)
                    await self._end(send)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events()) as parts, server_events.EventFlow(parts, ping_s=self._ping_s) as flow:
            reading = asyncio.create_task(flow.read())
            try:
                await asyncio.wait([reading], timeout=STATUS_S)
                if reading.done() and reading.result() is None:  # the client has had the end
                    await _send_no_content(send)
                    return
                await self._begin(send)
                part = await reading
                while part is not None:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    part = await flow.read()
            except Exception as error:
                if not self._has_begun:
                    raise  # it is answered with a status of its own
                await self._send_problem(error, send)
            finally:
                reading.cancel()
            await self._end(send)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        is_new, has_more, has_final = self._cursor is None, False, False
        async with aclosing(self._handle.stream_batches(after=self._cursor)) as batches:
            async for batch in batches:
                has_more, has_final = True, batch[-1].final
                yield b"".join(map(self._event_of, batch))
        if not has_final and (has_more or is_new):
            yield server_events.event(None, id=server_events.event_id(self._handle.id, ENDED), name="ended")

    def _event_of(self, item: StreamItem) -> bytes:
        data = item.masked().data if self._details else public_data(item)
        event_id = server_events.event_id(self._handle.id, item.cursor)
        return server_events.event(data, id=event_id, name="" if item.event == "chunk" else item.event)

    async def _send_problem(self, error: Exception, send: Send) -> None:
        """Tell the client why its stream ends, unless it only needs to connect again."""
        if isinstance(error, Unavailable):
            log.warning("job %s: its stream has ended: %s", self._handle.id, error)
            return
        log.error("job %s: its stream has failed: %s", self._handle.id, error, exc_info=error)
        problem = problem_of(error if isinstance(error, AIQueueError) else AIQueueError(str(error)))
        body = server_events.event(problem.body, name="problem")
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _begin(self, send: Send) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        retry = f"retry: {random.randint(*RETRY_MS)}\n\n".encode()  # noqa: S311  (spreads the load)
        await send({"type": "http.response.body", "body": retry, "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _cursor_of(handle: Handle[Any], after: str | None) -> str | None:
    """Return the cursor in an event's id; None: from the beginning. Raises BadInput."""
    if not after:
        return None
    job_id, _, cursor = after.partition(".")
    if (job_id, cursor) == (handle.id, ENDED):
        return ENDED
    job_id, cursor = server_events.parse_event_id(after)
    if job_id != handle.id:
        raise BadInput(f"Last-Event-ID is of job {job_id}, not of {handle.id}")
    return cursor


async def _send_no_content(send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
