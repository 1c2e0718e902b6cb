"""A server with 1 GB of storage, and programs that declare few of the families. On real servers of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import errors
from aiqueue.agent import Agent, Mail
from aiqueue.bus import create_envelope, decode, encode
from aiqueue.cli.app import app
from aiqueue.gateway import ApiKeys, Batches, UsageStore
from aiqueue.gateway.standin import StandIn
from aiqueue.inspect import examine, stats
from aiqueue.inspect.finding import Finding, Subject
from aiqueue.rag import Rag, RagWorker
from aiqueue.topology import provision

from ..gateway.front.fronts import add_keys, open_front
from ..gateway.running import KEY, KEY_VARIABLE, ask, running, write_config
from ..rag.asking import HashEmbedder
from ..support import Account, NatsProcess, create_streams, eventually

GB = "max_file_store: 1000000000, max_memory_store: 64000000"
LIMITED = f'jetstream {{ store_dir: ".", {GB} }}'


class Hello(aiqueue.Message[str], kind="hello"):
    name: str = "x"


class Note(aiqueue.Message, kind="agent.message", family="agent.message"):
    text: str = "hi"


def make_worker() -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Hello)
    async def hello(job: aiqueue.Job[Hello]) -> str:
        return f"hello {job.message.name}"

    return worker


async def findings(client: aiqueue.Client) -> list[Finding]:
    """What doctor says, but for how often the server syncs, which no client can see."""
    subject = Subject(client.connection, client.topology, rules=client.limit_rules)
    return [each async for each in examine(subject) if each.check != "sync"]


@pytest.fixture
def small_server(own_server: Callable[..., NatsProcess]) -> NatsProcess:
    return own_server(LIMITED)


def connect(server: NatsProcess | Account, **settings: Any) -> aiqueue.Client:
    return aiqueue.connect(server.url, user=server.user, password=server.password, **{"size": "small", **settings})


@asynccontextmanager
async def applied(server: NatsProcess | Account, **settings: Any) -> AsyncIterator[aiqueue.Client]:
    async with connect(server, **settings) as client:
        await provision.apply(client.connection, client.topology)
        yield client


def test_a_server_of_1_gb_takes_one_family_by_the_command_line(small_server: NatsProcess, tmp_path: Path) -> None:
    (tmp_path / "aiqueue.toml").write_text('size = "small"\nfamilies = ["agent.tasks"]\n')
    environment = {"NATS_URL": small_server.url, "AIQUEUE_USER": small_server.user}
    environment |= {"AIQUEUE_PASSWORD": small_server.password}

    def run(*arguments: str, code: int = 0, **more: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            done = CliRunner().invoke(app, list(arguments), env={**environment, **more})
        assert done.exit_code == code, done.output
        return done.output

    assert run("apply").count("+ create stream") == 13
    assert "13 streams as declared" in run("plan")

    async def perform() -> str:
        async with connect(small_server, families=["agent.tasks"]) as client, make_worker().running(client):
            return await (await client.enqueue(Hello(), tenant="acme")).result(timeout=20)

    assert asyncio.run(perform()) == "hello x"
    found = json.loads(run("doctor", "--json"))
    assert {each["level"] for each in found if each["check"] != "sync"} == {"ok"}
    refused = run("apply", code=1, AIQUEUE_SIZE="medium")
    assert "too much for the server" in refused
    for arguments in (["gateway", "usage"], ["gateway", "keys", "ls"], ["inbox", "ls"], ["rag", "ls", "--tenant", "a"]):
        refused = run(*arguments, code=2)
        assert refused.count("\n") == 1
        assert (
            f"the setting families does not name {'agent.message' if arguments[0] == 'inbox' else arguments[0]}"
            in refused
        )
        assert f"({tmp_path / 'aiqueue.toml'}): add it there" in refused


async def test_a_server_of_1_gb_takes_all_default_families_with_gateway_and_retrieval_at_work(
    small_server: NatsProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    (tmp_path / "rag.toml").write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n')
    async with applied(small_server) as client, StandIn() as standin:
        config = write_config(tmp_path, standin.url)
        retrieval = RagWorker(tmp_path / "rag.toml", embedder=HashEmbedder())
        async with running(client, config), retrieval.running(client), make_worker().running(client):
            hello = await client.enqueue(Hello(), tenant="acme", delay=0.1)
            answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=20)
            assert answer["choices"][0]["message"]["content"]
            await (await Rag(client).ingest("d", tenant="acme", content="Otters hold paws.")).result(timeout=20)
            found: Any = await (await Rag(client).ask("otters", tenant="acme", mode="keyword")).result(timeout=20)
            assert found["passages"]
            assert await hello.result(timeout=20) == "hello x"
            assert {each.level for each in await findings(client)} == {"ok"}


ALL = [
    "default", "agent.results", "agent.memory", "agent.tools", "rag.embeddings", "llmops.operations",
    "llmops.cost-alerts", "mlops.training", "mlops.predictions",
]  # fmt: skip


async def test_it_takes_all_optional_families_too_and_plain_bodies_of_the_guide_reach_their_handlers(
    small_server: NatsProcess,
) -> None:
    types = {
        "agent.memory": "memory_item", "llmops.operations": "llm_operation", "mlops.training": "ml_training_job",
        "mlops.predictions": "ml_prediction", "rag.embeddings": "embedding_request",
    }  # fmt: skip
    async with applied(small_server, families=ALL) as client:
        worker = aiqueue.Worker()
        for name in types:

            @worker.handle_any(name)
            async def handle(job: aiqueue.Job[Any]) -> str:
                return job.kind

        async with worker.running(client), aiqueue.NATSClient(client=client) as bus:
            for name, message_type in types.items():
                family = client.topology.family(name)
                assert family.key
                body = create_envelope(message_type, {family.key: "one", "n": 1})
                await bus.publish(f"ai.{name}.acme", encode(body))
                handle = await client.job("one", family=name, tenant="acme")
                assert await handle.result(timeout=20) == family.default_kind


async def test_results_of_tasks_are_requested_where_agent_results_is_named(account: Account) -> None:
    async with connect(account, families=["agent.tasks", "agent.results"]) as client:
        await create_streams(client)
        responder = aiqueue.Responder()
        async with make_worker().running(client), responder.running(client), aiqueue.NATSClient(client=client) as bus:
            handle = await client.enqueue(Hello(), tenant="acme", unique="t-1")
            answer = await bus.request("ai.agent.results.acme", encode({"task_id": "t-1"}), timeout=20)
            assert decode(answer) == "hello x"
            assert await handle.result(timeout=5) == "hello x"


async def test_fewer_families_delete_no_stream_take_no_subject_away_and_leave_other_jobs_where_they_are(
    account: Account,
) -> None:
    async with applied(account) as wide:
        await wide.enqueue(ask(request_id="r-1"), tenant="acme")
        parked = await wide.enqueue(ask(request_id="r-2"), tenant="acme", delay=0.2)
        before = await configs(wide)
        async with connect(account, families=["agent.tasks"]) as narrow:
            assert not (await provision.apply(narrow.connection, narrow.topology)).changes
            assert not (await provision.plan(narrow.connection, narrow.topology)).lines()
            async with make_worker().running(narrow):
                assert await (await narrow.enqueue(Hello(), tenant="acme")).result(timeout=20) == "hello x"

                async def is_forwarded() -> bool:  # by the narrow worker
                    return (await parked.status()).state == "queued"

                await eventually(is_forwarded)
            assert {each.level for each in await findings(narrow)} == {"ok"}
            with pytest.raises(errors.UnknownFamily, match=r"does not name gateway\.requests"):
                await narrow.enqueue(ask(), tenant="acme")
        assert await configs(wide) == before
        counts = {
            each.family: each.pending for each in await stats.overview(wide.connection, wide.topology, sample_s=0)
        }
        assert counts["gateway.requests"] == 2


async def configs(client: aiqueue.Client) -> dict[str, Any]:
    page = await client.connection.api("STREAM.LIST", {"offset": 0})
    return {each["config"]["name"]: each["config"] for each in page["streams"]}


async def test_what_meets_a_family_that_is_not_declared_names_the_setting(account: Account) -> None:
    async with connect(account, families=["agent.tasks"]) as client:
        await create_streams(client)
        agent = Agent("bob", tenant="acme")

        @agent.handle(Note)
        async def note(mail: Mail[Note]) -> None: ...

        async def run(what: Any) -> None:
            async with what.running(client):
                pytest.fail("it runs")

        other = aiqueue.Worker()
        other.handle_any("rag.ingest")(lambda job: None)
        calls: dict[str, list[Callable[[], Any]]] = {
            "agent.message": [lambda: client.inboxes, lambda: run(agent)],
            "rag.ingest": [
                lambda: Rag(client).status("d", tenant="acme"),
                lambda: Rag(client).ingest("d", tenant="a", content="x"),
                lambda: run(RagWorker()), lambda: run(other),
            ],
            "rag.queries": [lambda: Rag(client).ask("x", tenant="acme")],
            "gateway.requests": [
                lambda: UsageStore(client.connection, client.topology), lambda: ApiKeys(client),
                lambda: client.enqueue(ask(), tenant="acme"),
                lambda: client.set_limit("gateway.requests", "m", requests=1),
                lambda: stats.lanes(client.connection, client.topology, "gateway.requests"),
                lambda: client.pause("gateway.requests"),
            ],
            "gateway.batches": [lambda: Batches(client)],
        }  # fmt: skip
        for family, attempts in calls.items():
            for attempt in attempts:
                with pytest.raises(errors.BadInput) as caught:  # noqa: PT012  (the call itself, or what it returns)
                    found = attempt()
                    if asyncio.iscoroutine(found):
                        await found
                assert f"the setting families does not name {family} (argument families): add it there" in str(
                    caught.value
                )
                assert "\n" not in str(caught.value)


async def test_the_client_of_the_guide_needs_no_inboxes(account: Account) -> None:
    async with connect(account, families=["agent.tasks"]) as client:
        await create_streams(client)
        async with aiqueue.NATSClient(client=client) as bus, make_worker().running(client):
            published = await bus.publish("ai.agent.tasks.acme", encode(create_envelope("hello", {"name": "y"})))
            assert published is not None
            handle = await client.job(published.id, family="agent.tasks", tenant="acme")
            assert await handle.result(timeout=20) == "hello y"
            with pytest.raises(errors.BadInput, match=r"does not name agent\.message \(argument families\)"):
                await bus.publish("ai.agent.message.acme", b"{}")


async def test_an_agent_needs_no_other_family(account: Account) -> None:
    got = asyncio.Event()
    async with connect(account, families=["agent.message"]) as client:
        await provision.apply(client.connection, client.topology)
        agent = Agent("bob", tenant="acme")

        @agent.handle(Note)
        async def note(mail: Mail[Note]) -> None:
            got.set()

        async with agent.running(client):
            await client.inboxes.send(Note(), tenant="acme", to="bob")
            await asyncio.wait_for(got.wait(), 20)
        assert {each.level for each in await findings(client)} == {"ok"}
        assert not (await provision.plan(client.connection, client.topology)).lines()
    async with applied(account) as wide, make_worker().running(wide):
        assert await (await wide.enqueue(Hello(), tenant="acme")).result(timeout=20) == "hello x"


async def test_a_gateway_without_batches_answers_requests_and_serves_no_files(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    async with connect(account, families=["gateway.requests"]) as client, StandIn() as standin:
        await create_streams(client)
        config, (token, *_) = write_config(tmp_path, standin.url), await add_keys(client)
        body = {"model": "small", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 5}
        headers = {"authorization": f"Bearer {token}"}
        async with running(client, config), open_front(client, config) as front, aiohttp.ClientSession() as http:
            async with http.post(f"{front.url}/chat/completions", json=body, headers=headers) as answer:
                assert (await answer.json())["choices"]
            async with http.get(f"{front.url}/files", headers=headers) as answer:
                assert answer.status == 404
                assert "there are /v1/chat/completions" in (await answer.json())["error"]["message"]


async def test_an_overlay_of_every_stream_is_applied_and_taken_back(account: Account) -> None:
    unlimited = {role: {"stream": {"duplicate_window": "5m"}} for role in ("parked", "ticks")}
    async with applied(account) as client:
        before = await configs(client)
        specs = client.topology.streams.values()
        names = {each.name: each.role for each in specs if each.role not in ("work", "inbox")}
        names |= {each.stream: each.name for each in client.topology.families.values()}
    tables = {name: {"stream": {"max_bytes": "3MiB"}} for name in names.values()} | unlimited
    async with applied(account, overlay=tables) as client:
        after = await configs(client)
        assert not (await provision.plan(client.connection, client.topology)).lines()
        assert {each.level for each in await findings(client)} == {"ok"}
    for stream, name in names.items():
        key, value = ("duplicate_window", 300 * 10**9) if name in unlimited else ("max_bytes", 3 * 2**20)
        assert after[stream][key] == value
    async with applied(account) as client:
        again = await configs(client)
    keys = ("max_bytes", "duplicate_window", "subjects", "max_age")
    assert [[each[key] for key in keys] for each in again.values()] == [
        [before[name][key] for key in keys] for name in again
    ]


async def test_an_overlay_gives_a_bundled_family_limits_by_a_key(account: Account, tmp_path: Path) -> None:
    class Call(aiqueue.Message[str], kind="call"):
        model: str

    (tmp_path / "limits.toml").write_text('[[limit]]\nfamily = "agent.tasks"\nkey = "gpt"\nin_flight = 1\n')
    overlay = {"agent.tasks": {"family": {"limit_key": "model"}}}
    worker, running_now, most = aiqueue.Worker(), 0, 0

    @worker.handle(Call)
    async def call(job: aiqueue.Job[Call]) -> str:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.05)
        running_now -= 1
        return job.message.model

    async with applied(account, streams=tmp_path, overlay=overlay, families=["agent.tasks"]) as client:
        assert "ai.agent.tasks.*.normal.*" in (await configs(client))["AI_AGENT_TASKS"]["subjects"]
        handles = [await client.enqueue(Call(model="gpt"), tenant="acme") for _ in range(4)]
        async with worker.running(client):
            assert [await each.result(timeout=20) for each in handles] == ["gpt"] * 4
    assert most == 1


async def test_retrieval_without_a_gateway_finds_passages_and_says_why_there_is_no_answer_in_words(
    account: Account, tmp_path: Path
) -> None:
    (tmp_path / "rag.toml").write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n')
    async with connect(account, families=["rag.ingest", "rag.queries"]) as client:
        await create_streams(client)
        async with RagWorker(tmp_path / "rag.toml", embedder=HashEmbedder()).running(client):
            await (await Rag(client).ingest("d", tenant="acme", content="Otters hold paws.")).result(timeout=20)
            asked = await Rag(client).ask("otters", tenant="acme", mode="keyword", answer=True, model="small")
            found: Any = await asked.result(timeout=20)
    assert [each["document_id"] for each in found["passages"]] == ["d"]
    assert found["answer"] is None
    assert "the setting families does not name gateway.requests (argument families)" in found["answer_problem"]
