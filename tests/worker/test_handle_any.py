"""A handler for every kind of a family: which jobs it gets, in which form, and what a worker with one announces."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

import aiqueue
from aiqueue import codec
from aiqueue.errors import BadInput, DecodeError, JobFailed, UnknownFamily
from aiqueue.inspect import read_waiting_kinds
from aiqueue.job import JobSpec
from aiqueue.lanes import WorkerRecords, serves
from aiqueue.worker import unknown_kinds
from aiqueue.worker.runner import Runner

from ..support import eventually
from .plain_jobs import ONCE, letters

FAMILY = "agent.tasks"
BARE = "ai.agent.tasks.acme"
SOON = aiqueue.Backoff(attempts=2, first=0.02, jitter=0)


class Known(aiqueue.Message, kind="known"):
    n: int = 0


class Other(aiqueue.Message, kind="other"):
    n: int = 0
    text: str = ""


class Ask(aiqueue.Message, kind="ask", family="gateway.requests"):
    prompt: str


class Seen(asyncio.Queue[aiqueue.Job[Any]]):
    """The jobs of the handler of every kind, and those of the typed one."""

    def __init__(self) -> None:
        super().__init__()
        self.typed: list[aiqueue.Job[Known]] = []

    async def next(self) -> aiqueue.Job[aiqueue.RawMessage]:
        return await asyncio.wait_for(self.get(), 25)


def worker_of(seen: Seen, **options: Any) -> aiqueue.Worker:
    """A worker with a handler for the kind `known`, and one for every kind."""
    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Known, retry=ONCE)
    async def known(job: aiqueue.Job[Known]) -> str:
        seen.typed.append(job)
        return "typed"

    @worker.handle_any(FAMILY, **{"retry": ONCE, **options})
    async def every_kind(job: aiqueue.Job[aiqueue.RawMessage]) -> str:
        seen.put_nowait(job)
        return f"any: {job.kind}"

    return worker


async def parked(client: aiqueue.Client) -> int:
    """How many jobs are parked, and how often one was."""
    info = await client.connection.api("STREAM.INFO.AI_PARKED")
    return int(info["state"]["last_seq"])


async def result_of(client: aiqueue.Client, job_id: str) -> Any:
    return await (await client.job(job_id, tenant="acme")).result(25)


# -- which jobs, and in which form


async def test_a_typed_handler_goes_first_and_every_other_kind_goes_to_the_handler_of_every_kind(
    client: aiqueue.Client,
) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        known = await client.enqueue(Known(n=1), tenant="acme", priority="high")
        other = await client.enqueue(Other(n=2), tenant="acme", priority="high", headers={"X-Own": "kept"})
        assert (await known.result(25), await other.result(25)) == ("typed", "any: other")
    (typed,), job = seen.typed, await seen.next()
    assert typed.message == Known(n=1)
    assert seen.empty()
    assert (job.id, job.kind, job.family, job.tenant, job.priority) == (other.id, "other", FAMILY, "acme", "high")
    assert (job.attempt, job.deadline, job.headers["X-Own"]) == (1, None, "kept")
    message = job.message
    assert (message.kind, message.content_type, message.schema_version) == ("other", "application/cbor", None)
    assert message.body == codec.encode({"n": 2, "text": ""})
    assert message.decode() == {"n": 2, "text": ""}
    assert await parked(client) == 0


@pytest.mark.parametrize(
    ("body", "kind", "version", "data"),
    [
        (b'{ "n": 3 }', "agent.task", None, {"n": 3}),
        (b'{"schema_version": "1.0", "message_type": "llm", "data": {"n": 3}}', "llm", "1.0", {"n": 3}),
        (b'{"schema_version": "7", "message_type": "agent_task", "n": 3}', "agent.task", "7", {"n": 3}),
        (b'{"schema_version": 7, "message_type": "known", "data": {"n": 3}}', "known", "7", {"n": 3}),
    ],
    ids=["bare", "nested envelope", "flat envelope of another version", "a known kind of another version"],
)
async def test_a_plain_publishers_message_arrives_with_its_bytes_and_its_data_can_be_decoded(
    client: aiqueue.Client, plain: Any, body: bytes, kind: str, version: str | None, data: Any
) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        await plain.jetstream().publish(BARE, body, headers={"content-type": "application/json; charset=utf-8"})
        job = await seen.next()
    assert (job.kind, job.message.kind, job.message.schema_version) == (kind, kind, version)
    assert (job.message.body, job.message.content_type) == (body, "application/json; charset=utf-8")
    assert job.message.decode() == data
    assert (seen.typed, await parked(client)) == ([], 0)


async def test_an_accepted_version_of_a_known_kind_goes_to_its_own_handler(client: aiqueue.Client, plain: Any) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        body = b'{"schema_version": "1.0", "message_type": "known", "data": {"n": 3}}'
        await plain.jetstream().publish(BARE, body)
        await eventually(lambda: seen.typed)
    assert seen.typed[0].message == Known(n=3)
    assert seen.empty()


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\xff\xff", ""),
        (b"", ""),
        (b"[1, 2]", ""),
        (b"hello", "text/plain"),
        (b"<p>", "text/html"),
        (b"{}", "image/x"),
    ],
)
async def test_a_body_that_cannot_be_decoded_reaches_the_handler_as_it_is(
    client: aiqueue.Client, plain: Any, body: bytes, content_type: str
) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        stated = {"Content-Type": content_type} if content_type else {}
        await plain.jetstream().publish(BARE, body, headers={"task_id": "t-1", **stated})
        job = await seen.next()
        assert await result_of(client, "t-1") == "any: agent.task"
    assert (job.message.body, job.message.kind, job.message.content_type) == (body, "agent.task", content_type)
    with pytest.raises(DecodeError):
        job.message.decode()
    assert await letters(client) == []


async def test_a_body_of_a_known_kind_that_cannot_be_decoded_is_a_dead_letter(
    client: aiqueue.Client, plain: Any
) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        await plain.jetstream().publish(BARE, b"\xff", headers={"Aiq-Kind": "known"})
        await eventually(lambda: letters(client))
    assert [(each.kind, each.reason) for each in await letters(client)] == [("known", "undecodable")]
    assert seen.empty()


async def test_a_job_with_a_malformed_header_of_ours_is_a_dead_letter(client: aiqueue.Client, plain: Any) -> None:
    seen = Seen()
    async with worker_of(seen).running(client):
        await plain.jetstream().publish(BARE, b"{}", headers={"Aiq-Deadline": "soon"})
        await eventually(lambda: letters(client))
    assert [each.reason for each in await letters(client)] == ["invalid"]
    assert seen.empty()


async def test_a_body_that_is_stored_as_a_document_is_fetched(client: aiqueue.Client) -> None:
    seen, message = Seen(), Other(n=1, text="x" * 300_000)
    async with worker_of(seen).running(client):
        handle = await client.enqueue(message, tenant="acme")
        assert await handle.result(25) == "any: other"
        job = await seen.next()
    assert len(job.message.body) > 300_000
    assert job.message.decode() == message.model_dump()


def test_each_decoding_returns_new_data_and_the_text_of_a_message_shows_no_body() -> None:
    message = aiqueue.RawMessage("login", b'{"password": "hunter2"}')
    message.decode().clear()
    assert message.decode() == {"password": "hunter2"}
    assert repr(message) == "<RawMessage login of 23 bytes>"


async def test_a_message_as_it_came_cannot_be_enqueued(client: aiqueue.Client) -> None:
    with pytest.raises(BadInput, match="not RawMessage"):
        await client.enqueue(aiqueue.RawMessage("other", b"{}"), tenant="acme")  # type: ignore[arg-type]


# -- what becomes of them


async def test_a_failing_job_is_retried_dead_lettered_under_its_kind_and_replayed(
    client: aiqueue.Client, plain: Any
) -> None:
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle_any(FAMILY, retry=SOON, on={KeyError: aiqueue.Reject})
    def handler(job: aiqueue.Job[aiqueue.RawMessage]) -> str:
        attempts.append(job.attempt)
        if len(attempts) <= 2:
            raise ValueError("broken")
        if len(attempts) == 3:
            raise KeyError("never")
        return threading.current_thread().name

    async with worker.running(client):
        body = b'{"schema_version": "1.0", "message_type": "llm", "data": {"task_id": "t-1"}}'
        await plain.jetstream().publish(BARE, body)
        for reason, number in (("attempts", 2), ("rejected", 1)):
            await eventually(lambda: letters(client))
            (letter,) = await letters(client)
            assert (letter.job_id, letter.kind, letter.reason, letter.attempt) == ("t-1", "llm", reason, number)
            assert letter.body == body
            await client.dead.replay(letter)
        await eventually(lambda: len(attempts) == 4)
        assert (await result_of(client, "t-1")).startswith("aiqueue-handler")
    assert attempts == [1, 2, 1, 1]


async def test_a_timeout_and_a_cancellation_end_an_attempt(client: aiqueue.Client) -> None:
    started, ended = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle_any(FAMILY, retry=ONCE, timeout=0.2)
    async def handler(job: aiqueue.Job[aiqueue.RawMessage]) -> None:
        started.set()
        try:
            await asyncio.sleep(0.05 if job.message.decode()["n"] else 60)
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with worker.running(client):
        handle = await client.enqueue(Other(), tenant="acme")
        with pytest.raises(JobFailed, match=r"timed out after 0\.2 s"):
            await handle.result(25)
        started.clear()
        ended.clear()
        handle = await client.enqueue(Other(n=1), tenant="acme")
        await started.wait()
        assert await handle.cancel()
        await asyncio.wait_for(ended.wait(), 25)
        with pytest.raises(JobFailed, match="cancelled"):
            await handle.result(25)


async def test_a_request_of_a_kind_that_nobody_handles_is_answered_and_an_id_runs_once(
    client: aiqueue.Client,
) -> None:
    ran: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle_any("gateway.requests")
    async def answer(job: aiqueue.Job[aiqueue.RawMessage]) -> dict[str, Any]:
        ran.append(job.id)
        return {"kind": job.kind, **job.message.decode()}

    async with worker.running(client), aiqueue.Responder().running(client):
        ask = Ask(prompt="hi")
        first = await client.request(ask, tenant="acme", unique="r-1", timeout=25)
        again = await client.request(ask, tenant="acme", unique="r-1", timeout=25)
    assert first == again == {"kind": "ask", "prompt": "hi"}
    assert ran == ["r-1"]


async def test_an_error_repeats_no_secret_that_the_publisher_has_named(client: aiqueue.Client, plain: Any) -> None:
    worker = aiqueue.Worker()

    @worker.handle_any(FAMILY, retry=ONCE)
    async def handler(job: aiqueue.Job[aiqueue.RawMessage]) -> None:
        raise ValueError(f"cannot log in with {job.message.body!r}")

    async with worker.running(client):
        for job_id, body in (("decoded", b'{"key": "swordfish"}'), ("undecodable", b"swordfish")):
            job_headers = {"Aiq-Secret": "/key", "task_id": job_id, "Content-Type": "application/json"}
            await plain.jetstream().publish(BARE, body, headers=job_headers)
        await eventually(lambda: _are(letters(client), 2))
    found = {each.job_id: each for each in await letters(client)}
    for letter in found.values():
        assert "swordfish" not in json.dumps([letter.error, letter.history])
        assert "*****" in letter.error
    assert found["undecodable"].body == b"swordfish"


async def _are(found: Any, expected: int) -> bool:
    return len(await found) == expected


async def test_plain_first_deliveries_of_typed_and_of_other_kinds_take_the_short_way(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen()
    monkeypatch.delattr(Runner, "_run_any")
    async with worker_of(seen).running(client):
        handles = [await client.enqueue(model(n=1), tenant="acme") for model in (Known, Other)]
        assert [await each.result(25) for each in handles] == ["typed", "any: other"]


# -- what is announced


async def test_jobs_parked_aside_come_back_at_once_to_a_worker_that_handles_every_kind(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unknown_kinds, "HOP_FIRST_S", 600.0)
    monkeypatch.setattr(unknown_kinds, "HOP_MAX_S", 600.0)
    seen, family = Seen(), client.topology.family(FAMILY)
    former = aiqueue.Worker()
    former.handle(Known)(_do_nothing)
    async with former.running(client):
        specs = [JobSpec(Other(n=n), unique=f"u-{n}") for n in range(50)]
        async for _ in client.enqueue_many(specs, tenant="acme"):
            pass

        async def all_wait() -> bool:
            waiting = await read_waiting_kinds(client.connection, client.topology, [family])
            return [(each.kind, each.jobs, each.workers) for each in waiting] == [("other", 50, 0)]

        await eventually(all_wait)
    async with worker_of(seen).running(client):
        assert {(await seen.next()).id for _ in range(50)} == {f"u-{n}" for n in range(50)}
    assert await letters(client) == []


async def _do_nothing(job: aiqueue.Job[Known]) -> None: ...


async def test_the_record_lists_a_star_beside_the_kinds_of_typed_handlers(client: aiqueue.Client) -> None:
    records = WorkerRecords(client.connection, client.topology)
    async with worker_of(Seen()).running(client):
        await eventually(lambda: _are(records.read(), 1))
        (record,) = await records.read()
    assert record["kinds"] == {FAMILY: ["*", "known"]}


def test_a_star_in_a_record_stands_for_every_kind_of_its_family_and_of_no_other() -> None:
    record = {"kinds": {FAMILY: ["*", "known"], "rag.ingest": ["other"]}, "tenants": ["acme"]}
    assert serves(record, FAMILY, "other", "acme")
    assert serves(record, FAMILY, "", "acme")
    assert not serves(record, FAMILY, "other", "globex")
    assert not serves(record, "rag.ingest", "known", "acme")
    assert not serves(record, "rag.queries", "known", "acme")


# -- bad use


def test_a_family_has_one_handler_for_every_kind() -> None:
    worker = aiqueue.Worker()
    worker.handle_any(FAMILY)(_take)
    worker.handle_any("rag.ingest")(_take)
    with pytest.raises(BadInput, match=r"^agent\.tasks has a handler for every kind already$"):
        worker.handle_any(FAMILY)(_take)
    assert [each.key for each in worker.handlers] == [(FAMILY, "*"), ("rag.ingest", "*")]


async def _take(job: aiqueue.Job[aiqueue.RawMessage]) -> None: ...


@pytest.mark.parametrize("family", [Known, _take, "tasks", "", None, "ai.agent.tasks.acme"])
def test_what_is_no_name_of_a_family_is_refused(family: Any) -> None:
    with pytest.raises(BadInput, match=r'handle_any needs the name of a family, such as "agent\.tasks"'):
        aiqueue.Worker().handle_any(family)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"retry": 3}, "retry must be a Backoff"), ({"timeout": 0}, "timeout must be above 0"),
        ({"result": "no"}, "result must be True or False"), ({"process": 1}, "process must be True or False"),
        ({"on": {ValueError: 1}}, "give Reject"),
    ],
)  # fmt: skip
def test_its_options_are_checked_as_those_of_any_handler(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        aiqueue.Worker().handle_any(FAMILY, **options)


def test_a_function_without_an_argument_and_a_raw_message_for_a_kind_are_refused() -> None:
    worker: Any = aiqueue.Worker()
    with pytest.raises(BadInput, match="must take one argument"):
        worker.handle_any(FAMILY)(lambda: None)
    with pytest.raises(BadInput, match="use handle_any"):
        worker.handle(aiqueue.RawMessage)


async def test_a_family_that_is_not_declared_or_has_no_lanes_is_refused_at_the_start(client: aiqueue.Client) -> None:
    for family, error in (("no.such", UnknownFamily), ("agent.message", BadInput)):
        worker = aiqueue.Worker()
        worker.handle_any(family)(_take)
        with pytest.raises(error, match=family):
            async with worker.running(client):
                pass
