"""Messages, the jobs that carry them, and what a handler may say of its job."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pydantic

from . import subjects
from .document_ref import Chunks, Document, SyncChunks, drive, mentions
from .errors import BadInput, DecodeError
from .units import seconds

KIND = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Message(pydantic.BaseModel):
    """A typed payload. Subclass it with a kind, and a family where it is not ``agent.tasks``::

        class Summarise(aiqueue.Message, kind="summarise"):
            text: str

    The kind is what travels on the wire; without one it is the class's name. Fields that the model does not know
    are ignored, so that producers can be upgraded first. Raises ValueError for a kind or family that cannot travel.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    aiq_kind: ClassVar[str] = ""  # not "kind": a payload may well have a field of that name
    aiq_family: ClassVar[str] = "agent.tasks"
    aiq_documents: ClassVar[bool] = False  # whether a field may hold a Document

    def __init_subclass__(cls, *, kind: str | None = None, family: str | None = None, **config: Any) -> None:
        super().__init_subclass__(**config)
        if kind is None:  # Page[int] is a Page
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
        cls.aiq_documents = mentions(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A message with options of its own, for `Client.enqueue_many`: those of `Client.enqueue`, None being what
    `enqueue_many` was given. `headers` go over `enqueue_many`'s name by name; `delay` and `at` replace each other.
    """

    message: Message = field(kw_only=False)
    tenant: str | None = None
    priority: str | None = None
    unique: str | None = None
    headers: Mapping[str, str] | None = None
    deadline: str | float | None = None
    delay: str | float | None = None
    at: datetime | float | None = None


def untyped(kind: str, family: str) -> type[Message]:
    """A Message class that takes any fields, for tools that know a kind only by its name."""

    class Untyped(Message, kind=kind, family=family, extra="allow"):
        pass

    return Untyped


_MODEL_VALIDATE = pydantic.BaseModel.model_validate.__func__  # type: ignore[attr-defined]

M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)


class Progress(Protocol):
    """Whom a job talks to: the runner, or in a child process the way to it. `progress` and `chunk` go to the job's
    journal; `chunks` are a document's, verified.
    """

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def cancelled(self) -> bool: ...
    async def progress(self, fraction: float, note: str) -> None: ...
    async def chunk(self, data: Any) -> None: ...
    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]: ...


class Job(Generic[M_co]):
    """One message being carried to a handler.

    `attempt` counts from 1. `deadline` and `enqueued_at` are seconds since the epoch (`deadline` None: none).
    `state` is what the worker's lifespan yielded. `headers` are those of the wire.
    """

    __slots__ = (
        "_progress", "attempt", "deadline", "enqueued_at", "family", "headers", "id", "kind", "message", "priority",
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
        headers: Mapping[str, str],
        state: Any,
        progress: Progress,
    ) -> None:
        self.message: M_co = message
        self.id = job_id
        self.kind = message.aiq_kind
        self.family, self.tenant, self.priority = lane
        self.attempt = attempt
        self.enqueued_at = enqueued_at
        self.deadline = deadline
        self.headers = headers
        self.state = state
        self._progress = progress

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.kind} {self.tenant}/{self.priority} attempt {self.attempt}>"

    @property
    def cancelled(self) -> bool:
        """True once nobody waits for this attempt any more: its job was cancelled, its time is up, or the worker has
        left. An async handler gets asyncio.CancelledError then; a plain function, which nothing can interrupt, may look
        here now and then, and return.
        """
        return self._progress.cancelled

    async def progress(self, fraction: float, note: str = "") -> None:
        """Tell how far the job is: `fraction` from 0 to 1 and a note. Goes to the job's journal.

        Raises Stale when another attempt has taken the job over; let it pass, the work is no longer wanted.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, not {fraction!r}")
        await self._progress.progress(fraction, note)

    def progress_sync(self, fraction: float, note: str = "") -> None:
        """The same for a handler that is a plain function."""
        drive(self.progress(fraction, note), self._progress.loop, "`progress` and not `progress_sync`")

    async def chunk(self, data: Any) -> None:
        """Give a part of what comes out of the job, such as a few words of an answer, to whoever follows it by
        `Handle.stream`. Any data that a result may be; it goes to the job's journal, before the result does.

        Returns when there is room among the chunks that wait for the write under way: at most 256, or 1 MiB. Raises
        TooLarge for one that no message can hold, and what writing earlier ones raised: Unavailable, and Stale when
        another attempt has taken the job over; let that pass, the work is no longer wanted.
        """
        await self._progress.chunk(data)

    def chunk_sync(self, data: Any) -> None:
        """The same for a handler that is a plain function: it waits in its thread until there is room."""
        drive(self.chunk(data), self._progress.loop, "`chunk` and not `chunk_sync`")

    def open(self, document: Document) -> Chunks:
        """Read a document of this job's tenant: ``async for chunk in job.open(document)``, or its `read` or `save`.

        Raises BadInput for another tenant's.
        """
        return Chunks(self._own(document), self._progress.chunks)

    def open_sync(self, document: Document) -> SyncChunks:
        """The same for a handler that is a plain function."""
        return SyncChunks(self._own(document), self._progress.chunks, self._progress.loop)

    def _own(self, document: Document) -> Document:
        if document.tenant != self.tenant:
            raise BadInput(f"a document of tenant {document.tenant} cannot be read by a job of {self.tenant}")
        return document


class Retry(Exception):
    """Raised by a handler: try this job again, `after` a delay (seconds or "30s"; None: the handler's backoff).

    It counts as an attempt; when the attempts are used up the job ends as a dead letter.
    """

    def __init__(self, reason: str = "the handler asked for a retry", *, after: str | float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = None if after is None else seconds(after)


class Reject(Exception):
    """Raised by a handler: this job can never succeed. It ends as a dead letter at once, with `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_message(model: type[M], data: Mapping[str, Any]) -> M:
    """`data` as `model`. Raises DecodeError naming the first field that does not fit."""
    try:
        if model.model_validate.__func__ is not _MODEL_VALIDATE:  # type: ignore[attr-defined]
            return model.model_validate(data)
        message: M = model.__pydantic_validator__.validate_python(data)  # what it comes to
        return message  # noqa: TRY300
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        told = " ".join(first["msg"].split())
        raise DecodeError(f"not a {model.aiq_kind}: {where}: {told}{more}") from None
    except Exception as error:  # noqa: BLE001  (a model's own checks raise what they like, and pydantic lets it pass)
        told = " ".join(str(error).split())[:500]
        raise DecodeError(f"not a {model.aiq_kind}: {type(error).__name__}: {told}") from None
