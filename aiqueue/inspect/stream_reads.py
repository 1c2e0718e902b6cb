"""Reads of the server that views are made of: what a stream holds, by subject, and its consumers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from ..connection import Connection, timestamp

PAGES_AT_ONCE = 4
LIST_S = 8.0  # a server of a cluster waits 4 s for the others before it names those that are missing


class StreamSample(NamedTuple):
    """The state of a stream at one moment, `at` by the server's clock (seconds since the epoch)."""

    at: float
    last_seq: int
    messages: int
    size_bytes: int
    size_limit_bytes: int | None


async def sample_stream(connection: Connection, stream: str) -> StreamSample:
    """Return how full a stream is now. Raises NotFound."""
    info = await connection.api(f"STREAM.INFO.{stream}")
    state, at = info["state"], timestamp(info["ts"])  # the server's clock on both sides: ours may differ
    limit = info["config"].get("max_bytes", -1)
    return StreamSample(at, state["last_seq"], state["messages"], state["bytes"], limit if limit > 0 else None)


async def count_subjects(connection: Connection, stream: str, subject_filter: str) -> dict[str, int]:
    """Return how many messages a stream holds on each subject. The server answers page by page."""
    found: dict[str, int] = {}
    while True:
        info = await connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject_filter, "offset": len(found)})
        page: dict[str, int] = info["state"].get("subjects") or {}
        found |= page
        if not page or len(found) >= info.get("total", 0):
            return found


async def list_consumers(connection: Connection, stream: str) -> AsyncIterator[tuple[str, dict[str, Any] | None]]:
    """Yield the names of the consumers of a stream with their information.

    None: a server of a cluster has not reported it in time, as happens just after another server has died.
    The server answers page by page. PAGES_AT_ONCE are asked for, so that it makes the next ones while one is read.
    """

    async def read_page(offset: int) -> dict[str, Any]:
        return await connection.api(f"CONSUMER.LIST.{stream}", {"offset": offset}, timeout=LIST_S)

    pages = deque([asyncio.ensure_future(read_page(0))])
    offset = 0
    try:
        while pages:
            page = await pages.popleft()
            found, missing = page.get("consumers") or [], page.get("missing") or []
            offset = offset or len(found) + len(missing)  # as many are on each page but the last
            while found and offset < page["total"] and len(pages) < PAGES_AT_ONCE:
                pages.append(asyncio.ensure_future(read_page(offset)))
                offset += page["limit"]
            if pages:  # the tasks send their requests, and the socket gets them, before this page is used
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            for each in found:
                yield each["name"], each
            for name in missing:
                yield name, None
    finally:
        for waiting in pages:
            waiting.cancel()
        await asyncio.gather(*pages, return_exceptions=True)
