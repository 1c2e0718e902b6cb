"""The type of a result: how a message's class declares it, and how plain data becomes a value of it."""

from __future__ import annotations

import enum
import gc
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar
from uuid import UUID

import pydantic
import pytest

import aiqueue
from aiqueue import codec
from aiqueue.errors import BadInput, ResultInvalid
from aiqueue.job import check_message, check_model
from aiqueue.payload import parse_result

T = TypeVar("T")


class Summary(pydantic.BaseModel):
    title: str
    at: datetime | None = None


class Strict(pydantic.BaseModel, strict=True, extra="forbid"):
    at: datetime
    id: UUID


class Renamed(pydantic.BaseModel):
    first: int = pydantic.Field(alias="First")
    second: int = pydantic.Field(validation_alias="Second")


class Login(pydantic.BaseModel):
    user: str
    password: pydantic.SecretStr

    @pydantic.field_validator("password")
    @classmethod
    def long_enough(cls, value: pydantic.SecretStr) -> pydantic.SecretStr:
        if len(value.get_secret_value()) < 8:
            raise ValueError(f"{value.get_secret_value()} is too short")
        return value


class Pair(pydantic.BaseModel, Generic[T]):
    one: T
    two: T


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Size:
    width: int
    made: date


class Summarise(aiqueue.Message[Summary], kind="summarise"):
    text: str


class Plain(aiqueue.Message, kind="plain"):
    text: str


NOW = datetime.now(UTC)
A_UUID = UUID("57fe768e-ba08-4cee-8d83-dbccd87dfd40")


def read(declared: Any, data: Any, secrets: str = "") -> Any:
    class Ask(aiqueue.Message[declared]):  # type: ignore[valid-type]
        pass

    return parse_result(Ask, data, job_id="j", secrets=secrets)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (Summary, Summary(title="x", at=NOW)),
        (Size, Size(5, NOW.date())),
        (list[Summary], [Summary(title="x"), Summary(title="y")]),
        (dict[int, Summary], {5: Summary(title="x")}),
        (Pair[int], Pair[int](one=1, two=2)),
        (Strict, Strict(at=NOW, id=A_UUID)),
        (list[Strict], [Strict(at=NOW, id=A_UUID)]),
        (Renamed, Renamed.model_validate({"First": 1, "Second": 2})),
        (Login, Login(user="a", password=pydantic.SecretStr("long enough"))),
        (Summary | None, None),
        (Summary | int, 5),
        (tuple[int, str], (1, "a")),
        (set[int], {1, 2}),
        (Colour, Colour.RED),
        (Literal["a", "b"], "b"),
        (Annotated[int, pydantic.Field(gt=0)], 5),
        (Decimal, Decimal("1.50")),
        (timedelta, timedelta(seconds=90)),
        (Path, Path("/tmp/x")),
        (UUID, A_UUID),
        (bytes, b"\xff"),
        (int, 1 << 80),
        (float, 0.5),
        (None, None),
        (Any, {"anything": [1]}),
    ],
)
def test_what_a_handler_returns_is_read_as_an_equal_value_of_the_declared_type(declared: Any, value: Any) -> None:
    data = codec.decode(codec.encode(value))
    if declared is Any:
        assert read(declared, data) == value
    else:
        again = read(declared, data)
        assert again == value
        assert type(again) is type(value)


def test_the_wire_has_nothing_of_the_type() -> None:
    class Same(aiqueue.Message, kind="summarise"):
        text: str

    assert aiqueue.payload.encode_message(Summarise(text="x")) == aiqueue.payload.encode_message(Same(text="x"))


@pytest.mark.parametrize(
    ("declared", "data", "problem"),
    [
        (Summary, {"titel": "x"}, "title: Field required"),
        (Summary, "x", "the result: Input should be a valid dictionary"),
        (list[Summary], [{"title": "x"}, {}], "1.title: Field required"),
        (int, "many", "unable to parse string as an integer"),
        (Size, {"width": "a", "made": "b"}, r"width: Input should be a valid integer.* \(and 1 more\)"),
        (None, 5, "Input should be None"),
    ],
)
def test_a_misfit_names_the_type_and_the_first_problem_and_has_the_data(declared: Any, data: Any, problem: str) -> None:
    with pytest.raises(ResultInvalid, match=problem) as caught:
        read(declared, data)
    assert caught.value.data == data
    assert caught.value.job_id == "j"
    assert str(caught.value).startswith(f"job j is done, and its result is not of the type {caught.value.expected}: ")
    assert not caught.value.retryable


def test_the_text_of_a_misfit_repeats_no_secret() -> None:
    login = {"user": "a", "password": "hunter2"}
    with pytest.raises(ResultInvalid, match="password: ") as caught:
        read(
            Login, login, secrets=codec.encode_marked(Login(user="a", password=pydantic.SecretStr("12345678"))).secrets
        )
    assert "hunter2" not in str(caught.value)
    assert caught.value.data == login


def test_a_validator_that_raises_anything_is_a_misfit() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(ResultInvalid, match="RuntimeError: no"):
        read(Annotated[int, pydantic.BeforeValidator(fail)], 5)


def test_a_class_with_a_type_is_one_class_while_it_is_used() -> None:
    assert aiqueue.Message[Summary] is aiqueue.Message[Summary]
    assert aiqueue.Message[Summary] is not aiqueue.Message[Size]
    assert issubclass(Summarise, aiqueue.Message[Summary])
    assert aiqueue.Message[Any] is aiqueue.Message
    assert Summarise.aiq_result is Summary
    assert Plain.aiq_result is Any


def test_a_class_with_a_type_that_nobody_uses_goes() -> None:
    class Mine(pydantic.BaseModel):
        pass

    def names() -> set[str]:
        return {each.__name__ for each in aiqueue.Message.__subclasses__()}

    kept = aiqueue.Message[Mine]
    name = kept.__name__
    assert name in names()
    del kept
    gc.collect()
    assert name not in names()


def test_kind_family_and_fields_are_as_without_a_type() -> None:
    class ByName(aiqueue.Message[Summary]):
        text: str = "x"

    class Family(aiqueue.Message[int], kind="k", family="rag.queries"):
        aiq_more: ClassVar[int] = 5

    class Below(Family, kind="below"):
        pass

    assert (ByName.aiq_kind, ByName.aiq_family) == ("ByName", "agent.tasks")
    assert (Family.aiq_kind, Family.aiq_family) == ("k", "rag.queries")
    assert (Below.aiq_kind, Below.aiq_family, Below.aiq_result) == ("below", "rag.queries", int)
    assert ByName().model_dump() == {"text": "x"}
    assert list(Summarise.model_fields) == ["text"]


def test_generic_messages_work_with_and_without_a_type() -> None:
    class Page(aiqueue.Message, Generic[T], kind="page"):
        items: list[T]

    class Sorted(aiqueue.Message[list[T]], Generic[T], kind="sorted"):
        items: list[T]

    class One(aiqueue.Message[T], Generic[T], kind="one"):
        items: list[T]

    class Paired(aiqueue.Message[Pair[T] | None], Generic[T], kind="paired"):
        items: list[T]

    class Fixed(aiqueue.Message[Summary], Generic[T], kind="fixed"):
        items: list[T]

    assert Page[int](items=[1]).items == [1]
    assert (Page[int].aiq_kind, Page[int].aiq_result) == ("page", Any)
    assert (Sorted[int].aiq_kind, Sorted[int].aiq_result) == ("sorted", list[int])
    assert One[Summary].aiq_result is Summary
    assert Paired[int].aiq_result == Pair[int] | None
    assert Fixed[int].aiq_result is Summary
    assert parse_result(Paired[int], {"one": "1", "two": 2}, job_id="j", secrets="") == Pair[int](one=1, two=2)
    with pytest.raises(ResultInvalid):
        parse_result(Sorted[int], ["a"], job_id="j", secrets="")


class Unknown:
    pass


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ((Summary, Size), r"one type of results: for several values use tuple\[...\]"),
        ("Summary", "give the type itself, not its name"),
        (list["Summary"], "give the type itself, not its name"),  # type: ignore[type-arg]
        (5, "pydantic cannot read such a result"),
        (Unknown, r"Message\[Unknown\]: pydantic cannot read such a result"),
    ],
)
def test_what_cannot_be_a_results_type_is_refused_where_it_is_declared(declared: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        aiqueue.Message[declared]


def test_a_message_declares_one_type() -> None:
    with pytest.raises(TypeError, match="has its result type"):
        aiqueue.Message[Summary][Size]
    with pytest.raises(TypeError, match="cannot be parametrized"):
        Summarise[Size]


def test_a_model_may_name_a_class_that_is_defined_further_down() -> None:
    class Late(pydantic.BaseModel):
        inner: Further

    class Ask(aiqueue.Message[Late]):
        pass

    with pytest.raises(BadInput, match="the result type Late of Ask is unusable"):
        parse_result(Ask, {"inner": {"n": 1}}, job_id="j", secrets="")

    class Further(pydantic.BaseModel):
        n: int

    Late.model_rebuild(_types_namespace={"Further": Further})
    assert parse_result(Ask, {"inner": {"n": 1}}, job_id="j", secrets="") == Late(inner=Further(n=1))


def test_a_class_without_a_kind_is_no_message() -> None:
    for model in (aiqueue.Message, aiqueue.Message[Summary]):
        with pytest.raises(BadInput):
            check_model("handle", model)
        with pytest.raises(BadInput, match="your own subclass of"):
            check_message(model())
        with pytest.raises(BadInput, match="your own subclass of"):
            check_message(model)
