"""Children of a job: what a handler asks for, as plain data that also travels to the worker from a child process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple

from .. import codec
from ..errors import BadInput, ChildCancelled, ChildFailed, ChildLost, EncodeError, ResultInvalid
from ..payload import R_co, encode_message, find_documents, parse_result
from ..units import Duration, parse_duration
from .made_headers import MakeHeaders, add_made_headers
from .message import Message, check_message, secret_headers

NAME_MAX = 256
CANCELLED, LOST, RESULT = "cancelled", "lost", "result"  # as in `journal`, which may not be imported here
ChildError = ChildFailed | ChildLost | ResultInvalid  # what stands among the results of a gathering


@dataclass(frozen=True, slots=True)
class Child(Generic[R_co]):
    """A job that a handler has enqueued with `Job.enqueue`. `name`: its name in the parent.

    ``Child[Summary]``: the message's class declares that the result is a Summary. Otherwise the result is plain data.

    To wait for the result, pass the child to `Job.gather`: a handler that awaits a result itself keeps its slot.
    `duplicate`: an earlier attempt of the parent has enqueued the child.
    """

    name: str
    id: str
    """The child's job id."""
    family: str
    """Family of the child's kind."""
    tenant: str
    """Tenant of the child, which is that of its parent."""
    priority: str
    """Priority of the lane that the child was stored in."""
    duplicate: bool = False
    _model: type[Message[R_co]] | None = field(default=None, repr=False, compare=False)  # the message's class


class ChildSpec(NamedTuple):
    """A child that is to be enqueued, encoded. `priority` None: the parent's. `documents`: their fields.

    `delay_s`, `deadline_s`: seconds from now; None: no delay, and the parent's deadline. `secrets`: the header that
    names the secret fields, or nothing.
    """

    name: str
    kind: str
    family: str
    body: bytes
    priority: str | None
    delay_s: float | None
    deadline_s: float | None
    headers: dict[str, str]
    secrets: dict[str, str]
    documents: list[dict[str, Any]]


class ChildOutcome(NamedTuple):
    """How a child of a gathering has ended. `event`: result, failed, cancelled or lost. `result`: CBOR."""

    job_id: str
    event: str
    result: bytes | None
    reason: str
    error: str
    attempt: int


class Wait(NamedTuple):
    """A job's wait for its children: its number, how many have not ended, and after how long to look again, seconds."""

    number: int
    children: int
    fallback_s: float


class WaitsForChildren(BaseException):
    """Ends the run of a handler whose children have not all ended. The handler runs again when they have.

    No Exception, so that ``except Exception`` does not catch it. Do not catch it.
    """

    def __init__(self, wait: Wait) -> None:
        super().__init__(f"the handler waits for {wait.children:,} children, and runs again when they have ended")
        self.wait = wait


def check_child_name(name: Any) -> str:
    """Return the name of a child. Raises BadInput."""
    if not isinstance(name, str) or not 1 <= len(name) <= NAME_MAX or not name.isprintable():
        raise BadInput(f"a child's name must be 1 to {NAME_MAX} printable characters, not {str(name)[:80]!r}")
    return name


def make_child_spec(
    name: str,
    message: Message,
    *,
    priority: str | None = None,
    delay: Duration | None = None,
    deadline: Duration | None = None,
    headers: Mapping[str, str] | None = None,
    make_headers: MakeHeaders | None = None,
) -> ChildSpec:
    """Encode a child. `make_headers`: the client's function. Raises BadInput (EncodeError)."""
    check_message(message)
    headers = add_made_headers(make_headers, message, headers)
    if headers is not None and not isinstance(headers, Mapping):
        raise BadInput(f'headers must be a mapping of names to texts, such as {{"trace": "7"}}, not {headers!r}')
    try:
        documents = [each.model_dump() for each in find_documents(message)] if message.aiq_documents else []
    except Exception as error:
        raise EncodeError(f"the documents of the message cannot be read: {type(error).__name__}: {error}") from error
    return ChildSpec(
        check_child_name(name), message.aiq_kind, message.aiq_family, encode_message(message), priority,
        None if delay is None else parse_duration("delay", delay),
        None if deadline is None else parse_duration("deadline", deadline),
        dict(headers or {}), secret_headers(message), documents,
    )  # fmt: skip


class GatheredChild(NamedTuple):
    """A child that `Job.gather` was given: the message of a new one, or the id of one that was enqueued before.

    `model`: its message's class.
    """

    name: str
    message: Message | None
    id: str | None
    model: type[Message] | None


def check_gathered(children: Any, known: Mapping[str, str]) -> list[GatheredChild]:
    """Return the children that `Job.gather` was given. `known`: ids of this execution, by name. Raises BadInput."""
    if isinstance(children, Message | str | bytes | Mapping) or not isinstance(children, Sequence):
        raise BadInput(
            "pass a list: for each child the pair of its name and its message, or what `job.enqueue` has returned, not "
            f"{type(children).__name__}"
        )
    found: list[GatheredChild] = []
    for each in children:
        if isinstance(each, Child):
            found.append(GatheredChild(each.name, None, each.id, each._model))
        elif isinstance(each, tuple) and len(each) == 2:
            found.append(GatheredChild(check_child_name(each[0]), each[1], None, type(each[1])))
        else:
            raise BadInput(f"a child is the pair of its name and its message, not {type(each).__name__}")
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"two children are named {twice!r}: number the children of a loop, as in 'page-1'")
    for child in found:
        if child.id is not None and known.get(child.name) != child.id:
            raise BadInput(
                f"child {child.name!r} ({child.id}) is none of this execution of the handler: enqueue it here, which "
                "stores no second one, or pass the pair of its name and its message"
            )
    return found


def value_of_outcome(child: GatheredChild, outcome: ChildOutcome) -> Any:
    """Return the result of a child, or the error that stands for it (ChildError).

    The result is of the type that the message's class declares; without one it is plain data.
    """
    if outcome.event == LOST:
        return ChildLost(outcome.job_id, name=child.name, error=outcome.error)
    if outcome.event != RESULT:
        failed = ChildCancelled if outcome.event == CANCELLED else ChildFailed
        return failed(
            outcome.job_id, name=child.name, reason=outcome.reason, error=outcome.error, attempt=outcome.attempt
        )
    if outcome.result is None:
        return None
    data = codec.decode(outcome.result, codec.CBOR, max_bytes=len(outcome.result))
    if child.model is None or child.model.aiq_result is Any:
        return data
    try:
        return parse_result(child.model, data, job_id=outcome.job_id)
    except ResultInvalid as error:
        return error
