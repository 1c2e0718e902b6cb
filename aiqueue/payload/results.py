"""The type of a job's result: ``class Ask(Message[Answer])`` declares it, and who awaits the result gets an Answer.

The type is known to type checkers, and to the side that reads a result. It is nowhere on the wire.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, ForwardRef, Generic, Literal, cast, get_args, get_origin
from weakref import WeakValueDictionary

import pydantic
from typing_extensions import TypeVar

from ..codec import secret_paths
from ..errors import BadInput, ResultInvalid
from .messages import first_problem

R = TypeVar("R", default=Any)
R_co = TypeVar("R_co", covariant=True, default=Any)
_ADAPTER = "__aiq_result_adapter__"  # where a class keeps the adapter of its result's type

if TYPE_CHECKING:

    class TypedModel(pydantic.BaseModel, Generic[R]):
        """The base of Message. It is generic only for type checkers, because a message may have its own parameters:
        ``class Page(Message, Generic[T])`` has one, and Page[int] is its own.
        """

        aiq_kind: ClassVar[str]
        aiq_result: ClassVar[Any]

else:

    class ResultDeclaring(pydantic.BaseModel):
        """The base of Message when it runs. Message[Summary] is a subclass of Message with `aiq_result`."""

        aiq_kind: ClassVar[str] = ""
        aiq_result: ClassVar[Any] = Any  # the type of the job's result; Any: plain data

        def __class_getitem__(cls, item: Any) -> Any:
            """Return the class of messages whose result is an `item`; for a generic message, pydantic's own class."""
            if cls is ResultDeclaring:
                return cls
            return super().__class_getitem__(item) if cls.aiq_kind else _declare(cls, item)

        @classmethod
        def __pydantic_init_subclass__(cls, **config: Any) -> None:
            super().__pydantic_init_subclass__(**config)
            generic = cls.__pydantic_generic_metadata__
            if cls.aiq_result is not Any and generic["origin"] is not None:  # Ask[int] of `class Ask(Message[T], …[T])`
                parameters = generic["origin"].__pydantic_generic_metadata__["parameters"]
                cls.aiq_result = _replace(cls.aiq_result, parameters, generic["args"])

    TypedModel = ResultDeclaring


_declared: WeakValueDictionary[Any, type[TypedModel[Any]]] = WeakValueDictionary()  # Message[item] by item


def _declare(message: type[TypedModel[Any]], item: Any) -> type[TypedModel[Any]]:
    """Return Message[item], always the same class while it is used. Raises TypeError for what is no result's type."""
    if message.aiq_result is not Any:
        raise TypeError(f"{message.__name__} has its result type: declare one, as in `class Ask(Message[Answer])`")
    if item is Any:
        return message
    result = types.NoneType if item is None else item
    _check_type(result)
    try:
        known = _declared.get(result)
    except TypeError:  # not hashable, such as Annotated[int, Field(gt=0)]
        return _make_class(message, result)
    if known is None:
        known = _declared[result] = _make_class(message, result)
    return known


def _make_class(message: type[TypedModel[Any]], result: Any) -> type[TypedModel[Any]]:
    members = {"__module__": message.__module__, "__doc__": message.__doc__, "aiq_result": result}
    metaclass: Any = type(message)
    made: type[TypedModel[Any]] = metaclass(f"{message.__name__}[{_name(result)}]", (message,), members)
    return made


def _check_type(result: Any) -> None:
    """Raise TypeError for what pydantic cannot read. What it cannot read yet is left to the first result."""
    if isinstance(result, tuple):
        raise TypeError(
            "a message has one type of results: for several values use tuple[...], as in Message[tuple[A, B]]"
        )
    if _has_text(result):
        raise TypeError(f"Message[{_name(result)}]: give the type itself, not its name: define it above the message")
    try:
        pydantic.TypeAdapter(result)
    except pydantic.errors.PydanticSchemaGenerationError as error:
        raise TypeError(f"Message[{_name(result)}]: pydantic cannot read such a result: {error.message}") from None
    except (pydantic.errors.PydanticUserError, NameError):
        pass  # a model in it names a class that is defined further down


def _has_text(result: Any) -> bool:
    """Whether a type is stated by its name, as in list["Answer"], which nobody could look up later."""
    origin, inner = get_origin(result), get_args(result)
    if origin is None:
        return isinstance(result, str | ForwardRef)
    return origin is not Literal and any(map(_has_text, inner[:1] if origin is Annotated else inner))


def _replace(result: Any, parameters: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """Return a type with the values of its type parameters in their places. Pydantic does so in a model's field."""
    make, generic = cast("Any", pydantic.create_model), cast("Any", Generic)
    holder = make("Holder", __base__=(pydantic.BaseModel, generic[parameters]), value=(tuple[result], ...))
    return get_args(holder[values].model_fields["value"].annotation)[0]


def _name(result: Any) -> str:
    return result.__name__ if isinstance(result, type) and get_origin(result) is None else str(result)


def parse_result(model: type[TypedModel[Any]], data: Any, *, job_id: str, secrets: str = "") -> Any:
    """Return a job's result as the type that its message's class declares.

    The result is read like JSON: texts become times, and fields are found by alias or by name, in strict models too.
    `secrets`: which of its fields are secret, besides those that the type shows. Raises ResultInvalid, whose text
    quotes no secret; BadInput for a type that cannot be read.
    """
    adapter: pydantic.TypeAdapter[Any] = model.__dict__.get(_ADAPTER) or _make_adapter(model)
    try:
        return adapter.validate_python(data, strict=False, by_alias=True, by_name=True)
    except Exception as error:  # noqa: BLE001  (a type's own validators may raise anything, and pydantic passes it on)
        secrets = secret_paths.merge(secrets, secret_paths.header_of_type(model.aiq_result))
        if isinstance(error, pydantic.ValidationError):
            problem = first_problem(error, secrets, whole="the result")
        else:
            problem = f"{type(error).__name__}" if secrets else f"{type(error).__name__}: {error}"
    raise ResultInvalid(job_id, expected=_name(model.aiq_result), reason=problem, data=data)


def _make_adapter(model: type[TypedModel[Any]]) -> pydantic.TypeAdapter[Any]:
    try:
        adapter = pydantic.TypeAdapter(model.aiq_result)
        adapter.rebuild()  # raises for a class that is still undefined, and does nothing for one that is complete
    except Exception as error:
        raise BadInput(f"the result type {_name(model.aiq_result)} of {model.__name__} is unusable: {error}") from error
    setattr(model, _ADAPTER, adapter)
    return adapter
