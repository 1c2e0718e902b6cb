"""Lists of jobs: what a filter selects, page by page, and what is shown of a message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import testing
from aiqueue.codec.secret_paths import MASK
from aiqueue.errors import BadInput, InvalidToken, SettingsError, UnknownFamily
from aiqueue.inspect import ListedJob, job_list, make_filter, shown_payload
from aiqueue.inspect.job_scan import list_sources
from aiqueue.testing.server import settings_of_account
from aiqueue.topology import Topology

from ..support import Account, Eventually

TENANT = "acme"


class User(pydantic.BaseModel):
    id: str = ""
    tags: list[str] = []


class Summarise(aiqueue.Message, kind="summarise"):
    doc: int = 0
    user: User = User()
    urgent: bool = False
    key: pydantic.SecretStr | None = None
    blob: bytes = b""


class Crawl(aiqueue.Message, kind="crawl"):
    url: str = "https://example.org"


class Ask(aiqueue.Message, kind="ask", family="gateway.requests"):
    model: str = "m"


@pytest.fixture
def families() -> Collection[str]:
    return ("agent.tasks", "gateway.requests")


async def listed(client: aiqueue.Client, **which: Any) -> list[ListedJob]:
    return [each async for each in client.jobs.list(**which)]


async def ids(client: aiqueue.Client, **which: Any) -> list[str]:
    return [each.job_id for each in await listed(client, **which)]


async def test_a_job_is_listed_in_each_of_its_states(client: aiqueue.Client, eventually: Eventually) -> None:
    worker, running, released = aiqueue.Worker(concurrency=4), asyncio.Event(), asyncio.Event()

    @worker.handle(Summarise, retry=aiqueue.Backoff(attempts=2, first="1h", cap="1h"))
    async def summarise(job: aiqueue.Job[Summarise]) -> None:
        if job.message.doc == 1:
            running.set()
            await released.wait()
        if job.message.doc == 2:
            raise ValueError("not yet")
        if job.message.doc == 3:
            raise aiqueue.Reject("never")
        if job.message.doc == 4:
            await job.gather([await job.enqueue(Crawl(), "page", delay="1h")])

    names = {1: "running", 2: "failing", 3: "rejected", 4: "parent"}
    for doc, unique in names.items():
        await client.enqueue(Summarise(doc=doc), tenant=TENANT, unique=unique)
    await client.enqueue(Summarise(doc=5), tenant=TENANT, unique="later", delay="1h")
    async with worker.running(client):

        async def states() -> None:
            found = {each.job_id: each.state for each in await listed(client, kind="summarise")}
            assert found == {
                "running": "in_flight", "failing": "retrying", "rejected": "failed", "parent": "waiting",
                "later": "parked",
            }  # fmt: skip

        await running.wait()
        await eventually(states)
        assert await ids(client, state="in_flight") == ["running"]
        assert await ids(client, kind="summarise", state=["failed", "parked"]) == ["later", "rejected"]
        letter = next(iter(await listed(client, state="failed")))
        assert (letter.reason, letter.error, letter.attempt) == ("rejected", "never", 1)
        assert letter.failed_at is not None
        assert letter.payload["doc"] == 3
        retrying = next(iter(await listed(client, state="retrying")))
        assert retrying.due_at is not None
        assert retrying.enqueued_at is not None
        released.set()


async def test_a_queued_job_is_no_job_in_flight(client: aiqueue.Client) -> None:
    await client.enqueue(Summarise(), tenant=TENANT, unique="waits")
    assert await ids(client, state="queued") == ["waits"]
    assert await ids(client, state="in_flight") == []
    assert [each.state for each in await listed(client)] == ["queued"]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({"family": "gateway.requests"}, ["ask"]),
        ({"tenant": "other"}, ["other"]),
        ({"kind": "crawl"}, ["crawl"]),
        ({"priority": "high"}, ["high"]),
        ({"tenant": TENANT, "kind": "summarise", "where": {"doc": 42}}, ["high", "nested"]),
        ({"where": {"doc": "42"}}, ["high", "nested"]),
        ({"where": {"doc": 42, "user.id": "anna"}}, ["nested"]),
        ({"where": {"user.tags": "b"}}, ["nested"]),
        ({"where": {"urgent": True}}, ["high"]),
        ({"where": {"urgent": "true"}}, ["high"]),
        ({"where": {"key": MASK}}, []),
        ({"where": {"absent": "1"}}, []),
        ({"older": "1h"}, []),
        ({"newer": "1h", "kind": "crawl"}, ["crawl"]),
    ],
)
async def test_a_filter_selects(client: aiqueue.Client, which: dict[str, Any], expected: list[str]) -> None:
    await client.enqueue(Ask(), tenant=TENANT, unique="ask")
    await client.enqueue(Crawl(), tenant=TENANT, unique="crawl")
    await client.enqueue(Summarise(doc=1), tenant="other", unique="other")
    await client.enqueue(Summarise(doc=42, urgent=True), tenant=TENANT, priority="high", unique="high")
    nested = Summarise(doc=42, user=User(id="anna", tags=["a", "b"]))
    await client.enqueue(nested, tenant=TENANT, unique="nested", delay="1h")
    assert sorted(await ids(client, **which)) == expected


async def test_a_secret_is_masked_and_matches_nothing(client: aiqueue.Client) -> None:
    await client.enqueue(Summarise(key=pydantic.SecretStr("hunter2")), tenant=TENANT)
    found = await listed(client)
    assert found[0].payload["key"] == MASK
    assert "hunter2" not in repr(found)
    assert await listed(client, where={"key": "hunter2"}) == []


async def test_pages_hold_all_jobs_of_all_streams_once(client: aiqueue.Client) -> None:
    expected = [f"job-{n}" for n in range(7)] + ["ask"] + [f"later-{n}" for n in range(3)]
    for name in expected[:7]:
        await client.enqueue(Crawl(), tenant=TENANT, unique=name)
    await client.enqueue(Ask(), tenant=TENANT, unique="ask")
    for name in expected[8:]:
        await client.enqueue(Crawl(), tenant=TENANT, unique=name, delay="1h")
    found, cursor, pages = [], "", 0
    while not pages or cursor:
        page = await client.jobs.page(limit=3, cursor=cursor)
        found += [each.job_id for each in page.jobs]
        cursor, pages = page.cursor, pages + 1
    assert found == expected
    assert pages == 4


def test_a_list_of_all_jobs_has_the_server_count_what_follows_a_page_without_a_filter() -> None:
    """With a filter over subjects, the server reads a block of the stream for each page, to count in it."""
    topology = Topology.load()
    assert {each.subject for each in list_sources(topology, make_filter(topology))} == {">"}
    of_family = list_sources(topology, make_filter(topology, family="agent.tasks"))
    assert [(each.what, each.subject) for each in of_family] == [
        ("lanes", ">"), ("parked", "ai.parked.*.agent.tasks.*.*.*.*"), ("dead", "ai.dead.agent.tasks.*.*"),
    ]  # fmt: skip
    (lane, *_) = list_sources(topology, make_filter(topology, family="agent.tasks", tenant="acme"))
    assert lane.subject == "ai.agent.tasks.acme.*"


async def test_a_page_that_has_not_searched_all_says_where_to_go_on(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_list, "SEARCHED_MAX", 5)
    for n in range(11):
        await client.enqueue(Summarise(doc=n), tenant=TENANT, unique=f"job-{n}")
    first = await client.jobs.page(where={"doc": 9})
    assert (first.jobs, first.searched, first.cursor) == ((), 5, "AI_AGENT_TASKS.6")
    second = await client.jobs.page(where={"doc": 9}, cursor=first.cursor)
    assert [each.job_id for each in second.jobs] == ["job-9"]
    last = await client.jobs.page(where={"doc": 9}, cursor=second.cursor)
    assert (last.jobs, last.searched, last.cursor) == ((), 1, "")


async def test_jobs_whose_messages_cannot_be_read_are_counted(client: aiqueue.Client, plain: Any) -> None:
    await client.enqueue(Summarise(blob=bytes(300_000)), tenant=TENANT, unique="large")
    await plain.jetstream().publish(f"ai.agent.tasks.{TENANT}", b"\xff no message")
    page = await client.jobs.page(where={"doc": 0})
    assert (page.jobs, page.unreadable, page.cursor) == ((), 2, "")
    large, broken = (await client.jobs.page()).jobs
    assert large.payload_problem.startswith("stored as a document of 300,")
    assert large.size_bytes > 300_000
    assert broken.payload_problem.startswith("cannot be decoded")
    assert (large.payload, broken.payload) == (None, None)


async def test_a_plain_publishers_job_has_kind_id_and_payload(client: aiqueue.Client, plain: Any) -> None:
    body = {"schema_version": "1.0", "message_type": "agent_task", "data": {"task_id": "t-1", "doc": 42}}
    await plain.jetstream().publish(f"ai.agent.tasks.{TENANT}", json.dumps(body).encode())
    (found,) = await listed(client, where={"doc": 42})
    assert (found.job_id, found.kind) == ("t-1", "agent.task")
    assert found.payload == {"task_id": "t-1", "doc": 42}


def hide_user(family: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "user": f"hidden in {family} {kind}"}


def break_down(family: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(data["user"]["id"])


async def test_the_redact_hook_decides_what_is_shown(account: Account, client: aiqueue.Client) -> None:
    await client.enqueue(Summarise(user=User(id="anna")), tenant=TENANT)
    for hook in (hide_user, f"{__name__}:hide_user"):
        settings = settings_of_account(account).with_arguments(redact=hook)
        async with aiqueue.connect(settings=settings) as looking:
            (found,) = await listed(looking, where={"user.id": "anna"})
            assert found.payload["user"] == "hidden in agent.tasks summarise"
    async with aiqueue.connect(settings=settings_of_account(account).with_arguments(redact=break_down)) as looking:
        (found,) = await listed(looking)
        assert (found.payload, found.payload_problem) == (None, "not shown: the redact hook raised ValueError")
    missing = settings_of_account(account).with_arguments(redact=f"{__name__}:nothing")
    async with aiqueue.connect(settings=missing) as looking:
        with pytest.raises(SettingsError, match="has no function 'nothing'"):
            await looking.jobs.page()
    as_file = settings_of_account(account).with_arguments(redact="hooks.py:hide")
    async with aiqueue.connect(settings=as_file) as looking:
        with pytest.raises(SettingsError, match=r"cannot import hooks\.py: .*; a module is named without \.py: hooks"):
            await looking.jobs.page()


def test_a_redact_hook_is_a_function_or_its_name() -> None:
    assert aiqueue.Settings.load(redact="app.privacy:redact").redact == "app.privacy:redact"
    with pytest.raises(SettingsError, match="redact: must be a function"):
        aiqueue.Settings.load(redact="app.privacy")
    with pytest.raises(SettingsError, match=r'or its name such as "app\.privacy:hide"'):
        aiqueue.Settings.load(redact="./app/privacy.py:hide")


def test_what_is_shown_is_cut() -> None:
    deep: Any = "end"
    for _ in range(50):
        deep = {"in": deep}
    data = {"text": "x" * 1_000_000, "list": list(range(10_000)), "deep": deep, "raw": bytes(5000), "n": 10**5000}
    shown, problem = shown_payload.show_payload(None, "f", "k", data)
    assert not problem
    assert shown["text"].endswith("… (1,000,000 characters)")
    assert shown["list"][-1] == "… 9,980 more"
    assert shown["raw"] == "… 5,000 bytes"
    wide, _ = shown_payload.show_payload(None, "f", "k", {"k" * 500: [[[0] * 20] * 20] * 20, "many": {}})
    assert len(json.dumps([shown, wide])) < 10_000


@pytest.mark.parametrize(
    ("which", "problem"),
    [
        ({"family": "no.such"}, UnknownFamily),
        ({"family": "agent.message"}, UnknownFamily),
        ({"tenant": "a.b"}, InvalidToken),
        ({"family": "agent.tasks", "priority": "urgent"}, BadInput),
        ({"priority": "UP"}, BadInput),
        ({"state": "done"}, BadInput),
        ({"state": []}, BadInput),
        ({"older": "soon"}, BadInput),
        ({"where": {"": 1}}, BadInput),
        ({"where": {"a": [1]}}, BadInput),
        ({"where": {f"f{n}": n for n in range(11)}}, BadInput),
        ({"limit": 0}, BadInput),
        ({"limit": 1_001}, BadInput),
        ({"cursor": "AI_AGENT_TASKS"}, BadInput),
        ({"cursor": "AI_DEAD.7", "state": "queued"}, BadInput),
    ],
)
async def test_what_selects_nothing_sensible_is_refused(
    client: aiqueue.Client, which: dict[str, Any], problem: type[Exception]
) -> None:
    with pytest.raises(problem):
        await client.jobs.page(**which)


async def test_a_missing_stream_is_named_and_not_taken_for_empty(account: Account) -> None:
    settings = settings_of_account(account)
    async with testing.client(settings, families=["agent.tasks"]) as client:
        await client.enqueue(Crawl(), tenant=TENANT, unique="there")
        await client.connection.api("STREAM.DELETE.AI_DEAD")
        page = await client.jobs.page()
        assert [each.job_id for each in page.jobs] == ["there"]
        assert page.missing == ("AI_DEAD",)


async def test_a_small_page_of_what_is_rare_is_not_read_message_by_message(
    client: aiqueue.Client, account: Account
) -> None:
    specs = [aiqueue.JobSpec(Summarise(doc=n), tenant=TENANT) for n in range(600)]
    assert len([each async for each in client.enqueue_many(specs)]) == 600
    asked: list[str] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as other:
        await other.connection.subscribe(
            "$JS.API.DIRECT.GET.AI_AGENT_TASKS", lambda message: asked.append(message.subject)
        )
        await other.connection.flush()
        page = await client.jobs.page(limit=1, where={"doc": 599})
        await other.connection.flush()
    assert [each.payload["doc"] for each in page.jobs] == [599]
    assert len(asked) <= 4
