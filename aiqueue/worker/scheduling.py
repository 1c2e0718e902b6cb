"""The schedules that a worker's code declares: from the arguments of `Worker.schedule` to what is stored."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from ..attempt import Handlers
from ..client import Client
from ..config import GENERATION_MAX
from ..errors import BadInput
from ..job import Message, check_message
from ..schedules import (
    Declared,
    MessageMaker,
    Misfire,
    Overlap,
    Recurrence,
    Schedules,
    ScheduleSpec,
    StoredMessage,
    When,
    encode_stored,
    parse_recurrence,
)
from ..subjects import token
from ..units import Duration, Time, parse_duration, shown, whole_number

_AS_THEY_ARE = ("priority", "headers", "misfire", "bound", "overlap")  # options that are fields of a ScheduleSpec
_Message = type[Message[Any]]


class DeclareOptions(TypedDict, total=False):
    """The options of `Worker.schedule`, which explains them."""

    id: str
    tz: str
    start: Time
    end: Time
    jitter: Duration
    priority: str
    deadline: Duration
    headers: Mapping[str, str]
    misfire: Misfire
    bound: int
    grace: Duration
    overlap: Overlap
    makes: _Message


class DeclaredSchedules:
    """What one worker declares, as its code is loaded. `owner` None: it may declare nothing."""

    def __init__(self, owner: str | None, generation: int | None) -> None:
        self.owner = None if owner is None else token("owner", owner)
        self._generation = None if generation is None else whole_number("generation", generation, 0, GENERATION_MAX)
        if self._generation and self.owner is None:
            raise BadInput('a generation is of schedules, which need an owner: Worker(owner="billing", generation=...)')
        self._specs: dict[tuple[str, str], ScheduleSpec] = {}
        self._makers: dict[tuple[str, str], MessageMaker] = {}

    def parse(self, when: When, tenant: str, options: DeclareOptions) -> tuple[Recurrence, DeclareOptions]:
        """Return when a schedule fires, and the options that are left. Raises BadInput."""
        if self.owner is None:
            raise BadInput(
                'schedules in code need an owner, the name of this service: Worker(owner="billing"). A schedule is '
                "changed and pruned by its owner only"
            )
        if unknown := sorted(set(options) - set(DeclareOptions.__annotations__)):
            raise BadInput(f"schedule has no option {unknown[0]}: it has {', '.join(DeclareOptions.__annotations__)}")
        token("tenant", tenant)
        rest = options.copy()
        recurrence = parse_recurrence(
            when,
            tz=rest.pop("tz", None),
            jitter=rest.pop("jitter", None),
            start=rest.pop("start", None),
            end=rest.pop("end", None),
        )
        return recurrence, rest

    def add_message(self, recurrence: Recurrence, message: Message, tenant: str, options: DeclareOptions) -> None:
        """Declare a schedule whose jobs have one message."""
        check_message(message)
        if "id" not in options:
            raise BadInput(f'a schedule of a {type(message).__name__} needs an id, such as id="daily-report"')
        if "makes" in options:
            raise BadInput("makes= is of a function that makes messages: leave it out beside a message")
        stored = encode_stored(message, options.get("headers"))
        self._add(recurrence, tenant, stored, options)

    def add_function(
        self, recurrence: Recurrence, function: Any, handlers: Handlers, tenant: str, options: DeclareOptions
    ) -> None:
        """Declare a schedule of a handler, whose message is made without values, or of a function of the tick."""
        options = options.copy()
        if "id" not in options:
            if not hasattr(function, "__name__"):
                raise BadInput(f'the schedule of {shown(function)} needs an id, such as id="daily-report"')
            options["id"] = str(function.__name__)
        handler = next((each for each in handlers.values() if each.function is function), None)
        if handler is not None:
            if handler.any_of:
                raise BadInput(f"{options['id']} takes every kind: schedule a message, as in schedule(when, Report())")
            self.add_message(recurrence, _without_values(handler.model), tenant, options)
            return
        model = _made_by(function, options.pop("makes", None))
        family, kind = model.aiq_family, model.aiq_kind
        self._add(recurrence, tenant, StoredMessage(family, kind, None, ""), options)
        self._makers[tenant, options["id"]] = MessageMaker(function, family, kind)

    def _add(self, recurrence: Recurrence, tenant: str, message: StoredMessage, options: DeclareOptions) -> None:
        key = tenant, token("schedule", options["id"])
        if key in self._specs:
            raise BadInput(f"this worker declares a schedule {key[1]} of {tenant} already: give one of them another id")
        if not isinstance(headers := options.get("headers", {}), Mapping):
            raise BadInput(
                f'headers must be a mapping of names to texts, such as {{"trace": "7"}}, not {shown(headers)}'
            )
        deadline, grace = options.get("deadline"), options.get("grace")
        more: dict[str, Any] = {name: options[name] for name in _AS_THEY_ARE if name in options}  # type: ignore[literal-required]
        if deadline is not None:
            more["deadline_s"] = parse_duration("deadline", deadline)
        if grace is not None:
            more["grace_s"] = parse_duration("grace", grace)
        self._specs[key] = ScheduleSpec(
            tenant=tenant, id=key[1], recurrence=recurrence, owner=self.owner or "",
            **message._asdict(), **more,
        )  # fmt: skip

    def check(self, client: Client, handlers: Handlers) -> Declared:
        """Return what a run of the worker is to store. Raises BadInput (UnknownFamily) for what cannot be stored."""
        schedules = Schedules(client.connection, client.topology) if self._specs else None
        for each in self._specs.values():
            assert schedules is not None
            schedules.check(each)
            handler = handlers[each.family, each.kind]
            if each.overlap == "skip" and handler is not None and not handler.keeps_result:
                raise BadInput(
                    f'schedule {each.id}: with overlap="skip", a worker has to know whether the former job has ended, '
                    "and with result=False nothing is kept of that: leave result=False out, or skip no overlap"
                )
        generation = client.settings.generation if self._generation is None else self._generation
        specs = [replace(each, generation=generation) for each in self._specs.values()]
        return Declared(self.owner or "", generation, specs, self._makers)


def _without_values(model: _Message) -> Message[Any]:
    try:
        return model()
    except ValueError:  # pydantic's
        name = model.__name__
        raise BadInput(
            f"{name} has fields without defaults: pass a message, as in schedule(when, {name}(...)), or schedule a "
            f"function of the tick that returns one"
        ) from None


def _made_by(function: Any, makes: Any) -> _Message:
    """Return the class of the messages that a function of the tick makes."""
    name = getattr(function, "__qualname__", None) or shown(function)
    if not callable(function) or isinstance(function, type):
        raise BadInput(f"schedule decorates a handler or a function of the tick, not {shown(function)}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BadInput(f"{name} is a generator function: return the message of the tick")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise BadInput(f"{name} must take one argument, the tick: {error}") from None
    if makes is None:
        makes = _returned_by(function)
    if isinstance(makes, type) and issubclass(makes, Message) and makes.aiq_kind:
        return makes
    called = getattr(function, "__name__", "report")
    raise BadInput(
        f"{name} is no handler yet, and does not say which message it makes: put @worker.schedule above "
        f"@worker.handle, or state the class, as in `def {called}(tick: Tick) -> Report` or makes=Report"
    )


def _returned_by(function: Any) -> Any:
    """Return the class that a function is annotated to return; None if it is not, or that cannot be found out.

    Only this annotation is read: others may name what is imported for type checkers only.
    """
    stated = getattr(function, "__annotations__", {}).get("return")
    holder = types.SimpleNamespace(__annotations__={"return": stated})
    try:
        return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {})).get("return")
    except (NameError, TypeError, SyntaxError):
        return None
