"""What is written of a message fits the schema of its class, in both documents, whatever the values are."""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import json
from typing import Annotated, Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import codec
from aiqueue.errors import BadInput, EncodeError
from aiqueue.gateway import EmbeddingRequest, GatewayRequest
from aiqueue.payload import encode_message, parse_message
from aiqueue.rag import RagDelete, RagDocument, RagQuery, RagReindex
from aiqueue.schema import HandledKind, make_json_schema
from aiqueue.schema.drafts import to_draft07
from aiqueue.schema.payloads import describe_payloads

from . import programs
from .documents import find, print_schema, problems, problems_2020, sample
from .programs import SECRET, Aliased, Camel, Cat, Dog, Everything, Odd, Page, Part, Place, Point, Secrets, Tree

DOCUMENT = b"x"
TEXT = st.text(max_size=20)
WHOLE = st.integers(-(2**63), 2**63 - 1)
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False) | st.just(decimal.Decimal("1E+10"))
PARTS = st.builds(Part, name=TEXT, price=DECIMALS, at=st.none() | st.datetimes(timezones=st.just(dt.UTC)))
TREES = st.recursive(
    st.builds(Tree, value=WHOLE), lambda inner: st.builds(Tree, value=WHOLE, children=st.lists(inner, max_size=2))
)
PLAIN = st.recursive(
    st.none() | st.booleans() | WHOLE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
MESSAGES = {
    Everything: st.builds(
        Everything,
        text=TEXT,
        whole=WHOLE,
        number=st.floats(allow_nan=False),
        flag=st.booleans(),
        blob=st.binary(max_size=20),
        when=st.none() | st.datetimes() | st.datetimes(timezones=st.just(dt.UTC)),
        day=st.none() | st.dates(),
        time=st.none() | st.times(),
        span=st.timedeltas(dt.timedelta(days=-1000), dt.timedelta(days=1000)),
        id=st.none() | st.uuids(),
        price=DECIMALS,
        bounded=st.decimals(-9999, 9999, places=2),
        colour=st.sampled_from(programs.Colour),
        level=st.sampled_from(programs.Level),
        mode=st.sampled_from(["fast", "slow"]),
        tags=st.sets(TEXT, max_size=3),
        pair=st.tuples(WHOLE, TEXT),
        triple=st.lists(TEXT, max_size=3).map(tuple),
        table=st.dictionaries(TEXT, st.lists(WHOLE, max_size=3), max_size=3),
        either=st.none() | WHOLE | TEXT,
        pet=st.builds(Cat, lives=WHOLE) | st.builds(Dog, barks=st.booleans()),
        tree=TREES,
        point=st.builds(Point, st.floats(allow_nan=False), st.floats(allow_nan=False)),
        options=st.fixed_dictionaries({}, optional={"depth": WHOLE, "colour": st.sampled_from(programs.Colour)}),
        place=st.builds(Place, name=TEXT, floor=WHOLE),
        part=st.none() | PARTS,
        address=st.none() | st.ip_addresses(v=4),
        path=st.none() | st.sampled_from(["/", "/a/b", "c"]),
        anything=PLAIN,
        document=st.none()
        | st.just(aiqueue.Document(tenant="acme", sha256=hashlib.sha256(DOCUMENT).hexdigest(), size=1)),
    ),
    Aliased: st.builds(
        lambda **fields: Aliased.model_validate(fields), userId=TEXT, readToo=WHOLE, written=WHOLE, **{"in": WHOLE}
    ),
    Camel: st.builds(lambda **fields: Camel.model_validate(fields), firstName=TEXT, lastName=TEXT),
    Secrets: st.builds(Secrets, key=TEXT.map(pydantic.SecretStr)),
    Odd: st.builds(Odd, plain=PLAIN),
}
NAMES = {
    Everything: "agent.tasks.every_thing", Aliased: "agent.tasks.aliased", Camel: "agent.tasks.camel",
    Secrets: "agent.tasks.secrets", Odd: "agent.tasks.odd",
}  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> tuple[Any, Any]:
    """As AsyncAPI, and as JSON Schema."""
    return print_schema("tests.schema.programs:worker"), print_schema(
        "tests.schema.programs:worker", "--format", "json-schema"
    )


def describe(message: type[aiqueue.Message[Any]], what: str = "message") -> Any:
    """The document of JSON Schema of one kind: what its message, or its result, is."""
    kind = HandledKind(message.aiq_family, message.aiq_kind, message)
    document = make_json_schema({kind.family: [kind]}, title="", version="")
    found = document["$defs"][f"{what}.{NAMES[message]}"]
    return find(document, found["$ref"]) if "$ref" in found else found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: each.__name__)
def test_each_body_fits_the_schema_of_its_kind(documents: Any, message: type[aiqueue.Message[Any]]) -> None:
    asyncapi, bundle = documents
    name = f"message.{NAMES[message]}"
    tried = 0

    @given(MESSAGES[message])
    def fits(made: aiqueue.Message[Any]) -> None:
        nonlocal tried
        try:
            written = codec.decode(encode_message(made))
        except EncodeError:
            return  # it does not travel
        tried += 1
        assert problems(asyncapi, asyncapi["components"]["schemas"][name], written) == []
        assert problems_2020(bundle, name, written) == []

    fits()
    assert tried > 5


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: each.__name__)
def test_what_the_schema_asks_for_is_read_by_the_class(documents: Any, message: type[aiqueue.Message[Any]]) -> None:
    asyncapi, _ = documents
    made = sample(asyncapi, asyncapi["components"]["schemas"][f"message.{NAMES[message]}"])
    assert isinstance(parse_message(message, json.loads(json.dumps(made))), message)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (Everything, {"whole": 1}),
        (Everything, {"text": "a", "whole": "b"}),
        (Everything, {"text": "a", "pair": ["b", "a"]}),
        (Everything, {"text": "a", "pair": [1, "a", 2]}),
        (Everything, {"text": "a", "pet": {"sort": "bird"}}),
        (Everything, {"text": "a", "tree": {"children": [{"value": "b"}]}}),
        (Aliased, {"userId": "a", "readAs": 1, "written": 1}),
        (Camel, {"firstName": "a", "third": "b"}),
        (Secrets, {"key": 1}),
    ],
)
def test_what_the_class_refuses_does_not_fit(documents: Any, message: type[aiqueue.Message[Any]], wrong: Any) -> None:
    asyncapi, bundle = documents
    name = f"message.{NAMES[message]}"
    with pytest.raises(BadInput):
        parse_message(message, wrong)
    assert problems(asyncapi, asyncapi["components"]["schemas"][name], wrong)
    assert problems_2020(bundle, name, wrong)


def test_each_result_fits_its_schema(documents: Any) -> None:
    _, bundle = documents

    @given(st.lists(WHOLE.map(lambda number: Page(number=number)), max_size=3), PARTS)
    def fits(pages: list[Page], part: Part) -> None:
        assert problems_2020(bundle, "result.agent.tasks.agent.task", codec.decode(codec.encode(pages))) == []
        assert problems_2020(bundle, "result.agent.tasks.every_thing", codec.decode(codec.encode(part))) == []

    fits()


def test_a_result_is_described_as_it_is_stored_without_computed_fields() -> None:
    found = describe_payloads([HandledKind("agent.tasks", "agent.task", programs.Read)])
    page = next(each for each in found.definitions.values() if each["title"] == "Page")
    assert page["required"] == ["pageNumber"]
    assert "double" not in page["properties"]


def test_no_default_shows_a_secret_or_what_json_cannot_state(documents: Any) -> None:
    for document in documents:
        text = json.dumps(document, allow_nan=False)
        assert SECRET not in text
        assert "*****" not in text
    assert "default" not in describe(Everything)["properties"]["limit"]
    assert describe(Everything)["properties"]["mode"]["default"] == "fast"


def test_a_field_that_is_read_under_another_name_than_it_is_written_has_both() -> None:
    found = describe(Aliased)
    assert set(found["properties"]) == {
        "userId",
        "readAs",
        "read",
        "written",
        "writtenAs",
        "in",
        "out",
        "both",
        "first",
        "place",
        "user",
    }
    assert "required" not in found
    choices = [[name for each in part["anyOf"] for name in each["required"]] for part in found["allOf"]]
    assert choices == [["userId", "user"], ["readAs", "read"], ["written", "writtenAs"], ["in", "out", "both"]]
    assert set(describe(Camel)["properties"]) == {"firstName", "lastName"}


def test_classes_of_one_name_have_definitions_of_their_own() -> None:
    def make(number: int) -> type[aiqueue.Message[Any]]:
        class Item(pydantic.BaseModel):
            value: int = number

        class Bag(aiqueue.Message[Item], kind=f"bag-{number}"):
            item: Item = Item()

        return Bag

    kinds = [HandledKind("agent.tasks", f"bag-{number}", make(number)) for number in (1, 2)]
    document = make_json_schema({"agent.tasks": kinds}, title="", version="")
    assert [name for name in document["$defs"] if "." in name] == [
        f"{what}.agent.tasks.bag-{number}" for what in ("message", "result") for number in (1, 2)
    ]  # so that no class has the name of a message
    for number in (1, 2):
        for what in ("message", "result"):
            assert problems_2020(document, f"{what}.agent.tasks.bag-{number}", {}) == []
        bag = find(document, document["$defs"][f"message.agent.tasks.bag-{number}"]["$ref"])
        assert bag["properties"]["item"]["default"] == {"value": number}
        assert find(document, bag["properties"]["item"]["$ref"])["properties"]["value"]["default"] == number


def test_kinds_whose_names_are_alike_in_a_document_have_names_of_their_own() -> None:
    class One(aiqueue.Message, kind="a:b"):
        one: int

    class Two(aiqueue.Message, kind="a_b"):
        two: int

    kinds = [HandledKind("agent.tasks", each.aiq_kind, each) for each in (Two, One)]
    document = make_json_schema({"agent.tasks": kinds}, title="", version="")
    found = [find(document, each["$ref"]) for each in document["anyOf"]]
    assert [find(document, each["$ref"])["required"] for each in found] == [["two"], ["one"]]


def test_a_class_that_refuses_to_be_described_is_named() -> None:
    class Broken(aiqueue.Message, kind="broken"):
        @classmethod
        def __get_pydantic_json_schema__(cls, *_: Any) -> Any:
            raise RuntimeError("no\nschema")

    class Late(aiqueue.Message, kind="late"):
        later: Later  # type: ignore[name-defined]  # noqa: F821

    class Inexpressible(aiqueue.Message, kind="inexpressible"):
        n: Annotated[int, pydantic.Field(json_schema_extra={"example": float("nan")})] = 0

    good = HandledKind("agent.tasks", "quiet", programs.Quiet)
    for model, about in ((Broken, "RuntimeError: no schema"), (Late, "Later"), (Inexpressible, "ValueError")):
        with pytest.raises(BadInput) as raised:
            describe_payloads([good, HandledKind("agent.tasks", model.aiq_kind, model)])
        text = str(raised.value)
        assert f"kind {model.aiq_kind!r} of agent.tasks: " in text
        assert about in text
        assert "--kind" in text
        assert "\n" not in text


def test_a_draft_07_schema_keeps_data_and_names_that_look_like_keywords() -> None:
    schema = {
        "type": "object",
        "properties": {"prefixItems": {"type": "integer"}, "discriminator": {"$ref": "#/$defs/A", "title": "x"}},
        "default": {"prefixItems": [1], "$ref": "#/$defs/A"},
        "anyOf": [{"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, True],
        "discriminator": {"propertyName": "sort"},
    }
    assert to_draft07(schema) == {
        "type": "object",
        "properties": {
            "prefixItems": {"type": "integer"},
            "discriminator": {"title": "x", "allOf": [{"$ref": "#/components/schemas/A"}]},
        },
        "default": {"prefixItems": [1], "$ref": "#/$defs/A"},
        "anyOf": [{"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, True],
    }


def test_the_only_whole_numbers_that_do_not_fit_are_those_above_64_bits(documents: Any) -> None:
    _, bundle = documents
    written = codec.decode(encode_message(Everything(text="", whole=2**64)))
    assert isinstance(written["whole"], str)
    assert problems_2020(bundle, "message.agent.tasks.every_thing", written)


@pytest.mark.parametrize("program", ["aiqueue.gateway:worker", "aiqueue.rag:worker"])
def test_messages_of_the_products_fit_their_documents(program: str) -> None:
    document, bundle = print_schema(program), print_schema(program, "--format", "json-schema")
    for each in PRODUCTS[program]:
        name = f"message.{each.aiq_family}.{each.aiq_kind}"
        written = codec.decode(encode_message(each))
        assert problems(document, document["components"]["schemas"][name], written) == [], each
        assert problems_2020(bundle, name, written) == [], each


CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]},
]
PRODUCTS: dict[str, list[aiqueue.Message[Any]]] = {
    "aiqueue.gateway:worker": [
        GatewayRequest(model="small", messages=CHAT),
        GatewayRequest.model_validate({"model": "small", "prompt": "hi", "parameters": {"temperature": 0, "top_k": 3}}),
        GatewayRequest(model="small", messages=CHAT, stop=["a"], logit_bias={"1": -1}, stream=True, seed=-5),
        EmbeddingRequest.model_validate({"model": "small", "input": ["a", "b"]}),
    ],
    "aiqueue.rag:worker": [
        RagDocument(document_id="a", content="text"),
        RagDocument(content=b"\xff\x00", metadata={"tags": ["a", 1, None, True], "year": 2026}, name="x.pdf"),
        RagDocument(chunks=["one", {"content": "two", "heading": "H", "page": 3}]),  # type: ignore[list-item]
        RagDocument(path="/srv/x.md"),
        RagDelete(document_id="x"),
        RagReindex(all=True),
        RagQuery(query="why?", where={"year": {"gte": 2020}}, k=100),
    ],
}
