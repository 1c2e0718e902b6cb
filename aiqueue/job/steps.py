"""What is in force while a step of a job runs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from ..errors import BadInput
from ..tracing import NOT_TRACED, NotTraced, OpenSpan, names, running_tracing, span

_step: contextvars.ContextVar[str] = contextvars.ContextVar("aiqueue step")


@contextlib.contextmanager
def in_step(name: str) -> Iterator[None]:
    """Note that a step of this name runs here."""
    token = _step.set(name)
    try:
        yield
    finally:
        _step.reset(token)


def step_span(name: str) -> OpenSpan | NotTraced:
    """Return the span of a step that runs, to be entered."""
    if running_tracing() is None:
        return NOT_TRACED
    return span(names.step_span(name), {names.STEP: name})


def refuse_in_step(what: str) -> None:
    """Raise BadInput within a step: a later attempt would not do it again."""
    if name := _step.get(""):
        raise BadInput(
            f"no `{what}` within step {name!r}, which a later attempt does not run again: move it behind the step"
        )


class StepEnded(Exception):
    """Carries out of a task what a step of `Job.steps` has raised: a group takes no notice of a CancelledError, and the
    others end the event loop.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error
