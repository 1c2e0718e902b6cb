"""Messages, the jobs that carry them, and what a handler raises about its job."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pydantic

from . import codec, headers, secret_paths, subjects
from .backoff import DELAY_MAX_S
from .document_ref import Document, DocumentReader, SyncDocumentReader, may_contain_documents, run_from_thread
from .errors import BadInput
from .units import Duration, parse_duration

KIND = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
ANY_KIND = "*"  # where kinds are listed: every kind


class Message(pydantic.BaseModel):
    """A typed payload. Subclass it with a kind, and with a family unless that is ``agent.tasks``::

        class Summarise(aiqueue.Message, kind="summarise"):
            text: str

    The kind names the message type on the wire; by default it is the class's name. Fields that the model does not have
    are ignored, so that producers can be upgraded first. Raises ValueError for an invalid kind or family.

    The handler gets an equal message. One that would arrive changed is refused when it is enqueued (EncodeError).
    Fields of the types SecretStr, SecretBytes and Secret arrive whole, and are masked wherever they are shown.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    aiq_kind: ClassVar[str] = ""  # not "kind", because a payload may have a field of that name
    aiq_family: ClassVar[str] = "agent.tasks"
    aiq_documents: ClassVar[bool] = False  # whether a field may hold a Document
    aiq_secrets: ClassVar[str | None] = ""  # the header that names the secret fields; None: not known yet

    def __init_subclass__(cls, *, kind: str | None = None, family: str | None = None, **config: Any) -> None:
        super().__init_subclass__(**config)
        if kind is None:  # a parametrised generic such as Page[int] keeps the kind of Page
            kind = cls.aiq_kind if "[" in cls.__name__ else cls.__name__
        cls.aiq_kind = kind
        if not KIND.fullmatch(cls.aiq_kind):
            raise ValueError(f"kind {cls.aiq_kind!r} must be 1 to 128 characters of A-Z a-z 0-9 _ . : -")
        if family is not None:
            cls.aiq_family = family
        if not subjects.FAMILY.fullmatch(cls.aiq_family):
            raise ValueError(f'family {cls.aiq_family!r} must look like "component.operation", in a-z 0-9 _ -')

    @classmethod
    def __pydantic_init_subclass__(cls, **config: Any) -> None:
        super().__pydantic_init_subclass__(**config)
        cls.aiq_documents = may_contain_documents(cls)
        cls.aiq_secrets = secret_paths.header_of_class(cls) if cls.__pydantic_complete__ else None


_IMMUTABLE = frozenset({str, bytes, int, float, bool, type(None)})


@dataclass(frozen=True, slots=True, repr=False)
class RawMessage:
    """The message of a job or mail as a handler of every kind gets it (`Worker.handle_any`, `Agent.handle_any`).

    - `kind`: as ``job.kind``. A message that names no kind, or cannot be decoded, has the family's default kind.
    - `body`: the bytes that were published. A body that was stored as a document is fetched.
    - `content_type`: as the publisher stated it. "": not stated.
    - `schema_version`: that of the envelope, not checked. None: the body is no envelope.

    The headers are ``job.headers`` or ``mail.headers``.
    """

    kind: str
    body: bytes
    content_type: str = ""
    schema_version: str | None = None
    _data: dict[str, Any] | None = field(default=None, compare=False)  # what `decode` returns, if the worker has it

    @property
    def aiq_kind(self) -> str:
        """As of `Message`."""
        return self.kind

    def decode(self) -> dict[str, Any]:
        """Return the fields of the message as plain data, without its envelope: what a typed message is made of.

        Each call returns new data. Raises DecodeError if the body is not CBOR or JSON, or is not a map with text keys.
        """
        if self._data is not None and _IMMUTABLE.issuperset(map(type, self._data.values())):
            return dict(self._data)  # saves a second decoding
        if self.schema_version is None:
            return codec.decode_map(self.body, self.content_type)
        return codec.decode_message(self.body, content_type=self.content_type, default_kind="", aliases={}).data

    def __repr__(self) -> str:  # without the body, which may hold secrets
        return f"<RawMessage {self.kind} of {len(self.body):,} bytes>"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A message with its own options, for `Client.enqueue_many`.

    The options are those of `Client.enqueue`; None means the value that `enqueue_many` was given. `headers` are merged
    with those of `enqueue_many`, and replace headers of the same name. `delay` or `at` here replaces both there.
    """

    message: Message = field(kw_only=False)
    tenant: str | None = None
    priority: str | None = None
    unique: str | None = None
    headers: Mapping[str, str] | None = None
    deadline: Duration | None = None
    delay: Duration | None = None
    at: datetime | float | None = None


def check_message(message: Any) -> None:
    """Raise BadInput if `message` is no instance of a subclass of Message."""
    if isinstance(message, Message) and type(message) is not Message:
        return
    if isinstance(message, JobSpec):
        raise BadInput("a JobSpec is only for enqueue_many: pass the message itself, and the options as arguments")
    if isinstance(message, type) and issubclass(message, Message) and message is not Message:
        raise BadInput(f"pass an instance, such as {message.__name__}(...), not the class {message.__name__}")
    what = "Message itself" if message is Message or type(message) is Message else type(message).__name__
    raise BadInput(f"a message is an instance of your own subclass of aiqueue.Message, not {what}")


def check_model(argument: str, model: Any) -> None:
    """Raise BadInput if `model` is no subclass of Message."""
    if isinstance(model, type) and issubclass(model, Message) and model is not Message:
        return
    if model is RawMessage:
        raise BadInput(f"{argument} needs the class of a message: use handle_any for jobs or mail of every kind")
    if inspect.isroutine(model):
        raise BadInput(f"{argument} needs a message's class, not function {model.__name__}: use {argument}(YourClass)")
    shown = f"an instance of {type(model).__name__}" if isinstance(model, Message) else repr(model)
    raise BadInput(f"{argument} needs the class of a message, a subclass of aiqueue.Message, not {shown}")


def untyped(kind: str, family: str) -> type[Message]:
    """Return a Message class that takes any fields, for tools that know only the name of a kind."""

    class Untyped(Message, kind=kind, family=family, extra="allow"):
        pass

    return Untyped


M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message | RawMessage, covariant=True)
AnyM = TypeVar("AnyM", bound=Message | RawMessage)


def secret_headers(message: Message) -> dict[str, str]:
    """Return the header that names the secret fields of a message; empty if its class has none."""
    found = secret_paths.header_of_class(type(message)) if message.aiq_secrets is None else message.aiq_secrets
    return {headers.SECRET: found} if found else {}


class Progress(Protocol):
    """What a `Job` needs of its worker; in a child process, this forwards to the worker.

    `progress` and `chunk` write to the job's journal. `chunks` yields a document's bytes, verified.
    """

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def cancelled(self) -> bool: ...
    async def progress(self, fraction: float, note: str) -> None: ...
    async def chunk(self, data: Any) -> None: ...
    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]: ...


class Job(Generic[M_co]):
    """A job as its handler gets it: a message, and the data of this attempt.

    `message` is of the handler's class, and a `RawMessage` in a handler of every kind.

    `attempt` counts from 1. `enqueued_at` and `deadline` are seconds since the epoch; `deadline` may be None.
    `state` is the value that the worker's lifespan yielded. `headers` are the job's headers on the wire.
    """

    __slots__ = (
        "_headers", "_progress", "attempt", "deadline", "enqueued_at", "family", "id", "kind", "message", "priority",
        "state", "tenant",
    )  # fmt: skip

    def __init__(
        self,
        message: M_co,
        *,
        job_id: str,
        lane: tuple[str, str, str],
        attempt: int,
        enqueued_at: float,
        deadline: float | None,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]],
        state: Any,
        progress: Progress,
    ) -> None:
        """`headers` may be a function that returns them: most handlers do not ask."""
        self.message: M_co = message
        self.id = job_id
        self.kind = message.aiq_kind
        self.family, self.tenant, self.priority = lane
        self.attempt = attempt
        self.enqueued_at = enqueued_at
        self.deadline = deadline
        self._headers = headers
        self.state = state
        self._progress = progress

    @property
    def headers(self) -> Mapping[str, str]:
        if callable(self._headers):
            self._headers = self._headers()
        return self._headers

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.kind} {self.tenant}/{self.priority} attempt {self.attempt}>"

    @property
    def cancelled(self) -> bool:
        """Whether this attempt should stop: its job was cancelled, its timeout is over, or the worker is stopping.

        An async handler then gets asyncio.CancelledError. A handler that is a plain function cannot be interrupted; it
        may check this now and then, and return.
        """
        return self._progress.cancelled

    async def progress(self, fraction: float, note: str = "") -> None:
        """Report how far the job is, by a `fraction` from 0 to 1 and a note. Written to the job's journal.

        Raises Stale if another attempt has taken over the job. Do not catch it: the work is no longer needed.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, not {fraction!r}")
        await self._progress.progress(float(fraction), note)

    def progress_sync(self, fraction: float, note: str = "") -> None:
        """As `progress`, for a handler that is a plain function."""
        run_from_thread(self.progress(fraction, note), self._progress.loop, "`progress` and not `progress_sync`")

    async def chunk(self, data: Any) -> None:
        """Write a part of the job's output, such as a few words of an answer, for readers of `Handle.stream`.

        `data` may be anything that a result may be. It is written to the job's journal, before the result.

        Chunks wait for the write in progress, at most 256 chunks or 1 MiB; this returns as soon as there is capacity.
        Raises TooLarge for a chunk that exceeds a message, and errors of earlier writes: Unavailable, and Stale if
        another attempt has taken over the job. Do not catch Stale: the work is no longer needed.
        """
        await self._progress.chunk(data)

    def chunk_sync(self, data: Any) -> None:
        """As `chunk`, for a handler that is a plain function: it waits in its thread until there is capacity."""
        run_from_thread(self.chunk(data), self._progress.loop, "`chunk` and not `chunk_sync`")

    def open(self, document: Document) -> DocumentReader:
        """Open a document of this job's tenant: ``async for chunk in job.open(document)``, or its `read` or `save`.

        Raises BadInput for a document of another tenant.
        """
        self._check_tenant(document)
        return DocumentReader(document, self._progress.chunks)

    def open_sync(self, document: Document) -> SyncDocumentReader:
        """As `open`, for a handler that is a plain function."""
        self._check_tenant(document)
        return SyncDocumentReader(document, self._progress.chunks, self._progress.loop)

    def _check_tenant(self, document: Document) -> None:
        """Raise BadInput for a document of another tenant."""
        if document.tenant != self.tenant:
            raise BadInput(f"a job of tenant {self.tenant} cannot read a document of tenant {document.tenant}")


class Retry(Exception):
    """Raise this in a handler to retry the job `after` a delay: seconds or "30s", at most 365 days; None: its backoff.

    The attempt counts: when all attempts are used up, the job becomes a dead letter.
    """

    reason = "the handler asked for a retry"  # for subclasses whose __init__ does not call this one
    after_s: float | None = None

    def __init__(self, reason: str = reason, *, after: Duration | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = None if after is None else parse_duration("after", after)
        if self.after_s is not None and self.after_s > DELAY_MAX_S:
            raise BadInput(f"after must be at most 365 days, not {after!r}: use Reject for a job that cannot succeed")


class Reject(Exception):
    """Raise this in a handler if the job can never succeed. It becomes a dead letter at once, with `reason`."""

    reason = "the handler rejected the job"

    def __init__(self, reason: str = reason) -> None:
        super().__init__(reason)
        self.reason = reason
