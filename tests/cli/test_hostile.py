"""Hostile payloads and names in every view: nothing reaches a terminal raw, no secret is shown, no line has no end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import unicodedata
from typing import Any

import nats
import pydantic
import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.errors import JobFailed

from ..support import Account

SECRET = "hunter2-swordfish"
TENANT = "hostile"
MEGABYTE = "A" * 1_000_000
HOSTILE = [
    "\x1b[2J\x1b[H cleared", "\x1b]0;title\x07", "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1bPq#0;2;0;0;0\x1b\\", "\x9b31m red", "\x9d0;title\x9c", "\x90payload\x9c", "overwritten\rcovered",
    "erased\x08\x08\x08", "null\x00byte", "rubout\x7f", "bell\x07", "form\x0cfeed\x0b", "next\x85line",
    "line\u2028separator\u2029", "\u202egnp.exe", "\u202aembedded\u202c", "\u202boverride\u202d",
    "\u2066isolated\u2069", "\u2067\u2068", "\u200emark\u200f", "\u061carabic", "two\nlines\n\nerror: all is lost",
    "tab\tbed", "[red]markup[/red] [link=https://evil.example]x[/link]", "%s %n {0} {name} $(id) `id`",
    "e" + "\u0301" * 400, "\U0001f9d1\u200d\U0001f4bb wide \uff21\uff22", MEGABYTE, "\x1b[6n\x1b[?1049h" * 50,
]  # fmt: skip
_BIDI = {chr(each) for each in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))}


class Task(aiqueue.Message, kind="task"):
    text: str = ""
    fields: dict[str, Any] = pydantic.Field({})
    key: pydantic.SecretStr = pydantic.SecretStr(SECRET)


class Note(aiqueue.Message, kind="note", family="agent.message"):
    text: str = ""
    key: pydantic.SecretStr = pydantic.SecretStr(SECRET)


def test_there_are_thirty_of_them() -> None:
    assert len(set(HOSTILE)) == 30


async def _run_jobs(client: aiqueue.Client) -> None:
    """Have jobs succeed, fail and report with hostile texts."""
    worker = aiqueue.Worker(concurrency=8, tenants=["ran"])

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> dict[str, Any]:
        await job.progress(0.5, job.message.text[:500])
        await job.chunk(job.message.text[:500])
        if job.message.fields:
            raise ValueError(f"{job.message.text} {job.message.key.get_secret_value()}")
        return {job.message.text[:300]: [job.message.text], "key": job.message.key}

    handles = []
    for number, text in enumerate(HOSTILE):
        for name, fields in (("ok", {}), ("bad", {"x": 1})):
            message = Task(text=text, fields=fields)
            handles.append(await client.enqueue(message, tenant="ran", unique=f"{name}-{number}"))
    async with worker.running(client):
        for handle in handles:
            with contextlib.suppress(JobFailed):
                await handle.result(60)


async def _store(account: Account) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        plain = await nats.connect(account.url, user=account.user, password=account.password)
        await _run_jobs(client)
        for number, text in enumerate(HOSTILE):
            fields = {text[:2_000]: {"deep": [text]}}
            await client.enqueue(Task(text=text, fields=fields), tenant=TENANT, unique=f"{text[:500]} {number}")
            await client.enqueue(Task(text=text), tenant=TENANT, unique=f"later-{number}", delay="1h")
            body = {"schema_version": text[:40], "message_type": text[:200], "data": {"task_id": text, "text": text}}
            body = body if text != MEGABYTE else {**body, "data": {"text": text[:900_000]}}
            await plain.jetstream().publish(f"ai.agent.tasks.{TENANT}", json.dumps(body).encode())
            short = text[:200]
            if number < 5:
                await client.pause("agent.tasks", tenant=f"paused-{number}", reason=short, by=short)
            with contextlib.suppress(ValueError):
                async with client.audit.act("cancel", {"job": short, short: [short]}, by=short) as line:
                    line.details[short] = short
                    raise ValueError(short)
            await client.documents.put(b"x%d" % number, tenant=TENANT, name=f"{short}.txt")
            await client.inboxes.send(Note(text=text[:100_000]), tenant=TENANT, to="reader", sender="writer")
        await client.inboxes.create("reader", tenant=TENANT, description=HOSTILE[0])
        await client.schedules.add("tick", aiqueue.Every("1h"), Task(text=HOSTILE[0] * 20), tenant=TENANT)
        await client.schedules.pause("tick", tenant=TENANT, reason=HOSTILE[0], by=HOSTILE[15])
        await plain.close()


@pytest.fixture(scope="module")
def stored(shared: Account) -> Account:
    asyncio.run(_store(shared))
    return shared


VIEWS: dict[str, list[str]] = {
    "jobs": ["jobs", "ls", "--limit", "1000"],
    "jobs without messages": ["jobs", "ls", "--limit", "1000", "--no-payload"],
    "dead letters in jobs": ["jobs", "ls", "--state", "failed"],
    "outcomes": ["jobs", "outcomes", "--limit", "1000"],
    "outcomes without results": ["jobs", "outcomes", "--limit", "1000", "--no-result"],
    "metrics": ["metrics", "--once", "--tenants"],
    "top": ["top"],
    "top of a family": ["top", "agent.tasks"],
    **{f"top: {view}": ["top", "--view", view] for view in ("jobs", "dead", "workers", "kinds", "pauses")},
    "history": ["history"],
    "history of kinds": ["history", "agent.tasks"],
    "history of tenants": ["history", "agent.tasks", "--tenants"],
    "a dry run": ["jobs", "cancel", "--all", "--dry-run"],
    "families": ["inspect"],
    "lanes": ["inspect", "agent.tasks"],
    "dead letters": ["dead", "ls"],
    "audit": ["audit", "--limit", "1000"],
    "workers": ["workers"],
    "pauses": ["pause"],
    "limits": ["limits", "ls"],
    "batches": ["gateway", "batches"],
    "schedules": ["schedule", "ls"],
    "a schedule": ["schedule", "show", "tick", "--tenant", TENANT],
    "documents": ["documents", "ls", "--tenant", TENANT],
    "inboxes": ["inbox", "ls"],
    "mail": ["inbox", "read", "reader", "--tenant", TENANT, "--limit", "100"],
    **{f"job ok-{number}": ["inspect", f"ok-{number}", "--tenant", "ran"] for number in range(len(HOSTILE))},
    **{f"job bad-{number}": ["inspect", f"bad-{number}", "--tenant", "ran"] for number in range(0, 30, 5)},
    **{f"job later-{number}": ["inspect", f"later-{number}", "--tenant", TENANT] for number in range(0, 30, 5)},
    **{f"why later-{number}": ["explain", f"later-{number}", "--tenant", TENANT] for number in range(0, 30, 5)},
    **{f"dead letter {seq}": ["dead", "show", f"{seq}"] for seq in range(1, 31, 3)},
    **{f"output ok-{number}": ["tail", f"ok-{number}", "--tenant", "ran"] for number in range(0, 30, 5)},
}
ENDLESS = 300_000  # characters of a view; one job's result is cut later, at 20,000 characters of a line
TEXT_ONLY = ("metrics", "top")  # views without --json
WHOLE = ("job ok-", "dead letter ", "output ", "mail")  # views that show one payload whole


@pytest.fixture
def run(stored: Account, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in (("URL", stored.url), ("USER", stored.user), ("PASSWORD", stored.password)):
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    def invoke(arguments: list[str], **environment: str) -> str:
        done = CliRunner().invoke(app, arguments, env=environment)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code in (0, 1), done.output
        return done.stdout + done.stderr

    return invoke


def raw(text: str) -> set[str]:
    """The characters that a terminal would act on."""
    return {each for each in text if each in _BIDI or (unicodedata.category(each) == "Cc" and each not in "\n\t")}


@pytest.mark.parametrize("form", ["wide", "narrow", "json"])
@pytest.mark.parametrize("view", VIEWS)
def test_no_view_shows_a_control_character_or_a_secret(run: Any, view: str, form: str) -> None:
    if VIEWS[view][0] in TEXT_ONLY and form == "json":
        pytest.skip("it has no JSON")
    arguments = [*VIEWS[view], *(["--json"] if form == "json" else [])]
    text = run(arguments, COLUMNS="80" if form == "narrow" else "")
    assert raw(text) == set()
    assert SECRET not in text
    assert text.strip()
    if form == "json" and view.split(maxsplit=1)[0] != "output":
        json.loads(text[: text.rindex("}" if text.lstrip().startswith("{") else "]") + 1])
    if not view.startswith(WHOLE):
        assert len(text) < ENDLESS


def test_the_views_do_show_what_is_hostile_escaped(run: Any) -> None:
    for view in ("jobs", "dead letters", "audit", "pauses", "a schedule", "documents", "job ok-0", "output ok-0"):
        assert "\\x1b" in run(VIEWS[view]) or "\\u001b" in run(VIEWS[view]), view


def test_all_that_is_hostile_is_stored(run: Any) -> None:
    found = json.loads(run([*VIEWS["jobs"], "--json"]))["jobs"]
    assert sum(each["tenant"] == TENANT for each in found) == 90
    assert len(json.loads(run([*VIEWS["dead letters"], "--json"]))) == 30
    assert len(json.loads(run([*VIEWS["mail"], "--json"]))) == 30
