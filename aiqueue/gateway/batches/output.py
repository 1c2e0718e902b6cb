"""What becomes of a batch's lines: records of the output and of the error file, held until a part of them is stored."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import pydantic_core

from ...errors import JobCancelled, JobFailed
from ..failures import Failure, failure_of, message_of

Kind = Literal["output", "error_output"]
LINES: Final = "gateway.requests"  # the family of the jobs of lines


class LineEnd(NamedTuple):
    """How a line has ended, with its record in JSON. `usage`: as that of a batch. `is_stopped`: it was not called."""

    number: int
    kind: Kind
    record: bytes
    usage: tuple[int, int, int, int] = (0, 0, 0, 0)
    is_stopped: bool = False
    has_letter: bool = False  # its job has left a dead letter


def line_id(batch_id: str, number: int) -> str:
    """Return the id of the job of a line."""
    return f"{batch_id}-{number}"


def answered(batch_id: str, number: int, custom_id: str, answer: dict[str, Any]) -> LineEnd:
    """Return the end of a line that has an answer."""
    record = _record(batch_id, number, custom_id, _response(200, line_id(batch_id, number), answer), None)
    return LineEnd(number, "output", record, _usage_of(answer))


def refused(batch_id: str, number: int, custom_id: str, failure: Failure, message: str) -> LineEnd:
    """Return the end of a line that was answered with an error, before or after a call."""
    response = _response(failure.status, line_id(batch_id, number), failure.body(message))
    return LineEnd(number, "error_output", _record(batch_id, number, custom_id, response, None))


def unanswered(batch_id: str, number: int, custom_id: str, code: str, message: str) -> LineEnd:
    """Return the end of a line that has no answer: its batch was cancelled or has expired, or its job is lost."""
    error = {"code": code, "message": message}
    return LineEnd(number, "error_output", _record(batch_id, number, custom_id, None, error))


def failed(batch_id: str, number: int, custom_id: str, error: JobFailed, *, has_begun: bool = False) -> LineEnd:
    """Return the end of a line whose job has failed. `has_begun`: of one that is too late: it may have been called."""
    if isinstance(error, JobCancelled):
        return unanswered(batch_id, number, custom_id, "cancelled", "the job of this line was cancelled")
    if error.reason == "deadline":
        text = "not called before the batch expired"
        if has_begun:  # perhaps its worker has died in a call
            text = "not answered before the batch expired; an earlier call may be billed"
        end = unanswered(batch_id, number, custom_id, "batch_expired", text)
        return end._replace(is_stopped=True, has_letter=True)
    return refused(batch_id, number, custom_id, failure_of(error), message_of(error))._replace(has_letter=True)


def _record(batch_id: str, number: int, custom_id: str, response: dict[str, Any] | None, error: Any) -> bytes:
    record = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}-{number}", "custom_id": custom_id, "response": response,
        "error": error,
    }  # fmt: skip
    try:
        text = pydantic_core.to_json(record, inf_nan_mode="null")
    except ValueError:  # a lone surrogate in a message, which JSON can only name
        text = json.dumps(record, separators=(",", ":")).encode()
    return text + b"\n"


def _response(status: int, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


def _usage_of(answer: dict[str, Any]) -> tuple[int, int, int, int]:
    found = answer.get("usage")
    usage = found if isinstance(found, dict) else {}
    return (
        _count(usage, "prompt_tokens"),
        _count(usage.get("prompt_tokens_details"), "cached_tokens"),
        _count(usage, "completion_tokens"),
        _count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(fields: Any, name: str) -> int:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if type(value) is int and value > 0 else 0


@dataclass(slots=True)
class Pending:
    """Records that are in no part yet, and which lines have ended beyond those that all have.

    `open`: number and last byte of the lines that were begun, in order, from the first that has not ended on.
    """

    line: int
    offset: int
    done: set[int]
    open: deque[tuple[int, int]] = field(default_factory=deque)
    ends: list[LineEnd] = field(default_factory=list)
    size: int = 0

    def begin(self, number: int, end: int) -> None:
        self.open.append((number, end))
        self._advance()  # it may be done already

    def add(self, end: LineEnd) -> None:
        self.ends.append(end)
        self.size += len(end.record)
        self.done.add(end.number)
        self._advance()

    def take(self) -> list[LineEnd]:
        """Return the records that are in no part yet, and hold them no longer."""
        taken, self.ends, self.size = self.ends, [], 0
        return taken

    def _advance(self) -> None:
        while self.open and self.open[0][0] in self.done:
            self.line, self.offset = self.open.popleft()
            self.done.discard(self.line)


def ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return whole numbers as ranges, both ends included."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return tuple((first, last) for first, last in found)
