"""The chunks of a job's stream, for a reader that takes each one once, and the one that ends the answer last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ..client import Handle
from ..errors import AIQueueError, JobCancelled, JobFailed, ResultTimeout
from ..journal import StreamItem
from .stored_chunks import MARK, as_chunks


class StreamCut(AIQueueError):
    """A stream that has begun cannot go on from where it was."""


class ChunkReader:
    """Reads the chunks of a streamed request, each once. Afterwards `answer` is the whole answer.

    `timeout_s`: how long each chunk may take.
    """

    def __init__(self, handle: Handle[dict[str, Any]], timeout_s: float | None) -> None:
        self._handle, self._timeout_s = handle, timeout_s
        self.answer: dict[str, Any] = {}
        self._call = ""  # whose chunks are read
        self._read = self._skip = 0
        self._has_hole = False

    async def read(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks. Raises StreamCut, JobFailed, ResultTimeout, JobGone."""
        async with aclosing(self._items()) as items:
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        item = await anext(items)
                except TimeoutError:
                    text = f"no chunk of job {self._handle.id} within {self._timeout_s:g} s"
                    raise ResultTimeout(text) from None
                match item.event:
                    case "chunk" if isinstance(item.data, dict):
                        chunk = dict(item.data)
                        if self._takes(chunk):
                            yield chunk
                    case "gap":
                        self._has_hole = True
                    case "result":
                        for chunk in self._end(item.data):
                            yield chunk
                        return
                    case "failed" | "cancelled":
                        kind = JobCancelled if item.event == "cancelled" else JobFailed
                        told = item.data if isinstance(item.data, dict) else {}
                        reason, text = str(told.get("reason", "")), str(told.get("error", ""))
                        raise kind(self._handle.id, reason=reason, error=text, attempt=item.attempt)

    async def _items(self) -> AsyncGenerator[StreamItem, None]:
        """Yield the items of the newest attempt, and of those behind it: the reader may have joined an old request."""
        async with aclosing(self._handle.stream_batches(newest_attempt=True)) as batches:
            async for batch in batches:
                for item in batch:
                    yield item

    def _takes(self, chunk: dict[str, Any]) -> bool:
        """Return whether a chunk is new. What another worker has written again of the same call is not."""
        mark = chunk.pop(MARK, None)
        mark = mark if isinstance(mark, dict) else {}
        call = str(mark.get("call_id", ""))
        if call and call != self._call:
            if self._read:
                raise StreamCut(f"the answer has begun anew after {self._read} chunks: send the request again")
            self._call, self._has_hole = call, False
        elif call:
            self._skip, self._has_hole = self._read, False
        if self._has_hole or mark.get("left_out"):
            raise StreamCut("parts of the stream are gone: send the request again, without a stream, for the answer")
        if self._skip:
            self._skip -= 1
            return False
        self._read += 1
        return True

    def _end(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """Take the answer. If its chunks are gone, or were never streamed, it comes as one."""
        self.answer = answer
        if self._read and (self._has_hole or self._skip):
            raise StreamCut("parts of the stream are gone: send the request again, without a stream, for the answer")
        return [] if self._read else as_chunks(answer)


async def ordered(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks, those that end a choice last and as one: litellm reads no usage behind them."""
    last: dict[str, Any] | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            choices = [each for each in chunk.get("choices") or () if isinstance(each, dict)]
            if not any(each.get("finish_reason") for each in choices):
                yield chunk
                continue
            usage = chunk.pop("usage", None)
            if usage is not None:
                yield {**chunk, "choices": [], "usage": usage}
            last = chunk if last is None else {**last, "choices": [*last["choices"], *choices]}
    if last is not None:
        yield last
