"""Lines are found in a stream of bytes however it is cut; a number, an offset and ranges tell what is done."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, ConfigMismatch
from aiqueue.gateway.batches import Batches, BatchFile, BatchStore, LineProblem, RequestBatch
from aiqueue.gateway.batches.lines import LINE_BYTES_MAX, RawLine, split_lines
from aiqueue.gateway.batches.output import LineEnd, Pending, ranges
from aiqueue.gateway.budget_use import BudgetUse

TEXT = b"\xef\xbb\xbfone\n\n  \r\ntwo\r\nthree\n" + b"x" * 300 + b"\nlast"
LINES = [(1, b"one\n"), (4, b"two\r\n"), (5, b"three\n"), (6, b"x" * 300 + b"\n"), (7, b"last")]


async def cut(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def split(data: bytes, size: int, **at: int) -> list[RawLine]:
    return [each async for each in split_lines(cut(data, size), **at)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
async def test_lines_are_found_however_the_bytes_come(size: int) -> None:
    found = await split(TEXT, size)
    assert [(each.number, each.data) for each in found] == LINES
    for each in found:  # from behind each line, the others follow with their numbers
        rest = await split(TEXT, size, offset=each.end, number=each.number)
        assert rest == [other for other in found if other.number > each.number]


async def test_a_line_that_is_too_long_is_no_line_and_is_not_held() -> None:
    long = b"y" * (LINE_BYTES_MAX + 5)
    found = await split(b"a\n" + long + b"\nb\n" + long, 1 << 20)
    assert [(each.number, each.data) for each in found] == [(1, b"a\n"), (2, None), (3, b"b\n"), (4, None)]
    assert [each.number for each in await split(b"a\n" + long + b"\nb", 1 << 20, offset=found[1].end, number=2)] == [3]


def test_what_is_done_is_all_lines_up_to_one_and_ranges_above_it() -> None:
    numbers = list(range(1, 200))
    chosen = random.Random(7)
    pending = Pending(0, 0, {3, 4})
    for number in numbers:
        pending.begin(number, number * 10)
    assert (pending.line, ranges(pending.done)) == (0, ((3, 4),))
    left = [each for each in numbers if each not in (3, 4)]
    chosen.shuffle(left)
    ended = {3, 4}
    for number in left:
        pending.add(LineEnd(number, "output", b"12345\n"))
        ended.add(number)
        gap = next((each for each in numbers if each not in ended), 200)
        assert (pending.line, pending.offset) == (gap - 1, (gap - 1) * 10)
        assert {each for first, last in ranges(pending.done) for each in range(first, last + 1)} == {
            each for each in ended if each > gap
        }
    assert (pending.size, len(pending.take()), pending.size) == (197 * 6, 197, 0)


def test_a_call_is_taken_from_the_reservation_of_its_batch() -> None:
    use = BudgetUse()
    assert use.reserve("batch", 100, 1.0, 100) == "reserved"
    assert use.reserve("other", 1, 1.0, 100) == "spent"
    assert use.reserve("line", 60, 1.0, 100, "batch") == "reserved"
    assert (use.calls["batch"].amount, use.reserved) == (40, 100)
    assert use.reserve("line", 60, 1.0, 100, "batch") == "known"
    assert use.reserve("more", 60, 1.0, 100, "batch") == "spent"  # only 40 are left of it
    assert use.settle("line", 10)
    assert use.reserve("more", 60, 1.0, 100, "batch") == "reserved"
    assert (use.calls["batch"].amount, use.reserved, use.spent) == (0, 60, 10)
    assert use.reserve("none", 31, 1.0, 100, "no such") == "spent"
    assert use.release("batch")
    assert (use.reserved, use.charged) == (60, 70)


FILE = BatchFile(
    id="file-1", tenant="acme", filename="a.jsonl", size=3, sha256="0" * 64, purpose="batch", created_at=1, expires_at=2
)
BATCH = RequestBatch(
    id="batch_1", tenant="acme", endpoint="/v1/embeddings", input_file_id="file-1", input=("0" * 64, 3),
    completion_window="24h", created_at=1, expires_at=2, metadata={"a": "b"}, models=("small",), output_keep_s=3_600,
    times={"in_progress_at": 5}, problems=(LineProblem("c", "m", 3, "p"),), done=((2, 4),), output=(("1" * 64, 9),),
)  # fmt: skip


async def test_files_and_batches_are_stored_in_the_form_of_the_wire_contract(client: aiqueue.Client) -> None:
    store = BatchStore(client.connection, client.topology)
    seq = await store.put("file", "acme", FILE.id, {**FILE.plain(), "later": 1}, expected=0)
    kept = await store.get("file", "acme", FILE.id)
    assert kept is not None
    assert (kept.seq, BatchFile.parse("acme", kept.content)) == (seq, FILE)
    await store.put("batch", "acme", BATCH.id, {**BATCH.plain(), "later": 1}, expected=0)
    found = await store.get("batch", "acme", BATCH.id)
    assert found is not None
    assert RequestBatch.parse("acme", found.content, seq=0, written_at=0.0) == BATCH
    assert FILE.plain().keys() == {"id", "filename", "size", "sha256", "purpose", "created_at", "expires_at"}
    assert BATCH.plain().keys() == {
        "id", "endpoint", "input_file_id", "input", "completion_window", "created_at", "expires_at", "metadata",
        "models", "headers", "output_keep_s", "status", "times", "problems", "total", "completed", "failed",
        "stopped", "usage", "output_file_id", "error_file_id", "month", "reserved_micros", "owner", "line",
        "offset", "done", "sent", "output", "error_output", "failed_run",
    }  # fmt: skip
    stored = await client.connection.last("KV_AI_BATCHES", "$KV.AI_BATCHES.acme.file.file-1")
    assert stored is not None
    assert stored.data.startswith(b'{"v":1,"id":"file-1",')


@pytest.mark.parametrize("data", [b"", b"7", b'{"v":2}', b"[" * 9_999, b"\xff"])
async def test_what_another_version_has_stored_is_an_error_that_says_what_to_do(
    client: aiqueue.Client, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = BatchStore(client.connection, client.topology)
    await client.connection.store("$KV.AI_BATCHES.acme.file.file-9", data, {"Nats-Msg-Id": "x"})
    with pytest.raises(ConfigMismatch, match="update aiqueue, or delete it with `nats stream rmm KV_AI_BATCHES 1`"):
        await store.get("file", "acme", "file-9")
    assert [each async for each in store.read("file", "acme")] == []
    assert "update aiqueue" in caplog.text


async def test_what_is_damaged_hides_nothing_else(client: aiqueue.Client, caplog: pytest.LogCaptureFixture) -> None:
    store, batches = BatchStore(client.connection, client.topology), Batches(client)
    await store.put("file", "acme", "file-bad", {"id": "file-bad"}, expected=0)
    await store.put("batch", "acme", "batch_bad", {"id": "batch_bad"}, expected=0)
    file = await batches.upload(b"{}", tenant="acme")
    batch = await batches.create(file.id, tenant="acme", endpoint="/v1/embeddings")
    assert [each.id for each in await batches.files("acme")] == [file.id]
    assert [each.id for each in await batches.batches("acme")] == [batch.id]
    assert caplog.text.count("is damaged") > 2


@pytest.mark.parametrize(
    "damage", [{"id": None}, {"sha256": "x"}, {"size": -1}, {"size": None}], ids=["no-id", "sha", "size", "none"]
)
def test_a_damaged_file_is_an_error(damage: dict[str, Any]) -> None:
    plain = {**FILE.plain(), **damage}
    if damage == {"id": None}:
        del plain["id"]
    with pytest.raises(BadInput, match="a stored file of tenant acme is damaged"):
        BatchFile.parse("acme", plain)


def test_a_batch_looks_as_openai_s() -> None:
    public = replace(BATCH, status="failed", usage=(5, 1, 2, 0)).public()
    assert public["errors"] == {
        "object": "list", "data": [{"code": "c", "message": "m", "line": 3, "param": "p"}],
    }  # fmt: skip
    assert public["usage"]["total_tokens"] == 7
    assert public["in_progress_at"] == 5
    assert public["completed_at"] is None
