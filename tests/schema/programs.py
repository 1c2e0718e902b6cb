"""Workers and agents whose kinds are described: types of every sort, aliases, secrets, results."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import pathlib
import uuid
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

import aiqueue

SECRET = "hunter2-swordfish"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Part(pydantic.BaseModel):
    """A part of something."""

    name: str
    price: decimal.Decimal = decimal.Decimal("1.50")
    at: dt.datetime | None = None


class Cat(pydantic.BaseModel):
    sort: Literal["cat"] = "cat"
    lives: int = 9


class Dog(pydantic.BaseModel):
    sort: Literal["dog"] = "dog"
    barks: bool = True


class Tree(pydantic.BaseModel):
    value: int = 0
    children: list[Tree] = []


class Point(NamedTuple):
    x: float
    y: float


class Options(TypedDict, total=False):
    depth: int
    colour: Colour


@dataclasses.dataclass
class Place:
    name: str
    floor: int = 0


class Everything(aiqueue.Message[Part], kind="every:thing"):
    """A field of each type.

    With a second paragraph.
    """

    text: str
    whole: int = 0
    number: float = 0.0
    flag: bool = False
    blob: bytes = b""
    when: dt.datetime | None = None
    day: dt.date | None = None
    time: dt.time | None = None
    span: dt.timedelta = dt.timedelta(seconds=1)
    id: uuid.UUID | None = None
    price: decimal.Decimal = decimal.Decimal(0)
    bounded: decimal.Decimal = pydantic.Field(decimal.Decimal(1), max_digits=6, decimal_places=2)
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    mode: Literal["fast", "slow"] = "fast"
    tags: set[str] = pydantic.Field(set())
    pair: tuple[int, str] = (1, "a")
    triple: tuple[str, ...] = ()
    table: dict[str, list[int]] = pydantic.Field({})
    either: int | str | None = None
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="sort")] = Cat()
    tree: Tree = Tree()
    point: Point = Point(0, 0)
    options: Options = pydantic.Field({})
    place: Place = Place("here")
    part: Part | None = None
    address: ipaddress.IPv4Address | None = None
    path: pathlib.PurePosixPath | None = None
    anything: Any = None
    document: aiqueue.Document | None = None
    limit: float = float("inf")


class Aliased(aiqueue.Message, kind="aliased"):
    user: str = pydantic.Field(alias="userId")
    read: int = pydantic.Field(validation_alias=pydantic.AliasChoices("readAs", "readToo"))
    written: int = pydantic.Field(serialization_alias="writtenAs")
    both: int = pydantic.Field(validation_alias="in", serialization_alias="out")
    first: int = pydantic.Field(0, validation_alias=pydantic.AliasPath("numbers", 0))
    place: Place = Place("here")


class Camel(aiqueue.Message[list[int]], kind="camel", alias_generator=to_camel, extra="forbid"):
    first_name: str
    last_name: str = ""


class Login(pydantic.BaseModel):
    password: pydantic.SecretStr = pydantic.SecretStr(SECRET)


class Secrets(aiqueue.Message[dict[str, pydantic.SecretStr]], kind="secrets"):
    key: pydantic.SecretStr = pydantic.SecretStr(SECRET)
    login: Login = Login()
    logins: list[Login] = pydantic.Field([Login()])


class Page(pydantic.BaseModel, populate_by_name=True):
    number: int = pydantic.Field(alias="pageNumber")

    @pydantic.computed_field
    @property
    def double(self) -> int:
        return 2 * self.number


class Read(aiqueue.Message[list[Page]], kind="agent.task"):
    """The family's default kind."""

    task_id: str = ""


class Quiet(aiqueue.Message, kind="quiet"):
    n: int = 0


class Ask(aiqueue.Message[str], kind="gateway.request", family="gateway.requests"):
    model: str
    prompt: str


class Note(aiqueue.Message, kind="note", family="agent.message"):
    text: str


class Plain:
    """A type that only validators know."""


class Odd(aiqueue.Message, kind="odd", arbitrary_types_allowed=True):
    plain: Annotated[Any, pydantic.PlainValidator(lambda value: value)] = None
    instance: Plain | None = None


worker = aiqueue.Worker()


@worker.handle(Everything)
async def everything(job: aiqueue.Job[Everything]) -> Part:
    return Part(name=job.message.text, at=dt.datetime(2026, 11, 30, tzinfo=dt.UTC))


@worker.handle(Aliased)
async def aliased(job: aiqueue.Job[Aliased]) -> Any:
    return job.message.model_dump(mode="json")


@worker.handle(Camel)
async def camel(job: aiqueue.Job[Camel]) -> list[int]:
    return [len(job.message.first_name)]


@worker.handle(Secrets)
async def secrets(job: aiqueue.Job[Secrets]) -> dict[str, pydantic.SecretStr]:
    return {"key": job.message.key}


@worker.handle(Read)
async def read(job: aiqueue.Job[Read]) -> list[Page]:
    return [Page(number=1)]


@worker.handle(Quiet, result=False)
async def quiet(job: aiqueue.Job[Quiet]) -> None:
    if job.message.n < 0:
        raise aiqueue.Reject("below zero")


@worker.handle(Odd)
async def odd(job: aiqueue.Job[Odd]) -> None: ...


@worker.handle(Ask)
async def ask(job: aiqueue.Job[Ask]) -> str:
    return job.message.prompt.upper()


@worker.handle_any("rag.queries")
async def query(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
    return job.message.decode()


writer, reader = aiqueue.Agent("writer", tenant="acme"), aiqueue.Agent("reader", tenant="acme")


@writer.handle(Note)
@reader.handle(Note)
async def note(mail: Any) -> None: ...


agents = [writer, reader]
