"""A message as a callback gets it, and how callbacks are called."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .. import codec, headers, subjects
from ..attempt import Threads, is_async_handler
from ..errors import BadInput, DecodeError
from ..job import Job, RawMessage
from ..mailbox import Mail

Payload = bytes | bytearray | memoryview | str
Respond = Callable[[bytes], Awaitable[None]]


class Msg:
    """A message: `subject`, `data` (bytes), `headers`, `reply`, and `respond`. The names are those of nats-py.

    - `subject`: where the message was published. `reply`: where its sender expects an answer; "" if nowhere.
    - `job`: the job, in a callback of a queue of jobs. It has `id`, `attempt`, `tenant`, `priority`, `progress` …
    - `mail`: the mail, in a callback of an agent's inbox. It has `id`, `attempt`, `sender`, `conversation` …
    """

    __slots__ = ("_headers", "_respond", "_responded", "data", "job", "mail", "reply", "subject")

    def __init__(
        self,
        subject: str,
        data: bytes,
        message_headers: Mapping[str, str],
        *,
        reply: str = "",
        respond: Respond | None = None,
        job: Job[RawMessage] | None = None,
        mail: Mail[RawMessage] | None = None,
    ) -> None:
        self.subject = subject
        self.data = data
        self._headers = message_headers
        self.reply = reply
        self.job = job
        self.mail = mail
        self._respond = respond
        self._responded = False

    def __repr__(self) -> str:  # without the body, which may hold secrets
        return f"<Msg on {self.subject}, {len(self.data):,} bytes>"

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers as they were published."""
        return self._headers

    @property
    def content_type(self) -> str:
        """The format of `data` as its publisher stated it; "" if not stated."""
        return headers.find(self.headers, headers.CONTENT_TYPE) or ""

    async def respond(self, payload: Payload = b"") -> None:
        """Answer the message, once.

        1. A request: the requester gets the payload. On the subjects of `responses` and `results`, the payload is
           stored as the result.
        2. A job: the payload becomes its result when the callback returns.
        3. A mail: the sender gets the payload as a mail of the same conversation.

        Raises BadInput if nobody waits for an answer, or if this was called before.
        """
        if self._respond is None:
            raise BadInput(
                f"nobody waits for an answer to this message on {self.subject}: publish to a subject instead"
            )
        if self._responded:
            raise BadInput(f"this message on {self.subject} was answered already: answer a message once")
        body = to_bytes(payload)
        self._responded = True
        await self._respond(body)


class JobMsg(Msg):
    """A job as a message. `answer` is what the callback has responded; None: nothing yet."""

    __slots__ = ("answer",)

    def __init__(self, job: Job[RawMessage]) -> None:
        """Sets the fields of `Msg`, without a call for each job."""
        self.subject = _subject_of_jobs(job.family, job.tenant, job.priority)
        self.data = job.message.body
        self.reply = ""
        self.job = job
        self.mail = None
        self._responded = False
        self.answer: bytes | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        assert self.job is not None
        return self.job.headers  # read when they are asked for

    @property
    def content_type(self) -> str:
        assert self.job is not None
        return self.job.message.content_type  # without a look at the other headers

    async def _respond(self, body: bytes) -> None:  # a method: a bound one in a field would keep the message in a cycle
        self.answer = body


_subject_of_jobs = functools.lru_cache(10_000)(subjects.work)


class Callback:
    """A subscriber's function. An async function is awaited on the event loop, a plain one runs in a thread."""

    def __init__(self, function: Any) -> None:
        """Raises BadInput for what cannot be called with one message, and for a generator function."""
        self.is_async = is_async_handler(
            function,
            rule="callback must be a function of one message, such as `async def handle(msg)`",
            argument="the message",
            instead_of_yield="answer with `await msg.respond(...)`, or return the answer",
        )
        self.function = function
        self._threads = Threads("aiqueue-callback")  # daemons: one that hangs does not keep the process

    def close(self) -> None:
        """Let idle threads end."""
        self._threads.close()

    async def __call__(self, message: Msg) -> Any:
        """Call the function. Raises what it raises."""
        if self.is_async:
            return await self.function(message)
        return await self._threads.run(lambda: self.function(message))


def to_bytes(payload: Any) -> bytes:
    """Return a payload as bytes, a text as UTF-8. Raises BadInput."""
    if type(payload) is bytes:
        return payload
    if isinstance(payload, str):
        return payload.encode("utf-8", "surrogatepass")
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    kind = type(payload).__name__
    raise BadInput(f"payload must be bytes or text, not {kind}: encode it first, as aiqueue.bus.encode(payload) does")


def to_result(answer: Any) -> Any:
    """Return what is stored as the result for an answer: the plain data of a payload in JSON or CBOR, else its text,
    else its bytes. What is no payload is stored as it is.
    """
    if not isinstance(answer, bytes | bytearray | memoryview):
        return answer
    body = bytes(answer)
    if not body:
        return None
    try:
        return codec.decode(body)
    except DecodeError:
        try:
            return body.decode()
        except UnicodeDecodeError:
            return body
