"""Reading a stream without a consumer: single messages from its leader, batches by direct get."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from ..errors import AIQueueError, NotFound, ServerError, Unavailable
from . import frames
from .faults import from_api
from .frames import Received, Stored

if TYPE_CHECKING:
    from .link import Connection

BATCH = 256
BATCH_BYTES = 4 * 1024 * 1024  # what must be held at once; the server then ends the batch early
ANSWER_S = 5.0
ASK_WHY_S = 2.0


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


async def read(
    connection: Connection, stream: str, subject: str, seq: int, *, batch: int = BATCH, ahead: bool = False
) -> AsyncGenerator[Stored, None]:
    """All messages whose subject matches, in order from `seq`; `ahead` asks for a batch while the last is used."""

    def ask(at: int) -> asyncio.Task[tuple[deque[Stored], bool]]:
        return asyncio.create_task(_page(connection, stream, subject, at, batch))

    asking = ask(seq)
    try:
        more = True
        while more:
            page, more = await asking
            after = page[-1].seq + 1 if more else 0
            if more and ahead:
                asking = ask(after)
            while page:
                yield page.popleft()  # what is used is held no longer
            if more and not ahead:
                asking = ask(after)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _page(connection: Connection, stream: str, subject: str, seq: int, batch: int) -> tuple[deque[Stored], bool]:
    """One direct-get batch (ADR-31) and whether there is more behind it."""
    await connection.wait_up(ANSWER_S)
    inbox = connection.new_inbox()
    answers: asyncio.Queue[Received] = asyncio.Queue()
    subscription = await connection.subscribe(inbox, answers.put_nowait)
    request = {"seq": seq, "batch": batch, "next_by_subj": subject, "max_bytes": BATCH_BYTES}
    page: deque[Stored] = deque()
    try:
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=inbox)
        while True:
            async with asyncio.timeout(ANSWER_S):
                answer = await answers.get()
            said = answer.status
            if said is None or "Nats-Sequence" in answer.headers:  # a stored message may have a status of its own
                page.append(frames.stored_direct(answer))
                continue
            if said.code == 503:
                raise await _nobody(connection, stream)
            if said.code not in (204, 404):
                raise from_api(said.code, 0, said.description, f"reading {stream}")
            return page, bool(page) and said.code == 204 and answer.headers.get("Nats-Num-Pending", "0") != "0"
    except TimeoutError:
        raise Unavailable(f"{stream}: no answer to a read within {ANSWER_S:g} s") from None
    finally:
        await subscription.close()


async def _nobody(connection: Connection, stream: str) -> AIQueueError:
    """Why nobody answers a read: there is no such stream, or its leader is away."""
    try:
        await connection.api(f"STREAM.INFO.{stream}", timeout=ASK_WHY_S)
    except NotFound:
        return NotFound(f"there is no stream {stream}: has `aiqueue apply` been run on this server?")
    except AIQueueError:
        pass  # a user of one tenant may not ask; a cluster that elects a leader does not know
    return Unavailable(f"{stream}: nobody answers a read: its leader is away, or it was made without allow_direct")
