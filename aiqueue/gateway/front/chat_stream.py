"""A chat completion as OpenAI's stream of events, made of its job's journal: each token once, from any process.

An event's id has the job, how many chunks the client has, of which call, and the cursor of the job's stream: see
`StreamPosition`. docs/decisions/gateway-front.md tells what becomes of a stream whose worker dies.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...errors import BadInput, JobCancelled, JobFailed
from ...starlette import server_events
from ..stored_chunks import MARK, as_chunks
from .errors import ApiError, error_of_failure
from .idempotency import Submission

if TYPE_CHECKING:
    from ...journal import StreamItem

DONE: Final = b"data: [DONE]\n\n"

_POSITION = re.compile(r"([A-Za-z0-9_-]{1,64})\.(\d{1,9})\.([0-9a-f]{8})\.([0-9a-f-]{1,160})")


class StreamPosition(NamedTuple):
    """Where a client is in a stream: it has `sent` chunks of the call whose id has this `mark`; "": of none."""

    job_id: str
    sent: int
    mark: str
    cursor: str

    def __str__(self) -> str:
        return _text_of_position(*self)

    @classmethod
    def parse(cls, text: str) -> StreamPosition:
        """Return the position in a Last-Event-ID. Raises ApiError."""
        found = _POSITION.fullmatch(text)
        if found is None:
            problem = f"Last-Event-ID {text[:80]!r} is no id of an event of this gateway"
            raise ApiError(400, problem, code="invalid_last_event_id")
        return cls(found[1], int(found[2]), "" if found[3] == "0" * 8 else found[3], found[4])


def _text_of_position(job_id: str, sent: int, mark: str, cursor: str) -> str:
    return f"{job_id}.{sent}.{mark or '00000000'}.{cursor}"


class ChatEvents:
    """The events of one request's job, from its beginning or behind a position.

    `with_usage`: whether the client asks for the chunk with the usage. `with_restarts`: whether it understands the
    event `restart`: the output begins anew. Others get an error instead.
    """

    def __init__(
        self,
        submission: Submission,
        model: str,
        *,
        with_usage: bool,
        with_restarts: bool = False,
        position: StreamPosition | None = None,
    ) -> None:
        self._submission, self._handle, self._model = submission, submission.handle, model
        self._with_usage, self._with_restarts = with_usage, with_restarts
        self._after = None if position is None else position.cursor
        self._sent = 0 if position is None else position.sent
        self._mark = "" if position is None else position.mark
        self._skip = 0  # chunks that the client has already, of a call whose chunks are written again
        self._restart: dict[str, Any] | None = None  # a new attempt writes, and has written no chunk yet
        self._has_hole = self._is_over = False

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Yield the events, several in one part when they come together. Raises ApiError, and what `Handle.stream`
        raises.
        """
        try:
            batches = self._handle.stream_batches(
                after=self._after, is_new=self._submission.is_new, newest_attempt=self._after is None
            )
            async with aclosing(batches):
                async for batch in batches:
                    made: list[bytes] = []
                    problem = self._take(batch, made)
                    if made:
                        yield made[0] if len(made) == 1 else b"".join(made)
                    if problem is not None:
                        raise problem
        except BadInput as error:
            raise ApiError(400, str(error), code="invalid_last_event_id") from None
        if not self._is_over:  # the client had all but the end
            yield DONE

    def _take(self, batch: list[StreamItem], made: list[bytes]) -> ApiError | None:
        """Add the events of some items to `made`. Return the error with which the stream ends behind them."""
        try:
            for item in batch:
                match item.event:
                    case "chunk":
                        made += self._on_chunk(item.data, item.cursor)
                    case "restart":
                        self._restart = item.data if isinstance(item.data, dict) else {}
                    case "gap":
                        self._has_hole = True
                    case "result":
                        made += self._on_result(item.data, item.cursor)
                        self._is_over = True
                    case "failed" | "cancelled":
                        raise self._failure(item.event, item.data)
        except ApiError as error:
            return error
        return None

    def _on_chunk(self, chunk: Any, cursor: str) -> list[bytes]:
        if not isinstance(chunk, dict):
            return []
        made: list[bytes] = []
        call, mark = "", chunk.pop(MARK, None)
        mark = mark if isinstance(mark, dict) else {}
        if "call_id" in mark:
            call = f"{zlib.crc32(str(mark['call_id']).encode()):08x}"
        if (call and call != self._mark) or self._restart is not None:
            made += self._begin_call(call, cursor)
        if self._has_hole or mark.get("left_out"):
            raise self._hole()
        if self._skip:
            self._skip -= 1
            return made
        self._sent += 1
        if not self._with_usage and not chunk.get("choices") and chunk.get("usage") is not None:
            return made
        chunk["model"] = self._model
        return [*made, server_events.event(chunk, id=self._id(cursor))]

    def _begin_call(self, call: str, cursor: str) -> list[bytes]:
        """Take up the chunks of another attempt. The same call's are written again, and the client has some of them."""
        restart, self._restart = self._restart or {}, None
        if call and call == self._mark:
            self._skip, self._has_hole = self._sent, False
            return []
        had, self._mark, self._sent, self._skip = self._sent, call, 0, 0
        if not had:
            return []
        if not self._with_restarts:
            why = f": {restart['why']}" if restart.get("why") else ""
            problem = f"the answer has begun anew after {had} chunks{why}; send the request again for the whole answer"
            raise ApiError(502, problem, code="stream_restarted")
        self._has_hole = False
        return [server_events.event({"object": "aiqueue.restart", **restart}, id=self._id(cursor), name="restart")]

    def _on_result(self, answer: Any, cursor: str) -> list[bytes]:
        """The end of a stream. An answer whose chunks are gone, or were never streamed, comes as one chunk."""
        if isinstance(answer, dict):
            self._submission.settle(answer)
        if self._sent:
            if self._has_hole or self._skip:
                raise self._hole()
            return [b"id: " + self._id(cursor).encode() + b"\n" + DONE]
        made: list[bytes] = []
        for chunk in as_chunks(answer) if isinstance(answer, dict) else ():
            self._sent += 1
            if chunk.get("choices") or self._with_usage:
                made.append(server_events.event({**chunk, "model": self._model}, id=self._id(cursor)))
        return [*made, DONE]

    def _id(self, cursor: str) -> str:
        return _text_of_position(self._handle.id, self._sent, self._mark, cursor)

    def _hole(self) -> ApiError:
        problem = "parts of the stream are gone, because they are too old or too large; the answer itself is kept: "
        problem += "send the request again with the same Idempotency-Key for the whole answer"
        return ApiError(502, problem, code="stream_incomplete")

    def _failure(self, event: str, data: Any) -> ApiError:
        self._submission.settle(None)
        found = data if isinstance(data, dict) else {}
        kind = JobCancelled if event == "cancelled" else JobFailed
        reason, text = str(found.get("reason", "")), str(found.get("error", ""))
        return error_of_failure(kind(self._handle.id, reason=reason, error=text, attempt=0))
