"""The doctor says what is so, and what to do about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

import aiqueue
from aiqueue.inspect import Finding, Subject, examine
from aiqueue.inspect.finding import WHEN_FULL
from aiqueue.server import DIRECTORY, EmbeddedServer, supervisor
from aiqueue.topology import provision
from aiqueue.topology.streamfile import Role

from ..support import ROOT, Account, Cluster, Eventually, NatsProcess

STREAM = "AI_AGENT_TASKS"


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0
    blob: bytes = b""


async def found(client: aiqueue.Client, **more: Any) -> dict[str, Finding]:
    """The findings by check, the worst of each."""
    order = ("ok", "warn", "fail")
    worst: dict[str, Finding] = {}
    async for each in examine(Subject(client.connection, client.topology, **more)):
        if each.check not in worst or order.index(each.level) > order.index(worst[each.check].level):
            worst[each.check] = each
    return worst


async def all_found(client: aiqueue.Client) -> list[Finding]:
    return [each async for each in examine(Subject(client.connection, client.topology))]


async def configure(client: aiqueue.Client, **limits: Any) -> None:
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", {**config, **limits})


async def test_a_server_as_declared_is_well_but_for_what_it_does_not_report(client: aiqueue.Client) -> None:
    findings = await found(client)
    assert {name for name, each in findings.items() if each.level != "ok"} == {"sync"}
    assert "--monitor" in findings["sync"].remedy
    assert set(client.topology.streams) <= set(findings)
    assert all(each.remedy for each in findings.values() if each.level != "ok")


async def test_a_stream_that_is_missing_fails_and_one_that_differs_warns(client: aiqueue.Client) -> None:
    await client.connection.api("STREAM.DELETE.AI_RAG_INGEST")
    await configure(client, max_bytes=2**29)
    findings = await found(client)
    assert (findings["AI_RAG_INGEST"].level, findings["AI_RAG_INGEST"].remedy) == (
        "fail",
        "run `aiqueue apply`, which creates it",
    )
    assert findings[STREAM].level == "warn"
    assert "max_bytes: 512.0 MiB -> 1.0 GiB" in findings[STREAM].text


async def test_lanes_near_their_limit_and_without_a_worker_are_named(account: Account, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(
        '[family]\nname = "small.jobs"\ndefault_kind = "small"\n[stream]\nname = "SMALL"\nstorage = "memory"\n'
        'max_msgs_per_subject = 10\nmax_bytes = "1MiB"\n'
    )
    where = {"url": account.url, "user": account.user, "password": account.password, "streams": tmp_path}

    class Small(aiqueue.Message, kind="small", family="small.jobs"):
        pass

    async with aiqueue.connect(**where) as client:
        await provision.apply(client.connection, client.topology)
        for _ in range(9):
            await client.enqueue(Small(), tenant="acme")
        findings = await found(client)
    assert "small.jobs acme/normal (9 pending)" in findings["lanes near their limit"].text
    assert "small.jobs acme/normal (9 pending)" in findings["lanes without a worker"].text
    assert "a restart of the server loses all of it" in findings["SMALL"].remedy


async def make_lane(client: aiqueue.Client, tenant: str) -> None:
    config = client.topology.family("agent.tasks").lane_config(tenant, "normal")
    call = f"CONSUMER.CREATE.{STREAM}.{config['durable_name']}.{config['filter_subject']}"
    await client.connection.api(call, {"stream_name": STREAM, "config": config})


async def test_jobs_that_wait_although_workers_ask_are_named(client: aiqueue.Client) -> None:
    await make_lane(client, "acme")
    until = datetime.now(UTC) + timedelta(seconds=4)  # as short as a worker's own pause, before it removes a consumer
    await client.connection.api(f"CONSUMER.PAUSE.{STREAM}.acme-normal", {"pause_until": until.isoformat()})
    request, inbox = b'{"batch": 1, "expires": 9000000000}', client.connection.new_inbox()
    await client.connection.subscribe(inbox, lambda message: None)
    await client.connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.acme-normal", request, reply=inbox)
    await client.enqueue(Ping(), tenant="acme")
    findings = await found(client)
    assert "agent.tasks acme/normal (1 pending)" in findings["undelivered jobs"].text
    assert f"nats consumer info {STREAM} acme-normal" in findings["undelivered jobs"].remedy


async def test_a_lane_that_somebody_paused_is_named_with_the_command_that_resumes_it(client: aiqueue.Client) -> None:
    await make_lane(client, "acme")
    pause = {"pause_until": "2999-01-01T00:00:00Z"}
    await client.connection.api(f"CONSUMER.PAUSE.{STREAM}.acme-normal", pause)
    await client.enqueue(Ping(), tenant="acme")
    findings = await found(client)
    assert f"`nats consumer resume {STREAM} acme-normal`" in findings["paused lanes"].remedy
    assert "lanes without a worker" not in findings


async def test_messages_of_a_tenant_that_no_worker_can_serve_are_named_with_what_deletes_them(
    client: aiqueue.Client,
) -> None:
    for n, where in enumerate(("tasks.a@b", "tasks.a@b", "tasks.it's", "message.a@b.bob")):
        await client.connection.store(f"ai.agent.{where}", b"{}", {"Nats-Msg-Id": f"{n}"})
    await client.enqueue(Ping(), tenant="acme")
    findings = await all_found(client)
    wrong = {each.check: each for each in findings if each.code == "tenant-invalid"}
    assert {each.level for each in wrong.values()} == {"fail"}
    assert set(wrong) == {STREAM, "AI_AGENT_MESSAGE"}
    assert "3 messages on ai.agent.tasks.a@b.normal, ai.agent.tasks.it's.normal" in wrong[STREAM].text
    assert "--subject ai.agent.tasks.a@b.normal`" in wrong[STREAM].remedy
    unserved = next(each for each in findings if each.code == "lane-unserved")
    assert unserved.text == "agent.tasks acme/normal (1 pending)"  # a worker would not help the others


async def test_a_family_that_two_domains_store_is_named(
    own_server: Callable[..., NatsProcess], eventually: Eventually
) -> None:
    port = supervisor.free_port()
    hub = own_server(f'leafnodes {{ listen: "127.0.0.1:{port}" }}', storage="domain: hub")
    remote = f"nats://{hub.user}:{hub.password}@127.0.0.1:{port}"
    leaf = own_server(f'leafnodes {{ remotes: [{{ url: "{remote}" }}] }}', storage="domain: leaf")
    async with (
        aiqueue.connect(hub.url, user=hub.user, password=hub.password) as there,
        aiqueue.connect(leaf.url, user=leaf.user, password=leaf.password) as here,
    ):
        await provision.apply(here.connection, here.topology)
        assert not [each for each in await all_found(here) if each.code == "stored-twice"]
        await provision.apply(there.connection, there.topology)

        async def both_say_so() -> None:
            for client in (here, there):
                twice = [each for each in await all_found(client) if each.code == "stored-twice"]
                assert {each.check for each in twice} == {each.stream for each in client.topology.families.values()}
                assert {each.level for each in twice} == {"fail"}
                assert "`nats --js-domain DOMAIN stream rm" in twice[0].remedy

        await eventually(both_say_so)
        before = (await here.connection.api(f"STREAM.INFO.{STREAM}"))["state"]
        assert before["last_seq"] == 0  # doctor stores nothing


async def test_a_subscriber_that_answers_publishes_is_named(client: aiqueue.Client) -> None:
    await client.connection.subscribe(
        "ai.agent.tasks.*", lambda message: client.connection.tell(message.reply, b"got it")
    )
    findings = [each for each in await all_found(client) if each.code == "foreign-responder"]
    assert [each.check for each in findings] == [STREAM]


async def test_a_full_stream_fails_and_says_what_comes_of_it(client: aiqueue.Client) -> None:
    await configure(client, max_bytes=100_000)
    for n in range(9):
        await client.enqueue(Ping(n=n, blob=bytes(10_500)), tenant="acme")
    findings = await found(client)
    assert findings[STREAM].level == "warn"  # that it differs from what is declared comes first
    spec = client.topology.streams[STREAM]
    spec.config["max_bytes"] = 100_000  # type: ignore[index]
    findings = await found(client)
    assert findings[STREAM].level == "fail"
    assert "StreamFull" in findings[STREAM].remedy


@pytest.mark.parametrize(("interval", "level"), [("", "warn"), (", sync_interval: always", "ok")])
async def test_the_monitoring_reports_how_often_a_server_syncs(
    own_server: Callable[..., NatsProcess], interval: str, level: str
) -> None:
    port = supervisor.free_port()
    limits = f'store_dir: ".", max_file_store: {2**50}'
    server = own_server(f'http: "127.0.0.1:{port}"\njetstream {{ {limits}{interval} }}')
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
        findings = await found(client, monitor=f"http://127.0.0.1:{port}")
        assert findings["sync"].level == level
        assert ("2m" in findings["sync"].text) == (level == "warn")
        wrong = await found(client, monitor=f"http://127.0.0.1:{port + 1}")
        assert "no monitoring of a JetStream server answers there" in wrong["sync"].text


@pytest.mark.slow
async def test_a_copy_that_is_away_fails(own_cluster: Cluster, eventually: Eventually) -> None:
    account = own_cluster.account
    where = {"url": account.url, "user": account.user, "password": account.password, "profile": "cluster"}
    async with aiqueue.connect(**where) as client:
        await provision.apply(client.connection, client.topology)
        findings = await found(client)
        assert "3 copies, led by n" in findings[STREAM].text
        leaders = own_cluster.leader(STREAM), own_cluster.meta_leader()  # without them nothing is answered for a while
        next(node for node in own_cluster.nodes if node not in leaders).kill()

        async def away() -> bool:
            return any("is away" in each.text for each in (await found(client)).values())

        await eventually(away, within=40)


def test_every_role_of_a_stream_has_advice_for_when_it_is_full() -> None:
    assert set(WHEN_FULL) == set(get_args(Role))


def test_the_command_works_on_the_directorys_server_and_its_exit_code_shows_failures(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AIQUEUE_", "NATS_"))}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*words: str, verb: str = "doctor") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "aiqueue", verb, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    with EmbeddedServer.acquire(tmp_path / DIRECTORY, within_s=20):
        assert run(verb="apply").returncode == 0
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warn  sync: synced every 2m" in done.stdout
        assert "ok    AI_AGENT_TASKS: file, 1 copy" in done.stdout
        findings = json.loads(run("--json").stdout)
        assert {each["level"] for each in findings} == {"ok", "warn"}
    server = NatsProcess(tmp_path / "bare")
    server.start()
    try:
        environment |= {"NATS_URL": server.url, "AIQUEUE_USER": server.user, "AIQUEUE_PASSWORD": server.password}
        done = run()
    finally:
        server.kill()
    assert done.returncode == 1
    assert "fail  AI_AGENT_TASKS: is missing -> run `aiqueue apply`, which creates it" in done.stdout
