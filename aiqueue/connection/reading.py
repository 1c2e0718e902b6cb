"""Reading a stream without a consumer: single messages from the stream's leader, pages of messages by direct get.

In a cluster, any server with a replica of the stream answers a direct get, another one each time. One that is behind
the leader lacks the newest messages, and has some that are deleted. What it has is a state that the leader was in
before: nothing is missing in between. So `read_messages` asks the leader at the end whether there is more.
`wait_current` is for reads to which deletions matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from ..errors import AccessDenied, AIQueueError, NotFound, ServerError, Unavailable
from . import frames
from .faults import from_api
from .frames import Received, Stored

BATCH = 256
BATCH_BYTES = 4 * 1024 * 1024  # of one page, which is held in memory; the server ends a larger page early
ANSWER_S = 5.0
LOOKUP_S = 2.0
LAST_MAX = 256  # subjects whose newest messages are read at once; the server's limit is 1,024
SEQ_MAX = 2**64 - 1
STEPS_MAX = 64  # messages that are read one by one from the leader before the next page is asked for
CURRENT_S = 0.5  # how long a server of a cluster that is behind is waited for
LOOK_AGAIN_S, LOOK_AGAIN_MAX_S = 0.002, 0.05
LOST_NS = 10 * 10**9  # a leader that has not heard of a server for so long calls it lost


class ReadConnection(Protocol):
    """What reading needs of the connection."""

    @property
    def cluster(self) -> str: ...
    async def wait_up(self, timeout_s: float) -> None: ...
    def request_many(
        self, subject: str, body: bytes
    ) -> contextlib.AbstractAsyncContextManager[asyncio.Queue[Received | AIQueueError]]: ...
    async def api(
        self, subject: str, request: dict[str, Any] | None = None, *, timeout: float = ...
    ) -> dict[str, Any]: ...


async def get_message(connection: ReadConnection, stream: str, request: dict[str, Any]) -> Stored | None:
    """One message by STREAM.MSG.GET, or None if there is none. The server refuses a `seq` that it can never have."""
    if not 1 <= request.get("seq", 1) <= SEQ_MAX:
        return None
    try:
        reply = await connection.api(f"STREAM.MSG.GET.{stream}", request)
    except NotFound as error:
        if "stream not found" in str(error):
            raise
        return None
    return frames.parse_stored(reply["message"])


async def delete_message(connection: ReadConnection, stream: str, seq: int) -> bool:
    """Delete one message. Returns False if there is none."""
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


async def read_messages(
    connection: ReadConnection,
    stream: str,
    subject: str,
    seq: int,
    *,
    batch: int = BATCH,
    ahead: bool = False,
    since: float | None = None,
    confirmed: bool = True,
) -> AsyncGenerator[Stored, None]:
    """All messages whose subject matches, in order from `seq`, or from those stored at the time `since`. With `ahead`,
    the next page is requested while the caller uses this one. `confirmed`: see `Connection.read`.
    """

    def request_page() -> asyncio.Task[tuple[deque[Stored], bool]]:
        request = {**start, "batch": batch, "next_by_subj": subject, "max_bytes": BATCH_BYTES}
        return asyncio.create_task(_read_page(connection, stream, request))

    start: dict[str, Any] = {"seq": seq}
    if since is not None:
        start = {"start_time": datetime.fromtimestamp(since, UTC).isoformat()}
    page_task, rest = request_page(), _LeadersRest(connection, stream, subject)
    try:
        while True:
            page, more = await page_task
            if page:
                start = {"seq": page[-1].seq + 1}
                rest.steps = 1
            if more and ahead:
                page_task = request_page()
            while page:
                yield page.popleft()  # popped, so that a used message is freed
            if not more:
                if not (confirmed and connection.cluster):
                    return
                for stored in await rest.read(start):
                    start = {"seq": stored.seq + 1}
                    yield stored
                if rest.is_over:
                    return
            if not (more and ahead):
                page_task = request_page()
    finally:
        page_task.cancel()
        await asyncio.gather(page_task, return_exceptions=True)


class _LeadersRest:
    """What the leader of a stream has behind the last page: more messages if who has answered is behind it.

    `steps`: how many of them are read before the next page is asked for. `is_over`: there are no more, or only those
    that were stored after the first of them was found: otherwise reading a busy stream would not end.
    """

    def __init__(self, connection: ReadConnection, stream: str, subject: str) -> None:
        self.steps = 1
        self.is_over = False
        self._connection, self._stream, self._subject = connection, stream, subject
        self._last_seq = 0

    async def read(self, start: dict[str, Any]) -> list[Stored]:
        """Return the next messages, one request each."""
        found: list[Stored] = []
        for _ in range(self.steps):
            stored = await self._get_next(start)
            if stored is None:
                self.is_over = True
                return found
            start = {"seq": stored.seq + 1}
            found.append(stored)
        self.steps = min(2 * self.steps, STEPS_MAX)
        return found

    async def _get_next(self, start: dict[str, Any]) -> Stored | None:
        if self._last_seq and start.get("seq", 0) > self._last_seq:
            return None
        try:
            stored = await get_message(self._connection, self._stream, {**start, "next_by_subj": self._subject})
        except AccessDenied:  # the log says so, once: for this user, reads end where a server does that may be behind
            return None
        if stored is not None and not self._last_seq:
            self._last_seq = SEQ_MAX
            with contextlib.suppress(AccessDenied):
                info = await self._connection.api(f"STREAM.INFO.{self._stream}")
                self._last_seq = int(info["state"]["last_seq"])
        return stored


async def is_still_stored(connection: ReadConnection, stream: str, seq: int) -> bool:
    """Return whether a message that a direct get has returned is still there, as the stream's leader says. True where
    there is no cluster, without a request, and for a user that may not ask the leader.
    """
    if not connection.cluster:
        return True
    with contextlib.suppress(AccessDenied):
        return await get_message(connection, stream, {"seq": seq, "no_hdr": True}) is not None
    return True


async def wait_current(connection: ReadConnection, stream: str, *, within_s: float = CURRENT_S) -> bool:
    """Wait until all servers that answer direct gets have the changes that the stream's leader has now, deletions too.

    The leader says which changes a server has got; to apply them takes it a moment longer. False: one has not got them
    after `within_s` seconds, or this user may not ask. A server that is down does not count: it answers nobody. True at
    once where there is no cluster.

    Raises NotFound, Unavailable.
    """
    current: set[str] = set()
    began, pause_s = time.monotonic(), LOOK_AGAIN_S
    while connection.cluster:
        try:
            found = (await connection.api(f"STREAM.INFO.{stream}")).get("cluster") or {}
        except AccessDenied:
            return False
        replicas = [each for each in found.get("replicas") or () if not each.get("offline")]
        current |= {each["name"] for each in replicas if each.get("current") and not each.get("lag")}
        if current >= {each["name"] for each in replicas}:
            break
        if time.monotonic() - began > within_s:
            return not any(_is_heard(each) for each in replicas if each["name"] not in current)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LOOK_AGAIN_MAX_S)
    return True


def _is_heard(replica: Mapping[str, Any]) -> bool:
    """Return whether the leader has lately heard of a replica. 0: not since it leads. `offline` is set only minutes
    after a server was killed.
    """
    return 0 < int(replica.get("active") or 0) < LOST_NS


async def read_last(connection: ReadConnection, stream: str, subjects: Sequence[str]) -> list[Stored]:
    """The newest messages of subjects, LAST_MAX with each request. One server of a cluster may be behind. Messages are
    missing if those of one request have more than BATCH_BYTES together.
    """
    found: list[Stored] = []
    for at in range(0, len(subjects), LAST_MAX):
        request = {"multi_last": list(subjects[at : at + LAST_MAX]), "batch": LAST_MAX, "max_bytes": BATCH_BYTES}
        page, _ = await _read_page(connection, stream, request)
        found += page
    return found


async def _read_page(connection: ReadConnection, stream: str, request: dict[str, Any]) -> tuple[deque[Stored], bool]:
    """One batched direct get (ADR-31). Returns its messages, and whether the server that answers has more of them."""
    await connection.wait_up(ANSWER_S)
    page: deque[Stored] = deque()
    try:
        async with connection.request_many(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode()) as replies:
            while True:
                if replies.empty():
                    async with asyncio.timeout(ANSWER_S):
                        reply = await replies.get()
                else:  # a timer for each of thousands of messages would cost more than the rest of their way
                    reply = replies.get_nowait()
                if isinstance(reply, Unavailable):
                    raise Unavailable(f"reading stream {stream}: {reply}")
                if isinstance(reply, AIQueueError):
                    raise reply
                status = reply.status
                if status is None or "Nats-Sequence" in reply.headers:  # a stored message may carry a status of its own
                    page.append(frames.parse_direct(reply))
                    continue
                if status.code == 503:
                    raise await _explain_no_responders(connection, stream)
                if status.code not in (204, 404):
                    raise from_api(status.code, 0, status.description, f"reading stream {stream}")
                return page, bool(page) and status.code == 204 and reply.headers.get("Nats-Num-Pending", "0") != "0"
    except TimeoutError:
        raise Unavailable(f"reading stream {stream}: no reply within {ANSWER_S:g} s") from None


async def _explain_no_responders(connection: ReadConnection, stream: str) -> AIQueueError:
    """Why a direct get had no responders: the stream does not exist, has no leader now, or forbids direct gets."""
    try:
        await connection.api(f"STREAM.INFO.{stream}", timeout=LOOKUP_S)
    except NotFound:
        return NotFound(f"stream {stream} does not exist: run `aiqueue apply` on this server first")
    except AIQueueError:
        pass  # a tenant's user may not ask; a cluster without a leader does not know
    return Unavailable(
        f"reading stream {stream}: nobody responds: the stream has no leader now, or was created without allow_direct"
    )
