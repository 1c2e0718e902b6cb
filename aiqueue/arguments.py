"""Checks of what callers pass. Each raises BadInput, which names the argument and says what to pass instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import BadInput
from .job import JobSpec, Message, RawMessage


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


def whole_number(argument: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{argument} must be a whole number from {low} to {high:,}, not {value!r}")
    return value


def flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise BadInput(f"{argument} must be True or False, not {value!r}")
    return value


def text(argument: str, value: Any) -> str:
    """Return `value` if it is a text."""
    if not isinstance(value, str):
        raise BadInput(f"{argument} must be a text, not {value!r}")
    return value


def texts(argument: str, values: Any) -> tuple[str, ...]:
    """Return the texts in an iterable. One text is none: its characters would be taken for the items."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise BadInput(f'{argument} must be a list of texts, such as ["a", "b"], not {values!r}')
    return tuple(text(f"each of {argument}", each) for each in values)
