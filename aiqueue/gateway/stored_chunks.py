"""The chunks of a streamed answer in the job's journal: written as they come, and read again after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from .. import codec
from ..errors import AIQueueError, BadInput, Stale, Unavailable
from ..job import Job
from .answers import HEAD, PlainChunk, shallow

if TYPE_CHECKING:
    from ..client import Client

log = logging.getLogger(__name__)

READ_S: Final = 15.0
WRITE_TRIES_MAX: Final = 10  # of a chunk, while the server does not answer
WRITE_PAUSE_S: Final = 0.5
SILENT_S: Final = 0.005
MARK: Final = "aiqueue"  # a field of the first chunk of a call, which OpenAI's clients pass over


class ChunkWriter:
    """Writes the chunks of one call into the journal, for `Handle.stream`. Awaited with each chunk.

    The first one has the call's id. A chunk that is larger than a message, such as an image, is left out, and while the
    server does not answer, all further ones are: a call that is paid for goes on, and the answer has all of it. The
    chunk behind such a hole says so. Of most providers, the first chunk has no text yet: it waits for the second one,
    SILENT_S at most, so that they share an entry, and the second does not wait until the first is stored.
    """

    def __init__(self, job: Job[Any], call_id: str) -> None:
        self._job, self._call_id = job, call_id
        self._mark: dict[str, Any] = {"call_id": call_id}
        self._is_cut = False
        self._silent: Mapping[str, Any] | None = None  # the first chunk, while it waits
        self._is_first = True
        self._releasing: asyncio.Task[None] | None = None

    async def __call__(self, chunk: Mapping[str, Any]) -> None:
        """Raises Stale if another attempt has taken over the job, or the job was cancelled."""
        is_first, self._is_first = self._is_first, False
        if is_first and is_silent(chunk):
            self._silent = chunk
            self._releasing = asyncio.create_task(self._release())
            return
        if self._silent is not None:
            await self._write_silent()
        await self._add(chunk)

    async def _release(self) -> None:
        await asyncio.sleep(SILENT_S)
        with contextlib.suppress(Stale):  # the next chunk finds out
            await self._write_silent()

    async def _write_silent(self) -> None:
        chunk, self._silent = self._silent, None
        if chunk is not None:
            await self._add(chunk)

    async def _add(self, chunk: Mapping[str, Any]) -> None:
        if self._is_cut:
            return
        is_plain, mark = type(chunk) is PlainChunk, self._mark
        data = dict(chunk) if is_plain else shallow(chunk)
        if mark:
            data, self._mark = {**data, MARK: mark}, {}
        try:
            await self._write(codec.Encoded(codec.dump(data)) if is_plain else data)
        except (BadInput, Unavailable) as error:
            log.warning("job %s: what follows is not streamed, the answer has it: %s", self._job.id, error)
            self._is_cut = isinstance(error, Unavailable)
            self._mark = {**mark, "call_id": self._call_id, "left_out": True}

    async def _write(self, data: dict[str, Any] | codec.Encoded) -> None:
        for _ in range(WRITE_TRIES_MAX - 1):
            try:
                await self._job.chunk(data)
            except Unavailable:  # of an earlier write: this chunk was not taken
                await asyncio.sleep(WRITE_PAUSE_S)
            else:
                return
        await self._job.chunk(data)


async def read_chunks(client: Client, job: Job[Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the chunks that earlier attempts of a running job have stored, by call id, without gaps or nothing.

    A mark is written into the journal, as a report of progress: what stands before it is what there is. If the journal
    cannot be read, nothing is found. Raises Stale.
    """
    mark = f"looks for the chunks of earlier calls ({secrets.token_hex(4)})"
    found: dict[str, list[dict[str, Any]]] = {}
    broken = set[str]()
    current = ""
    try:
        await job.progress(0.0, mark)
        handle = await client.job(job.id, family=job.family, tenant=job.tenant)
        async with aclosing(handle.stream(timeout=READ_S)) as items:
            async for item in _until(items, mark):
                if item.event == "gap":
                    broken.add(current)
                elif item.event in ("restart", "started"):
                    current = ""
                elif item.event == "chunk" and isinstance(item.data, dict):
                    chunk = dict(item.data)
                    mark = chunk.pop(MARK, None)
                    if isinstance(mark, dict) and isinstance(mark.get("call_id"), str):
                        current = mark["call_id"]
                        broken |= {current} if mark.get("left_out") else set()
                    found.setdefault(current, []).append(chunk)
    except Stale:
        raise
    except AIQueueError as error:
        log.warning("job %s: the chunks of its earlier calls cannot be read: %s", job.id, error)
        return {}
    return {call: chunks for call, chunks in found.items() if call and call not in broken}


async def _until(items: AsyncIterator[Any], mark: str) -> AsyncIterator[Any]:
    async for item in items:
        if item.event == "progress" and isinstance(item.data, dict) and item.data.get("note") == mark:
            return
        yield item


def is_silent(chunk: Mapping[str, Any]) -> bool:
    """Return whether a chunk has no text, call of a tool or end yet, such as one that says whose message begins."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and all(
        isinstance(each, dict)
        and each.get("finish_reason") is None
        and isinstance(delta := each.get("delta"), dict)
        and not any(value for name, value in delta.items() if name != "role")
        for each in choices
    )


def is_whole_answer(chunk: Mapping[str, Any]) -> bool:
    """Return whether what stands in place of a chunk is a whole completion."""
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(
        isinstance(each, dict) and isinstance(each.get("message"), dict) and each.get("delta") is None
        for each in choices
    )


def as_chunks(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a completion as the chunks of a stream: one with all that each choice has, and one with the usage."""
    head = {name: answer[name] for name in HEAD if name in answer}
    head["object"] = "chat.completion.chunk"
    choices = []
    for place, each in enumerate(answer.get("choices") or ()):
        message = each.get("message") if isinstance(each, dict) else None
        if not isinstance(message, dict):  # nothing that can be streamed
            continue
        delta = {name: value for name, value in message.items() if value is not None}
        if isinstance(calls := delta.get("tool_calls"), list):
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(calls) if isinstance(call, dict)
            ]
        told = {"finish_reason": each.get("finish_reason") or "stop", "logprobs": each.get("logprobs")}
        index = each.get("index")
        choices.append({"index": place if index is None else index, "delta": delta, **told})
    usage = answer.get("usage")
    return [{**head, "choices": choices}, *([{**head, "choices": [], "usage": usage}] if usage is not None else [])]
