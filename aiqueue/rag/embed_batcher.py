"""Texts of many documents and questions, embedded together: what arrives during a call is the next one."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ..errors import BadInput
from ..job import Retry
from .types import Embedder, Vectors

TEXTS_MAX: Final = 256  # in a call
CHARS_MAX: Final = (
    320 * 1024
)  # in a call of more than one piece: an embedder's time and memory grow with the characters
PIECE: Final = 64  # so that a question waits for one call at most, and is in the next
PIECE_CHARS: Final = 80 * 1024  # of a piece of more than one text: 64 chunks of the largest usual size


@dataclass(slots=True, eq=False)
class _TextGroup:
    texts: Sequence[str]
    vectors: asyncio.Future[Vectors]
    chars: int


@dataclass(slots=True, eq=False)
class _TextQueue:
    urgent: deque[_TextGroup] = field(default_factory=deque)
    other: deque[_TextGroup] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class EmbedBatcher:
    """Calls an embedder with what many callers want, questions before documents: up to 256 texts at a time, of 320 Ki
    characters together; or `texts_max` of the embedder, if it has that, and as much less of characters.

    One call is under way for each tenant, or for all tenants together if the embedder's `by_tenant` is False. Nobody
    waits for a batch to fill. A batch that fails for good is tried text group by text group, so that it fails only
    those whose texts are at fault.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.embedded = 0  # texts so far
        self._by_tenant: bool = getattr(embedder, "by_tenant", True)
        self._texts_max: int = getattr(embedder, "texts_max", TEXTS_MAX)
        self._queues: dict[str, _TextQueue] = {}
        self._closed = False

    async def embed(self, texts: Sequence[str], *, tenant: str, urgent: bool = False) -> Vectors:
        """Return a vector for each text: of shape (texts, dimensions). `urgent`: a question. Raises as the embedder.

        A caller that is cancelled before its texts are sent costs nothing.
        """
        import numpy as np  # noqa: PLC0415  (loaded where it is needed)

        if self._closed:
            raise BadInput("the batcher is closed: make another EmbedBatcher")
        if not texts:
            return np.zeros((0, self.embedder.dimensions), np.float32)
        loop = asyncio.get_running_loop()
        pieces = [_TextGroup(each, loop.create_future(), sum(map(len, each))) for each in _cut(texts)]
        key = tenant if self._by_tenant else ""
        queue = self._queues.setdefault(key, _TextQueue())
        (queue.urgent if urgent else queue.other).extend(pieces)
        if queue.task is None:  # in an empty context: the next texts may be another job's
            queue.task = asyncio.create_task(self._run(key, tenant, queue), context=contextvars.Context())
        try:
            found = [await each.vectors for each in pieces]
        except BaseException:
            for each in pieces:
                each.vectors.cancel()
                if each.vectors.done() and not each.vectors.cancelled():
                    each.vectors.exception()  # it is this caller's error too: it counts as seen
            raise
        return found[0] if len(found) == 1 else np.concatenate(found)

    async def close(self) -> None:
        """Cancel what waits, and close the embedder. Safe twice."""
        self._closed = True
        tasks = [each.task for each in self._queues.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.embedder.close()

    async def _run(self, key: str, tenant: str, queue: _TextQueue) -> None:
        batch: list[_TextGroup] = []
        try:
            while batch := _take(queue, self._texts_max):
                await self._embed(tenant, batch)
        finally:
            queue.task = None
            self._queues.pop(key, None)
            for each in (*batch, *queue.urgent, *queue.other):  # only if this task was cancelled
                each.vectors.cancel()

    async def _embed(self, tenant: str, batch: list[_TextGroup]) -> None:
        texts = [text for each in batch for text in each.texts]
        try:
            vectors = _checked(await self.embedder.embed(texts, tenant=tenant), len(texts), self.embedder.name)
        except Exception as error:  # noqa: BLE001 -- whatever a user's embedder raises is the callers'
            if len(batch) == 1 or _may_pass(error):
                for each in batch:
                    if not each.vectors.done():
                        each.vectors.set_exception(error)
                return
            for each in batch:
                await self._embed(tenant, [each])
            return
        self.embedded += len(texts)
        at = 0
        for each in batch:
            if not each.vectors.done():
                each.vectors.set_result(vectors[at : at + len(each.texts)])
            at += len(each.texts)


def _may_pass(error: Exception) -> bool:
    """Whether the embedder is away, rather than one of the texts at fault."""
    return isinstance(error, Retry | OSError) or bool(getattr(error, "retryable", False))


def _checked(vectors: Vectors, count: int, name: str) -> Vectors:
    if len(vectors) != count:
        raise BadInput(f"embedder {name} has returned {len(vectors)} vectors for {count} texts")
    return vectors


def _take(queue: _TextQueue, texts_max: int) -> list[_TextGroup]:
    """Take the next batch: questions first, without those whose callers are gone. `texts_max`: of several groups."""
    chars_max = CHARS_MAX * texts_max // TEXTS_MAX
    batch: list[_TextGroup] = []
    count = chars = 0
    for waiting in (queue.urgent, queue.other):
        while waiting and (
            not batch or (count + len(waiting[0].texts) <= texts_max and chars + waiting[0].chars <= chars_max)
        ):
            piece = waiting.popleft()
            if not piece.vectors.done():
                batch.append(piece)
                count += len(piece.texts)
                chars += piece.chars
    return batch


def _cut(texts: Sequence[str]) -> list[Sequence[str]]:
    """Return the texts in pieces of at most 64 texts and 80 Ki characters, or of one text."""
    pieces: list[Sequence[str]] = []
    first = chars = 0
    for at, text in enumerate(texts):
        if at > first and (at - first >= PIECE or chars + len(text) > PIECE_CHARS):
            pieces.append(texts[first:at])
            first, chars = at, 0
        chars += len(text)
    return [*pieces, texts[first:]]
