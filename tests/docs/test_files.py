"""The reference of the files has each of their keys, with a sentence of its own, and the defaults are true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aiqueue.errors import TopologyError
from aiqueue.limits import Rules
from aiqueue.topology import FileKey, Topology, stream_keys, streamfile
from aiqueue.topology.file_keys import CheckedKey
from aiqueue.topology.values import flag
from tools.docs import files, own_files
from tools.docs.files import Table

READ: dict[str, tuple[list[Table], Callable[[str], Any]]] = {
    "gateway": (own_files.GATEWAY, own_files.read_gateway),
    "rag": (own_files.RAG, own_files.read_rag),
    "limits": (own_files.LIMITS, own_files.read_limits),
}
TRIED = [
    (read, table, name, key)
    for tables, read in READ.values()
    for table in tables
    for name, key in table.keys.items()
]  # fmt: skip


@pytest.mark.parametrize(
    "tables", [own_files.STREAMS, own_files.LIMITS, own_files.GATEWAY, own_files.RAG], ids=lambda each: each[0].name
)
def test_every_key_of_a_file_has_a_sentence_of_its_own(tables: list[Table]) -> None:
    assert files.gaps(tables) == []


def test_a_key_without_a_sentence_is_found() -> None:
    keys = {"good": FileKey("How many there are."), "bare": FileKey(""), "max_bytes": FileKey("The max bytes.")}
    assert files.gaps([Table("[table]", keys)]) == ["[table] bare", "[table] max_bytes"]


@pytest.mark.parametrize(("read", "table", "name", "key"), TRIED, ids=lambda each: getattr(each, "name", each))
def test_the_default_of_a_key_is_what_the_file_means_without_the_key(
    read: Callable[[str], Any], table: Table, name: str, key: FileKey
) -> None:
    assert table.with_value is not None
    if not key.default:
        with pytest.raises(TopologyError, match=f"{name}: is missing"):
            read(table.with_value(name, None))
    elif files.is_toml(key.default):
        without, stated = (read(table.with_value(name, value)) for value in (None, key.default))
        assert plain(without) == plain(stated)


def plain(found: Any) -> Any:
    return found.declared if isinstance(found, Rules) else found


def _stream_file(table: str, key: str, value: str) -> Topology:
    family = {"name": '"a.b"', "default_kind": '"k"'} | ({key: value} if table == "[family]" else {})
    consumer = {key: value} if table == "[consumer]" else {}
    text = own_files._keep(("[family]", family), ("[stream]", {"name": '"A"'}), ("[consumer]", consumer))
    return streamfile.parse_file("a.toml", text)  # type: ignore[return-value]


@pytest.mark.parametrize("name", stream_keys.CONSUMER)
def test_the_default_of_a_key_of_lanes_is_what_a_stream_file_means_without_the_key(name: str) -> None:
    key = stream_keys.CONSUMER[name]
    assert streamfile.parse_file("a.toml", _MINIMAL) == _stream_file("[consumer]", name, key.default)


_MINIMAL = '[family]\nname = "a.b"\ndefault_kind = "k"\n[stream]\nname = "A"\n'


@pytest.mark.parametrize("name", [name for name, key in stream_keys.WORK_FAMILY.items() if files.is_toml(key.default)])
def test_the_default_of_a_key_of_a_family_is_what_a_stream_file_means_without_the_key(name: str) -> None:
    own = '[family]\nname = "a.b"\ndefault_kind = "k"\n{}[stream]\nname = "A"\n'
    stated = own.format(f"{name} = {stream_keys.WORK_FAMILY[name].default}\n")
    without, given = (
        Topology.build([*own_files._bundled(), ("a.toml", text)]).families["a.b"] for text in (own.format(""), stated)
    )
    assert without == given


def test_what_a_value_must_be_is_taken_from_the_error_of_a_wrong_one() -> None:
    assert files.expected_of(CheckedKey(flag, "Whether it is so.")) == "true or false"
    (_, rows), *_ = files.rows([own_files.LIMITS[0]], own_files.read_limits)
    assert ("`window`", 'a duration from 1s to 31d, such as `"1m"`', '`"1m"`') in [each[:3] for each in rows]


def test_every_key_is_on_its_page() -> None:
    for tables, page in (
        (own_files.STREAMS, own_files.render_streams()),
        (own_files.LIMITS, own_files.render_limits()),
        (own_files.GATEWAY, own_files.render_gateway()),
        (own_files.RAG, own_files.render_rag()),
    ):
        for table in tables:
            section = page.partition(f"## `{table.name}`\n")[2].partition("\n## ")[0]
            assert [name for name in table.keys if f"| `{name}` | " not in section] == []
