"""Reading a stream without a consumer: single messages from its leader, batches by direct get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..errors import NotFound, ServerError, Unavailable
from . import frames
from .faults import from_api
from .frames import Received, Stored

if TYPE_CHECKING:
    from .link import Connection

BATCH = 256
BATCH_BYTES = 4 * 1024 * 1024  # what must be held at once; the server then ends the batch early
ANSWER_S = 5.0


async def get(connection: Connection, stream: str, request: dict[str, Any]) -> Stored | None:
    """One message by STREAM.MSG.GET, None where there is none."""
    try:
        answer = await connection.api(f"STREAM.MSG.GET.{stream}", request)
    except NotFound as error:
        if "stream not found" in str(error):
            raise
        return None
    return frames.stored(answer["message"])


async def delete(connection: Connection, stream: str, seq: int) -> bool:
    """Delete one message, False where there is none."""
    try:
        await connection.api(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True})
    except NotFound as error:
        if "stream not found" in str(error):
            raise
        return False
    except ServerError as error:  # err_code 10057, which stands for every failure to delete
        if "no message found" not in error.description:
            raise
        return False
    return True


async def read(connection: Connection, stream: str, subject: str, seq: int) -> AsyncIterator[Stored]:
    """All messages whose subject matches, in order from `seq`."""
    more = True
    while more:
        page, more = await _page(connection, stream, subject, seq)
        for item in page:
            yield item
            seq = item.seq + 1


async def _page(connection: Connection, stream: str, subject: str, seq: int) -> tuple[list[Stored], bool]:
    """One direct-get batch (ADR-31) and whether there is more behind it."""
    await connection.wait_up(ANSWER_S)
    inbox = connection.new_inbox()
    answers: asyncio.Queue[Received] = asyncio.Queue()
    subscription = await connection.subscribe(inbox, answers.put_nowait)
    request = {"seq": seq, "batch": BATCH, "next_by_subj": subject, "max_bytes": BATCH_BYTES}
    page: list[Stored] = []
    try:
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=inbox)
        while True:
            async with asyncio.timeout(ANSWER_S):
                answer = await answers.get()
            said = answer.status
            if said is None:
                page.append(frames.stored_direct(answer))
                continue
            if said.code == 503:
                raise NotFound(f"there is no stream {stream}: has `aiqueue apply` been run on this server?")
            if said.code not in (204, 404):
                raise from_api(said.code, 0, said.description, f"reading {stream}")
            return page, bool(page) and said.code == 204 and answer.headers.get("Nats-Num-Pending", "0") != "0"
    except TimeoutError:
        raise Unavailable(f"{stream}: no answer to a read within {ANSWER_S:g} s") from None
    finally:
        await subscription.close()
