"""Fields of a message that a header may state: filled in where the body has none, refused where the two do not agree.

And `priority`, which a plain publisher states in a header.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import attempt, headers, subjects
from aiqueue.errors import BadInput, NotFound
from aiqueue.lanes import WorkerRecords
from aiqueue.subjects import Lane
from aiqueue.topology import Topology

from ..support import Account, create_streams, eventually

FAMILY, STREAM, BARE = "gateway.requests", "AI_GATEWAY_REQUESTS", "ai.gateway.requests.acme"
RULES = f'[[limit]]\nfamily = "{FAMILY}"\nkey = "big-*"\nrequests = 1000\n'


class Ask(aiqueue.Message, kind="gateway.request", family=FAMILY):
    prompt: str
    model: str = ""
    request_id: str = ""


def recording(*, any_kind: bool = False) -> tuple[aiqueue.Worker, list[tuple[str, str, str, int]]]:
    """A worker, and what it runs: prompt, model, priority and attempt."""
    ran: list[tuple[str, str, str, int]] = []
    worker = aiqueue.Worker()
    if any_kind:

        @worker.handle_any(FAMILY)
        async def run_any(job: aiqueue.Job[aiqueue.RawMessage]) -> None:
            ran.append((job.kind, "", job.priority, job.attempt))

        return worker, ran

    @worker.handle(Ask)
    async def run(job: aiqueue.Job[Ask]) -> str:
        ran.append((job.message.prompt, job.message.model, job.priority, job.attempt))
        return job.message.model

    return worker, ran


@asynccontextmanager
async def limited(account: Account, directory: Path) -> AsyncIterator[aiqueue.Client]:
    """A client with a rule for the models that begin with `big-`."""
    (directory / "streams").mkdir(exist_ok=True)
    (directory / "streams" / "limits.toml").write_text(RULES)
    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": directory / "streams"}
    (directory / "streams" / "own.toml").write_text(
        '[family]\nname = "test.own"\ndefault_kind = "own"\n[stream]\nname = "TEST_OWN"\n'
    )
    async with aiqueue.connect(account.url, **options) as client:
        await create_streams(client)
        yield client


async def state(client: aiqueue.Client) -> dict[str, Any]:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}", {"subjects_filter": ">"})
    found: dict[str, Any] = info["state"]
    return found


@pytest.mark.parametrize(
    ("stated", "body", "seen"),
    [
        ({"model": "small"}, {}, "small"),
        ({"Model": "small"}, {"model": ""}, "small"),
        ({"model": "small"}, {"model": "small"}, "small"),
        ({"model": ""}, {"model": "small"}, "small"),
        ({}, {"model": "small"}, "small"),
    ],
)
async def test_the_handler_sees_the_field_whether_header_or_body_state_it(
    client: aiqueue.Client, plain: Any, stated: dict[str, str], body: dict[str, Any], seen: str
) -> None:
    worker, ran = recording()
    async with worker.running(client):
        payload = json.dumps({"schema_version": "1.0", "message_type": "llm_request", "data": {"prompt": "p", **body}})
        await plain.publish(BARE, payload.encode(), headers={"request_id": "r-1", **stated})
        await eventually(lambda: ran)
    assert ran == [("p", seen, "normal", 1)]


@pytest.mark.parametrize("any_kind", [False, True])
async def test_a_plain_publishers_job_that_contradicts_itself_is_a_dead_letter_and_its_requester_hears_it(
    client: aiqueue.Client, plain: Any, any_kind: bool
) -> None:
    worker, ran = recording(any_kind=any_kind)
    async with worker.running(client), aiqueue.Responder().running(client):
        body = json.dumps({"prompt": "p", "model": "dear"}).encode()
        await plain.publish(BARE, body, headers={"request_id": "r-1", "model": "cheap"})
        answer = await plain.request("ai.gateway.responses.acme", b"r-1", timeout=20)
        told = json.loads(answer.data)
        assert (answer.headers["Nats-Service-Error-Code"], told["reason"]) == ("422", "invalid")
        assert "header model is 'cheap', and model in the body is 'dear'" in told["cause"]
        (letter,) = [each async for each in client.dead.find()]
        assert (letter.job_id, letter.reason, letter.body) == ("r-1", "invalid", body)

        asked = {"request_id": "r-2", "model": "cheap"}
        answer = await plain.request("ai.gateway.responses.acme", body, headers=asked, timeout=20)
        assert answer.headers["Nats-Service-Error-Code"] == "400"
        assert (await state(client))["messages"] == 0
    assert ran == []


@pytest.mark.parametrize("value", [["cheap"], True, 1.0, {"name": "cheap"}])
def test_a_field_that_is_neither_a_text_nor_a_whole_number_contradicts_its_header(value: Any) -> None:
    family = Topology.load().family(FAMILY)
    body = json.dumps({"prompt": "p", "model": value}).encode()
    raw = attempt.RawJob(family, "acme", "normal", 1, 0.0, {"model": str(value)}, body)
    decoded = attempt.decode_body(raw)  # as a child process does
    refused = attempt.build_job(raw, decoded, None, attempt=1, state=None, progress=None)  # type: ignore[arg-type]
    assert isinstance(refused, attempt.Refused)
    assert refused.reason == "invalid"


async def test_clients_refuse_a_header_that_contradicts_the_message_and_send_nothing(
    client: aiqueue.Client, account: Account
) -> None:
    wrong = {"model": "cheap"}
    problem = "header model is 'cheap', and model in the body is 'dear'"
    ask = Ask(prompt="p", model="dear")
    async with aiqueue.NATSClient(client=client) as bus:
        payload = json.dumps({"prompt": "p", "model": "dear", "request_id": "r"}).encode()
        with pytest.raises(BadInput, match=problem):
            await bus.publish(BARE, payload, headers=wrong)
        with pytest.raises(BadInput, match=problem):
            await bus.request("ai.gateway.responses.acme", payload, headers=wrong)
        with pytest.raises(BadInput, match=problem):
            await client.enqueue(ask, tenant="acme", headers=wrong)
        with pytest.raises(BadInput, match=problem):
            await client.request(ask, tenant="acme", headers=wrong)
        (outcome,) = [each async for each in client.enqueue_many([ask], tenant="acme", headers=wrong)]
        assert isinstance(outcome, BadInput)
        assert (await state(client))["last_seq"] == 0
        await client.enqueue(ask, tenant="acme", headers={"model": "dear"})
        await bus.publish(BARE, b'{"prompt": "p"}', headers=wrong)
        assert (await state(client))["messages"] == 2


@pytest.mark.parametrize(
    ("priority", "in_lane"),
    [("high", "high"), ("low", "low"), ("batch", "batch"), ("normal", "normal"), ("urgent", "normal")],
)
async def test_a_job_that_moves_to_the_lane_of_its_model_gets_the_priority_of_its_header_in_one_move(
    account: Account, tmp_path: Path, plain: Any, priority: str, in_lane: str
) -> None:
    """The model is stated by a header, too."""
    worker, ran = recording()
    async with limited(account, tmp_path) as client, worker.running(client):
        told = {"request_id": "r-1", "model": "big-1", "priority": priority}
        await plain.publish(BARE, b'{"prompt": "p"}', headers=told)
        await eventually(lambda: ran)
        handle = await client.job("r-1")
        assert await handle.result(20) == "big-1"
        assert (await state(client))["last_seq"] == 2
        moved = [each async for each in client.connection.read("AI_RESULTS", "ai.gateway.responses.acme.r-1")]
    assert ran == [("p", "big-1", in_lane, 1)]
    assert [each.headers["Aiq-Event"] for each in moved] == ["retry", "started", "result"]


async def test_a_large_body_of_a_limited_model_moves_with_its_document(
    account: Account, tmp_path: Path, plain: Any
) -> None:
    worker, ran = recording()
    async with limited(account, tmp_path) as client:
        prompt = "p" * 300_000
        handle = await client.enqueue(Ask(prompt=prompt, model="big-1"), tenant="acme", unique="r-1")
        assert handle.lane == Lane(FAMILY, "acme", "normal")  # it was the first job: the rules were not looked up yet
        async with worker.running(client):
            assert await handle.result(20) == "big-1"
        assert (await state(client))["last_seq"] == 2
    assert ran == [(prompt, "big-1", "normal", 1)]


async def test_the_guides_client_publishes_into_the_lane_of_model_and_priority_at_once(
    account: Account, tmp_path: Path
) -> None:
    async with limited(account, tmp_path) as client, aiqueue.NATSClient(client=client) as bus:
        await client.key_lanes.find_token(client.topology.family(FAMILY), "acme", "big-1")
        told = {"request_id": "r-1", "model": "big-1", "priority": "high"}
        await bus.publish(BARE, b'{"prompt": "p"}', headers=told)
        await client.enqueue(Ask(prompt="p"), tenant="acme", headers={"model": "big-1"})
        lanes = [subjects.work(FAMILY, "acme", each, subjects.hashed("big-1")) for each in ("high", "normal")]
        assert (await state(client))["subjects"] == dict.fromkeys(lanes, 1)
        stored = await client.connection.last(STREAM, lanes[0])
        assert stored is not None
        assert headers.limit_key(stored.headers) == "big-1"


@pytest.mark.parametrize("has_rule", [False, True])
async def test_a_worker_on_streams_without_limits_runs_requests_unless_a_rule_holds_for_them(
    account: Account, tmp_path: Path, caplog: pytest.LogCaptureFixture, has_rule: bool
) -> None:
    """Before `aiqueue apply` the requests' stream has no lanes of keys, and there is no bucket of limits."""
    async with limited(account, tmp_path) as client:
        await client.connection.api("STREAM.DELETE.KV_AI_LIMITS")
        config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
        config["subjects"] = [each for each in config["subjects"] if each.count(".") < 5]
        await client.connection.api(f"STREAM.UPDATE.{STREAM}", config)
    if not has_rule:
        (tmp_path / "streams" / "limits.toml").unlink()
    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": tmp_path / "streams"}
    worker, ran = recording()
    async with aiqueue.connect(account.url, **options) as client:
        if has_rule:
            with pytest.raises(NotFound, match="KV_AI_LIMITS"):
                async with worker.running(client):
                    pass
            return
        async with worker.running(client):
            for n in range(3):
                handle = await client.enqueue(Ask(prompt="p", model="big-1"), tenant="acme", unique=f"r-{n}")
                assert await handle.result(20) == "big-1"
            (record,) = await WorkerRecords(client.connection, client.topology).read()
            assert record["key_lanes"] is False
    assert len(ran) == 3
    assert "limits are not heeded until `aiqueue apply` has run" in caplog.text
