"""The audit, whatever others have stored in its stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.client.auditing import AuditLine

from ..support import Account

LINE: dict[str, Any] = {
    "id": "1", "act": "cancel", "phase": "ended", "target": {"job": "7"}, "nats_user": "n", "os_user": "anna",
    "host": "h", "count": 1, "details": {}, "error": "",
}  # fmt: skip
STRANGE: list[dict[str, Any]] = [
    {"count": "many"}, {"count": [1]}, {"count": {"a": 1}}, {"count": float("inf")}, {"count": 10**400},
    {"count": True}, {"details": {"a": {"b": "\x1b[2J"}}}, {"details": [["a", "b"]]}, {"target": {"\x1b[2J": "\u202e"}},
    {"target": json.loads("[" * 900 + "]" * 900)}, {"act": "\x1b[2J"}, {"host": {"a": "\x1b[2J"}}, {"error": ["\x1b"]},
    {"error": "x" * 100_000}, {"nats_user": None}, {"id": None}, {"phase": ["ended"]}, {"error": "\ud800"},
    {"target": {"deep": json.loads('{"a":' * 200 + "1" + "}" * 200)}},
]  # fmt: skip


@pytest.fixture
def families() -> Collection[str]:
    return ("agent.tasks",)


async def publish(client: aiqueue.Client, *lines: bytes) -> None:
    for each in lines:
        await client.connection.store("ai.audit.cancel", each, {})


async def find(client: aiqueue.Client, **which: Any) -> list[AuditLine]:
    return [each async for each in client.audit.find(**which)]


async def test_no_line_of_a_stranger_hides_those_of_others(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = [json.dumps({**LINE, "id": f"s{n}"} | each).encode() for n, each in enumerate(STRANGE)]
    await publish(client, b"", b"\xff", b"null", b"[]", b"{}", b"[" * 100_000, *strange)
    async with client.audit.act("pause", {"family": "agent.tasks"}, by="anna"):
        pass
    lines = await find(client)
    assert lines[-1].act == "pause"
    assert all(each.count is None or type(each.count) is int for each in lines)
    assert len(json.dumps([asdict(each) for each in lines])) < 50_000
    for name, value in (("URL", account.url), ("USER", account.user), ("PASSWORD", account.password)):
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    for arguments in ([], ["--json"]):
        shown = await aiqueue_in_thread("audit", *arguments)
        assert "pause" in shown
        assert not {"\x1b", "\u202e"} & set(shown)


async def aiqueue_in_thread(*arguments: str) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_a_later_message_of_the_same_id_replaces_nothing(client: aiqueue.Client) -> None:
    async with client.audit.act("cancel", {"job": "7"}, by="anna") as act:
        act.count = 1
    (line,) = await find(client)
    forged = {**LINE, "id": line.id, "os_user": "bob", "target": {"job": "8"}, "count": 99, "error": "forged"}
    await publish(client, json.dumps(forged).encode(), json.dumps({**forged, "phase": "begun"}).encode())
    assert await find(client) == [line]


async def test_lines_are_found_by_an_act_as_its_command_is_written(client: aiqueue.Client) -> None:
    for act in ("jobs.run_now", "jobs.move", "dead.purge"):
        async with client.audit.act(act, {}):
            pass
    assert [each.act for each in await find(client, act="jobs.run-now")] == ["jobs.run_now"]
    assert [each.act for each in await find(client, act="jobs.run_now")] == ["jobs.run_now"]
    assert [each.act for each in await find(client, act="jobs")] == ["jobs.run_now", "jobs.move"]
    assert await find(client, act="job") == []


async def test_a_line_says_how_many_of_many_items_it_leaves_out(client: aiqueue.Client) -> None:
    for seqs in ([*range(50)], [*range(173)]):
        async with client.audit.act("dead.replay", {"seqs": seqs, "error": "x" * 501, "of": dict.fromkeys(seqs, 1)}):
            pass
    whole, cut = [each.target for each in await find(client)]
    assert (whole["seqs"], len(whole["of"])) == ([*range(50)], 50)
    assert cut["seqs"] == [*range(49), "… and 124 more"]
    assert cut["of"]["…"] == "and 124 more"
    assert cut["error"] == "x" * 499 + "…"


class Login(aiqueue.Message, kind="login"):
    user: str
    password: str


async def test_a_value_that_matches_nothing_may_be_a_secret_and_is_not_written_down(client: aiqueue.Client) -> None:
    await client.enqueue(Login(user="anna", password="x"), tenant="acme")
    for where in ({"user": "anna"}, {"password": "hunter2", "user": "anna"}):
        plan = await client.jobs.plan("cancel", where=where)
        await client.jobs.act(plan, by="anna")
    first, second = [each.target for each in await find(client)]
    assert first["where user"] == "anna"
    assert {name: value for name, value in second.items() if name.startswith("where")} == {
        "where password": "**********", "where user": "**********",
    }  # fmt: skip
