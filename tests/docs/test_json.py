"""What commands print with --json has the keys that are declared for it, and each of these has a sentence.

Every run of a command in a test's own process is compared, see `compared` in tests/conftest.py. Here are runs of those
that no other test runs so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.cli.json_keys import OUTPUTS, Common, Output
from aiqueue.errors import JobFailed
from aiqueue.schedules import DeclaredSet, DeclaredSets
from tools.docs import json_keys
from tools.docs.json_text import command_of, problems_of
from tools.docs.pages import commands
from tools.docs.sentences import attribute_sentences

from ..support import ROOT, Account

COMMON = attribute_sentences(Common)
# Commands that need more than streams, and the tests that run them with --json.
ELSEWHERE = {
    "demo": "tests/cli/test_demo.py",
    "gateway demo": "tests/gateway/test_demo.py",
    "gateway batch": "tests/gateway/batches/test_command.py",
    "gateway batches": "tests/gateway/batches/test_command.py",
    "gateway keys add": "tests/gateway/test_keys_command.py",
    "gateway keys ls": "tests/gateway/test_keys_command.py",
    "gateway keys revoke": "tests/gateway/test_keys_command.py",
    "rag ask": "tests/cli/test_rag.py",
    "rag eval": "tests/cli/test_rag.py",
    "rag ingest": "tests/cli/test_rag.py",
    "rag ls": "tests/cli/test_rag.py",
    "rag reindex": "tests/cli/test_rag.py",
    "rag rm": "tests/cli/test_rag.py",
    "rag stats": "tests/cli/test_rag.py",
    "rag status": "tests/cli/test_rag.py",
    "rag watch": "tests/cli/test_rag.py",
}
STREAM_FILE = (
    '[family]\nname = "llm.calls"\ndefault_kind = "llm.call"\nlimit_key = "model"\n[stream]\nname = "LLM_CALLS"\n'
)
ACME = ("--tenant", "acme")


def test_every_key_has_a_sentence_of_its_own() -> None:
    assert json_keys.gaps(OUTPUTS, COMMON) == []


def test_every_command_with_json_has_a_declared_output() -> None:
    assert sorted(OUTPUTS) == sorted(" ".join(each.words) for each in commands() if each.has_json)


@dataclass
class _Row:
    """A row. `named`: what is said of the row."""

    named: str
    bare: int
    job_id: str


class _Printed(TypedDict):
    rows: list[_Row]
    """The rows of the output."""
    total: NotRequired[float]


def test_a_key_without_a_sentence_is_found_in_objects_of_objects_too() -> None:
    assert json_keys.gaps({"show": (Output(_Printed),)}, {}) == [
        "show: rows[].bare",
        "show: rows[].job_id",
        "show: total",
    ]
    assert json_keys.gaps({"show": (Output(_Printed),)}, COMMON) == ["show: rows[].bare", "show: total"]


def test_keys_that_are_missing_or_not_declared_and_values_of_another_type_are_found() -> None:
    row = {"named": "a", "bare": 1, "job_id": "j"}
    assert json_keys.differences({"rows": [row], "total": 1}, _Printed) == []
    assert json_keys.differences({"rows": [row | {"more": 1}]}, _Printed) == [".rows[0].more: not declared"]
    assert json_keys.differences({"rows": [{**row, "bare": None}]}, _Printed) == [".rows[0].bare: no whole number"]
    assert json_keys.differences({"total": 2}, _Printed) == [".rows: missing"]
    assert json_keys.differences([], _Printed | None) == [": list, not an object"]


def test_an_output_is_compared_with_the_forms_of_its_command() -> None:
    outputs = {"show": (Output(list[_Row]), Output(_Printed)), "follow": (Output(_Printed, lines=True),)}
    assert command_of(["show", "x", "--json"], outputs) == "show"
    assert command_of(["show", "x"], outputs) is None
    assert problems_of(["show", "--json"], '{"rows": []}', outputs) == []
    assert problems_of(["show", "--json"], "[]", outputs) == []
    assert problems_of(["show", "--json"], '{"rows": [], "n": 1}', outputs) == ["show.n: not declared"]
    assert problems_of(["follow", "--json"], 'note\n{"rows": []}\n{}\n', outputs) == ["follow.rows: missing"]


class Task(aiqueue.Message, kind="agent.task"):
    n: int = 0


class Call(aiqueue.Message, kind="llm.call", family="llm.calls"):
    model: str = "gpt-4o"


async def _run_jobs(settings: aiqueue.Settings) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> dict[str, int]:
        await job.progress(0.5, "half")
        if job.message.n > 1:
            raise ValueError("odd")
        return {"n": job.message.n}

    async with aiqueue.Client(settings) as client, worker.running(client):
        for n, unique in enumerate(("zero", "one", "two", "three", "four")):
            handle = await client.enqueue(Task(n=n), tenant="acme", unique=unique)
            with contextlib.suppress(JobFailed):
                await handle.result(30)
        await client.enqueue(Call(), tenant="acme")
        await client.enqueue(Task(), tenant="globex")


Run = Callable[..., Any]


@pytest.fixture
def run(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "llm_calls.toml").write_text(STREAM_FILE)
    values = {"URL": account.url, "USER": account.user, "PASSWORD": account.password, "STREAMS": str(tmp_path)}
    for name, value in values.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*words, "--json"])
        assert done.exit_code == code, (words, done.output)
        command = command_of([*words, "--json"], OUTPUTS)
        assert command is not None
        ran.add(command)
        is_lines = all(each.lines for each in OUTPUTS[command])
        return [json.loads(line) for line in done.stdout.splitlines()] if is_lines else json.loads(done.stdout)

    ran: set[str] = set()
    invoke.ran = ran  # type: ignore[attr-defined]
    return invoke


def test_every_command_prints_the_keys_that_are_declared(run: Run, tmp_path: Path) -> None:
    run("plan", code=3)
    run("apply")
    run("plan")
    asyncio.run(_run_jobs(aiqueue.Settings()))
    _look_at_jobs(run)
    _act_on_jobs(run)
    _operate(run, tmp_path)
    _schedule(run)
    assert run.ran.isdisjoint(ELSEWHERE)  # type: ignore[attr-defined]
    assert run.ran | ELSEWHERE.keys() == OUTPUTS.keys()  # type: ignore[attr-defined]


def _look_at_jobs(run: Run) -> None:
    run("inspect")
    run("inspect", "agent.tasks")
    for job in ("one", "two"):
        run("inspect", job, *ACME)
        run("explain", job, *ACME)
        run("tail", job, *ACME, code=0 if job == "one" else 1)
    run("jobs", "ls")
    run("jobs", "outcomes")
    run("history")
    letters = run("dead", "ls")
    run("dead", "show", str(letters[0]["seq"]))
    run("dead", "replay", str(letters[0]["seq"]))
    run("dead", "purge", str(letters[1]["seq"]), "--yes")


def _act_on_jobs(run: Run) -> None:
    run("enqueue", "agent.task", "{}", *ACME, "--unique", "later", "--delay", "1h")
    run("enqueue", "agent.task", "{}", *ACME, "--wait", "--timeout", "0.1", code=1)
    run("reschedule", "later", *ACME, "--delay", "2h")
    run("jobs", "move", "low", "--all", "--yes")
    run("jobs", "run-now", "--all", "--dry-run")
    run("jobs", "run-now", "--all", "--yes")
    run("jobs", "replay", "--all", "--yes")
    run("jobs", "purge", "--all", "--yes")
    run("enqueue", "agent.task", "{}", *ACME, "--unique", "cancelled")
    run("cancel", "cancelled", *ACME)
    run("jobs", "cancel", "--all", "--yes")


def _operate(run: Run, tmp_path: Path) -> None:
    run("limits", "set", "llm.calls", "gpt-*", "--requests", "5", "--for", "1h")
    run("limits", "ls")
    run("limits", "unset", "llm.calls", "gpt-*")
    run("pause", "agent.tasks", *ACME, "--for", "1h", "--reason", "books")
    run("pause")
    run("resume", "agent.tasks", *ACME)
    run("workers")
    run("audit")
    run("doctor", code=run_code("doctor"))
    (tmp_path / "a.txt").write_text("some text")
    run("documents", "put", "a.txt", *ACME)
    run("documents", "ls")
    run("documents", "collect")
    run("gateway", "usage")
    assert CliRunner().invoke(app, ["inbox", "create", "planner", *ACME]).exit_code == 0
    run("inbox", "send", "planner", "agent.note", '{"text": "hello"}', *ACME)
    run("inbox", "ls")
    run("inbox", "read", "planner", *ACME)
    report = {"state": "ok", "time": 2e10, "pid": 1, "worker": "w", "slots": 1, "running": 0, "done": 3, "lanes": 2}
    (tmp_path / "health").write_text(json.dumps(report))
    run("health", "health")


def run_code(command: str) -> int:
    """The exit code of a command that depends on the server, such as its storage."""
    return CliRunner().invoke(app, [command]).exit_code


def _schedule(run: Run) -> None:
    run("schedule", "add", "tick", "agent.task", "{}", *ACME, "--every", "1h")
    run("schedule", "ls")
    run("schedule", "show", "tick", *ACME)
    run("schedule", "next", "tick", *ACME)
    run("schedule", "run", "tick", *ACME)
    run("schedule", "pause", "tick", *ACME, "--reason", "books")
    run("schedule", "resume", "tick", *ACME)
    run("schedule", "backfill", "tick", *ACME, "--from", "2026-01-01T00:00Z", "--to", "2026-01-01T02:30Z")
    run("schedule", "rm", "tick", *ACME)
    run("schedule", "add", "declared", "agent.task", "{}", *ACME, "--every", "1h")
    asyncio.run(_declare_no_more())
    run("schedule", "prune", "--owner", "billing")


async def _declare_no_more() -> None:
    now = time.time()
    async with aiqueue.Client(aiqueue.Settings()) as client:
        store = client.schedules.engine.store
        await store.put(replace(await client.schedules.engine.get("acme", "declared"), owner="billing"))
        await DeclaredSets(store).refresh("billing", DeclaredSet("new", 0, now - 60, now, frozenset()))


def test_each_command_that_is_tested_elsewhere_is_run_with_json_there() -> None:
    for command, file in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        assert f'"{command.split()[-1]}"' in text, command
        assert "--json" in text, command
