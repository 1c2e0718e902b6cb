"""A message as a callback gets it, and how callbacks are called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any

from .. import codec, headers, subjects
from ..attempt import PLAIN_TYPES, Threads, is_async_handler
from ..errors import BadInput, DecodeError, Unavailable
from ..job import Job, RawMessage
from ..mailbox import Mail

Payload = bytes | bytearray | memoryview | str
Answer = bytes | str  # what was passed to `Msg.respond`; a text stays one, because a result may be it
Respond = Callable[[Answer], Coroutine[Any, Any, None]]
RESPOND_S = 60.0  # how long a plain function waits in its thread until its answer is sent
_CBOR_CONTAINERS = frozenset({*range(0x80, 0x9C), 0x9F, *range(0xA0, 0xBC), 0xBF})  # no text begins with these bytes
_JSON_CONTAINERS = ("{", "[")
_claiming = threading.Lock()  # of the right to answer a message: a thread of the callback may ask for it too


class Msg:
    """A message: `subject`, `data` (bytes), `headers`, `reply`, and `respond`. The names are those of nats-py.

    - `subject`: where the message was published. `reply`: where its sender expects an answer; "" if nowhere.
    - `job`: the job, in a callback of a queue of jobs. It has `id`, `attempt`, `tenant`, `priority`, `progress` …
    - `mail`: the mail, in a callback of an agent's inbox. It has `id`, `attempt`, `sender`, `conversation` …
    """

    __slots__ = ("_headers", "_loop", "_respond", "_responded", "data", "job", "mail", "reply", "subject")

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
        self._loop = None if respond is None else asyncio.get_running_loop()
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

    def respond(self, payload: Payload = b"") -> Awaitable[None]:
        """Answer the message, once. In an async function ``await msg.respond(…)``, in a plain one ``msg.respond(…)``,
        which returns when the answer is sent.

        1. A request: the requester gets the payload. On the subjects of `responses` and `results`, the payload is
           stored as the result.
        2. A job: the payload becomes its result when the callback returns.
        3. A mail: the sender gets the payload as a mail of the same conversation.

        As a result, a payload in bytes is what it holds in JSON or, for a map or array, in CBOR; else it is its text,
        else bytes. A text is that text, unless it is a map or array in JSON. To store any other value, return it.

        Raises BadInput if nobody waits for an answer, or if this was called before, and what sending raises. Then the
        message is not answered, and this may be called again.
        """
        sending, running = self._send(self._claim(payload)), _running_loop()
        if running is self._loop:
            return sending
        assert self._loop is not None  # otherwise `_claim` has raised
        try:
            sent = asyncio.run_coroutine_threadsafe(sending, self._loop)
        except RuntimeError:  # the loop is closed
            sending.close()
            raise Unavailable("the answer was not sent: the connection was closed") from None
        if running is not None:  # this thread runs an event loop of its own
            return asyncio.wrap_future(sent)
        try:
            sent.result(RESPOND_S)
        except TimeoutError:
            if sent.done():
                raise
            sent.cancel()
            raise Unavailable(f"the answer was not sent within {RESPOND_S:g} s: the event loop is busy") from None
        return _DONE

    def _claim(self, payload: Payload) -> Answer:
        """Return the payload as an answer, and note that the message is answered. Raises BadInput."""
        if self._respond is None:
            raise BadInput(
                f"nobody waits for an answer to this message on {self.subject}: publish to a subject instead"
            )
        answer = payload if isinstance(payload, str) else to_bytes(payload)
        with _claiming:
            if self._responded:
                raise BadInput(f"this message on {self.subject} was answered already: answer a message once")
            self._responded = True
        return answer

    async def _send(self, answer: Answer) -> None:
        assert self._respond is not None
        try:
            await self._respond(answer)
        except BaseException:
            self._responded = False  # so that another answer, such as a shorter one, can be sent
            raise


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
        self.answer: Answer | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        assert self.job is not None
        return self.job.headers  # read when they are asked for

    @property
    def content_type(self) -> str:
        assert self.job is not None
        return self.job.message.content_type  # without a look at the other headers

    def respond(self, payload: Payload = b"") -> Awaitable[None]:
        """As of `Msg`. Nothing is sent, so the answer is noted at once, in whatever thread."""
        self.answer = self._claim(payload)
        return _DONE if _running_loop() is None else self._respond(self.answer)

    async def _respond(self, answer: Answer) -> None:  # a method: one in a field would keep the message in a cycle
        pass


class _Done:
    """What `Msg.respond` returns to a plain function: the answer is sent, and awaiting this does nothing."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


_DONE = _Done()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_subject_of_jobs = functools.lru_cache(10_000)(subjects.work)


class Callback:
    """A subscriber's function. An async function is awaited on the event loop, a plain one runs in a thread.

    What a plain one returns is awaited on the event loop if it is awaitable: it may be a decorated async function, or a
    lambda that calls one. `name` is for logs.
    """

    def __init__(self, function: Any) -> None:
        """Raises BadInput for what cannot be called with one message, and for a generator function."""
        self.is_async = is_async_handler(
            function,
            rule="callback must be a function of one message, such as `async def handle(msg)`",
            argument="the message",
            instead_of_yield="answer with `await msg.respond(...)`, or return the answer",
        )
        self.function = function
        self.name = str(getattr(function, "__qualname__", None) or repr(function))
        self._threads = Threads("aiqueue-callback")  # daemons: one that hangs does not keep the process

    def close(self) -> None:
        """Let idle threads end."""
        self._threads.close()

    async def __call__(self, message: Msg) -> Any:
        """Call the function. Raises what it raises."""
        if self.is_async:
            return await resolved(await self.function(message))
        return await resolved(await self._threads.run(lambda: self.function(message)))


async def resolved(value: Any) -> Any:
    """Return what a function has returned or, if it is awaitable, what it comes to."""
    return await value if type(value) not in PLAIN_TYPES and inspect.isawaitable(value) else value


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


def to_result(value: Any) -> Any:
    """Return what is stored as the result for what a callback has returned. Bytes are read as `data_of_answer` does."""
    return data_of_answer(bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else value


def data_of_answer(answer: Answer) -> Any:
    """Return the data of a payload that becomes a result, as `Msg.respond` says; None for no bytes.

    Whatever `envelopes.encode` writes comes back as it was, except scalars in CBOR: their bytes may be any text. A
    number is read only if it comes to the same text again.
    """
    if isinstance(answer, str):
        return _data_of_text(answer, answer.encode("utf-8", "surrogatepass"))
    if not answer:
        return None
    if answer[0] in _CBOR_CONTAINERS:
        try:
            return codec.decode(answer, codec.CBOR, max_bytes=len(answer))
        except DecodeError:
            return answer
    try:
        text = answer.decode()
    except UnicodeDecodeError:
        return answer
    if codec.JSON_SCALAR.fullmatch(answer):
        number = _data_of_json(answer, text)
        return number if json.dumps(number) == text else text
    if text.startswith('"'):
        return _data_of_json(answer, text)
    return _data_of_text(text, answer)


def _data_of_text(text: str, body: bytes) -> Any:
    """Return the data of a text that is a map or array in JSON, else the text. `body`: the text in UTF-8."""
    is_container = text.lstrip("\ufeff \t\r\n").startswith(_JSON_CONTAINERS)
    return _data_of_json(body, text) if is_container else text


def _data_of_json(body: bytes, otherwise: Any) -> Any:
    try:
        return codec.decode(body, codec.JSON, max_bytes=len(body))
    except DecodeError:
        return otherwise
