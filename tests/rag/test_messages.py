"""What retrieval is asked for: what is refused, and what arrives as it was sent."""

from __future__ import annotations

from typing import Any

import pytest

from aiqueue.errors import BadInput, DecodeError
from aiqueue.payload import parse_message
from aiqueue.payload.messages import encode_message
from aiqueue.rag import RagDelete, RagDocument, RagQuery, RagReindex, check_tenant
from aiqueue.rag.sources import document_id_of
from aiqueue.rag.store.filters import metadata_json


@pytest.mark.parametrize(
    "message",
    [
        RagDocument(document_id="a b/ü.md", content="text"),
        RagDocument(content=""),
        RagDocument(content=b"\xff\x00", metadata={"tags": ["a", 1, None, True], "year": 2026}, name="x.pdf"),
        RagDocument(content="AAA=", encoding="base64"),
        RagDocument(chunks=["one", {"content": "two", "heading": "H", "page": 3}]),
        RagDocument(path="/srv/x.md"),
        RagDelete(document_id="x"),
        RagReindex(all=True),
        RagQuery(query="why?", where={"year": {"gte": 2020}}, k=100),
    ],
    ids=repr,
)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    import cbor2  # noqa: PLC0415

    assert parse_message(type(message), cbor2.loads(encode_message(message))) == message


@pytest.mark.parametrize(
    ("kind", "data", "error"),
    [
        (RagDocument, {}, "give exactly one of content, document, path, url, chunks, not none"),
        (RagDocument, {"content": "x", "url": "http://x/"}, "not content and url"),
        (RagDocument, {"content": "x", "document_id": ""}, "document_id"),
        (RagDocument, {"content": "x", "document_id": "x" * 1_025}, "document_id"),
        (RagDocument, {"content": "x", "document_id": "文" * 700}, "has 2,100 bytes"),
        (RagDelete, {"document_id": "a\0b"}, "remove its NULs"),
        (RagDocument, {"content": b"x", "encoding": "base64"}, "encoding is given without a text"),
        (RagDocument, {"content": "x", "metadata": {"a": {"b": 1}}}, "a must be a text, a number"),
        (RagDocument, {"content": "x", "metadata": {"a": float("nan")}}, "cannot be written as JSON"),
        (RagDocument, {"content": "x", "metadata": {"a": "x" * 70_000}}, "above the limit of 65,536"),
        (RagDocument, {"content": "x", "metadata": {str(at): at for at in range(257)}}, "at most 256 keys"),
        (RagDocument, {"content": "x", "metadata": [1]}, "must be a map"),
        (RagDocument, {"chunks": ["x"] * 50_001}, "at most 50,000 chunks"),
        (RagDocument, {"chunks": [{"content": "x" * 16_385}]}, "content"),
        (RagDocument, {"chunks": [{"content": "x", "page": 2**31}]}, "page"),
        (RagDocument, {"chunks": [{"content": "x", "metadata": {"start": 2**63}}]}, "start"),
        (RagReindex, {}, "give either document_id, or all = true"),
        (RagReindex, {"document_id": "x", "all": True}, "give either document_id, or all = true"),
        (RagQuery, {"query": ""}, "query"),
        (RagQuery, {"query": "x", "k": 101}, "k"),
        (RagQuery, {"query": "x", "mode": "magic"}, "mode"),
        (RagQuery, {"query": "x", "where": {"a": "x" * 20_000}}, "16,384 bytes"),
    ],
)
def test_a_wrong_message_is_refused_in_one_line_that_names_the_field(kind: Any, data: Any, error: str) -> None:
    with pytest.raises(DecodeError) as raised:
        parse_message(kind, data)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_metadata_that_a_message_may_have_can_be_stored() -> None:
    metadata = {f"key{at}": list(range(100, 170)) for at in range(220)}  # 62 KiB, and 78 with a blank after each comma
    assert metadata_json(RagDocument(content="x", metadata=metadata).metadata)


def test_what_is_no_base64_is_refused_and_what_is_stands_for_bytes() -> None:
    assert RagDocument(content="AP8=", encoding="base64").content_bytes() == b"\x00\xff"
    with pytest.raises(BadInput, match="is not base64"):
        RagDocument(content="no!", encoding="base64").content_bytes()


def test_a_document_is_named_by_its_field_else_a_header_else_its_place_else_its_job() -> None:
    header = {"Document_Id": "h"}
    assert document_id_of({"document_id": "f", "path": "/p"}, header, "j") == "f"
    assert document_id_of({"path": "/p"}, header, "j") == "h"
    assert document_id_of({"path": "/p"}, {}, "j") == "/p"
    assert document_id_of({"url": "http://u"}, {}, "j") == "http://u"
    assert document_id_of({}, {}, "j") == "j"
    with pytest.raises(BadInput, match="1,025 characters"):
        document_id_of({}, {"document_id": "x" * 1_025}, "j")


def test_another_tenant_in_the_body_is_refused() -> None:
    check_tenant(RagQuery(query="x", tenant_id="acme"), "acme")
    check_tenant(RagQuery(query="x"), "acme")
    with pytest.raises(BadInput, match="tenant_id 'globex' is not the tenant of this job, acme"):
        check_tenant(RagQuery(query="x", tenant_id="globex"), "acme")
