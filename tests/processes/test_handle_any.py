"""A handler for every kind in child processes: with ``process=True``, and for suspects."""

from __future__ import annotations

import os
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput

from .. import suspects
from ..support import eventually
from ..suspects import Act, act_on_any, act_on_any_sync
from .test_quarantine import dead, lose, plain

pytestmark = pytest.mark.families("agent.tasks")
FAMILY = "agent.tasks"
BARE = "ai.agent.tasks.acme"
ONCE = aiqueue.Backoff(attempts=1)
ENVELOPE = b'{"schema_version": "9", "message_type": "llm", "data": {"n": 1}}'


class Typed(aiqueue.Message, kind="typed"):
    pass


def worker_of(handler: Any, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(processes=1)
    worker.handle_any(FAMILY, **{"retry": ONCE, **options})(handler)
    return worker


async def result_of(client: aiqueue.Client, job_id: str) -> Any:
    return await (await client.job(job_id, tenant="acme")).result(25)


async def publish(account: Any, bodies: dict[str, bytes], **more: str) -> None:
    """Publish bodies as a plain client does, under these ids."""
    async with plain(account) as publisher:
        for job_id, body in bodies.items():
            await publisher.jetstream().publish(BARE, body, headers={"task_id": job_id, **more})


@pytest.mark.parametrize("handler", [act_on_any, act_on_any_sync])
async def test_a_handler_of_every_kind_runs_in_a_child(client: aiqueue.Client, account: Any, handler: Any) -> None:
    async with worker_of(handler, process=True).running(client):
        await publish(account, {"a": ENVELOPE, "b": b"\xff", "c": b"exit", "d": b'{"n": 1}'})
        pid, *envelope = await result_of(client, "a")
        assert envelope == ["llm", "llm", ENVELOPE, "", "9"]
        assert (await result_of(client, "b"))[1:] == ["agent.task", "agent.task", b"\xff", "", None]
        assert (await result_of(client, "d"))[1:] == ["agent.task", "agent.task", b'{"n": 1}', "", None]
        await eventually(lambda: dead(client))
    assert pid != os.getpid()
    (letter,) = await dead(client)
    assert (letter.job_id, letter.kind, letter.reason) == ("c", "agent.task", "attempts")
    assert "worker process died: exit code 9" in letter.error


async def test_a_child_finds_a_handler_of_every_kind_with_policies_only_through_its_worker(
    client: aiqueue.Client,
) -> None:
    worker = worker_of(act_on_any, process=True, on={ValueError: aiqueue.Reject})
    with pytest.raises(BadInput, match=r"the handler of every kind of agent\.tasks cannot run with process=True"):
        async with worker.running(client):
            pass


@pytest.mark.parametrize("handler", [act_on_any, act_on_any_sync])
async def test_a_suspect_of_any_kind_is_tried_in_a_child_also_if_its_body_cannot_be_decoded(
    client: aiqueue.Client, account: Any, handler: Any
) -> None:
    await publish(account, {"a": ENVELOPE, "b": b"\xff", "c": b"exit"})
    own = await client.enqueue(Act(do="tell"), tenant="acme")
    await lose(client, account, jobs=4)
    async with worker_of(handler).running(client):
        found = [await result_of(client, each) for each in ("a", "b", own.id)]
        await eventually(lambda: dead(client))
    assert [each[1:4] for each in found[:2]] == [["llm", "llm", ENVELOPE], ["agent.task", "agent.task", b"\xff"]]
    assert found[2][1] == "act"
    assert os.getpid() not in [each[0] for each in found]
    (letter,) = await dead(client)
    assert (letter.job_id, letter.reason, letter.body) == ("c", "killed_worker", b"exit")


async def test_a_suspect_of_a_typed_kind_in_another_version_goes_to_the_handler_of_every_kind(
    client: aiqueue.Client, account: Any
) -> None:
    worker = worker_of(act_on_any)
    worker.handle(Act)(suspects.act)
    body = b'{"schema_version": "9", "message_type": "act", "data": {"do": "tell"}}'
    await publish(account, {"a": body})
    await lose(client, account)
    async with worker.running(client):
        assert (await result_of(client, "a"))[1:] == ["act", "act", body, "", "9"]


async def test_a_suspect_whose_handler_no_child_finds_is_tried_in_the_worker(
    client: aiqueue.Client, account: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def closure(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
        return [os.getpid(), job.message.body, client is not None]

    await publish(account, {"b": b"\xff"})
    await lose(client, account)
    async with worker_of(closure).running(client):
        assert await result_of(client, "b") == [os.getpid(), b"\xff", True]
    assert "suspects of every kind of agent.tasks are tried in the worker" in caplog.text


async def test_an_error_in_a_child_repeats_nothing_of_an_undecodable_body_with_secrets(
    client: aiqueue.Client, account: Any
) -> None:
    async with worker_of(act_on_any, process=True).running(client):
        await publish(account, {"a": b"secret: swordfish"}, **{"Aiq-Secret": "/key"})
        await eventually(lambda: dead(client))
    (letter,) = await dead(client)
    assert "swordfish" not in f"{letter.error} {letter.history}"
    assert letter.body == b"secret: swordfish"
