"""Pauses are shown where an operator looks: who paused what, since when, and which workers do not heed it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli.app import app
from aiqueue.inspect import Finding, Subject, examine, read_waiting_kinds, stats
from aiqueue.inspect.unknown_kinds import describe_waiting
from aiqueue.lanes import WorkerRecords

from ..support import Account, eventually


class Ping(aiqueue.Message, kind="ping"):
    pass


class Pong(aiqueue.Message, kind="pong"):
    pass


def ponger() -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Pong)
    async def pong(job: aiqueue.Job[Pong]) -> None:
        pass

    return worker


async def doctor(client: aiqueue.Client) -> list[Finding]:
    return [each async for each in examine(Subject(client.connection, client.topology))]


async def test_the_numbers_of_families_lanes_and_jobs_show_their_pauses(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Ping(), tenant="acme")
    other = await client.enqueue(Ping(), tenant="globex")
    pause = await client.pause("agent.tasks", tenant="acme", by="anna", reason="too slow")
    families = {each.family: each.pauses for each in await stats.overview(client.connection, client.topology)}
    assert {name for name, pauses in families.items() if pauses} == {"agent.tasks"}
    assert families["agent.tasks"] == (pause,)
    lanes = {each.tenant: each.pause for each in await stats.lanes(client.connection, client.topology, "agent.tasks")}
    assert lanes == {"acme": pause, "globex": None}
    assert (await handle.status()).pause == pause
    assert (await other.status()).pause is None


async def test_doctor_says_what_is_paused_and_no_lane_of_it_is_without_a_worker(client: aiqueue.Client) -> None:
    await client.enqueue(Ping(), tenant="acme")
    assert "lane-unserved" in {each.code for each in await doctor(client)}
    await client.pause("agent.tasks", kind="ping", by="anna", reason="too slow", duration="10m")
    await client.pause("agent.tasks", tenant="acme", by="bert")
    found = await doctor(client)
    assert "lane-unserved" not in {each.code for each in found}
    whole, kind = [each for each in found if each.code == "paused"][::-1]
    assert kind.text.startswith("agent.tasks, kind ping is paused by anna: too slow, since ")
    assert kind.remedy == "`aiqueue resume agent.tasks --kind ping` when it may go on"
    assert "tenant acme is paused by bert" in whole.text


async def test_doctor_names_the_workers_that_know_of_no_pauses(client: aiqueue.Client) -> None:
    records = WorkerRecords(client.connection, client.topology)
    former = {"worker": "former", "kinds": {"agent.tasks": ["ping"]}}
    await records.write("former", former)
    await records.write("elsewhere", {"worker": "elsewhere", "kinds": {"rag.ingest": ["ping"]}})
    async with ponger().running(client):
        assert "pause-unheeded" not in {each.code for each in await doctor(client)}  # nothing is paused
        await client.pause("agent.tasks", tenant="acme")

        async def named() -> None:
            assert len(await records.read()) == 3
            (finding,) = [each for each in await doctor(client) if each.code == "pause-unheeded"]
            assert finding.text.endswith(": former")

        await eventually(named)


async def test_jobs_that_are_parked_aside_are_said_to_wait_for_the_end_of_the_pause(client: aiqueue.Client) -> None:
    await client.pause("agent.tasks", kind="pong")
    await client.enqueue(Pong(), tenant="acme")
    async with ponger().running(client):

        async def told() -> None:
            found = await read_waiting_kinds(client.connection, client.topology, client.topology.work_families)
            assert list(map(describe_waiting, found)) == ["1 job waits for the end of a pause: pong is paused"]

        await eventually(told)
        assert "kind-unknown" not in {each.code for each in await doctor(client)}


@pytest.fixture
def run(client: aiqueue.Client, account: Account) -> Any:
    """Run a command on the test's account."""
    environment = {"AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password}

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, arguments, env={**environment, "COLUMNS": "200"})

    return run


async def test_the_commands_pause_show_and_resume(client: aiqueue.Client, run: Any) -> None:
    assert (await run("pause")).stdout == "nothing is paused\n"
    done = await run("pause", "agent.tasks", "--tenant", "acme", "--kind", "ping", "--for", "10m", "--reason", "slow")
    assert done.exit_code == 0
    assert done.stdout.startswith("agent.tasks, tenant acme, kind ping: paused ")
    (pause,) = await client.pauses()
    assert (pause.tenant, pause.kind, pause.reason, pause.now) == ("acme", "ping", "slow", False)
    assert "@" in pause.by
    assert pause.until is not None
    assert 599 < pause.until - pause.since < 601
    assert json.loads((await run("pause", "agent.tasks", "--now", "--json")).stdout)["now"] is True
    shown = json.loads((await run("pause", "--json")).stdout)
    assert [(each["family"], each["tenant"]) for each in shown] == [("agent.tasks", None), ("agent.tasks", "acme")]
    for arguments in (["inspect"], ["inspect", "agent.tasks"], ["inspect", "agent.tasks", "--tenant", "acme"]):
        told = (await run(*arguments)).stdout
        assert "\nagent.tasks: paused " in told
        assert "\nagent.tasks, tenant acme, kind ping: paused " in told
    assert "kind ping" not in (await run("inspect", "agent.tasks", "--tenant", "globex")).stdout
    handle = await client.enqueue(Ping(), tenant="globex")
    assert "  paused " in (await run("inspect", handle.id)).stdout
    wrong = await run("resume", "agent.tasks", "--tenant", "globex")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: agent.tasks, tenant globex is not paused; paused are: agent.tasks; ")
    assert (await run("resume", "agent.tasks")).stdout.startswith("resumed agent.tasks\nagent.tasks, tenant acme")
    assert (await run("resume", "agent.tasks", "--tenant", "acme", "--kind", "ping")).exit_code == 0
    assert await client.pauses() == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pause", "agent.tsks"], "unknown family 'agent.tsks'"),
        (["pause", "agent.tasks", "--tenant", "a.b"], "tenant 'a.b'"),
        (["pause", "agent.tasks", "--kind", "a b"], "kind 'a b'"),
        (["pause", "agent.message"], "mail of agent.message cannot be paused"),
        (["pause", "agent.tasks", "--for", "0"], "must be above 0"),
        (["pause", "--now"], "name the family to pause"),
        (["resume", "agent.tsks"], "unknown family 'agent.tsks'"),
    ],
)
async def test_what_is_wrong_on_the_command_line_is_one_line(
    client: aiqueue.Client, run: Any, arguments: list[str], told: str
) -> None:
    done = await run(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert await client.pauses() == []


def test_a_client_without_asyncio_pauses_and_resumes(shared: Account) -> None:
    with aiqueue.connect_sync(shared.url, user=shared.user, password=shared.password) as client:
        pause = client.pause("rag.ingest", tenant="acme", reason="slow")
        assert client.pauses() == [pause]
        assert client.resume("rag.ingest", tenant="acme")
        assert not client.resume("rag.ingest", tenant="acme")
        assert client.pauses() == []
