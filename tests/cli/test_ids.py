"""Keys, known ids and another time, on the command line."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import subjects
from aiqueue.cli.app import app
from aiqueue.errors import JobFailed

from ..support import Account, create_streams

URL = "https://example.com/a b?c=\x1bd"
SHOWN = "https://example.com/a b?c="


class Task(aiqueue.Message, kind="task"):
    fails: bool = False


@pytest.fixture
async def client(account: Account, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


Cli = Callable[..., Awaitable[Result]]


@pytest.fixture
def cli() -> Cli:
    async def run(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, list(words))

    return run


async def enqueue(cli: Cli, *options: str, body: str = "{}") -> Any:
    result = await cli("enqueue", "task", body, "--tenant", "acme", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def failing(*, fails: list[bool]) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> str:
        if fails[0]:
            raise ValueError("no")
        return "done"

    return worker


async def test_a_job_is_enqueued_shown_and_rerun_by_a_key_that_is_no_token(client: aiqueue.Client, cli: Cli) -> None:
    fails = [True]
    stored = await enqueue(cli, "--unique", URL)
    assert stored["job_id"] == subjects.foreign_id(URL)
    assert (await enqueue(cli, "--unique", URL))["duplicate"]
    shown = (await cli("inspect", URL)).stdout
    assert SHOWN in shown
    assert "\x1b" not in shown
    async with failing(fails=fails).running(client):
        with pytest.raises(JobFailed):
            await (await client.job(URL)).result(25)
        (letter,) = [each async for each in client.dead.find()]
        assert SHOWN in (await cli("dead", "show", str(letter.seq))).stdout
        assert json.loads((await cli("dead", "show", str(letter.seq), "--json")).stdout)["unique"] == URL
        assert json.loads((await cli("dead", "ls", "--job", URL, "--json")).stdout)[0]["seq"] == letter.seq
        fails[0] = False
        again = await enqueue(cli, "--unique", URL, "--on-duplicate", "rerun_failed", "--wait")
        assert (again["duplicate"], again["result"]) == (False, "done")
    assert json.loads((await cli("dead", "ls", "--json")).stdout) == []
    found = json.loads((await cli("inspect", "--job", URL, "--json")).stdout)
    assert (found["unique"], found["state"]) == (URL, "done")


async def test_raise_ends_with_one_line_and_another_word_with_a_usage_error(client: aiqueue.Client, cli: Cli) -> None:
    await enqueue(cli, "--unique", "k")
    words = ("enqueue", "task", "{}", "--tenant", "acme", "--unique", "k", "--on-duplicate")
    result = await cli(*words, "raise")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: job k is already in agent.tasks acme/normal: nothing was stored" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (await cli(*words, "sometimes")).exit_code == 2
    result = await cli("enqueue", "task", "{}", "--tenant", "acme", "--on-duplicate", "rerun")
    assert (result.exit_code, "needs an id" in result.stderr) == (2, True)


async def test_reschedule_gives_a_parked_job_another_time(client: aiqueue.Client, cli: Cli) -> None:
    await enqueue(cli, "--unique", "k", "--delay", "1h")
    for words, seconds in ((("--delay", "2h"), 7_200), (("--at", str(time.time() + 600)), 600), (("--now",), 0)):
        result = await cli("reschedule", "k", *words, "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert (told["job_id"], told["due"]) == ("k", pytest.approx(time.time() + seconds, abs=10))
    replaced = await enqueue(cli, "--unique", "r", "--delay", "1h")
    assert "r is due at" in (await cli("reschedule", "r", "--delay", "3h")).stdout
    again = await enqueue(cli, "--unique", "r", "--delay", "1m", "--on-duplicate", "replace")
    assert (again["duplicate"], again["job_id"]) == (False, replaced["job_id"])
    assert "r is due now" in (await cli("reschedule", "r", "--now")).stdout
    await client.pause("agent.tasks", tenant="acme", by="anna")
    result = await cli("reschedule", "r", "--now")
    assert result.stderr == (
        "agent.tasks, tenant acme is paused by anna: it starts after `aiqueue resume agent.tasks --tenant acme`\n"
    )


async def test_reschedule_says_why_it_cannot(client: aiqueue.Client, cli: Cli) -> None:
    await enqueue(cli, "--unique", "k")
    result = await cli("reschedule", "k", "--now")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: job k is not parked (queued), so it cannot be rescheduled\n"
    for words in ((), ("--now", "--delay", "1m")):
        result = await cli("reschedule", "k", *words)
        assert (result.exit_code, "one of --delay, --at and --now" in result.stderr) == (2, True)
    assert (await cli("reschedule", "nobody", "--now")).exit_code == 1


async def test_mail_with_a_key_shows_it(client: aiqueue.Client, cli: Cli) -> None:
    result = await cli("inbox", "send", "planner", "task", "{}", "--tenant", "acme", "--unique", URL)
    assert result.exit_code == 0, result.output
    assert SHOWN in (await cli("inbox", "read", "planner", "--tenant", "acme")).stdout
