"""Messages: what users declare, as it is enqueued, and as a handler of every kind gets it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

import pydantic
from typing_extensions import TypeVar

from .. import codec, headers, subjects
from ..codec import secret_paths
from ..errors import BadInput
from ..payload import R, TypedModel, may_contain_documents
from ..units import Deadline, Duration, Time

KIND = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
ANY_KIND = "*"  # where kinds are listed: every kind


class Message(TypedModel[R]):
    """A typed payload. Subclass it with a kind, and with a family unless that is ``agent.tasks``::

        class Summarise(aiqueue.Message[Summary], kind="summarise"):
            text: str

    In brackets stands the type of the job's result, which may be any type that pydantic can read: a model, a dataclass,
    ``list[Page]``, ``int``. Handlers must return it, and `Handle.result` returns it. Without brackets, the result is
    plain data.

    The kind names the message type on the wire; by default it is the class's name. Fields that the model does not have
    are ignored, so that producers can be upgraded first. Raises ValueError for an invalid kind or family.

    The handler gets an equal message. One that would arrive changed is refused when it is enqueued (EncodeError).
    Fields of the types SecretStr, SecretBytes and Secret arrive whole, and are masked wherever they are shown.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    aiq_kind: ClassVar[str] = ""  # not "kind", because a payload may have a field of that name; "": not declared yet
    aiq_family: ClassVar[str] = "agent.tasks"
    aiq_documents: ClassVar[bool] = False  # whether a field may hold a Document
    aiq_secrets: ClassVar[str | None] = ""  # the header that names the secret fields; None: not known yet

    def __init_subclass__(cls, *, kind: str | None = None, family: str | None = None, **config: Any) -> None:
        try:
            super().__init_subclass__(**config)
        except TypeError:
            if not config:
                raise
            problem = f"{cls.__name__}: a message has no option {', '.join(config)}: it has kind, family"
            raise TypeError(f"{problem}, and those of pydantic.ConfigDict") from None
        if kind is not None or "[" not in cls.__name__:  # Page[int] keeps the kind of Page, and Message[Summary] none
            cls.aiq_kind = cls.__name__ if kind is None else kind
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
class JobSpec(Generic[R]):
    """A message with its own options, for `Client.enqueue_many`.

    The options are those of `Client.enqueue`; None means the value that `enqueue_many` was given. `headers` are merged
    with those of `enqueue_many`, and replace headers of the same name. `delay` or `at` here replaces both there.
    """

    message: Message[R] = field(kw_only=False)
    """Message to enqueue."""
    tenant: str | None = None
    """Tenant that the job belongs to."""
    priority: str | None = None
    """Priority of the job, such as "high"."""
    unique: str | None = None
    """Key of which the job's id is made."""
    headers: Mapping[str, str] | None = None
    deadline: Deadline | None = None
    """When the job is not started any more."""
    delay: Duration | None = None
    at: Time | None = None
    on_duplicate: subjects.OnDuplicate | None = None
    """What happens if a job with this id is known, such as "rerun_failed"."""


def check_message(message: Any) -> None:
    """Raise BadInput if `message` is no instance of a subclass of Message."""
    if isinstance(message, Message) and message.aiq_kind:
        return
    if isinstance(message, JobSpec):
        raise BadInput("a JobSpec is only for enqueue_many: pass the message itself, and the options as arguments")
    if isinstance(message, type) and issubclass(message, Message) and message.aiq_kind:
        raise BadInput(f"pass an instance, such as {message.__name__}(...), not the class {message.__name__}")
    what = "Message itself" if message is Message or type(message) is Message else type(message).__name__
    raise BadInput(f"a message is an instance of your own subclass of aiqueue.Message, not {what}")


def check_model(argument: str, model: Any) -> None:
    """Raise BadInput if `model` is no subclass of Message."""
    if isinstance(model, type) and issubclass(model, Message) and model.aiq_kind:
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
M_co = TypeVar("M_co", bound=Message | RawMessage, covariant=True, default=Any)
S_co = TypeVar("S_co", covariant=True, default=Any)  # what a worker's lifespan yields
AnyM = TypeVar("AnyM", bound=Message | RawMessage)


def secret_headers(message: Message) -> dict[str, str]:
    """Return the header that names the secret fields of a message; empty if its class has none."""
    found = secret_paths.header_of_class(type(message)) if message.aiq_secrets is None else message.aiq_secrets
    return {headers.SECRET: found} if found else {}
