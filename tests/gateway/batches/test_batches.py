"""A batch is run line by line, and its files say of each line how it has ended."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, JobFailed, NotFound, QueueFull, Unavailable
from aiqueue.gateway import Batches, BatchQuota, BatchQuotas, Budgets, UsageLedger, UsageStore
from aiqueue.gateway.batches import BatchEnded, engine
from aiqueue.gateway.batches.engine import BatchLines
from aiqueue.gateway.http_provider import HttpProvider
from aiqueue.gateway.ledger import month_of
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ...support import Eventually
from ..running import billed, running, write_config
from .lines import CHAT, chat_line, create, jsonl, records, reported


async def test_each_line_of_a_batch_is_called_once_and_stands_in_the_output(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    batch = await create(client, map(chat_line, range(40)), metadata={"run": "7"})
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 40, 40, 0)
    assert batch.error_file_id is None
    found = await reported(client, batch)
    assert {name: each["response"]["body"]["choices"][0]["message"]["content"] for name, each in found.items()} == {
        f"c{number}": f"line {number} line {number} line" for number in range(40)
    }
    first = found["c0"]
    assert (first["error"], first["response"]["status_code"]) == (None, 200)
    assert first["response"]["request_id"] == f"{batch.id}-1"
    assert len(standin.calls) == 40
    public = batch.public()
    assert public["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert public["usage"]["total_tokens"] == sum(standin.billed())
    assert public["metadata"] == {"run": "7"}
    assert public["created_at"] <= public["in_progress_at"] <= public["finalizing_at"] <= public["completed_at"]


async def test_embeddings_are_lines_too(client: aiqueue.Client, config: Path) -> None:
    body = {"model": "vectors", "input": ["a", "b"], "dimensions": 4}
    line = {"custom_id": "v", "method": "POST", "url": "/v1/embeddings", "body": body}
    batch = await create(client, [line], endpoint="/v1/embeddings")
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    (found,) = await records(client, batch.output_file_id)
    assert [len(each["embedding"]) for each in found["response"]["body"]["data"]] == [4, 4]


async def test_lines_that_fail_stand_in_the_error_file_and_leave_no_dead_letter(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    standin.order(Fault(422, message="unprocessable", model="large-1", count=9))
    lines = [
        chat_line(1),
        chat_line(2, model="none"),
        chat_line(3, model="large"),
        chat_line(4, request_id="x"),
        chat_line(5, stream=True),
        chat_line(6, temperature=9),
    ]
    batch = await create(client, lines)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 6, 1, 5)
    errors = {each["custom_id"]: each["response"] for each in await records(client, batch.error_file_id)}
    assert {name: each["status_code"] for name, each in errors.items()} == {
        "c2": 404, "c3": 422, "c4": 400, "c5": 400, "c6": 400,
    }  # fmt: skip
    unknown = errors["c2"]["body"]["error"]
    assert unknown.pop("message").startswith("unknown model 'none'")
    assert unknown == {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}  # as of the front
    assert [each async for each in client.dead.find()] == []


async def test_a_line_of_a_model_that_its_api_key_may_not_call_is_refused_as_by_the_front(
    client: aiqueue.Client, config: Path
) -> None:
    batch = await create(client, [chat_line(1, model="large")], models=("small",))
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    (found,) = await records(client, batch.error_file_id)
    assert (found["response"]["status_code"], found["response"]["body"]["error"]["code"]) == (403, "model_not_allowed")


async def test_what_json_has_no_number_for_is_null_in_the_output(
    client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = HttpProvider.chat

    async def chat_with_nan(*arguments: Any) -> Any:
        reply = await chat(*arguments)
        reply.answer["choices"][0]["logprobs"] = {"content": [{"logprob": -math.inf}, {"logprob": math.nan}]}
        return reply

    monkeypatch.setattr(HttpProvider, "chat", chat_with_nan)
    batch = await create(client, [chat_line(1)])
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert batch.output_file_id is not None
    data = await Batches(client).content(await Batches(client).file(batch.output_file_id, tenant="acme")).read()
    found = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["response"]["body"]["choices"][0]["logprobs"]["content"] == [{"logprob": None}] * 2


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        (b"", "", 0),
        (b"\n \n", "empty_file", None),
        (jsonl([chat_line(1), chat_line(2), chat_line(1)]), "duplicate_custom_id", 3),
        (b"\n{", "invalid_json_line", 2),
        (b"[" * 100_000, "invalid_json_line", 1),
        (b"\xff\n", "invalid_json_line", 1),
        (b"7\n", "invalid_json_line", 1),
        (jsonl([chat_line(1, url="/v1/embeddings")]), "invalid_url", 1),
        (jsonl([{**chat_line(1), "method": "GET"}]), "invalid_method", 1),
        (jsonl([{**chat_line(1), "custom_id": ""}]), "invalid_custom_id", 1),
        (jsonl([{**chat_line(1), "custom_id": "\ud800"}]), "invalid_custom_id", 1),
        (jsonl([{**chat_line(1), "body": None}]), "missing_required_parameter", 1),
        (jsonl([{**chat_line(1), "bdy": 1}]), "unknown_parameter", 1),
        (jsonl(map(chat_line, range(6))), "too_many_tasks", None),
    ],
)
async def test_a_batch_with_a_wrong_line_is_refused_as_a_whole(
    client: aiqueue.Client, config: Path, standin: StandIn, text: bytes, code: str, line: int | None
) -> None:
    if not code:
        with pytest.raises(BadInput, match="the file is empty"):
            await create(client, text)
        return
    batch = await create(client, text)
    async with running(client, config, quotas=BatchQuotas(lines=5)):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [(each.code, each.line) for each in batch.problems] == [(code, line)]
    assert standin.calls == []


async def test_a_batch_is_counted_against_the_budget_before_it_begins(
    client: aiqueue.Client, tmp_path: Path, config: Path, standin: StandIn
) -> None:
    config = write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 0.001\n')
    many = await create(client, map(chat_line, range(40)))
    few = await create(client, map(chat_line, range(5)))
    async with running(client, config):
        many = await Batches(client).wait(many.id, tenant="acme")
        few = await Batches(client).wait(few.id, tenant="acme")
    assert many.status == "failed"
    assert [each.code for each in many.problems] == ["insufficient_quota"]
    assert "tenant acme has a budget of $0.001" in many.problems[0].message
    assert (few.status, few.completed) == ("completed", 5)
    budgets = Budgets(store := UsageStore(client.connection, client.topology), UsageLedger(store))
    (stats,) = await budgets.stats(month_of(await store.now()))
    assert (stats.spent_micros, stats.reserved_micros, stats.held_micros) == (billed(standin), 0, 0)


async def test_calls_are_taken_from_what_their_batch_has_reserved(
    client: aiqueue.Client, tmp_path: Path, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    config = write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 0.0006\n')
    standin.behaviour = Behaviour(first_token_s=0.5)
    batch = await create(client, map(chat_line, range(8)))
    async with running(client, config):
        budgets = Budgets(store := UsageStore(client.connection, client.topology), UsageLedger(store))
        await eventually(lambda: len(standin.calls) == 8)
        (stats,) = await budgets.stats(month_of(await store.now()))
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert stats.reserved_micros == batch.reserved_micros <= 600
    assert (batch.completed, batch.failed) == (8, 0)


async def test_a_cancelled_batch_calls_no_further_line_and_reports_all(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(first_token_s=1.0)
    batch = await create(client, map(chat_line, range(60)))
    batches = Batches(client)
    async with running(client, config, concurrency=4):
        await eventually(lambda: len(standin.calls) >= 4)
        cancelled = await batches.cancel(batch.id, tenant="acme")
        assert cancelled.status == "cancelling"
        batch = await batches.wait(batch.id, tenant="acme")
    assert (batch.status, batch.total) == ("cancelled", 60)
    found = await reported(client, batch)
    assert len(found) == 60
    assert {each["error"]["code"] for each in found.values() if each["error"]} == {"batch_cancelled"}
    amid = [each for each in found.values() if each["error"] and "may be billed" in each["error"]["message"]]
    # a call may begin while its job is cancelled
    assert batch.completed <= len(standin.calls) <= batch.completed + len(amid) < 20
    assert (await batches.cancel(batch.id, tenant="acme")).status == "cancelled"


async def test_an_expired_batch_reports_what_was_not_called(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.gateway.batches.client.WINDOW_S", 2)
    standin.behaviour = Behaviour(first_token_s=0.7)
    batch = await create(client, map(chat_line, range(30)))
    async with running(client, config, concurrency=2):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.total, batch.completed + batch.failed) == ("expired", 30, 30)
    found = await reported(client, batch)
    assert {each["error"]["code"] for each in found.values() if each["error"]} == {"batch_expired"}
    assert 0 < batch.completed == len(standin.calls) < 30
    assert [each async for each in client.dead.find()] == []


async def test_an_ended_batch_cannot_be_cancelled(client: aiqueue.Client, config: Path) -> None:
    batch = await create(client, [chat_line(1)])
    async with running(client, config):
        await Batches(client).wait(batch.id, tenant="acme")
    with pytest.raises(BatchEnded, match="it is completed"):
        await Batches(client).cancel(batch.id, tenant="acme")


async def test_what_is_another_tenant_s_is_not_found(client: aiqueue.Client) -> None:
    batches = Batches(client)
    batch = await create(client, [chat_line(1)])
    for call in (
        batches.batch(batch.id, tenant="globex"),
        batches.cancel(batch.id, tenant="globex"),
        batches.file(batch.input_file_id, tenant="globex"),
        batches.delete_file(batch.input_file_id, tenant="globex"),
        batches.create(batch.input_file_id, tenant="globex", endpoint="/v1/embeddings"),
        batches.file("../x", tenant="acme"),
        batches.file("*", tenant="acme"),
        batches.batch(f"acme.batch.{batch.id}", tenant="acme"),
    ):
        with pytest.raises(NotFound, match="no such"):
            await call
    assert await batches.batches("globex") == []
    assert await batches.files("globex") == []


async def test_two_files_of_the_same_bytes_live_each_for_itself(client: aiqueue.Client) -> None:
    batches, data = Batches(client), jsonl([chat_line(1)])
    first = await batches.upload(data, tenant="acme", filename="a.jsonl")
    second = await batches.upload(data, tenant="acme", filename="b.jsonl")
    assert [each.id for each in await batches.files("acme")] == [second.id, first.id]
    await batches.delete_file(first.id, tenant="acme")
    assert await batches.content(second).read() == data
    await batches.delete_file(second.id, tenant="acme")
    with pytest.raises(NotFound):
        await batches.content(second).read()
    assert await batches.files("acme") == []


async def test_a_deleted_input_is_still_there_for_its_batch(client: aiqueue.Client, config: Path) -> None:
    batch = await create(client, [chat_line(1)])
    await Batches(client).delete_file(batch.input_file_id, tenant="acme")
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, batch.completed) == ("completed", 1)


async def test_quotas_hold_for_a_tenant(client: aiqueue.Client) -> None:
    small = Batches(client, BatchQuotas(file_bytes=100, files=2, total_bytes=150, batches=1))
    with pytest.raises(BadInput, match="the file is larger than 100 bytes"):
        await small.upload(b"x" * 101, tenant="acme")
    assert await small.files("acme") == []
    file = await small.upload(b"x" * 100, tenant="acme")
    with pytest.raises(BatchQuota, match="at most 150 bytes in all files"):
        await small.upload(b"y" * 100, tenant="acme")
    await small.upload(b"z", tenant="acme")
    with pytest.raises(BatchQuota, match="at most 2 files"):
        await small.upload(b"z", tenant="acme")
    await small.upload(b"z", tenant="globex")
    await small.create(file.id, tenant="acme", endpoint="/v1/embeddings")
    outcomes: list[Any] = await asyncio.gather(
        *(small.create(file.id, tenant="acme", endpoint="/v1/embeddings") for _ in range(3)), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [BatchQuota] * 3
    assert len(await small.batches("acme")) == 1
    assert len(await small.files("acme")) == 2
    assert sorted([each.document.size async for each in client.documents.find("acme")]) == [1, 100]


async def test_a_full_bucket_takes_no_new_file_or_batch_and_cancels_what_runs(
    client: aiqueue.Client,
) -> None:
    batches, stream = Batches(client), client.topology.batches_stream.name
    batch = await create(client, [chat_line(1)])
    for number in range(20):
        await batches.upload(b"%d" % number, tenant="globex")
    declared = await client.connection.api(f"STREAM.INFO.{stream}")
    most = int(declared["state"]["bytes"] / 0.9) - 1
    await client.connection.api(f"STREAM.UPDATE.{stream}", {**declared["config"], "max_bytes": most})
    with pytest.raises(QueueFull, match="its last tenth is for batches that run"):
        await batches.upload(b"x", tenant="acme")
    with pytest.raises(QueueFull, match="its last tenth is for batches that run"):
        await batches.create(batch.input_file_id, tenant="acme", endpoint=CHAT)
    await batches.cancel(batch.id, tenant="acme")
    assert [each.status for each in await batches.batches("acme")] == ["cancelling"]


async def test_a_batch_whose_creator_died_before_its_job_was_stored_is_run_when_it_is_asked_for(
    client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        raise Unavailable("as ordered")

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "_enqueue", die)
        patch.setattr(Batches, "_forget", die)
        with pytest.raises(Unavailable):
            await create(client, [chat_line(1)])
    batches = Batches(client)
    (batch,) = await batches.batches("acme")
    async with running(client, config):
        assert (await batches.batch(batch.id, tenant="acme")).status == "validating"
        monkeypatch.setattr("aiqueue.gateway.batches.client.LOOK_AFTER_S", 0)
        monkeypatch.setattr("aiqueue.gateway.batches.client.QUIET_S", 0)
        batch = await batches.wait(batch.id, tenant="acme")
    assert (batch.status, batch.completed) == ("completed", 1)


async def reserved_micros(client: aiqueue.Client) -> int:
    """What calls and batches have reserved of all budgets of this month."""
    budgets = Budgets(store := UsageStore(client.connection, client.topology), UsageLedger(store))
    found = await budgets.stats(month_of(await store.now()))
    return sum(each.reserved_micros for each in found)


async def test_a_batch_whose_job_is_cancelled_is_cancelled_with_all_its_lines(
    client: aiqueue.Client, tmp_path: Path, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    config = write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 1.0\n')
    standin.behaviour = Behaviour(first_token_s=0.3)
    batch = await create(client, map(chat_line, range(40)))
    batches = Batches(client)
    async with running(client, config, concurrency=4):
        await eventually(lambda: len(standin.calls) >= 8)
        assert await client.cancel(batch.id, family="gateway.batches", tenant="acme")
        batch = await batches.wait(batch.id, tenant="acme")
        assert await reserved_micros(client) == 0
    assert (batch.status, batch.total, batch.problems) == ("cancelled", 40, ())
    found = await reported(client, batch)
    assert len(found) == 40
    assert {each["error"]["code"] for each in found.values() if each["error"]} == {"batch_cancelled"}
    assert 0 < batch.completed <= len(standin.calls) < 40


async def test_a_waiting_batch_whose_job_is_cancelled_is_cancelled_when_it_is_asked_for(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await create(client, map(chat_line, range(3)))
    assert await client.cancel(batch.id, family="gateway.batches", tenant="acme")
    monkeypatch.setattr("aiqueue.gateway.batches.client.LOOK_AFTER_S", 0)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, standin.calls) == ("cancelled", [])


@pytest.mark.parametrize("again", [False, True])
async def test_a_batch_whose_job_is_a_dead_letter_fails_with_what_has_ended_in_its_files(
    client: aiqueue.Client, tmp_path: Path, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually, again: bool,
) -> None:  # fmt: skip
    """`again`: the job that is to end the batch fails, too."""
    config = write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 1.0\n')
    standin.behaviour = Behaviour(first_token_s=0.2)
    batch = await create(client, map(chat_line, range(40)))
    batches, failures = Batches(client), 0
    write = BatchLines._write

    async def write_twice(lines: BatchLines, pending: Any) -> None:
        nonlocal failures
        if lines._run.batch.completed >= 4 and (again or failures < 1):
            failures += 1
            raise RuntimeError("as ordered")
        await write(lines, pending)

    monkeypatch.setattr(BatchLines, "_write", write_twice)
    monkeypatch.setattr("aiqueue.gateway.gateway_worker._OF_FAULTS", {Exception: aiqueue.Backoff(attempts=1)})
    monkeypatch.setattr("aiqueue.gateway.batches.engine.PART_S", 0.1)
    monkeypatch.setattr("aiqueue.gateway.batches.client.LOOK_AFTER_S", 0)
    async with running(client, config, concurrency=4):
        await eventually(lambda: failures)
        batch = await batches.wait(batch.id, tenant="acme")
        await eventually(lambda: failures == 1 + again)
        calls, ended = len(standin.calls), len(await reported(client, batch))
    assert (batch.status, {each.code for each in batch.problems}) == ("failed", {"job_failed"})
    assert 4 <= batch.completed <= calls < 40
    assert ended == (batch.completed if again else 40)
    left = [each async for each in client.connection.read("AI_GATEWAY_REQUESTS", "ai.gateway.requests.>")]
    assert left == []
    assert await reserved_micros(client) == 0


async def test_a_batch_whose_job_has_failed_is_not_ended_while_the_job_that_is_to_end_it_waits_for_a_worker(
    client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await create(client, map(chat_line, range(3)))
    batches = Batches(client)
    run = BatchLines.call

    async def fail(_lines: BatchLines) -> None:
        raise RuntimeError("as ordered")

    monkeypatch.setattr("aiqueue.gateway.gateway_worker._OF_FAULTS", {Exception: aiqueue.Backoff(attempts=1)})
    monkeypatch.setattr("aiqueue.gateway.batches.client.LOOK_AFTER_S", 0)
    monkeypatch.setattr(BatchLines, "call", fail)
    handle = await client.job(batch.id, family="gateway.batches", tenant="acme")
    async with running(client, config):
        with pytest.raises(JobFailed, match="as ordered"):
            await handle.result(10)
    seen = [(await batches.batch(batch.id, tenant="acme")).status for _ in range(3)]
    assert seen == ["in_progress"] * 3
    monkeypatch.setattr(BatchLines, "call", run)
    async with running(client, config):
        batch = await batches.wait(batch.id, tenant="acme")
    assert (batch.status, [each.code for each in batch.problems]) == ("failed", ["job_failed"])
    assert set(await reported(client, batch)) == {"c0", "c1", "c2"}


async def test_an_input_that_vanishes_amid_its_batch_leaves_no_line_behind(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.2)
    batch = await create(client, map(chat_line, range(40)))
    split = engine.split_lines

    async def split_some(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async for raw in split(*arguments, **options):
            if raw.number == 9:
                raise NotFound("as ordered")
            yield raw

    monkeypatch.setattr(engine, "split_lines", split_some)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
        calls = len(standin.calls)
    assert (batch.status, [each.code for each in batch.problems]) == ("failed", ["input_file_unreadable"])
    assert set(await reported(client, batch)) == {f"c{number}" for number in range(8)}
    assert batch.completed == calls <= 8


async def test_a_batch_that_is_cancelled_just_after_its_reservation_gives_it_back(
    client: aiqueue.Client, tmp_path: Path, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 1.0\n')
    batch = await create(client, map(chat_line, range(4)))
    validate = engine.validate

    async def validate_then_stop(run: Any) -> Any:
        found = await validate(run)
        await Batches(client).cancel(batch.id, tenant="acme")
        await run.look()
        return found

    monkeypatch.setattr(engine, "validate", validate_then_stop)
    async with running(client, config):
        batch = await Batches(client).wait(batch.id, tenant="acme")
    assert (batch.status, standin.calls) == ("cancelled", [])
    assert await reserved_micros(client) == 0


async def test_a_worker_of_batches_alone_is_refused(client: aiqueue.Client, config: Path) -> None:
    with pytest.raises(BadInput, match="a gateway worker takes requests, too"):
        async with running(client, config, families=["gateway.batches"]):
            pass
