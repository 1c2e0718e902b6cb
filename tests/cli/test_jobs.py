"""``jobs``, its acts, and ``audit``."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli.app import app
from aiqueue.client.job_calls import Jobs
from aiqueue.inspect import job_list

from ..support import Account, create_streams

TENANT = "acme"
T = TypeVar("T")
Cli = Callable[..., Result]


class Task(aiqueue.Message, kind="task"):
    n: int = 0


class Chat(aiqueue.Message, kind="chat", family="gateway.requests"):
    model: str = "m"


@pytest.fixture
def cli(shared: Account, monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name, value in (("URL", shared.url), ("USER", shared.user), ("PASSWORD", shared.password)):
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    def run(*arguments: str, answer: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=answer)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def on_client(work: Callable[[aiqueue.Client], Awaitable[T]]) -> T:
    async def run() -> T:
        async with aiqueue.connect() as client:
            return await work(client)

    return asyncio.run(run())


def store(tenant: str, count: int, **options: Any) -> list[str]:
    async def enqueue(client: aiqueue.Client) -> list[str]:
        return [(await client.enqueue(Task(n=n), tenant=tenant, **options)).id for n in range(count)]

    return on_client(enqueue)


def test_jobs_are_listed_with_their_messages_and_page_by_page(cli: Cli, tenant: str) -> None:
    ids = store(tenant, 3)
    shown = cli("jobs", "--tenant", tenant)
    assert shown.exit_code == 0
    assert all(job_id in shown.stdout for job_id in ids)
    assert '{"n":2}' in shown.stdout
    assert "queued" in shown.stdout
    first = cli("jobs", "--tenant", tenant, "--limit", "2", "--json")
    page = json.loads(first.stdout)
    assert [each["job_id"] for each in page["jobs"]] == ids[:2]
    assert f"there are more: --cursor {page['cursor']}" in first.stderr
    second = json.loads(cli("jobs", "ls", "--tenant", tenant, "--cursor", page["cursor"], "--json").stdout)
    assert [each["job_id"] for each in second["jobs"]] == ids[2:]
    assert second["cursor"] == ""
    found = json.loads(cli("jobs", "--tenant", tenant, "--where", "n=1", "--no-payload", "--json").stdout)
    assert [(each["job_id"], each["payload"]) for each in found["jobs"]] == [(ids[1], None)]
    assert cli("jobs", "--tenant", tenant, "--state", "failed").stdout == "no jobs match\n"


def test_a_queued_job_shows_the_pause_or_the_limit_that_holds_it(cli: Cli, tenant: str) -> None:
    model = f"m-{tenant}"
    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Chat)
    async def chat(job: aiqueue.Job[Chat]) -> None: ...

    async def use_the_limit(client: aiqueue.Client) -> None:
        await client.set_limit("gateway.requests", model, requests=1, window="1h")
        handles = [await client.enqueue(Chat(model=model), tenant=tenant) for _ in range(2)]
        results = [asyncio.create_task(each.result(timeout=60)) for each in handles]
        async with worker.running(client):
            await asyncio.wait(results, return_when=asyncio.FIRST_COMPLETED)
        for each in results:
            each.cancel()

    on_client(use_the_limit)
    store(tenant, 1)
    on_client(lambda client: client.pause("agent.tasks", tenant=tenant, reason="too slow"))
    shown = cli("jobs", "--tenant", tenant, "--no-payload").stdout
    assert "queued (limit)" in shown
    assert "queued (paused)" in shown
    assert f"the limit of gateway.requests for '{model}' is reached: 1 request in 1h, all tenants together" in shown
    assert "too slow" in shown


def test_an_interrupted_list_says_where_to_go_on(cli: Cli, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tenant, 3)
    page = Jobs.page

    async def interrupted(jobs: Jobs, **options: Any) -> Any:
        if options.get("cursor"):
            raise KeyboardInterrupt
        return await page(jobs, **options)

    monkeypatch.setattr(Jobs, "page", interrupted)
    monkeypatch.setattr(job_list, "SEARCHED_MAX", 1)
    done = cli("jobs", "--tenant", tenant)
    assert done.exit_code != 0
    assert "interrupted after 1 stored job searched: go on with --cursor AI_AGENT_TASKS." in done.stderr
    assert done.stdout == ""


def test_a_dry_run_counts_and_the_act_leaves_out_what_came_later(cli: Cli, tenant: str) -> None:
    store(tenant, 5)
    dry = json.loads(cli("jobs", "cancel", "--tenant", tenant, "--dry-run", "--json").stdout)
    assert dry["matched"] == 5
    (later,) = store(tenant, 1)
    done = cli("jobs", "cancel", "--tenant", tenant, "--until", dry["until"], "--yes")
    assert (done.exit_code, done.stdout) == (0, "cancelled 5 jobs\n")
    left = json.loads(cli("jobs", "--tenant", tenant, "--json").stdout)
    assert [each["job_id"] for each in left["jobs"]] == [later]
    text = cli("jobs", "cancel", "--tenant", tenant, "--dry-run").stdout
    assert text.startswith("1 job would be cancelled (1 stored job searched)\n")


def test_parked_jobs_run_now_and_queued_ones_move(cli: Cli, tenant: str) -> None:
    store(tenant, 2, priority="low")
    store(tenant, 2, delay="1h")
    moved = json.loads(cli("jobs", "move", "high", "--tenant", tenant, "--yes", "--json").stdout)
    assert (moved["done"], moved["ended"], moved["failed"]) == (2, [], [])
    listed = json.loads(cli("jobs", "--tenant", tenant, "--json").stdout)["jobs"]
    assert sorted(each["priority"] for each in listed) == ["high", "high", "normal", "normal"]
    assert cli("jobs", "run-now", "--tenant", tenant, "--yes").stdout == "made due now 2 jobs\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cancel"], "select jobs by a filter, or --all"),
        (["cancel", "--all", "--tenant", "acme", "--yes"], "exclude each other"),
        (["cancel", "--tenant", "acme"], "look with --dry-run, then add --yes"),
        (["cancel", "--state", "failed", "--yes"], "cancel is for jobs that are queued or in_flight"),
        (["move", "urgent", "--family", "agent.tasks", "--yes"], "agent.tasks has no priority 'urgent'"),
        (["ls", "--where", "doc"], "give FIELD=VALUE"),
        (["ls", "--where", "doc=1", "--where", "doc=2"], "given twice"),
        (["ls", "--state", "done"], "a state is one of"),
        (["ls", "--cursor", "x"], "a cursor is what a list before has returned"),
        (["cancel", "--tenant", "acme", "--state", "", "--yes"], "--state is empty"),
        (["cancel", "--tenant", "acme", "--until", "x", "--dry-run"], "until is what a dry run has printed"),
        (["cancel", "--tenant", "acme", "--until", "AI_DEAD.3,@1", "--dry-run"], "a dry run with another filter"),
    ],
)
def test_what_is_wrong_is_one_line(cli: Cli, arguments: list[str], said: str) -> None:
    done = cli("jobs", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


ACTS: list[tuple[list[str], str, int | None]] = [
    (["cancel", "{job}", "--tenant", "{tenant}"], "cancel", 1),
    (["reschedule", "{delayed}", "--now"], "reschedule", 1),
    (["pause", "agent.tasks", "--tenant", "{tenant}", "--reason", "why"], "pause", 1),
    (["resume", "agent.tasks", "--tenant", "{tenant}"], "resume", 1),
    (["resume", "agent.tasks", "--tenant", "{tenant}"], "resume", 0),
    (["dead", "replay", "--tenant", "{tenant}"], "dead.replay", 0),
    (["dead", "replay", "999999999"], "dead.replay", None),
    (["schedule", "add", "s", "task", "{{}}", "--tenant", "{tenant}", "--every", "1h"], "schedule.add", 1),
    (["schedule", "pause", "s", "--tenant", "{tenant}"], "schedule.pause", 1),
    (["schedule", "resume", "s", "--tenant", "{tenant}"], "schedule.resume", 1),
    (["schedule", "run", "s", "--tenant", "{tenant}"], "schedule.run", 1),
    (["schedule", "backfill", "s", "--tenant", "{tenant}", "--from", "1", "--to", "2"], "schedule.backfill", 0),
    (["schedule", "rm", "s", "--tenant", "{tenant}"], "schedule.rm", 1),
    (["jobs", "cancel", "--tenant", "{tenant}", "--yes"], "jobs.cancel", 3),
    (["jobs", "replay", "--tenant", "{tenant}", "--yes"], "jobs.replay", 0),
    (["jobs", "purge", "--tenant", "{tenant}", "--yes"], "jobs.purge", 0),
    (["jobs", "run-now", "--tenant", "{tenant}", "--yes"], "jobs.run_now", 0),
    (["jobs", "move", "low", "--tenant", "{tenant}", "--yes"], "jobs.move", 0),
    (["inbox", "send", "planner", "note", '{{"text": "a secret"}}', "--tenant", "{tenant}"], "inbox.send", 1),
    (["inbox", "send", "-", "note", "--tenant", "{tenant}"], "inbox.send", 0),
    (["documents", "put", __file__, "--tenant", "{tenant}"], "documents.put", 1),
    (["gateway", "usage", "--rebuild", "--tenant", "{tenant}"], "gateway.usage.rebuild", 1),
]


def test_every_act_of_an_operator_has_a_line_in_the_audit(cli: Cli, tenant: str) -> None:
    (job,) = store(tenant, 1)
    (delayed,) = store(tenant, 1, delay="1h")
    store(tenant, 1)
    for arguments, _, _ in ACTS:
        cli(*(each.format(job=job, delayed=delayed, tenant=tenant) for each in arguments))
    lines = json.loads(cli("audit", "--json", "--limit", "1000").stdout)
    ours = [each for each in lines if tenant in json.dumps(each) or "999999999" in json.dumps(each)]
    ours += [each for each in lines if each["target"].get("job") == delayed]
    counted = {(each["act"], each["count"]) for each in ours}
    assert counted == {(act, count) for _, act, count in ACTS}
    for each in ours:
        assert each["os_user"] == getpass.getuser()
        assert each["nats_user"] == os.environ["AIQUEUE_USER"]
        assert each["host"]
        assert each["ended_at"] is not None
    assert "a secret" not in json.dumps(lines)
    failed = next(each for each in ours if each["count"] is None)
    assert failed["error"].startswith("NotFound: there is no dead letter 999999999")
    assert next(each for each in ours if each["act"] == "pause")["target"] == {
        "family": "agent.tasks", "tenant": tenant, "reason": "why",
    }  # fmt: skip


def test_the_collection_of_documents_has_a_line_with_what_was_deleted(cli: Cli) -> None:
    assert cli("documents", "collect", "--grace", "1h").exit_code == 0
    line = json.loads(cli("audit", "--json", "--act", "documents.collect").stdout)[-1]
    assert line["target"] == {"grace": "1h"}
    assert line["count"] == 0
    assert line["details"] == {"size_bytes": 0, "uploads": 0, "holds": 0}


def test_the_audit_is_shown_for_people_and_by_act(cli: Cli, tenant: str) -> None:
    cli("pause", "agent.tasks", "--tenant", tenant)
    cli("resume", "agent.tasks", "--tenant", tenant)
    shown = cli("audit", "--act", "pause", "--newer", "1h", "--limit", "1")
    assert f"family=agent.tasks tenant={tenant}" in shown.stdout
    assert "resume" not in shown.stdout
    assert cli("audit", "--user", "nobody-of-this-name").stdout == "no acts match\n"
    assert re.search("^no acts match; there are: .*pause, .*resume", cli("audit", "--act", "pauze").stdout)
    cli("resume", "agent.tasks", "--tenant", tenant)
    assert "nothing changed" in cli("audit", "--act", "resume", "--newer", "1h", "--limit", "1").stdout


def test_an_act_that_cannot_be_written_down_is_done_and_says_so(
    account: Account, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    for name, value in (("USER", account.user), ("PASSWORD", account.password)):
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    async def prepare(client: aiqueue.Client) -> str:
        await create_streams(client)
        await client.connection.api("STREAM.DELETE.AI_AUDIT")
        return (await client.enqueue(Task(), tenant=TENANT)).id

    job = on_client(prepare)
    done = cli("cancel", job)
    assert (done.exit_code, done.stdout) == (0, f"cancelled {job}: it will not run\n")
    assert done.stderr == "this is not in the audit: stream AI_AUDIT does not exist: run `aiqueue apply`\n"
    acted = cli("jobs", "cancel", "--all", "--yes", "--json")
    assert json.loads(acted.stdout)["unaudited"].startswith("stream AI_AUDIT does not exist")
    assert cli("audit").exit_code == 1
