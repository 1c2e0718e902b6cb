"""Messages on the wire: what enqueue accepts comes back equal, what cannot is refused with the name of its field."""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Network
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, SecretBytes, SecretStr
from pydantic.alias_generators import to_camel

from aiqueue import codec
from aiqueue.errors import BadInput, DecodeError, EncodeError
from aiqueue.job import Message
from aiqueue.payload import encode_message, error_text, messages, parse_message

T = TypeVar("T")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: float


@dataclass
class Part:
    name: str
    key: SecretStr


class Options(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)

    max_tokens: int = 10
    stop_at: datetime | None = None
    api_key: SecretStr = SecretStr("")


class Node(BaseModel):
    name: str
    inner: list[Node] = []


class Box(BaseModel, Generic[T]):
    content: T
    more: dict[str, T] = {}


class Everything(Message, kind="everything", extra="forbid"):
    text: str = ""
    whole: int = 0
    number: float = 0.0
    raw: bytes = b""
    when: datetime | None = None
    day: date = date(2026, 1, 1)
    hour: time = time(1, 2)
    took: timedelta = timedelta(0)
    price: Decimal = Decimal(0)
    ident: UUID | None = None
    address: IPv4Address | None = None
    network: IPv6Network | None = None
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    mode: Literal["a", "b"] = "a"
    pair: tuple[int, str] = (1, "")
    many: set[int] = Field(set())
    frozen: frozenset[date] = frozenset()
    queue: deque[Decimal] = Field(deque())
    point: Point = Point(1, 2.0)
    part: Part | None = None
    options: Options = Options()
    node: Node | None = None
    box: Box[date] | None = None
    keys: Box[SecretStr] | None = None
    by_day: dict[date, Decimal] = Field({})
    password: SecretStr | None = None
    tokens: list[SecretBytes] = Field([])
    number_kept: pydantic.Secret[int] | None = None
    renamed: int = Field(0, alias="otherName")
    pattern: Annotated[str, Field(pattern="^[a-z]*$", max_length=5)] = ""
    link: pydantic.HttpUrl | None = None
    encoded: pydantic.Json[list[int]] | None = None

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def length(self) -> int:
        return len(self.text)


OPTIONS = st.builds(
    Options,
    maxTokens=st.integers(),
    stopAt=st.none() | st.datetimes(timezones=st.just(UTC)),
    apiKey=TEXT.map(SecretStr),
)
NODES = st.recursive(
    st.builds(Node, name=TEXT), lambda inner: st.builds(Node, name=TEXT, inner=st.lists(inner, max_size=3))
)
ZONED = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.timezones())  # noqa: DTZ001
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "text": TEXT, "whole": st.integers(), "number": st.floats(), "raw": st.binary(max_size=9),
    "when": st.none() | st.datetimes() | ZONED, "day": st.dates(), "hour": st.times(),
    "took": st.timedeltas(timedelta(-10**6), timedelta(10**6)),
    "price": st.decimals(allow_nan=False, allow_infinity=False, min_value=-10**30, max_value=10**30),
    "ident": st.uuids(),
    "address": st.ip_addresses(v=4), "network": st.just(IPv6Network("fe80::/10")), "colour": st.sampled_from(Colour),
    "level": st.sampled_from(Level), "mode": st.sampled_from(["a", "b"]), "pair": st.tuples(st.integers(), TEXT),
    "many": st.sets(st.integers(), max_size=4), "frozen": st.frozensets(st.dates(), max_size=3),
    "queue": st.lists(st.decimals(allow_nan=False, allow_infinity=False, places=3), max_size=3).map(deque),
    "point": st.builds(Point, st.integers(), st.floats(allow_nan=False)),
    "part": st.builds(Part, TEXT, TEXT.map(SecretStr)), "options": OPTIONS, "node": NODES,
    "box": st.builds(Box[date], content=st.dates(), more=st.dictionaries(TEXT, st.dates(), max_size=2)),
    "keys": st.builds(Box[SecretStr], content=TEXT.map(SecretStr)),
    "by_day": st.dictionaries(st.dates(), st.decimals(allow_nan=False, allow_infinity=False, places=2), max_size=3),
    "password": st.none() | TEXT.map(SecretStr), "tokens": st.lists(st.binary(max_size=5).map(SecretBytes), max_size=3),
    "number_kept": st.integers().map(pydantic.Secret[int]), "otherName": st.integers(),
    "pattern": st.from_regex("^[a-z]{0,5}$", fullmatch=True), "link": st.just("https://x.org/a?b=c"),
    "encoded": st.just("[1, 2]"),
}  # fmt: skip


def carried(message: Message) -> Any:
    """Return what a handler would get."""
    body = encode_message(message)
    return parse_message(type(message), codec.decode(body, codec.CBOR))


def equal(one: Any, two: Any) -> bool:
    return bool(one == two) or next(messages._differences(one, two, ""), None) is None


@given(st.fixed_dictionaries({}, optional=FIELDS))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_what_enqueue_accepts_the_handler_gets_equal(fields: dict[str, Any]) -> None:
    message = Everything(**fields)
    assert equal(message, carried(message))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.binary(max_size=5) | st.dates()
    | st.uuids() | st.decimals(allow_nan=False, allow_infinity=False, places=2) | st.sampled_from(Colour),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3) | st.tuples(inner)
    | st.sets(st.integers(), max_size=2),
    max_leaves=6,
)  # fmt: skip


class Loose(Message, kind="loose", extra="allow"):
    meta: dict[str, Any] = Field({})
    anything: Any = None


@given(st.dictionaries(TEXT, JSON_VALUES, max_size=3), JSON_VALUES)
@example({"d": date(2026, 1, 1), "n": 2**80, "p": Decimal("1.5")}, UUID(int=1))
def test_values_without_a_declared_type_come_back_equal_or_are_refused(meta: dict[str, Any], anything: Any) -> None:
    message = Loose(meta=meta, anything=anything, extra=anything)  # type: ignore[call-arg]
    try:
        again = carried(message)
    except EncodeError as error:
        assert "meta" in str(error) or "anything" in str(error) or "extra" in str(error)  # noqa: PT017
        return
    assert again == message


class Nested(Message, kind="nested"):
    options: Options


def test_a_nested_model_is_written_by_its_aliases() -> None:
    message = Nested(options=Options(maxTokens=500))
    assert codec.decode(encode_message(message))["options"]["maxTokens"] == 500
    assert carried(message).options.max_tokens == 500


def test_a_body_of_an_older_producer_that_has_field_names_for_keys_is_read() -> None:
    assert parse_message(Nested, {"options": {"max_tokens": 500}}).options.max_tokens == 500


class Aliased(Message, kind="aliased"):
    required: int = Field(alias="theRequired")
    read_as: int = Field(1, validation_alias="in")
    written_as: int = Field(2, serialization_alias="out")
    chosen: int = Field(3, validation_alias=AliasChoices("a", "b"))
    deep: int = Field(4, validation_alias=AliasPath("x", "y"))


def test_aliases_of_all_kinds_come_back() -> None:
    message = Aliased(theRequired=7, **{"in": 8, "b": 9, "x": {"y": 10}}, written_as=11)
    assert carried(message) == message


class Strict(Message, kind="strict", strict=True):
    colour: Colour
    day: date
    ident: UUID
    pair: tuple[int, ...]
    inner: Box[date]
    raw: bytes = b""


def test_a_strict_model_comes_back_and_stays_strict() -> None:
    message = Strict(
        colour=Colour.BLUE, day=date(2026, 1, 1), ident=UUID(int=1), pair=(1, 2), inner=Box(content=date.max)
    )
    assert carried(message) == message
    body = codec.decode(encode_message(message))
    with pytest.raises(DecodeError, match=r"pair\.0"):
        parse_message(Strict, {**body, "pair": ["1", 2]})


class StrictRaw(Message, kind="strict-raw", strict=True):
    day: date
    raw: bytes


def test_a_strict_model_with_bytes_that_are_no_text_comes_back() -> None:
    message = StrictRaw(day=date(2026, 1, 1), raw=b"\xff\x00")
    assert carried(message) == message


class Excluded(Message, kind="excluded"):
    kept: int = 0
    hidden: int = Field(1, exclude=True)


class ExcludedRequired(Message, kind="excluded-required"):
    hidden: int = Field(exclude=True)


class Shouting(Message, kind="shouting"):
    text: str

    @pydantic.field_validator("text")
    @classmethod
    def shout(cls, text: str) -> str:
        return text + "!"


class OneWay(Message, kind="one-way"):
    amount: int

    @pydantic.field_serializer("amount")
    def write(self, amount: int) -> str:
        return f"{amount} EUR"


class Animal(BaseModel):
    name: str


class Dog(Animal):
    breed: str


class Owner(Message, kind="owner"):
    pet: Animal


class Flat(Message, kind="flat"):
    text: str
    whole: int = 0
    parts: list[str] = Field([])
    counts: list[int] = Field([])
    rates: dict[str, float] | None = None


class Many(Message, Generic[T]):
    items: list[T]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Excluded(hidden=2), "hidden"), (ExcludedRequired(hidden=2), "hidden"), (Shouting(text="a"), "text"),
        (OneWay(amount=3), "amount"), (Owner(pet=Dog(name="x", breed="y")), "pet"), (Many(items=[Node(name="x")]),
        "items"),
        (Loose(meta={"t": (1, 2)}), r"meta\.t"), (Loose(meta={"c": [Colour.RED]}), r"meta\.c\.0"),
        (Loose(anything=SecretStr("hunter2")), "anything"), (Flat.model_construct(text=5), "text"),
        (Flat.model_construct(whole=1), "text"), (Flat(text="a").model_copy(update={"whole": "many"}), "whole"),
        (Flat.model_construct(text="a", parts=["b", 3]), r"parts\.1"), (Flat.model_construct(text="a",
        rates={"b": "c"}), "rates"),
        (Flat.model_construct(text="a", counts=[1, "b"]), r"counts\.1"),
    ],
)  # fmt: skip
def test_what_would_arrive_changed_or_die_at_the_worker_is_refused_by_the_name_of_its_field(
    message: Message, field: str
) -> None:
    with pytest.raises(EncodeError, match=field) as caught:
        encode_message(message)
    assert isinstance(caught.value, BadInput)
    assert "hunter2" not in str(caught.value)


def test_an_excluded_field_that_has_its_default_is_carried() -> None:
    assert carried(Excluded(kept=3)) == Excluded(kept=3)


@pytest.mark.parametrize(
    "message",
    [
        Flat(text="a", whole=2**63), Flat(text="a", whole=-(2**200)), Flat(text="a", counts=[2**70, -1]),
        Flat(text="a", parts=["b"], counts=[1, 2], rates={"c": math.inf}), Loose(anything=math.nan),
        Many[SecretStr](items=["x"]),
        Many[Options](items=[Options(maxTokens=3)]), Many[Decimal](items=[Decimal("1E+5")]),
    ],
)  # fmt: skip
def test_what_comes_back_is_accepted(message: Message) -> None:
    assert equal(carried(message), message)


def test_a_time_in_the_hour_that_happens_twice_is_accepted_and_one_with_an_odd_offset() -> None:
    class At(Message, kind="at"):
        when: datetime

    when = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
    assert carried(At(when=when)).when.isoformat() == when.isoformat()
    before_zones = datetime(1890, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))  # 53 minutes and 28 seconds off
    assert carried(At(when=before_zones)).when == before_zones


def test_private_attributes_stay_with_the_producer() -> None:
    class Cached(Message, kind="cached"):
        text: str
        _seen: int = pydantic.PrivateAttr(0)

    message = Cached(text="a")
    message._seen = 5
    assert carried(message).text == "a"


def test_a_lone_surrogate_in_a_payload_becomes_a_replacement_character() -> None:
    assert carried(Loose(meta={"t": "a\ud83d"})).meta == {"t": "a\ufffd"}


def test_a_flat_class_is_written_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(messages, "_find_problem", lambda *given: tried.append(given) or "")
    encode_message(Flat(text="a", parts=["b"], counts=[1], rates={"c": 1.0}))
    assert tried == []
    encode_message(Nested(options=Options()))
    assert len(tried) == 1


def test_a_class_with_a_name_that_is_declared_later_is_carried() -> None:
    class Later(Message, kind="later"):
        inner: Optional[Undeclared] = None  # noqa: UP045

    class Undeclared(BaseModel):
        key: SecretStr

    Later.model_rebuild(_types_namespace={"Undeclared": Undeclared})
    message = Later(inner=Undeclared(key=SecretStr("x")))
    assert carried(message) == message


# errors


class Login(Message, kind="login"):
    password: SecretStr
    pin: int = 0

    @pydantic.field_validator("password")
    @classmethod
    def check(cls, password: SecretStr) -> SecretStr:
        if password.get_secret_value() == "hunter2":
            raise ValueError(f"{password.get_secret_value()} is too well known")
        return password


class Cat(BaseModel):
    kind: Literal["cat"]


class Cow(BaseModel):
    kind: Literal["cow"]


class Pet(Message, kind="pet"):
    pet: Annotated[Cat | Cow, Field(discriminator="kind")]


class Even(Message, kind="even"):
    number: int

    @pydantic.field_validator("number")
    @classmethod
    def check(cls, number: int) -> int:
        if number % 2:
            raise ValueError("must be even")
        return number


def test_a_validator_s_own_text_is_shown_as_it_was_written() -> None:
    with pytest.raises(DecodeError, match=r"^not a even: number: must be even$"):
        parse_message(Even, {"number": 1})


def refusals() -> Iterator[tuple[type[Message], dict[str, Any]]]:
    yield Login, {"password": "hunter2"}
    yield Login, {"password": "x", "pin": "hunter2"}
    yield Login, {"password": ["hunter2"]}
    yield Pet, {"pet": {"kind": "hunter2"}}
    yield Nested, {"options": {"maxTokens": "hunter2"}}


@pytest.mark.parametrize(("model", "data"), list(refusals()))
def test_a_refusal_names_the_field_and_repeats_no_value(model: type[Message], data: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match=list(data)[-1]) as caught:
        parse_message(model, data)
    assert "hunter2" not in str(caught.value)


def test_the_text_of_pydantics_error_has_no_input() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Flat(text="a", whole="hunter2")  # type: ignore[arg-type]
    assert "hunter2" in str(caught.value)
    text = error_text(caught.value)
    assert "hunter2" not in text
    assert "whole" in text
